"""The chart of Compare Quantized: SQNR by timestep and by layer, made to be read 420 pixels wide."""

from __future__ import annotations

import math

import torch

from .chart import as_image
from .compare_report import decibels, layer_words, worst_layers

# told apart by colour-blind people too (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NAMED = 5
LONGEST = 54  # letters of a name


def compare_chart(found) -> torch.Tensor:
    """found: a quantize.compare.Compared -> IMAGE [1, H, W, 3], 0 to 1. On a light ground, which
    stays readable in a dark theme."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.labelsize": 16}):
        figure = Figure(figsize=(8, 10), dpi=100, layout="constrained", facecolor="#fafafa")
        times, layers, words = figure.subplots(3, 1, height_ratios=(3, 4, 1.5))
        _draw_times(times, found)
        _draw_layers(layers, found)
        _write_worst(words, found)
        return as_image(figure)


def _shown(values: list[float]) -> list[float]:
    """Values that can be drawn: exact ones just above the others, lost ones just below."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    limits = {math.inf: max(finite) + 6, -math.inf: min(finite) - 6}
    return [limits.get(value, value) for value in values]


def _draw_times(axes, found) -> None:
    sigmas = [step.sigma for step in found.steps]
    values = _shown([step.energy.db for step in found.steps])
    axes.plot(sigmas, values, "o-", color=COLOURS[0], markersize=8, linewidth=2)
    if min(sigmas) > 0 and max(sigmas) > 10 * min(sigmas):
        axes.set_xscale("log")
    axes.invert_xaxis()  # sampling goes to the right
    total = found.energy.db
    if math.isfinite(total):
        axes.axhline(total, color="#555555", linestyle="--", linewidth=1.5)
    axes.set_title(f"UNet output: {decibels(total)} over {found.calls} calls")
    axes.set_xlabel("noise level sigma (sampling goes right)")
    _dress(axes)


def _draw_layers(axes, found) -> None:
    if not found.layers:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no quantized layer to compare", ha="center", va="center")
        return
    values = _shown([one.energy.db for one in found.layers])
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(found.layers):
        kind = {"linear": "Linear", "conv2d": "conv"}[one.kind]
        groups.setdefault(f"{kind} {layer_words(one.layer)}", []).append(index)
    size = 64 if len(found.layers) < 150 else 24
    for number, (label, members) in enumerate(groups.items()):
        axes.scatter(
            members,
            [values[i] for i in members],
            s=size,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=label,
            zorder=3,
        )
    _number_worst(axes, found.layers, values)
    _mark_parts(axes, found.layers)
    low, high = min(values), max(values)
    room = max(high - low, 1.0)
    axes.set_ylim(low - 0.16 * room, high + (0.1 + 0.13 * math.ceil(len(groups) / 2)) * room)
    axes.set_title("Each layer on the original's input")
    axes.legend(loc="upper center", ncols=2, fontsize=14, framealpha=0.9, handletextpad=0.2)
    _dress(axes)


def _number_worst(axes, layers, values: list[float]) -> None:
    """1 to NAMED beside their points: left of them where another named one or the edge is near."""
    index = {one.name: place for place, one in enumerate(layers)}
    places = [index[one.name] for one in worst_layers(layers)[:NAMED]]
    near = 0.06 * len(layers)
    for number, place in enumerate(places, start=1):
        left = any(0 < other - place < near for other in (*places, len(layers)))
        axes.annotate(
            str(number),
            (place, values[place]),
            xytext=(-9 if left else 9, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=18,
            fontweight="bold",
            zorder=4,
        )


def _mark_parts(axes, layers) -> None:
    """The parts of the model along the x axis, shaded in turn."""
    parts: list[list] = []
    for index, one in enumerate(layers):
        name = one.name.partition(".")[0]
        if not parts or parts[-1][0] != name:
            parts.append([name, index, index])
        parts[-1][2] = index
    for number, (_, first, last) in enumerate(parts):
        if number % 2:
            axes.axvspan(first - 0.5, last + 0.5, color="#000000", alpha=0.05, linewidth=0)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xticks(
        [(first + last) / 2 for _, first, last in parts],
        [name.removesuffix("_blocks").removesuffix("_block") for name, *_ in parts],
    )
    axes.tick_params(axis="x", length=0)


def _write_worst(axes, found) -> None:
    axes.set_axis_off()
    lines = [
        f"{number} {decibels(one.energy.db):>8}  {_short(one.name)}"
        for number, one in enumerate(worst_layers(found.layers)[:NAMED], start=1)
    ]
    if lines:
        text = "\n".join(["Worst layers:", *lines])
        axes.text(-0.08, 1, text, va="top", family="monospace", fontsize=13, linespacing=1.35)


def _short(name: str) -> str:
    """A layer's name in a line of the picture; the text has it whole."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _dress(axes) -> None:
    axes.set_ylabel("SQNR, dB")
    axes.grid(axis="y", alpha=0.35)
    axes.set_axisbelow(True)
    axes.set_facecolor("#ffffff")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
