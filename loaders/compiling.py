"""torch.compile for a loaded quantized UNet, block by block.

Blocks of one kind share their code: what was compiled for one serves the others of its size, and a
patch or ControlNet outside of blocks changes nothing. Shapes are dynamic, so that another resolution
or batch compiles at most once more. Stock ComfyUI's TorchCompileModel compiles the whole UNet.
"""

from __future__ import annotations

import logging
import time

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

from .fused import FusedResBlock, FusedTransformerBlock

log = logging.getLogger(__name__)
KEY = "modelopt_compile"
# of one block's code: widths (3), depths, kinds of input, and room for what users put on
RECOMPILES = 64


def compile_blocks(model, backend="inductor") -> int:
    """Compiles every ResBlock and transformer block of a MODEL at its first call; how many there are.

    The modules are the MODEL's own, so its clones are compiled too. The time of the first call at
    each size is logged. backend: of torch.compile.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    runners = {
        kind: torch.compile(kind.run, backend=backend, dynamic=True)
        for kind in (FusedResBlock, FusedTransformerBlock)
    }
    count = 0
    for module in model.model.diffusion_model.modules():
        if type(module) in runners:
            module.runner = runners[type(module)]
        elif isinstance(module, (ResBlock, BasicTransformerBlock)):
            module.compile(backend=backend, dynamic=True)
        else:
            continue
        count += 1
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    model.add_wrapper_with_key(kind, KEY, _Timer())
    return count


class _Timer:
    """Tells in the log how long the first call at a size took, which is when blocks compile."""

    def __init__(self):
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, executor, x, *args, **kwargs):
        size = tuple(x.shape)
        if size in self.seen:
            return executor(x, *args, **kwargs)
        started = time.monotonic()
        out = executor(x, *args, **kwargs)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seen.add(size)
        took = time.monotonic() - started
        log.info("ModelOpt: the first compiled UNet call at %s took %.1f s", list(size), took)
        return out
