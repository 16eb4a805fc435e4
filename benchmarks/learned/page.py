"""The result of benchmarks/quality.py as a page: the table, and what it says of the defaults."""

from __future__ import annotations

import math
from typing import Any

from ...formats import FORMATS
from ...quantize.layers import MODES
from .judging import bits_of, holm, paired

HEAD = (
    "| format | algorithm | options | layers | SQNR, held out | worst call | PSNR of samples "
    "| class read right (95 %) | lost / won | p | UNet |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
SIGNIFICANT = 0.05


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


def defaults(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each format and choice of layers with a choice: its default beside its best recipe.

    behind_db: the best SQNR less the default's. The accuracies are compared as in the table:
    lost and won by the default, p of McNemar's test.
    """
    found = []
    for layers in MODES:
        for form in FORMATS:
            group = [row for row in rows if (row["format"], row["layers"]) == (form, layers)]
            own = next((row for row in group if row["default"]), None)
            if own is None or len(group) < 2:
                continue
            best = max(group, key=lambda row: row["sqnr_db"])
            most = max(group, key=lambda row: (row["right"], row["default"]))
            found.append(
                {
                    "format": form,
                    "layers": layers,
                    "default": recipe_name(own),
                    "best": recipe_name(best),
                    "behind_db": round(best["sqnr_db"] - own["sqnr_db"], 3),
                    "most_right": recipe_name(most),
                    **paired(bits_of(most["readings"]), bits_of(own["readings"])),
                }
            )
    return found


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


def _default_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| format | layers | default | best SQNR | default behind by | most classes right "
        "| lost / won by the default | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in defaults(rows):
        lines.append(
            f"| {one['format']} | {one['layers']} | {one['default']} | {one['best']} "
            f"| {one['behind_db']:.2f} dB | {one['most_right']} | {one['lost']} / {one['won']} "
            f"| {one['p']:.2g} |"
        )
    return lines


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
            "one model, calibration and held-out run.",
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
