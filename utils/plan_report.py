"""The words of a plan: what quantizing will give, what it takes, and what is exact about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import capability
from .report import kernel_lines, layer_lines, megabytes, opens_line, recipe_line

# share of the weights in convolutions from which `linear only` is said to leave much of the model
MANY_CONVOLUTIONS = 0.5


@dataclass(frozen=True)
class Facts:
    """recipe, layers, kernels, notes: as in the Quantize report. Bytes: file; before (the UNet in 16
    bits); held (the weights once loaded); running (a UNet call beside them), reserved (ComfyUI's
    estimate for it), to_quantize (on the device, in RAM beside it). None: not known. missing: a
    CALIBRATION is needed and not connected. compiles: whether ModelOpt's CUDA kernels would be built.
    shape: of the recorded call's latent. others: format -> bytes of the file with the same layers.
    convolutions: share of the weights that are in convolutions and not quantized."""

    recipe: Mapping[str, object]
    layers: Mapping[str, object]
    kernels: Sequence[object]
    opens_in_stock: bool
    file: int
    before: int
    held: int
    device: str
    gpu: capability.GPU
    missing: bool
    records: int
    shape: tuple[int, ...] | None
    call_seconds: float | None
    running: int | None
    reserved: int | None
    to_quantize: tuple[int, int] | None
    seconds: float | None
    compiles: bool
    calls: int
    others: Mapping[str, int]
    convolutions: float
    notes: Sequence[str]


def text(facts: Facts) -> str:
    """The plan as the node shows it."""
    lines = [
        f"Plan: {recipe_line(facts.recipe)}",
        *layer_lines(facts.layers),
        _file_line(facts),
        *_running_lines(facts),
        _quantizing_line(facts),
        _time_line(facts),
        *kernel_lines(facts.kernels),
        opens_line(facts.opens_in_stock, facts.recipe),
        *(f"Mind: {warning}" for warning in warnings(facts)),
        *_advice_lines(facts),
        *facts.notes,
    ]
    return "\n".join(lines)


def size_line(file: int, held: int) -> str:
    """The two sizes that are exact before the run, for a log and a node's text."""
    return f"Planned: a file of {file:,} bytes, {megabytes(held)} of weights when loaded"


def kept_line(planned: tuple[int, int], made: tuple[int, int]) -> str:
    """The same in the report afterwards, beside what it came to. Bytes of the file and held."""
    line = size_line(*planned)
    if planned == made:
        return f"{line}: it came out as planned."
    return f"{line}; it is {made[0]:,} bytes and {megabytes(made[1])}."


def figures(facts: Facts) -> dict:
    """JSON-able, for scripts."""
    device, ram = facts.to_quantize or (None, None)
    return {
        **facts.recipe,
        "file_bytes": facts.file,
        "exact": not facts.missing,
        "bytes_before": facts.before,
        "held_bytes": facts.held,
        "call_bytes": facts.running,
        "reserved_bytes": facts.reserved,
        "quantize_bytes": device,
        "quantize_ram_bytes": ram,
        "seconds": facts.seconds,
        "opens_in_stock": facts.opens_in_stock,
    }


def _file_line(facts: Facts) -> str:
    share = f"{facts.file / facts.before:.3f} of the 16-bit UNet"
    if facts.missing:
        return (
            f"File: about {facts.file:,} bytes ({share}); exact once the CALIBRATION is connected, "
            "which the file's header describes, and which this recipe needs"
        )
    exact = f"File: {facts.file:,} bytes ({share}), exact"
    if not facts.records:
        return f"{exact} without a CALIBRATION"
    return f"{exact} if the recording calls every layer to quantize (the others stay in 16 bits)"


def _running_lines(facts: Facts) -> list[str]:
    held = f"Memory to run: {megabytes(facts.held)} of weights on {facts.device}"
    if facts.running is None:
        why = (
            "torch does not count memory there"
            if facts.records
            else "connect a CALIBRATION to measure it"
        )
        return [f"{held}; what a UNet call takes beside them is not known: {why}"]
    size = " x ".join(map(str, facts.shape or ()))
    lines = [
        f"{held} and about {megabytes(facts.running)} for a UNet call with a latent of {size}, "
        f"together about {megabytes(facts.held + facts.running)} (from a measured call of the MODEL "
        "as it is)"
    ]
    if facts.reserved is not None:
        lines.append(
            f"ComfyUI reckons with {megabytes(facts.reserved)} for such a call when it decides how "
            "much of a MODEL stays on the device"
        )
    return lines


def _quantizing_line(facts: Facts) -> str:
    if facts.to_quantize is None:
        return f"Memory to quantize: not known, torch does not count memory on {facts.device}"
    here, ram = facts.to_quantize
    line = f"Memory to quantize: about {megabytes(here)} of tensors on {facts.device}"
    line += f" and {megabytes(ram)} of RAM for the packed weights" if ram else " beside the MODEL"
    if not facts.records:
        line += ", UNet calls not counted"
    return f"{line}; what Python and ModelOpt themselves take is not in it"


def _time_line(facts: Facts) -> str:
    if facts.missing:
        return "Time to quantize: not known without the CALIBRATION that this recipe needs"
    if facts.seconds is None:
        return "Time to quantize: not known, awq_full's search for clipping is not timed here: slow"
    line = f"Time to quantize: about {_duration(facts.seconds)} here"
    if facts.calls and facts.call_seconds is not None:
        line += f", {facts.calls} UNet calls of {facts.call_seconds:.2g} s among it (one was timed)"
    if facts.compiles:
        line += "; minutes more where ModelOpt builds its CUDA kernels for the first time"
    return line


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"


def warnings(facts: Facts) -> list[str]:
    """What speaks against the choice on this machine, with what to do."""
    found = []
    form, gpu = str(facts.recipe.get("format")), facts.gpu
    slow = sum(1 for kernel in facts.kernels if kernel.level in ("dequantized", "emulated"))
    if slow and gpu.capability is not None:
        fastest = capability.recommend(gpu).get("fastest picture")
        remedy = f"; {fastest[0]} is computed natively" if fastest and fastest[0] != form else ""
        found.append(
            f"{slow} of {len(facts.kernels)} layers are not computed in low precision on {gpu.name}: "
            f"memory gets smaller, pictures do not get faster{remedy}."
        )
    if facts.convolutions >= MANY_CONVOLUTIONS:
        found.append(
            f"{facts.convolutions:.0%} of the weights are in convolutions, which linear only leaves "
            "in 16 bits: choose linear + conv for a small file."
        )
    if form == "int8" and facts.recipe.get("algorithm") == "max" and facts.opens_in_stock:
        found.append(
            "smoothquant measured nearer to 16 bits than max; its file opens with this pack only."
        )
    if facts.missing:
        found.append("this recipe needs recorded activations: connect a CALIBRATION.")
    return found


def _advice_lines(facts: Facts) -> list[str]:
    """Every format's size with these layers, and what to pick for which goal on this machine."""
    sizes = sorted(facts.others.items(), key=lambda item: item[1])
    listed = ", ".join(f"{name} {megabytes(size)}" for name, size in sizes)
    goals = capability.recommend(facts.gpu).items()
    return [
        *([f"With these layers: {listed} (each format's default algorithm)"] if sizes else []),
        *(f"For the {goal}: {name} ({reason})" for goal, (name, reason) in goals),
    ]
