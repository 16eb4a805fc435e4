"""Whether Triton works on this machine: every kernel once, small, against its reference.

Asked before a model is loaded, so that a missing C compiler or a driver that is too old is a sentence
in the log and other kernels run, not an error in the middle of a picture.
"""

from __future__ import annotations

import logging

import torch

from . import backends, conv, gemm, hopper, library, producers, tiles

log = logging.getLogger(__name__)

KINDS = ("int8", "fp8")
_known: dict[tuple[torch.device, str], str | None] = {}


def why_not(device: torch.device, kind: str) -> str | None:
    """The reason our Triton kernels of a kind ("int8", "fp8") are not used on a device, or None.

    The answer is kept for the process, but for that of a device whose memory is full.
    """
    if (device, kind) not in _known:
        reason = gemm.why_not(kind, device)
        if reason is None:
            try:
                reason = _reason(device, kind)
            except torch.OutOfMemoryError as error:
                return f"no memory was left to try Triton's kernels ({_in_one_line(error)})"
        _known[device, kind] = reason
    return _known[device, kind]


def _reason(device: torch.device, kind: str) -> str | None:
    if hopper.why_not(device) is None:
        _try_hopper(device, kind)
    try:
        wrong = differing(device, kind)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, a linker or a driver raises
        name = type(error).__name__
        return f"Triton failed to run a kernel here ({name}: {_in_one_line(error)})"
    if wrong:
        return f"Triton's {', '.join(wrong)} differ here from the exact reference"
    return None


def _try_hopper(device: torch.device, kind: str) -> None:
    """Takes the kernels of hopper.py out of use where they fail, and says so: the others remain."""
    try:
        wrong = differing(device, kind, hopper.LEAST_ROWS) + tiles_that_differ(device, kind)
        reason = f"{', '.join(wrong)} differ here from the exact reference" if wrong else None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"{type(error).__name__}: {_in_one_line(error)}"
    if reason is not None:
        hopper.off[device] = reason
        log.warning("ModelOpt: kernels with TMA are not used, the others are: %s", reason)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def differing(device: torch.device, kind: str, rows: int = 48) -> list[str]:
    """Names of the kernels whose result is not the reference's on small inputs of `rows` rows."""
    ours, reference = backends.triton(), backends.REFERENCE
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def eight(*shape: int) -> torch.Tensor:
        return (normal(*shape) * 20).clamp_(-128, 127).to(dtype)

    inner = max(hopper.LEAST_INNER, library.LEAST)
    x, gain, bias = normal(rows, 64).half(), normal(64).half(), normal(64).half()
    smoothing = torch.linspace(0.5, 2, 64, device=device)
    image = normal(2, 64, 6, 6).half().contiguous(memory_format=torch.channels_last)
    step = torch.tensor(0.02, device=device)
    columns = torch.rand(64, 1, generator=generator).to(device) * 0.01 if kind == "int8" else step
    pixels = columns.reshape(-1, 1, 1, 1) if kind == "int8" else step
    a, b, taps = eight(rows, inner), eight(64, inner), eight(64, 64, 3, 3)
    pictures = eight(2, 64, 6, 6).contiguous(memory_format=torch.channels_last)
    calls = [
        ("quantize_rows", (x, kind)),
        ("layer_norm_quantize", (x, gain, bias, 1e-5, kind, step)),
        ("group_norm_quantize", (image, 32, gain, bias, 1e-5, True, kind, step)),
        ("quantize_rows", (x, kind, None, smoothing)),
        ("layer_norm_quantize", (x, gain, bias, 1e-5, kind, None, smoothing)),
        ("group_norm_quantize", (image, 32, gain, bias, 1e-5, False, kind, None, smoothing)),
        ("geglu_quantize", (x, kind, step)),
        ("scaled_mm", (a, b, step, columns, bias, x)),
        ("scaled_mm", (a, b, step, columns, bias)),  # a library's, where library.py takes it
        ("grouped_scaled_mm", (a, (b, b, b), step, (columns,) * 3)),
        ("scaled_mm_geglu", (a, b, step, columns, bias)),
        ("conv2d", (pictures, taps, step, pixels, bias, (1, 1), (1, 1))),
    ]
    wrong = (
        name
        for name, args in calls
        if not _agree(getattr(ours, name)(*args), getattr(reference, name)(*args))
    )
    return list(dict.fromkeys(wrong))


def tiles_that_differ(device: torch.device, kind: str) -> list[str]:
    """The same of each tile of hopper.py's convolution, with all that it adds, and of a GEGLU that
    quantizes what it writes."""
    dtype = producers.DTYPES[kind]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def eight(*shape: int) -> torch.Tensor:
        return (normal(*shape) * 20).clamp_(-128, 127).to(dtype)

    last = torch.channels_last
    step, scale = torch.tensor(0.02, device=device), torch.tensor(0.01, device=device)
    pixels = torch.rand(64, 1, 1, 1, generator=generator).to(device) * 0.01
    pixels = pixels if kind == "int8" else scale
    args = [eight(2, 64, 6, 6).contiguous(memory_format=last)]
    args += [eight(64, 64, 3, 3).contiguous(memory_format=last), step, pixels, normal(64).half()]
    more = {"padding": (1, 1), "row_bias": normal(2, 64).half()}
    more["residual"] = normal(2, 64, 6, 6).half().contiguous(memory_format=last)
    wanted, wrong = conv.conv2d_reference(*args, **more), []
    for found in tiles.TMA[f"conv2d {kind}"]:
        for split in (1, 3):
            tile = tiles.Tiles(*found, split)
            if not _agree(hopper.conv2d(*args, **more, tile=tile), wanted):
                wrong.append(f"conv2d with {tile}")
    product = (eight(hopper.LEAST_ROWS, 64), eight(64, 64), step, scale, normal(64).half())
    out = {"out_kind": dtype, "out_scale": torch.tensor(0.05, device=device)}
    found = hopper.scaled_mm_geglu(*product, **out)
    if not _agree(found, gemm.scaled_mm_geglu_reference(*product, **out)):
        wrong.append("scaled_mm_geglu that quantizes")
    return wrong


def _agree(found, wanted) -> bool:
    """Equal but for the last place of 16 bits, or one step of 8 bits, here and there."""
    if isinstance(found, tuple):
        return all(_agree(*pair) for pair in zip(found, wanted, strict=True))
    found, wanted = found.float(), wanted.float()
    error = (found - wanted).norm() / wanted.norm()
    return found.shape == wanted.shape and bool(error < 5e-3)
