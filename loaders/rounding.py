"""ModelOpt's fake quantization along the last axis, of a tensor that is no quantized layer's weight.

For the inputs of modules kept in floating point, and for weights whose blocks no format stores.
"""

from __future__ import annotations

import torch

from ..formats import blocks, mxfp8, nvfp4
from ..formats.checkpoint import Input
from ..kernels import fp8, int8

KERNELS = {"int8": int8, "fp8": fp8}


def rounded(x: torch.Tensor, how: Input | None) -> torch.Tensor:
    """[..., K] float -> the same in x's dtype, rounded as `how` says. A shorter block may end a row."""
    if how is None:
        return x
    given = None if how.amax is None else torch.tensor(how.amax, device=x.device)
    if how.format in KERNELS:
        amax = x.float().abs().amax(dim=-1, keepdim=True) if given is None else given
        return KERNELS[how.format].fake_quantize(x, amax).to(x.dtype)
    module = {"nvfp4": nvfp4, "mxfp8": mxfp8}[how.format]
    flat = blocks.padded(x.float().reshape(-1, x.shape[-1]), 1, module.BLOCK)
    amax = module.weight_amax(flat) if given is None else given
    made = module.fake_quantize(flat, amax)[:, : x.shape[-1]]
    return made.reshape(x.shape).to(x.dtype)
