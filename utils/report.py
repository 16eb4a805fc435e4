"""The words users read about a quantized UNet: after quantizing, after loading, in the info node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from . import capability
from .text import brief, listed

LONGEST_NOTE = 2000  # it may name many layers
OPTIONS = ("alpha", "convolutions", "percentile", "rank", "activations")
KINDS = {"linear": "Linear", "conv2d": "convolution"}


def megabytes(count: float) -> str:
    """Bytes as text in MB (10^6), or GB from 1 GB on."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def layer_lines(layers: Mapping[str, object]) -> list[str]:
    """How many layers of which format and kind."""
    counts = Counter((x.format, x.kind, x.smoothed, x.rank, x.activations) for x in layers.values())
    return [
        f"{count} {KINDS[kind]} layers in {form}"
        + (" with smoothing" if smoothed else "")
        + (f" and a branch of rank {rank}" if rank else "")
        + (f", activations {activations}" if activations else "")
        for (form, kind, smoothed, rank, activations), count in sorted(counts.items())
    ]


def recipe_line(recipe: Mapping[str, object]) -> str:
    """Format, algorithm and layers of a recipe in one line."""
    if recipe.get("format") == "mixed":
        return mixed_line(recipe)
    algorithm = brief(recipe.get("algorithm", "?"))
    options = [f"{name} {brief(recipe[name])}" for name in OPTIONS if name in recipe]
    if options:
        algorithm += f" ({', '.join(options)})"
    return f"{brief(recipe.get('format', '?'))}, {algorithm}, {brief(recipe.get('layers', '?'))}"


def choice_words(choice: Mapping[str, object]) -> str:
    """A choice of a mixed recipe in a few words."""
    options = [f"{name} {brief(choice[name])}" for name in OPTIONS if name in choice]
    return " ".join([brief(choice.get("format")), brief(choice.get("algorithm")), *options])


def mixed_line(recipe: Mapping[str, object]) -> str:
    """A mixed recipe in one line: what it was made for, and how many layers each choice has."""
    goal, assignment = recipe.get("goal") or {}, recipe.get("assignment") or {}
    made_for = goal_words(goal)
    counts = [
        f"{len(assignment.get(str(index), ()))} layers {choice_words(choice)}"
        for index, choice in enumerate(recipe.get("choices") or ())
    ]
    return "mixed" + (f" for {made_for}" if made_for else "") + ": " + ", ".join(listed(counts))


def goal_words(goal: Mapping[str, object]) -> str:
    """What a mixed recipe was made for, "" where it does not say."""
    value = goal.get("value")
    if not isinstance(value, int | float):
        return ""
    if goal.get("kind") == "size":
        return f"a file of at most {megabytes(value)}"
    return f"{value:g} bits a weight" if goal.get("kind") == "bits" else f"{value:g} dB"


def quality_line(figures: Mapping[str, object] | None) -> str:
    """SQNR in words, or why there is none."""
    if not figures:
        return "SQNR: not measured, no calibration was connected"
    return (
        f"SQNR {figures['sqnr_db']:.1f} dB on {figures['records']} recorded UNet calls, "
        f"worst call {figures['worst_sqnr_db']:.1f} dB"
    )


def calibration_line(summary: Mapping[str, object] | None) -> str:
    """What the scales were calibrated on."""
    if not summary:
        return "Calibration: none"
    sizes = ", ".join(listed(summary.get("resolutions", [])))
    runs = f"{summary['runs']} run{'' if summary['runs'] == 1 else 's'}"
    return f"Calibration: {summary['records']} UNet calls of {runs} at {sizes}"


def kernel_lines(kernels: Iterable[object]) -> list[str]:
    """Which kernel runs how many layers, and why where it is not a native one."""
    return [
        f"{count} layers run as {kernel.name}" + (f": {kernel.why}" if kernel.why else "")
        for kernel, count in Counter(kernels).most_common()
    ]


def opens_line(opens_in_stock: bool, recipe: object = None) -> str:
    """Where the file opens, and what of its recipe could be otherwise if it must open in stock."""
    if opens_in_stock:
        return 'Opens in stock ComfyUI ("Load Diffusion Model") and with this pack.'
    line = "Opens with this pack only: stock ComfyUI has no such layers and refuses the file."
    chosen = recipe if isinstance(recipe, Mapping) else {}
    found = [chosen.get(name) for name in ("format", "algorithm", "layers")]
    if found == ["int8", "smoothquant", "linear only"]:
        return line + " With max it would open there."
    return line


def quantize_report(
    header: Mapping[str, object],
    layers: Mapping[str, object],
    kernels: Iterable[object],
    bytes_before: int,
    bytes_after: int,
    seconds: float,
    opens_in_stock: bool,
    notes: Iterable[str],
) -> str:
    """The report of the Quantize node. bytes_before: the UNet in 16 bits."""
    lines = [
        f"Quantized: {recipe_line(header['recipe'])}",
        *layer_lines(layers),
        f"Size {megabytes(bytes_before)} -> {megabytes(bytes_after)} "
        f"({bytes_after / bytes_before:.3f} of the 16-bit UNet)",
        quality_line(header.get("quality")),
        calibration_line(header.get("calibration")),
        *kernel_lines(kernels),
        opens_line(opens_in_stock, header["recipe"]),
        f"Took {seconds:.1f} s",
        *notes,
    ]
    return "\n".join(lines)


def model_report(
    header: Mapping[str, object],
    layers: Mapping[str, object],
    kernels: Iterable[object],
    bytes_now: int,
) -> str:
    """The text of the Load and Info nodes."""
    source = header.get("source")
    versions = header.get("versions") or {}
    lines = [
        f"Recipe: {recipe_line(header.get('recipe') or {})}",
        *layer_lines(layers),
        f"Size {megabytes(bytes_now)}",
        quality_line(header.get("quality")),
        calibration_line(header.get("calibration")),
        *kernel_lines(kernels),
        opens_line(bool(header.get("opens_in_stock")), header.get("recipe")),
        f"Model: {brief(header.get('model', 'unknown'))}",
        f"Made from: {brief(source['name'])} (SHA-256 {brief(source['sha256'])})"
        if source
        else "Made from: unknown file",
        "Made with: "
        + ", ".join(listed(f"{name} {made}" for name, made in sorted(versions.items()))),
    ]
    imported = header.get("imported")
    if imported:
        lines += [
            f"Imported from: {brief(imported['kind'])}",
            *listed(imported["notes"], LONGEST_NOTE),
        ]
    if header.get("baked_patches"):
        lines.append(f"{header['baked_patches']} weights carry baked-in patches (LoRA)")
    return "\n".join(lines)


def capability_report(gpu: capability.GPU) -> str:
    """What this machine does with each format, what to pick, and what other cards do."""
    machine = f"This machine: {gpu.name}"
    if gpu.capability is not None:
        machine += (
            f", compute capability {dotted(gpu.capability)}: {capability.cards(gpu.capability)}; "
            f"torch {dotted(gpu.torch)} built for CUDA {dotted(gpu.cuda) or 'none'}"
        )
    lines = [machine]
    for name, kind, found in capability.table(gpu):
        why = f": {found.why}" if found.why else ""
        lines.append(f"{name} {KINDS[kind]}: {found.level}{why}")
    for goal, (name, reason) in capability.recommend(gpu).items():
        lines.append(f"For the {goal}: {name} ({reason})")
    lines.append("Formats that Linear layers run in natively, by card:")
    for needed, cards in capability.CARDS.items():
        lines.append(f"{dotted(needed)} {cards}: {', '.join(capability.natively(needed))}")
    return "\n".join(lines)


def dotted(version: tuple[int, ...] | None) -> str:
    """(8, 9) as 8.9, nothing as ""."""
    return ".".join(str(part) for part in version or ())
