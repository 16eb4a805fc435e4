"""Quantized Model Info: header, kernels and sizes of a quantized MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders import info
from ..utils.chart import blocks_chart
from .shown import shown


class ModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptModelInfo",
            display_name="Quantized Model Info",
            category="ModelOpt",
            description="Shows what a quantized MODEL was made from, how, with which recording and "
            "versions, how good it is and what runs it.",
            inputs=[io.Model.Input("model", tooltip="A MODEL quantized or loaded by this pack.")],
            outputs=[
                io.String.Output(
                    display_name="info", tooltip="What the node shows, with long lists whole."
                ),
                io.Image.Output(display_name="chart", tooltip="Bits and size by block."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        short, text = info.in_full(model)
        chart = blocks_chart(info.blocks(model), "Quantized UNet by block")
        return io.NodeOutput(text, chart, ui=shown(short, model))
