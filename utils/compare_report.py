"""The words of Compare Quantized: how far the output moved, which layers moved most, what to do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .report import KINDS

TIMES = 6  # lines of the table by timestep
WORST = 8  # layers named
APART = 6.0  # dB under the median of its kind: twice the noise of an ordinary layer
FOUR_BITS = ("nvfp4", "int4", "w4a8")


def decibels(value: float) -> str:
    """A ratio in dB as text."""
    if math.isnan(value):
        return "not a number"
    if value == math.inf:
        return "exact"
    return "no signal left" if value == -math.inf else f"{value:.1f} dB"


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
    if isinstance(layer, str):
        return "skip it"
    if layer.format in FOUR_BITS:
        return "give it 8 bits, or skip it"
    if layer.format == "fp8" and kind == "linear" and not layer.activations:
        return "fp8 per token, or skip it"
    if layer.format == "int8" and kind == "linear" and not layer.smoothed:
        return "smoothquant, or skip it"
    if layer.format == "int8" and kind == "conv2d":
        return "fp8, or skip it"
    return "skip it"


def stands_out(one, middle: dict) -> bool:
    """Whether a layer is far below the others of its kind and format. middle: of `medians`."""
    return one.energy.db < middle[one.kind, layer_words(one.layer)][0] - APART


def worst_layers(layers: Sequence) -> list:
    """WORST layers: those that stand out, then those with most noise for their signal, each the worst
    first. A damaged layer of 8 bits is still nearer to the original than a sound one of 4."""
    middle = medians(layers)
    return sorted(layers, key=lambda one: (not stands_out(one, middle), one.energy.db))[:WORST]


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
    lines = [
        f"{counted(len(layers), 'quantized layer')}, each by itself on the original's input (up to "
        f"{positions} positions of {counted(calls, 'call')}):",
        *(
            f"  {counted(count, KINDS[kind] + ' layer')} in {words}: median {decibels(db)}"
            for (kind, words), (db, count) in middle.items()
        ),
        "Those that stand out, then those with most noise:"
        if any(stands_out(one, middle) for one in layers)
        else "Those with most noise:",
    ]
    worst = worst_layers(layers)
    for number, one in enumerate(worst, start=1):
        lines.append(
            f"  {number}. {decibels(one.energy.db)}  {one.name} ({layer_words(one.layer)})"
            + (f": stands out; {advice(one.layer, one.kind)}" if stands_out(one, middle) else "")
        )
    share = sum(one.weights for one in worst) / sum(one.weights for one in layers)
    how = sorted({advice(one.layer, one.kind) for one in worst})
    lines += [
        *left,
        f"What to do: {'; '.join(how)}. Lines to add to `skip` of Quantize, which leave these "
        f"{len(worst)} in 16 bits ({share:.1%} of the quantized weights):",
        *(one.name for one in worst),
    ]
    return lines


def medians(layers: Sequence) -> dict[tuple[str, str], tuple[float, int]]:
    """(kind, format in words) -> median SQNR in dB and number of layers."""
    groups: dict[tuple[str, str], list[float]] = {}
    for one in layers:
        groups.setdefault((one.kind, layer_words(one.layer)), []).append(one.energy.db)
    return {key: (statistics.median(found), len(found)) for key, found in sorted(groups.items())}
