"""The words of Compare Quantized: how far the output moved, which layers moved most, what to do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from . import report

TIMES = 6  # lines of the table by timestep
WORST = 8  # layers named
APART = 6.0  # dB under the median of its kind: twice the noise of an ordinary layer
FEW = 4  # layers of a kind from which a median says what is ordinary
FOUR_BITS = ("nvfp4", "int4", "w4a8")
# dB of an ordinary layer by its bits, where there are too few to tell
ORDINARY = {4: 18.0, 8: 28.0, 16: 50.0}
POINTWISE = "conv2d 1x1"  # on its own: nearer to a Linear than to a convolution over neighbours
KINDS = report.KINDS | {POINTWISE: "1x1 convolution"}
SIXTEEN = "16 bits"  # of a layer's activations
OTHER_WEIGHTS = "16 bits, other weights"  # of a layer that is not quantized


def decibels(value: float) -> str:
    """A ratio in dB as text. "lost": NaN, infinity, or no signal at all."""
    if math.isnan(value):
        return "not a number"
    if value == math.inf:
        return "exact"
    return "lost" if value == -math.inf else f"{value:.1f} dB"


def counted(count: int, what: str) -> str:
    """1 call, 2 calls."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def noise_share(db: float) -> str:
    """Noise as a share of the signal, both as root mean squares."""
    share = 10 ** (-db / 20)
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def layer_words(layer: object) -> str:
    """What a layer is quantized to."""
    if isinstance(layer, str):
        return layer
    words = [layer.format]
    if layer.activations:
        words.append(f"activations {layer.activations}")
    if layer.smoothed:
        words.append("smoothed")
    if layer.rank:
        words.append(f"rank {layer.rank}")
    return ", ".join(words)


def advice(layer: object, kind: str) -> str:
    """What to do about a layer that is damaged."""
    if layer == OTHER_WEIGHTS:
        return "quantize the reference's own MODEL"
    if isinstance(layer, str):
        return "skip it"
    if layer.format in FOUR_BITS:
        return "give it 8 bits, or skip it"
    if layer.activations == SIXTEEN:  # nothing in 8 bits is nearer
        return "skip it"
    if layer.format == "fp8" and kind == "linear" and not layer.activations:
        return "fp8 per token, or skip it"
    if layer.format == "int8" and kind == "linear" and not layer.smoothed:
        return "smoothquant, or skip it"
    if layer.format == "int8" and kind != "linear":
        return "fp8, or skip it"
    return "skip it"


def ordinary(one, middle: dict) -> float:
    """dB of an ordinary layer of its kind and format. middle: of `medians`."""
    median, count = middle[one.kind, layer_words(one.layer)]
    if count >= FEW and one.layer != OTHER_WEIGHTS and math.isfinite(median):
        return median
    if one.layer == OTHER_WEIGHTS:
        return ORDINARY[16]
    return ORDINARY[4 if getattr(one.layer, "format", None) in FOUR_BITS else 8]


def stands_out(one, middle: dict) -> bool:
    """Whether a layer is far below an ordinary one of its kind and format."""
    return one.energy.db < ordinary(one, middle) - APART


def worst_layers(layers: Sequence) -> list:
    """At most WORST layers: those that stand out, the furthest below an ordinary one first, then those
    with most noise for their signal. A damaged layer of 8 bits is still nearer to the original than a
    sound one of 4. None that is exact."""
    middle = medians(layers)

    def rank(one) -> tuple[bool, float]:
        out = stands_out(one, middle)
        return not out, one.energy.db - (ordinary(one, middle) if out else 0.0)

    return sorted((one for one in layers if one.energy.db < math.inf), key=rank)[:WORST]


def compare_report(found) -> str:
    """The text of the node. found: a quantize.compare.Compared."""
    total = found.energy.db
    lines = [
        f"SQNR {decibels(total)} over {counted(found.calls, 'recorded UNet call')}"
        + (f": noise of {noise_share(total)} of the output" if math.isfinite(total) else ""),
        f"Worst call {decibels(found.worst.energy.db)}, at timestep {found.worst.timestep:g} "
        f"(sigma {found.worst.sigma:.3g})",
        "In words: at 20 dB the noise is 10% of the signal, at 30 dB 3%, at 40 dB 1%; 6 dB more "
        "halves it.",
        *found.notes,
        "",
        "Output by timestep, as sampling goes:",
        *(f"  {line}" for line in _time_lines(found.steps)),
        "",
        *_picture_lines(found),
        "",
        *_layer_lines(found),
    ]
    return "\n".join(lines)


def _time_lines(steps: Sequence) -> list[str]:
    count = min(TIMES, len(steps))
    lines = []
    for i in range(count):
        part = steps[i * len(steps) // count : (i + 1) * len(steps) // count]
        first, last = part[0], part[-1]
        energy = sum((one.energy for one in part[1:]), first.energy)
        calls = sum(one.calls for one in part)
        times, sigmas = f"timestep {first.timestep:.0f}", f"sigma {first.sigma:.3g}"
        if len(part) > 1:
            times, sigmas = f"{times} to {last.timestep:.0f}", f"{sigmas} to {last.sigma:.3g}"
        lines.append(f"{times} ({sigmas}): {decibels(energy.db)}, {counted(calls, 'call')}")
    return lines


def _picture_lines(found) -> list[str]:
    made = found.settings
    if made is None:
        return [
            "Pictures: none. Connect positive, negative, latent_image (and vae) to sample some."
        ]
    worst = min(found.likeness, key=lambda one: -math.inf if math.isnan(one[0]) else one[0])
    where = "decoded by the VAE" if found.images else "of the latents, as no VAE is connected"
    # of all pixels together: in dB, one identical picture would make the mean infinite
    errors = [10 ** (-psnr / 10) for psnr, _ in found.likeness]
    error = statistics.fmean(errors)
    whole = math.inf if error == 0 else -10 * math.log10(error)
    alike = statistics.fmean(ssim for _, ssim in found.likeness)
    lines = [
        f"Same-seed pictures, {where}: PSNR {decibels(whole)}, SSIM {alike:.3f} (1 is identical)",
        f"  seed {made.seed}, {made.steps} steps, cfg {made.cfg:g}, {made.sampler_name}, "
        f"{made.scheduler}, denoise {made.denoise:g}",
    ]
    if len(found.likeness) > 1:
        lines[0] += f", of {len(found.likeness)} together"
        lines.append(f"  worst of them: PSNR {decibels(worst[0])}, SSIM {worst[1]:.3f}")
    return lines


def _layer_lines(found) -> list[str]:
    layers = found.layers
    left = [f"Not compared: {name}, {why}" for name, why in found.left_out.items()]
    if len(left) > WORST:
        left = [*left[:WORST], f"Not compared: {len(left) - WORST} more layers"]
    if not layers:
        return ["Layers: the quantized MODEL has no quantized layer to compare.", *left]
    calls, positions = found.sampled
    middle = medians(layers)
    own = [one for one in layers if one.layer != OTHER_WEIGHTS]
    lines = [
        f"{counted(len(own), 'quantized layer')}, each by itself on the original's input (up to "
        f"{positions} positions of {counted(calls, 'call')}):",
        *(
            f"  {counted(count, KINDS[kind] + ' layer')} in {words}: median {decibels(db)}"
            for (kind, words), (db, count) in middle.items()
        ),
    ]
    worst = worst_layers(layers)
    if not worst:
        return [*lines, "All of them are exact.", *left]
    out = [one for one in worst if stands_out(one, middle)]
    lines.append(
        "Those that stand out, then those with most noise:" if out else "Those with most noise:"
    )
    for number, one in enumerate(worst, start=1):
        lines.append(
            f"  {number}. {decibels(one.energy.db)}  {one.name} ({layer_words(one.layer)})"
            + (f": stands out; {advice(one.layer, one.kind)}" if one in out else "")
        )
    if any(one.energy.db == -math.inf for one in worst):
        lines.append("  lost: it gives NaN, infinity or nothing")
    return [*lines, *left, *_what_to_do(worst, out, own)]


def _what_to_do(worst: Sequence, out: Sequence, own: Sequence) -> list[str]:
    """own: all quantized layers, the only ones that `skip` is about."""
    named = [one for one in worst if one.layer != OTHER_WEIGHTS]
    if not named:
        return []
    share = sum(one.weights for one in named) / sum(one.weights for one in own)
    how = sorted({advice(one.layer, one.kind) for one in out or named})
    first = "What to do" if out else "No layer stands out. If the whole is not near enough"
    return [
        f"{first}: {'; '.join(how)}. Lines to add to `skip` of Quantize, which leave these "
        f"{len(named)} in 16 bits ({share:.1%} of the quantized weights):",
        *(one.name for one in named),
    ]


def medians(layers: Sequence) -> dict[tuple[str, str], tuple[float, int]]:
    """(kind, format in words) -> median SQNR in dB of those that have one, and number of layers."""
    groups: dict[tuple[str, str], list[float]] = {}
    for one in layers:
        groups.setdefault((one.kind, layer_words(one.layer)), []).append(one.energy.db)
    return {key: (_median(found), len(found)) for key, found in sorted(groups.items())}


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else max(values)
