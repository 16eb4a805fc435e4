"""Quantize UNet: MODEL and CALIBRATION -> quantized MODEL and a report."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize.recipe import recipe_of
from ..utils import progress
from .planning import sizes
from .quantize_and_load import quantize_and_load
from .recipe_inputs import recipe_inputs, why_not
from .shown import shown
from .types import Calibration


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptQuantize",
            display_name="Quantize UNet (ModelOpt)",
            category="ModelOpt",
            description="Quantizes the UNet of an SD1.5, SDXL or related MODEL with NVIDIA "
            "ModelOpt, LoRAs attached to it included; of FLUX, SD3, Qwen-Image and WAN the Linear "
            "layers. The MODEL itself is not changed.",
            search_aliases=["quantize", "int8", "fp8", "compress", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to quantize, in 16 or 32 bits."),
                *recipe_inputs(),
                Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="What the UNet really saw. Needed wherever activations get a scale or "
                    "weights are smoothed; without it the quality is not measured.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model."),
                io.String.Output(display_name="report", tooltip="Size, quality, kernels, time."),
            ],
        )

    @classmethod
    def validate_inputs(cls, skip: str | None = None, format=None) -> bool | str:
        """`skip` is named because ComfyUI reports the answer on an input that it did pass."""
        return why_not(format) or True

    @classmethod
    def execute(cls, model, format, layers, skip, calibration=None) -> io.NodeOutput:
        recipe = recipe_of(format, layers, skip)
        planned = sizes(model, recipe, calibration)
        progress.tell(planned.line())
        quantized, report, figures = quantize_and_load(model, recipe, calibration, planned)
        return io.NodeOutput(quantized, report, ui=shown(report, quantized, figures))
