"""A LoRA on an 8-bit weight: kept as a low-rank branch, so that nothing of it is rounded away.

The steps of an 8-bit weight are often wider than a LoRA's change to it; requantizing the patched
weight then loses the change or replaces it by noise. ComfyUI hands the patched weight over in
full, so its difference to the quantized weight is factored again (randomized range finder, Halko,
Martinsson and Tropp 2011, algorithm 4.4); a difference that is not low-rank is requantized.
"""

from __future__ import annotations

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .layouts import with_branch, without_branch

RANKS = (16, 64, 256)
OVERSAMPLING = 8
# a branch is good enough when it misses less than this share of the difference (or of what
# rounding the patched weight to its own dtype already lost)
RESIDUAL = 1e-3


def factor(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """float32 [out, K] -> up [out, r], down [r, K] and the Frobenius norm of what they miss."""
    width = min(rank + OVERSAMPLING, *delta.shape)
    generator = torch.Generator(device=delta.device).manual_seed(0)
    probe = torch.randn(delta.shape[1], width, generator=generator, device=delta.device)
    basis = torch.linalg.qr(delta @ probe).Q
    basis = torch.linalg.qr(delta @ (delta.t() @ basis)).Q
    core = basis.t() @ delta
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, int((values > values[0] * 1e-7).sum()))
    up = basis @ (left[:, :kept] * values[:kept])
    down = right[:kept]
    return up, down, (delta - up @ down).norm().item()


def patched(base: QuantizedTensor, weight: torch.Tensor, seed: int | None) -> QuantizedTensor:
    """Quantized `base` and the weight a patch made of it (same shape, original basis) -> quantized.

    A weight the patch left unchanged gives `base` itself, bit for bit.
    """
    base = without_branch(base).to(device=weight.device)
    delta = weight.float() - base.to(dtype=weight.dtype).dequantize().float()
    delta = delta.reshape(weight.shape[0], -1)
    size = delta.norm().item()
    if size == 0.0:
        return base
    rounding = torch.finfo(weight.dtype).eps * weight.float().norm().item()
    for rank in RANKS:
        if rank * sum(delta.shape) * 2 > delta.numel():
            break  # the branch would be larger than half the 8-bit weight itself
        up, down, missed = factor(delta, rank)
        if missed <= max(RESIDUAL * size, rounding):
            dtype = base._params.orig_dtype
            return with_branch(base, up.to(dtype), down.to(dtype))
    return base.requantize_from_float(weight, scale="recalculate", stochastic_rounding=seed or 0)
