"""The words of a speed measurement: the Benchmark node's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .capability import GPU
from .report import dotted, megabytes
from .timing import Timing

# below this share of a call the GPU waits for the host more than a sixth of the time
BUSY = 0.85
ERROR = 240


@dataclass
class Row:
    """One contender. call_bytes: what a call takes beside the weights, None where not measured.
    held: dtype of most unquantized weights. why_not: why there is no timing."""

    label: str
    timing: Timing | None = None
    first_seconds: float = 0.0
    weight_bytes: int = 0
    call_bytes: int | None = None
    held: str = ""
    why_not: str = ""


def in_one_line(error: BaseException) -> str:
    """An error's kind and message without line breaks, cut to ERROR characters."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return said if len(said) <= ERROR else f"{said[:ERROR]}…"


def kernel_line(kernel) -> str:
    """A layer's kernel, and why it is that one."""
    return f"{kernel.name} ({kernel.level})" + (f": {kernel.why}" if kernel.why else "")


def row_line(row: Row) -> str:
    """One contender in words."""
    if row.timing is None:
        return f"{row.label}: not measured ({row.why_not})"
    t = row.timing
    memory = f"weights {megabytes(row.weight_bytes)} in memory"
    if row.held == "float32":
        memory += ", those that are not quantized in 32 bits"
    if row.call_bytes is not None:
        memory += f", {megabytes(row.call_bytes)} more during a call"
    return (
        f"{row.label}: {t.median:.2f} ms a UNet call (IQR {t.iqr:.2f}), "
        f"{1e3 / t.median:.2f} it/s; {memory}; first call {row.first_seconds:.1f} s"
    )


def ratio_lines(rows: Sequence[Row]) -> list[str]:
    """How the first row compares with each other one, losses included."""
    own, lines = rows[0], []
    for other in rows[1:]:
        if own.timing is None or other.timing is None:
            continue
        ratio = other.timing.median / own.timing.median
        overlap = own.timing.low <= other.timing.high and other.timing.low <= own.timing.high
        word = (
            f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times slower than"
        )
        line = f"{own.label} is {word} {other.label}"
        lines.append(line + (", within the spread of the calls" if overlap else ""))
        if own.weight_bytes and other.weight_bytes:
            share = own.weight_bytes / other.weight_bytes
            lines[-1] += f"; its weights take {share:.2f} of the memory"
    return lines


def limits(
    kernels: Iterable[object],
    gpu: GPU,
    branches: int = 0,
    streamed: bool = False,
    busy: float | None = None,
    split_ms: Mapping[str, float] | None = None,
    launches: int = 0,
) -> list[str]:
    """What holds the speed back, in sentences.

    branches: layers with a LoRA beside them; streamed: weights come from main memory per call; busy:
    share of a call in which the GPU computes; split_ms: that time by kind of kernel.
    """
    kernels = list(kernels)
    lines = []
    if gpu.capability is None:
        lines.append(
            f"there is no NVIDIA GPU here, {gpu.name} computes: low precision is emulated and gains "
            "no speed"
        )
    elif kernels and "cuda" not in gpu.backends:
        lines.append(
            "comfy-kitchen's CUDA kernels are disabled: ComfyUI enables them with a torch built for "
            f"CUDA 13, this one is built for CUDA {dotted(gpu.cuda)}"
        )
    convs = [k for k in kernels if "conv2d" in k.name and k.level == "emulated"]
    if convs:
        lines.append(
            f"{len(convs)} convolutions run an exact reference without a low-precision kernel: "
            "quantize `linear only` for speed"
        )
    others = [k for k in kernels if k.level == "emulated" and "conv2d" not in k.name]
    if others:
        lines.append(f"{len(others)} Linear layers run an exact reference, which is not fast")
    for level, what in (
        ("dequantized", "are dequantized to 16 or 32 bits at every call"),
        ("weight-only", "hold few bits in memory and compute in 16 or 32 bits: no gain in speed"),
        ("simulated", "run ModelOpt's simulation, which is there to verify and is slow"),
    ):
        count = sum(k.level == level for k in kernels)
        if count:
            lines.append(f"{count} layers {what}")
    if branches:
        lines.append(f"{branches} layers compute a LoRA beside their quantized weight")
    if streamed:
        lines.append("the weights do not fit: some come from main memory at every call")
    if busy is not None and busy < BUSY:
        lines.append(
            f"the GPU computes {100 * busy:.0f}% of a call and waits for {launches} launches the rest "
            "of it: start ComfyUI with --disable-cuda-malloc and load the file with cuda_graphs, "
            "compile the model (TorchCompileModel), or raise the batch"
        )
    if split_ms:
        total = sum(split_ms.values())
        parts = [f"{kind} {100 * ms / total:.0f}%" for kind, ms in split_ms.items()]
        lines.append("the GPU's time by kind of kernel: " + ", ".join(parts))
    return lines or ["nothing known: every quantized layer runs a low-precision kernel"]


def benchmark_report(
    gpu: GPU,
    what: str,
    rows: Sequence[Row],
    layers: Sequence[str],
    limiting: Sequence[str],
    rounds: int,
    repeats: int,
    together: bool,
) -> str:
    """The text of the Benchmark node."""
    machine = gpu.name
    if gpu.capability is not None:
        machine += f", torch {dotted(gpu.torch)} built for CUDA {dotted(gpu.cuda) or 'none'}"
    way = (
        "taking turns in shuffled order" if together else "one after the other, as memory is short"
    )
    lines = [f"Machine: {machine}", f"Measured: {what}"]
    lines += [row_line(row) for row in rows]
    lines += ratio_lines(rows)
    lines.append(f"Median of {rounds} x {repeats} calls of each" + (f", {way}" if rows[1:] else ""))
    lines += ["Layers:", *(f"- {line}" for line in layers)]
    lines += ["What limits it:", *(f"- {line}" for line in limiting)]
    return "\n".join(lines)
