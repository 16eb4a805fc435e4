"""The chart of Compare Quantized: SQNR by timestep and by layer, made to be read 420 pixels wide."""

from __future__ import annotations

import math

import torch

from .chart import as_image
from .compare_report import POINTWISE, decibels, layer_words, worst_layers

# told apart by colour-blind people too (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SHAPES = {"linear": ("s", "D", "P"), "conv2d": ("o", "v", "h"), POINTWISE: ("^", "X", "*")}
WORDS = {"linear": "Linear", "conv2d": "conv", POINTWISE: "1x1 conv"}
NAMED = 5
LONGEST = 54  # letters of a name
PART = 14  # letters of a part of the model
BEYOND = {math.inf: "exact", -math.inf: "lost"}  # ticks beyond the numbers
WIDTH = 68  # letters of the x axis' size side by side


def compare_chart(found) -> torch.Tensor:
    """found: a quantize.compare.Compared -> IMAGE [1, H, W, 3], 0 to 1. On a light ground, which
    stays readable in a dark theme."""
    return as_image(figure_of(found))


def figure_of(found):
    """The same as a matplotlib Figure: of the output, of the layers, and the worst ones' names."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18, "axes.labelsize": 16}):
        labels = [_label(*group) for group in _groups(found.layers)]
        rows = math.ceil(len(labels) / _columns(labels))
        size = (8, 10 + 0.3 * max(rows - 2, 0))
        figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="#fafafa")
        figure.get_layout_engine().set(h_pad=0.08)
        times, layers, words = figure.subplots(3, 1, height_ratios=(3, 4, 1.5))
        _draw_times(times, found)
        _draw_layers(layers, found)
        _write_worst(words, found)
    return figure


def _shown(values: list[float]) -> tuple[list[float], dict[float, str]]:
    """Values that can be drawn, exact ones above the others and lost ones below, and the words of
    those two places."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    beyond = max(0.2 * (high - low), 1.0)
    places = {math.inf: high + beyond, -math.inf: low - beyond}
    words = {places[one]: name for one, name in BEYOND.items() if one in values}
    return [places.get(value, value) for value in values], words


def _mark_beyond(axes, values: list[float], words: dict[float, str]) -> None:
    """Ticks in dB among the finite values only, and the words of what has no number."""
    if not words:
        return
    from matplotlib.ticker import MaxNLocator

    finite = [value for value in values if value not in words]
    ticks = MaxNLocator(5).tick_values(min(finite), max(finite)) if finite else []
    ticks = [one for one in ticks if min(finite) <= one <= max(finite)]
    axes.set_yticks([*ticks, *words], [*(f"{one:g}" for one in ticks), *words.values()])
    if not finite:
        axes.set_ylim(min(words) - 1, max(words) + 1)


def _draw_times(axes, found) -> None:
    sigmas = [step.sigma for step in found.steps]
    values, words = _shown([step.energy.db for step in found.steps])
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
    _mark_beyond(axes, values, words)


def _groups(layers) -> dict[tuple[str, str], list[int]]:
    """(what it is quantized to, kind) -> places of those layers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, one in enumerate(layers):
        groups.setdefault((layer_words(one.layer), one.kind), []).append(index)
    return dict(sorted(groups.items()))


def _label(form: str, kind: str) -> str:
    words = f"{WORDS[kind]} {form}"
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


def _columns(labels: list[str]) -> int:
    return 1 if max(map(len, labels), default=0) > 34 else 2


def _draw_layers(axes, found) -> None:
    if not found.layers:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no quantized layer to compare", ha="center", va="center")
        return
    values, words = _shown([one.energy.db for one in found.layers])
    size = 64 if len(found.layers) < 150 else 24
    groups = _groups(found.layers)
    labels = [_label(*group) for group in groups]
    formats = list(dict.fromkeys(form for form, _ in groups))
    for place, ((form, kind), members) in enumerate(groups.items()):
        # the shape says the kind; the colour the group, of many the format, an eighth of which has
        # other shapes
        number = place if len(groups) <= len(COLOURS) else formats.index(form)
        shapes = SHAPES[kind]
        axes.scatter(
            members,
            [values[i] for i in members],
            s=size,
            color=COLOURS[number % len(COLOURS)],
            marker=shapes[number // len(COLOURS) % len(shapes)],
            label=labels[place],
            zorder=3,
        )
    low, high = min(values), max(values)
    room = max(high - low, 1.0)
    _mark_parts(axes, found.layers)
    _dress(axes)
    _mark_beyond(axes, values, words)
    axes.set_ylim(low - 0.3 * room, high + 0.1 * room)
    _number_worst(axes, found.layers, values, low - 0.2 * room)
    axes.set_title("Each layer on the original's input")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.45, -0.1),
        ncols=_columns(labels),
        fontsize=14,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def _number_worst(axes, layers, values: list[float], height: float) -> None:
    """1 to NAMED in a row at `height`, each with a line to its point."""
    index = {one.name: place for place, one in enumerate(layers)}
    numbers = {
        index[one.name]: number for number, one in enumerate(worst_layers(layers)[:NAMED], start=1)
    }
    for place, across in _spread(sorted(numbers), len(layers)).items():
        axes.annotate(
            str(numbers[place]),
            (place, values[place]),
            xytext=(across, height),
            ha="center",
            va="center",
            fontsize=18,
            fontweight="bold",
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 1, "shrinkA": 2},
        )


def _spread(places: list[int], count: int) -> dict[int, float]:
    """Places in rising order on an axis of `count` -> where a number fits, none over another."""
    gap = 0.05 * count
    across: list[float] = []
    for place in places:
        across.append(max(place, across[-1] + gap) if across else max(place, 0.4 * gap - 0.5))
    over = across[-1] - (count - 0.5 - 0.4 * gap) if across else 0.0
    for i in reversed(range(len(across))):
        if over <= 0:
            break
        across[i] -= over
        over = gap - (across[i] - across[i - 1]) if i else 0.0
    return dict(zip(places, across, strict=True))


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
    named = {}
    for name, first, last in parts:
        short = name.removesuffix("_blocks").removesuffix("_block")
        short = short if len(short) <= PART else short[: PART - 1] + "…"
        if (last - first + 1) / len(layers) * WIDTH > len(short):  # where there is room for it
            named[(first + last) / 2] = short
    axes.set_xticks(list(named), list(named.values()))
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
