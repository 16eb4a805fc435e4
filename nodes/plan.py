"""Plan Quantization: what a recipe will give and take, before anything is quantized."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import mixed
from ..quantize.recipe import recipe_of
from .planning import plan
from .recipe_inputs import recipe_inputs, why_not
from .shown import shown
from .types import Calibration


class Plan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptPlan",
            display_name="Plan Quantization (ModelOpt)",
            category="ModelOpt",
            description="Tells before the run how large the quantized file will be (to the byte), "
            "what memory it takes to run and to quantize, how long it takes here, what opens in "
            "stock ComfyUI and what this machine computes natively. Nothing is quantized.",
            search_aliases=["predict size", "vram", "which format", "how long"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to plan for, in 16 or 32 bits."),
                *recipe_inputs(),
                Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="The recording you will quantize with: one of its UNet calls is measured. "
                    "Without it, a call's memory and time are not known.",
                ),
                io.String.Input(
                    "recipe",
                    optional=True,
                    force_input=True,
                    tooltip="The recipe that Auto Quantize gave: its mix is planned, format, layers and "
                    "skip above do not count then.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="plan", tooltip="The text shown on the node."),
                io.Int.Output(display_name="file_bytes", tooltip="Bytes of the file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, skip: str | None = None, format=None) -> bool | str:
        """`skip` is named because ComfyUI reports the answer on an input that it did pass."""
        return why_not(format) or True

    @classmethod
    def execute(
        cls, model, format, layers, skip, calibration=None, recipe: str | None = None
    ) -> io.NodeOutput:
        if recipe is None:
            chosen = recipe_of(format, layers, skip)
        else:
            chosen = mixed.read(recipe, "the recipe that is connected")
        text, figures = plan(model, chosen, calibration)
        return io.NodeOutput(text, figures["file_bytes"], ui=shown(text, figures=figures))
