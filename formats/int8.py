"""INT8, symmetric, one weight scale per output channel.

Weight rounding is ModelOpt's (`round(w * (127 / amax))`), so stored integers are exactly the ones
its fake quantization rounds to. A Linear's activations are quantized per token at run time, a
convolution's with one calibrated scale, because its sum runs over several pixels.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

import torch

NAME = "int8"
TITLE = "INT8, per-channel weights"
COMFY_FORMAT = "int8_tensorwise"
STOCK = True
STORAGE = torch.int8
BITS = 8
BLOCK = None
SCALES = ("weight_scale",)
SECOND = None
ACTIVATIONS = True
QMAX = 127.0
# reached only where a calibration clips: ModelOpt then uses int8's own lower end
QMIN = -128.0
# an amax below the smallest step of fp16 counts as zero, as in ModelOpt's fake quantization
AMAX_EPSILON = 2.0**-24
PIECE = 2**16  # channels of one look at `amax_exceptions`


def needs_input_scale(kind: str) -> bool:
    """Whether a layer of this kind ("linear" or "conv2d") carries a calibrated activation scale."""
    return kind == "conv2d"


def why_not(shape: tuple[int, ...]) -> str | None:
    """Every weight fits."""
    return None


def scale_shape(weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `weight_scale` for a weight [out, in, ...]: [out, 1, ...]."""
    return (weight_shape[0], *(1 for _ in weight_shape[1:]))


def stored(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors of a weight of this shape."""
    scale = (scale_shape(shape), (torch.float32,))
    return {"weight": (shape, (STORAGE,)), "weight_scale": scale}


def weight_amax(weight: torch.Tensor) -> torch.Tensor:
    """[out, in, ...] float -> float32 largest magnitude per output channel, [out, 1, ...]."""
    return weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).float()


def quantize(weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """[out, in, ...] float and its amax -> int8 `weight` and float32 `weight_scale` [out, 1, ...].

    weight ≈ weight_q * weight_scale. An all-zero channel gets integers 0 and scale 1/127.
    """
    amax = amax.float().reshape(scale_shape(tuple(weight.shape)))
    dead = amax <= AMAX_EPSILON
    # a tensor over a tensor: PyTorch turns a number over a tensor into a product with the
    # reciprocal, whose second rounding would move some ties
    step = torch.where(dead, 0.0, torch.full_like(amax, QMAX) / torch.where(dead, 1.0, amax))
    q = (weight.float() * step).round_().clamp_(QMIN, QMAX).to(torch.int8)
    return {"weight": q, "weight_scale": torch.where(dead, 1.0, amax) / QMAX}


def dequantize(stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """What `quantize` gave -> float32 weight of `shape`."""
    return stored["weight"].float() * stored["weight_scale"]


def amax_of(scale: torch.Tensor) -> torch.Tensor:
    """The amax whose scale this is: float32, such that amax / 127 rounds to `scale`.

    In one float32 out of ninety two neighbours share a scale; the one with more trailing zero bits
    is taken, which is right for every weight that came from 16 bits.
    """
    best, zeros = scale * QMAX, torch.full(scale.shape, -1, device=scale.device)
    for candidate in _near(scale):
        bits = candidate.view(torch.int32)
        trailing = sum(((bits & ((1 << n) - 1)) == 0).int() for n in range(1, 24))
        better = (candidate / QMAX == scale) & (trailing > zeros)
        best = torch.where(better, candidate, best)
        zeros = torch.where(better, trailing, zeros)
    return best


def _near(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scale * 127 and its float32 neighbours: every amax whose scale this can be."""
    near = scale * QMAX
    below = torch.nextafter(near, torch.zeros_like(near))
    return near, below, torch.nextafter(near, torch.full_like(near, torch.inf))


def _other(scale: torch.Tensor) -> torch.Tensor:
    """The second amax that has this scale; NaN where there is none.

    There are two at most: neighbouring scales lie 127/64 neighbouring amax apart, or half of that.
    """
    first = amax_of(scale)
    found = torch.full_like(first, torch.nan)
    for candidate in _near(scale):
        other = (candidate / QMAX == scale) & (candidate != first)
        found = torch.where(other, candidate, found)
    return found


def amax_exceptions(scale: torch.Tensor, amax: torch.Tensor) -> dict[str, float]:
    """Channels whose amax `amax_of` does not give back to the last bit: index -> amax."""
    amax = amax.float().reshape(-1)
    wrong = (amax_of(scale.reshape(-1)) != amax) & (amax > AMAX_EPSILON)
    return {str(i): amax[i].item() for i in wrong.nonzero().flatten().tolist()}


def exceptions_text(exceptions: Mapping[str, float], scale: torch.Tensor) -> str | None:
    """`amax_exceptions` as text of a length that follows from the number of channels alone: one bit a
    channel, set where its amax is the second one of its scale, in base64.

    None where an amax is not of its scale. scale: float32 [out, 1, ...], on any device, where there
    are no exceptions a meta one too.
    """
    bits = bytearray(-(-len(scale) // 8))
    if exceptions:
        others = _other(scale.detach().cpu().reshape(-1)).tolist()
        for channel, amax in exceptions.items():
            if others[int(channel)] != amax:
                return None
            bits[int(channel) // 8] |= 128 >> int(channel) % 8
    return base64.b64encode(bits).decode()


def exceptions_of(text: str, scale: torch.Tensor) -> dict[str, float]:
    """The inverse of `exceptions_text`. Raises ValueError for a text that it does not give."""
    bits = base64.b64decode(text, validate=True)
    if len(bits) != -(-len(scale) // 8):
        raise ValueError(f"{len(bits)} bytes for {len(scale)} channels")
    if not any(bits):
        return {}
    places = torch.arange(7, -1, -1, dtype=torch.uint8)
    unpacked = torch.frombuffer(bytearray(bits), dtype=torch.uint8)[:, None] >> places & 1
    channels, found = unpacked.reshape(-1).nonzero().flatten(), {}
    flat = scale.reshape(-1)
    for piece in channels.split(PIECE):
        others = _other(flat[piece]) if piece[-1] < len(flat) else None
        if others is None or bool(others.isnan().any()):
            raise ValueError("a channel whose scale has no second amax")
        found |= zip(map(str, piece.tolist()), others.tolist(), strict=True)
    return found


def input_scale(amax: torch.Tensor) -> torch.Tensor:
    """Calibrated activation amax (scalar) -> float32 scalar scale, x ≈ x_q * scale."""
    amax = amax.float().reshape(())
    return torch.where(amax <= AMAX_EPSILON, 1.0, amax) / QMAX
