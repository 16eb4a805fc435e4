"""Benchmark Model: a UNet call's time on this machine, beside the same weights in 16 bits."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders import benchmark
from .shown import shown


class Benchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptBenchmark",
            display_name="Benchmark Model (ModelOpt)",
            category="ModelOpt",
            description="Measures what one UNet call of a MODEL takes on this machine, against the "
            "same weights in 16 bits, which kernels run its layers, and what limits it. Works for "
            "ordinary MODELs of SD1.5, SD2 and SDXL kind too.",
            search_aliases=["speed", "it/s", "how fast"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to measure; it is not changed."),
                _size("width", "Width of the picture in pixels."),
                _size("height", "Height of the picture in pixels."),
                io.Int.Input(
                    "batch",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures at once. Guidance doubles it: 1 is a UNet call of batch 2.",
                ),
                io.Int.Input(
                    "repeats",
                    default=10,
                    min=1,
                    max=1000,
                    tooltip="Timed UNet calls in each of 5 rounds.",
                ),
                io.Boolean.Input(
                    "compare_eager",
                    default=True,
                    tooltip="Compare a quantized MODEL with its own weights in 16 bits.",
                ),
                io.Boolean.Input(
                    "compare_compiled",
                    default=False,
                    tooltip="Compare with the 16-bit weights under torch.compile; the first call "
                    "takes minutes.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The report, as text.")],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, width, height, batch, repeats, compare_eager, compare_compiled
    ) -> io.NodeOutput:
        text = benchmark.run(model, width, height, batch, repeats, compare_eager, compare_compiled)
        return io.NodeOutput(text, ui=shown(text))


def _size(name: str, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=512, min=64, max=8192, step=8, tooltip=tooltip)
