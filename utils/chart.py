"""Charts of reports as ComfyUI IMAGE tensors, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def blocks_chart(blocks: Mapping[str, tuple[float, float]], title: str) -> torch.Tensor:
    """block name -> (bits per weight, size in MB), in the UNet's order -> IMAGE [1, H, W, 3], 0 to 1,
    made to be read 420 pixels wide.

    Above the size of each block, below its average bits per weight.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 16, "axes.titlesize": 18}):
        figure = Figure(figsize=(8, 8), dpi=100, layout="constrained", facecolor="#fafafa")
        _draw_blocks(figure, blocks, title)
    return as_image(figure)


def _draw_blocks(figure, blocks: Mapping[str, tuple[float, float]], title: str) -> None:
    sizes, bits = figure.subplots(2, 1, sharex=True)
    names = list(blocks)
    sizes.bar(names, [blocks[name][1] for name in names], color="#4c72b0")
    sizes.set_ylabel("size, MB")
    sizes.set_title(title)
    bits.bar(names, [blocks[name][0] for name in names], color="#55a868")
    bits.set_ylabel("bits per weight")
    bits.set_yticks([0, 4, 8, 12, 16])
    bits.set_ylim(0, 17)
    bits.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=14)
    for axes in (sizes, bits):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)


def _short(block: str) -> str:
    """input_blocks.4 as input 4."""
    return block.replace("_blocks.", " ").replace("_block", "")


def as_image(figure) -> torch.Tensor:
    """A matplotlib figure -> IMAGE [1, H, W, 3], 0 to 1."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = numpy.asarray(canvas.buffer_rgba())[:, :, :3]
    return torch.from_numpy(pixels.copy()).float().div_(255.0).unsqueeze(0)
