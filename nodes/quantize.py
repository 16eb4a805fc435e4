"""Quantize UNet: MODEL and CALIBRATION -> quantized MODEL and a report."""

from __future__ import annotations

from comfy_api.latest import io

from ..formats import FORMATS
from ..quantize import layers as layer_choice
from ..quantize.recipe import ALGORITHMS, DEFAULT_ALPHA, SMOOTHQUANT
from .quantize_and_load import quantize_and_load
from .types import Calibration

ALGORITHM_TOOLTIP = {
    "max": "max: scales from the largest values seen.",
    SMOOTHQUANT: "smoothquant: moves outliers of the activations into the weights first.",
}


def _algorithm_option(name: str) -> io.DynamicCombo.Option:
    alpha = io.Float.Input(
        "alpha",
        default=DEFAULT_ALPHA,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip="How much of the activations' outliers moves into the weights: 0 none, 1 all.",
    )
    return io.DynamicCombo.Option(name, [alpha] if name == SMOOTHQUANT else [])


def _format_option(name: str) -> io.DynamicCombo.Option:
    algorithms = ALGORITHMS[name]
    algorithm = io.DynamicCombo.Input(
        "algorithm",
        options=[_algorithm_option(a) for a in algorithms],
        tooltip=" ".join(ALGORITHM_TOOLTIP[a] for a in algorithms),
    )
    return io.DynamicCombo.Option(name, [algorithm])


class Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptQuantize",
            display_name="Quantize UNet (ModelOpt)",
            category="ModelOpt",
            description="Quantizes the UNet of an SD1.5, SDXL or related MODEL with NVIDIA "
            "ModelOpt, LoRAs attached to it included. The MODEL itself is not changed.",
            search_aliases=["quantize", "int8", "fp8", "compress", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to quantize, in 16 or 32 bits."),
                io.DynamicCombo.Input(
                    "format",
                    options=[_format_option(name) for name in FORMATS],
                    tooltip="; ".join(f"{name}: {m.TITLE}" for name, m in FORMATS.items()),
                ),
                io.Combo.Input(
                    "layers",
                    options=list(layer_choice.MODES),
                    default=layer_choice.LINEAR_AND_CONV,
                    tooltip="linear + conv: the smallest file, opens with this pack only. "
                    "linear only: opens in stock ComfyUI too (not with smoothquant).",
                ),
                io.String.Input(
                    "skip",
                    multiline=True,
                    default="\n".join(layer_choice.DEFAULT_SKIP),
                    tooltip="Layers to leave in 16 bits: names with * and ?, one a line.",
                ),
                Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="What the UNet really saw. Needed but for int8, max, linear only; "
                    "without it the quality is not measured.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model."),
                io.String.Output(display_name="report", tooltip="Size, quality, kernels, time."),
            ],
        )

    @classmethod
    def validate_inputs(cls, skip: str | None = None, format=None) -> bool | str:
        """ComfyUI leaves out a format or algorithm that the schema does not have.

        `skip` is named because ComfyUI reports the answer on an input that it did pass.
        """
        if format is None:
            return f"format must be one of {', '.join(FORMATS)}: choose one in the node"
        if isinstance(format, dict) and not format.get("algorithm"):
            known = ", ".join(ALGORITHMS[format["format"]])
            return f"algorithm of {format['format']} must be one of {known}: choose one"
        return True

    @classmethod
    def execute(cls, model, format, layers, skip, calibration=None) -> io.NodeOutput:
        quantized, report, figures = quantize_and_load(model, format, layers, skip, calibration)
        return io.NodeOutput(quantized, report, ui={"text": [report], "modelopt": [figures]})
