"""Run as a script, without Triton's interpreter: what torch.compile makes of a quantized UNet for a GPU.

The UNet lies on a CUDA device as fake tensors, torch and Triton are told of an H100 that never runs
anything, and our kernels are chosen. Answers JSON: {"graphs": after each call, "launches": of ours in
all graphs, "written": arguments that torch.compile believes kernels write to}.
Arguments: a format, and "whole" or "blocks".
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CALLS = ((2, 32, 32, 77), (2, 48, 40, 154), (4, 64, 64, 231))  # N, H, W, tokens


def load_everything() -> None:
    sys.path[0] = os.environ.get("COMFYUI_PATH") or str(ROOT / ".comfyui" / "ComfyUI")
    from comfy.cli_args import args

    args.cpu = True
    spec = importlib.util.spec_from_file_location(
        "comfyui_modelopt", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_modelopt"] = module
    spec.loader.exec_module(module)


class H100:
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


def checkpoint(form: str):
    """A small SD1.5 UNet in a format, with static scales of a made-up calibration."""
    import comfy.sd
    import torch
    from comfyui_modelopt.devtools import synthetic
    from comfyui_modelopt.formats import FORMATS
    from comfyui_modelopt.formats.checkpoint import Layer, QuantizedCheckpoint
    from comfyui_modelopt.quantize.layers import DEFAULT_SKIP, LINEAR_AND_CONV, select

    numerics = FORMATS[form]
    tensors = dict(synthetic.unet_state_dict("sd15"))
    unet = comfy.sd.load_diffusion_model_state_dict(dict(tensors)).model.diffusion_model
    layers, amaxes = {}, {}  # queries, keys and values see one input, each block another
    for name, kind in select(unet, LINEAR_AND_CONV, DEFAULT_SKIP).items():
        weight = tensors.pop(f"{name}.weight")
        stored = numerics.quantize(weight, numerics.weight_amax(weight))
        layers[name] = Layer(form, kind)
        if layers[name].static:
            amax = amaxes.setdefault(name.rpartition(".")[0], 4.0 + len(amaxes) / 8)
            layers[name] = Layer(form, kind, input_amax=amax)
            stored["input_scale"] = numerics.input_scale(torch.tensor(amax))
        tensors |= {f"{name}.{key}": t for key, t in stored.items()}
    return QuantizedCheckpoint(tensors, layers, {})


def to_fake_gpu(unet) -> None:
    """Every tensor of the UNet becomes a fake one on a CUDA device, in 16 bits where it was in 32."""
    import torch
    from comfy_kitchen.tensor import QuantizedTensor

    def there(t, dtype=None):
        return torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype, device="cuda")

    def quantized(t):
        params = t._params
        own = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
        moved = {k: there(v) for k, v in own.items() if isinstance(v, torch.Tensor)}
        params = dataclasses.replace(params, orig_dtype=torch.float16, **moved)
        return QuantizedTensor(there(t._qdata), t._layout_cls, params)

    for module in unet.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            keeps = p.dtype != torch.float32 or name == "input_scale"
            is_ours = isinstance(p, QuantizedTensor)
            new = quantized(p) if is_ours else there(p, None if keeps else torch.float16)
            module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
    unet.dtype = torch.float16


def main(form: str, way: str) -> None:
    load_everything()
    import torch
    import torch.utils._triton
    import triton
    from comfy.ldm.modules import attention
    from comfyui_modelopt.kernels import backends, tiles
    from comfyui_modelopt.loaders import compiling
    from comfyui_modelopt.loaders import unet as loader
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.utils._triton.has_triton = lambda *ignored: True
    triton.runtime.driver.set_active(H100())
    tiles.chip = lambda device: tiles.Chip((9, 0), 132, 227 * 1024)
    # --use-pytorch-cross-attention, which is ComfyUI's default on NVIDIA GPUs
    attention.optimized_attention = attention.attention_pytorch
    # what is not compiled calls operators: launching a kernel would take a GPU
    ours = backends.triton() if way == "whole" else backends.triton().compiled
    model = loader.load(checkpoint(form), backend=ours)
    unet, graphs, counts = model.model.diffusion_model, [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        to_fake_gpu(unet)
        call = unet
        if way == "whole":
            call = torch.compile(unet, backend=backend, fullgraph=True, dynamic=True)
        else:
            compiling.compile_blocks(model, backend)
        for n, height, width, tokens in CALLS:
            half = {"device": "cuda", "dtype": torch.float16}
            x = torch.empty(n, 4, height, width, **half)
            context = torch.empty(n, tokens, 768, **half)
            call(x, torch.empty(n, device="cuda"), context=context, transformer_options={})
            counts.append(len(graphs))
    launches = [
        node
        for graph in graphs
        for node in graph.graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    written = sorted({name for node in launches for name in node.kwargs["tensors_to_clone"]})
    answer = {"graphs": counts, "launches": len(launches), "written": written}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
