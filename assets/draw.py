#!/usr/bin/env python3
"""Draws icon.png and banner.png of the registry's page: a curve, and the steps it is rounded to."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
BACK, CURVE, STEPS, FILL, WORDS = "#14171c", "#7d8896", "#7fd858", "#7fd85826", "#f2f5f7"
DPI = 100


def curve(x):
    """A wave packet between -1 and 1."""
    import numpy as np

    return np.cos(1.35 * np.pi * x) * np.exp(-1.1 * x**2)


def draw(axes, span: tuple[float, float], samples: int, width: float, levels: int) -> None:
    """The curve over `span`, and its values in the middle of `samples` equal parts, rounded to `levels`
    steps on each side of zero. width: of the lines, in points."""
    import numpy as np

    x = np.linspace(*span, 800)
    edges = np.linspace(*span, samples + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    rounded = np.round(curve(middle) * levels) / levels
    axes.stairs(rounded, edges, fill=True, color=FILL, linewidth=0)
    axes.plot(x, curve(x), color=CURVE, linewidth=0.6 * width, solid_capstyle="round")
    axes.stairs(rounded, edges, baseline=None, color=STEPS, linewidth=width)
    axes.set_xlim(*span)
    axes.set_ylim(-0.85, 1.25)
    axes.axis("off")


def icon(path: Path) -> None:
    """400 x 400 pixels."""
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    figure = pyplot.figure(figsize=(4, 4), dpi=DPI)
    back = figure.add_axes((0, 0, 1, 1))
    back.add_patch(
        FancyBboxPatch(
            (0.1, 0.1), 0.8, 0.8, boxstyle="round,pad=0.1,rounding_size=0.18", color=BACK
        )
    )
    back.set(xlim=(0, 1), ylim=(0, 1))
    back.axis("off")
    draw(figure.add_axes((0.06, 0.14, 0.88, 0.76)), (-1.08, 1.08), 9, 10, levels=3)
    figure.savefig(path, transparent=True)
    pyplot.close(figure)


def banner(path: Path) -> None:
    """1680 x 720 pixels, 21:9."""
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(16.8, 7.2), dpi=DPI, facecolor=BACK)
    draw(figure.add_axes((0, 0.03, 1, 0.55)), (-2.4, 2.4), 48, 5, levels=7)
    say = {"color": WORDS, "ha": "center", "va": "center", "family": "DejaVu Sans"}
    figure.text(0.5, 0.82, "ModelOpt for ComfyUI", size=66, weight="bold", **say)
    figure.text(0.5, 0.665, "quantize your own SDXL and SD1.5 UNets, in the graph", size=28,
                **(say | {"color": CURVE}))  # fmt: skip
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    icon(HERE / "icon.png")
    banner(HERE / "banner.png")
