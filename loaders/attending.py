"""Attention of fused blocks: ComfyUI's, or PyTorch's in another order of its own backends where that was
measured to be faster."""

from __future__ import annotations

import torch
from comfy.ldm.modules import attention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import tiles

# ComfyUI asks for FLASH_ATTENTION first. On an H200 CUDNN_ATTENTION took 10 to 46 % less time for nine of
# the ten attentions of SDXL and SD1.5 from 256 queries on, 6 % more for one, and 29 % more for self-attention
# of 64 pixels (benchmarks/results/tma_nvidia-h200.md)
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
FASTER = (9,)  # the first number of the compute capability
LEAST = 256  # queries
CUDNN = 91900  # the oldest version that was tried


def by_cudnn(q: Tensor, options: dict) -> bool:
    """Whether cuDNN computes attention that ComfyUI would leave to PyTorch."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and attention.optimized_attention is attention.attention_pytorch
        and "optimized_attention_override" not in options
        and q.shape[1] >= LEAST
        and len(q) <= attention.SDP_BATCH_LIMIT
        and not torch.compiler.is_compiling()
        and tiles.chip(q.device).capability[0] in FASTER
        and torch.backends.cuda.cudnn_sdp_enabled()
        and (torch.backends.cudnn.version() or 0) >= CUDNN
    )


def attend(q: Tensor, k: Tensor, v: Tensor, module: torch.nn.Module, options: dict) -> Tensor:
    """q [N, queries, heads * d], k and v [N, keys, heads * d] -> [N, queries, heads * d], with the heads
    and the precision of a CrossAttention `module`."""
    if by_cudnn(q, options):
        return split(q, k, v, module.heads)
    return attention.optimized_attention(
        q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=options
    )


def split(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same by PyTorch, its backends asked in ORDER."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(ORDER, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)
