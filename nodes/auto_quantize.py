"""Auto Quantize UNet: the best mix of formats for a size, a number of bits or a quality."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import layers as layer_choice
from ..quantize import mixed
from ..quantize.candidates import CANDIDATES
from ..utils import packages
from .auto_and_load import auto_and_load
from .shown import shown
from .types import Calibration


def _target() -> io.Input:
    size = io.Float.Input(
        "megabytes",
        default=1500.0,
        min=1.0,
        max=1e6,
        step=1.0,
        round=0.000001,
        tooltip="The file is at most this large, in MB (a million bytes).",
    )
    bits = io.Float.Input(
        "bits",
        default=6.0,
        min=1.0,
        max=16.0,
        step=0.1,
        tooltip="Bits a weight on average, scales included, of the layers that may be quantized.",
    )
    quality = io.Float.Input(
        "sqnr_db",
        default=30.0,
        min=0.0,
        max=120.0,
        step=0.5,
        tooltip="The smallest file whose output on the recorded calls has at least this SQNR, in dB.",
    )
    recipe = io.String.Input(
        "recipe",
        multiline=True,
        default="",
        tooltip="What another Auto Quantize gave as `recipe`: the same again, without a search.",
    )
    options = {"size": size, "bits": bits, "quality": quality, "recipe": recipe}
    return io.DynamicCombo.Input(
        "target",
        options=[io.DynamicCombo.Option(name, [one]) for name, one in options.items()],
        tooltip="size: of the file. bits: a weight. quality: the smallest file that keeps it. "
        "recipe: a mix that was found before.",
    )


class AutoQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptAutoQuantize",
            display_name="Auto Quantize UNet (ModelOpt)",
            category="ModelOpt",
            description="Chooses the format of each layer: measures how much every allowed format in "
            "every layer changes the UNet's output on recorded calls, then takes the best mix for a "
            "size, a number of bits or a quality. Takes several quantizations; a second target with "
            "the same calibration takes one or two, a quality up to five.",
            search_aliases=["mixed precision", "automatic", "target size", "sensitivity"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to quantize, in 16 or 32 bits."),
                Calibration.Input("calibration", tooltip="What the UNet really saw."),
                _target(),
                *(
                    io.Boolean.Input(name, default=one.default, tooltip=one.text)
                    for name, one in CANDIDATES.items()
                ),
                io.Boolean.Input(
                    "sixteen_bits", default=True, tooltip="Layers may stay in 16 bits."
                ),
                io.Combo.Input(
                    "layers",
                    options=list(layer_choice.MODES),
                    default=layer_choice.LINEAR_AND_CONV,
                    tooltip="linear only: opens in stock ComfyUI if int4 and w4a8 are not allowed.",
                ),
                io.String.Input(
                    "skip",
                    multiline=True,
                    default="\n".join(layer_choice.DEFAULT_SKIP),
                    tooltip="Layers to leave in 16 bits in any case: names with * and ?, one a line.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model."),
                io.String.Output(
                    display_name="report", tooltip="What was reached, and each layer's format."
                ),
                io.String.Output(
                    display_name="recipe",
                    tooltip="The mix as JSON, for the target `recipe`, here or elsewhere.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, skip: str | None = None, target=None) -> bool | str:
        """`skip` is named because ComfyUI reports the answer on an input that it did pass, and leaves
        out a target that the schema does not have."""
        if (missing := packages.why_missing(packages.MODELOPT)) is not None:
            return missing
        if target is None:
            return "target must be size, bits, quality or recipe: choose one in the node"
        if isinstance(target, dict) and target.get("target") == "recipe":
            try:
                if target.get("recipe") is not None:
                    mixed.read(target["recipe"], "the recipe on the node")
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(
        cls, model, calibration, target, sixteen_bits, layers, skip, **allowed
    ) -> io.NodeOutput:
        quantized, report, recipe, figures = auto_and_load(
            model,
            calibration,
            target,
            [name for name in CANDIDATES if allowed[name]],
            sixteen_bits,
            layers,
            skip,
        )
        return io.NodeOutput(quantized, report, recipe, ui=shown(report, quantized, figures))
