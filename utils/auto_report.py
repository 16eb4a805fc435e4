"""The words on an automatic mix of formats: what was reached, what one format alone gives, which
layer has what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .report import goal_words, megabytes


def plain(value: float) -> float | None:
    """A figure for JSON, which has no infinity."""
    return round(value, 3) if math.isfinite(value) else None


def text(
    goal: Mapping,
    layers: Mapping[str, Sequence[str]],
    size: int,
    predicted: float,
    measured: float,
    uniform: Sequence[tuple[str, int, float]],
    sixteen: Sequence[str],
    notes: Sequence[str],
    weight_only: int,
) -> tuple[str, str]:
    """What stands above the report of quantizing, and below it.

    goal: as a mixed recipe has it. layers: a recipe in words -> the layers that it quantizes. size:
    bytes of the file; SQNR in dB. uniform: one recipe for all layers -> size and SQNR.
    sixteen: layers that the mix leaves in 16 bits; weight_only: how many layers compute in 16 bits
    with weights of fewer.
    """
    lines = [f"Target: {goal_words(goal)}", f"Reached: {megabytes(size)}, {measured:.2f} dB"]
    if goal.get("kind") == "size":
        lines[-1] += f" ({size / goal['value']:.4f} of the target)"
    lines.append(f"The sensitivities predicted {predicted:.2f} dB")
    if weight_only:
        lines.append(
            f"{weight_only} layers have small weights but compute in 16 bits, which saves memory and "
            "not time: for speed, do not allow int8_weights and int4."
        )
    lines += notes
    lines.append("One recipe for all layers would give, in the same low-precision arithmetic:")
    lines += [f"  {name}: {megabytes(bytes_)}, {sqnr:.2f} dB" for name, bytes_, sqnr in uniform]
    below = ["Layers:"]
    below += [f"  {words}: {', '.join(names)}" for words, names in layers.items()]
    if sixteen:
        below.append(f"  16 bits: {', '.join(sixteen)}")
    return "\n".join(lines), "\n".join(below)
