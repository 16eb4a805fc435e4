"""The result of benchmarks/quality.py as a page: the table, and what it says of the defaults."""

from __future__ import annotations

import math
from typing import Any

from ...formats import FORMATS
from ...formats.checkpoint import SIXTEEN
from ...quantize.layers import MODES
from ...quantize.recipe import AWQ, SMOOTHQUANT, SVDQUANT
from .judging import bits_of, gain, holm, paired

HEAD = (
    "| format | algorithm | options | layers | SQNR, held out | worst call | PSNR of samples "
    "| class read right (95 %) | lost / won | p | UNet |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
SIGNIFICANT = 0.05
SAME_SIZE = 0.01  # as share of a file
SAME_QUALITY = 0.1  # dB: 2 % of the noise
# algorithms whose layers multiply what they get by a scale, at every call
SMOOTHING = (SMOOTHQUANT, *AWQ)


def decibels(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "exact"


def share(row: dict[str, Any]) -> str:
    """Such as "97.5 % (94.7 to 98.8)"."""
    low, high = row["accuracy_interval"]
    return f"{100 * row['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def line(row: dict[str, Any]) -> str:
    """A row of the table; a format's default algorithm is bold."""
    algorithm = f"**{row['algorithm']}**" if row["default"] else row["algorithm"]
    return (
        f"| {row['format']} | {algorithm} | {row['options']} | {row['layers']} "
        f"| {decibels(row['sqnr_db'])} | {decibels(row['worst_sqnr_db'])} "
        f"| {decibels(row['psnr_db'])} | {share(row)} | {row['lost']} / {row['won']} "
        f"| {row['p']:.2g} | {row['bytes'] / 1e6:.1f} MB |"
    )


def recipe_name(row: dict[str, Any]) -> str:
    return f"{row['algorithm']}, {row['options']}" if row["options"] else row["algorithm"]


def costs(own: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """What another recipe asks of its user that the default does not."""
    found = []
    larger = row["bytes"] / own["bytes"] - 1
    if larger > SAME_SIZE:
        found.append(f"{100 * larger:.0f} % larger")
    if own["opens_in_stock"] and not row["opens_in_stock"]:
        found.append("not for stock ComfyUI")
    if row["algorithm"] in SMOOTHING and own["algorithm"] not in SMOOTHING:
        found.append("smoothing at every call")
    if row["algorithm"] == SVDQUANT != own["algorithm"]:
        found.append("branches to compute")
    if row["activations"] == SIXTEEN:
        found.append("arithmetic in 16 bits")
    return found


def defaults(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each format and choice of layers: its default beside every other recipe, in table order.

    psnr, sqnr: what the other gains over the default in dB, see `judging.gain`. verdict: of the two,
    see `verdict`. costs: see `costs`. lost and won by the other, p of McNemar's test.
    """
    found = []
    for layers in MODES:
        for form in FORMATS:
            group = [row for row in rows if (row["format"], row["layers"]) == (form, layers)]
            own = next((row for row in group if row["default"]), None)
            for row in group:
                if own is None or row is own:
                    continue
                psnr = gain(own["errors"], row["errors"])
                sqnr = gain(own["noise"], row["noise"], row["calls_a_run"])
                found.append(
                    {
                        "format": form,
                        "layers": layers,
                        "default": recipe_name(own),
                        "other": recipe_name(row),
                        "psnr": psnr,
                        "sqnr": sqnr,
                        "verdict": verdict(psnr, sqnr),
                        "costs": costs(own, row),
                        **paired(bits_of(own["readings"]), bits_of(row["readings"])),
                    }
                )
    return found


def verdict(*gains: dict[str, Any]) -> str:
    """Of gains of one recipe over another: "better" where some is a gain and none a loss, "worse" the
    other way round, "mixed" where there are both, "tie" where there is neither. A gain's interval lies
    above 0, and it is SAME_QUALITY or more; a loss's the same below."""
    above = any(one["interval"][0] > 0 and one["db"] >= SAME_QUALITY for one in gains)
    below = any(one["interval"][1] < 0 and one["db"] <= -SAME_QUALITY for one in gains)
    return "mixed" if above and below else "better" if above else "worse" if below else "tie"


def eight_bits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether recipes of 8-bit weights read fewer classes right than the model in 16 bits.

    worst: the lowest end of the intervals of the change. p: the least, adjusted for their number.
    """
    chosen = [row for row in rows if FORMATS[row["format"]].BITS == 8]
    if not chosen:
        return {"recipes": 0}
    adjusted = holm([row["p"] for row in chosen])
    losses = [p for row, p in zip(chosen, adjusted, strict=True) if row["lost"] > row["won"]]
    least = min(losses, default=1.0)
    return {
        "recipes": len(chosen),
        "p": least,
        "beyond_noise": sum(p < SIGNIFICANT for p in losses),
        "largest_loss": max(0.0, *(-row["change"] for row in chosen)),
        "worst": min(row["change_interval"][0] for row in chosen),
    }


def without_infinity(value: Any) -> Any:
    """Infinite decibels, of outputs that are equal, as null: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: without_infinity(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_infinity(one) for one in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def signed(found: dict[str, Any]) -> str:
    """Such as "+0.31 dB (+0.12 to +0.50)"."""
    low, high = found["interval"]
    return f"{found['db']:+.2f} dB ({low:+.2f} to {high:+.2f})"


def _default_lines(rows: list[dict[str, Any]]) -> list[str]:
    found = defaults(rows)
    beaten = [one for one in found if one["verdict"] == "better" and not one["costs"]]
    paid = [one for one in found if one["verdict"] == "better" and one["costs"]]
    mixed = [one for one in found if one["verdict"] == "mixed"]
    lines = [
        "Each other recipe of a format beside its default, on the same samples and calls: what it "
        "gains, with the 95 % interval of a paired bootstrap over the samples (PSNR) and over the "
        "sampling runs (SQNR). Better is what gains in one of them and loses in neither; an interval that "
        f"holds 0 is no gain, nor is less than {SAME_QUALITY:g} dB. They can part: a sample is decided by "
        "the early calls, where large sigmas place shapes, while SQNR counts every call alike, and so the "
        "late ones, which refine it.",
        "",
        f"Better than the default at no cost: {names(beaten) or 'none'}. "
        f"Better at a cost: {names(paid) or 'none'}. "
        f"Better in one and worse in the other: {names(mixed) or 'none'}.",
        "",
        "| format | layers | default | other | PSNR of samples | SQNR, held out | by both | at a cost of "
        "| lost / won | p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        lines.append(
            f"| {one['format']} | {one['layers']} | {one['default']} | {one['other']} "
            f"| {signed(one['psnr'])} | {signed(one['sqnr'])} | {one['verdict']} "
            f"| {', '.join(one['costs'])} | {one['lost']} / {one['won']} | {one['p']:.2g} |"
        )
    return lines


def names(found: list[dict[str, Any]]) -> str:
    """Recipes of a list of `defaults`, for a sentence."""
    return "; ".join(f"{one['format']} {one['other']} ({one['layers']})" for one in found)


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    where, rows, taught = result["machine"], result["rows"], result["training"]
    own, sampling = result["reference"], result["sampling"]
    seen, asked = result["calibration"], result["held_out"]
    judge = ", ".join(f"{100 * x:.2f} %" for x in result["classifier_accuracy"].values())
    eight = eight_bits(rows)
    verdict = (
        f"8-bit weights: {eight['beyond_noise']} of {eight['recipes']} recipes lose accuracy beyond "
        f"noise (McNemar's exact test, Holm's adjustment, {SIGNIFICANT:g}; least p "
        f"{eight['p']:.2g}); the largest loss seen is {100 * eight['largest_loss']:.1f} points, "
        f"and the lowest end of their 95 % intervals {100 * eight['worst']:+.1f} points."
        if eight["recipes"]
        else "No recipe of 8-bit weights is among these."
    )
    return "\n".join(
        [
            "# Quality on a model with learned weights",
            "",
            f"An SD1.5 UNet of {result['unet_parameters'] / 1e6:.1f} M parameters, trained for "
            f"{taught['steps']} steps (seed {taught['seed']}) to draw one of 4 shapes in one of 6 "
            f"colours on {sampling['size']}x{sampling['size']} latents; the class comes through the "
            "context. Recipes marked bold are their format's default.",
            "",
            "**What it cannot tell**: how a full SDXL or SD1.5 does on real pictures. It is small, "
            "trained briefly, has one level, tiny latents, and need not have the outlier channels of "
            "large models. It compares recipes with one another on weights and activations "
            "that were learnt. Small differences of SQNR between recipes are differences on this "
            "one model, calibration and held-out run. The classes are easy to read, at the noise of 4 "
            "bits too: that column shows that a recipe breaks nothing, not which is the better one.",
            "",
            f"Calibrated on {seen['records']} UNet calls of {seen['runs']} sampling run(s). SQNR: of "
            f"the UNet's output on {asked['records']} calls of {asked['runs']} other runs, all calls "
            "together and the worst one. PSNR: of samples from the same noise against those of the "
            "model in 16 bits, turned to RGB, range 0 to 1, all samples together. Class read right: "
            f"of {own['samples']} samples ({sampling['steps']} steps of {sampling['sampler_name']}, "
            f"cfg {sampling['cfg']:g}), shape and colour, by a small conv net that reads {judge} of "
            "4800 drawings it has not seen; Wilson's interval. Lost / won: samples that only the "
            "16-bit model gets right, and that only the quantized one does; p: McNemar's exact test.",
            "",
            f"Machine: {where['gpu'] or 'no GPU'}; {where['cpu']}, torch on {where['threads']} "
            f"thread(s); torch {where['torch']}, ModelOpt {where['modelopt']}, ComfyUI "
            f"{where['comfyui']}. Integer arithmetic, emulated exactly. Made by "
            "`benchmarks/quality.py`.",
            "",
            f"The model in 16 bits: {share(own)} right.",
            "",
            HEAD,
            *map(line, rows),
            "",
            "## What it says of the defaults",
            "",
            verdict,
            "",
            *_default_lines(rows),
            "",
        ]
    )
