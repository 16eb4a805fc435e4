"""Calibration from Prompts: sample a list of prompts and keep what the UNet saw."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import prompts as prompt_list
from ..quantize import words
from ..quantize.bridge import sampling
from ..utils.report import calibration_line
from .sampler_inputs import max_records_input, sampler_inputs, seed_input, told
from .shown import shown
from .types import Calibration


class CalibrationPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptCalibrationPrompts",
            display_name="Calibration from Prompts (ModelOpt)",
            category="ModelOpt",
            description="Samples a picture for each prompt, without decoding it, and records what "
            "the UNet is called with. Use it where the one prompt of a graph is too little.",
            search_aliases=["calibrate", "quantize"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with and to record."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="\n".join(prompt_list.BUILT_IN),
                    tooltip="One prompt a line: what you make pictures of, in your own words.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    **told("negative"),
                ),
                *(
                    io.Int.Input(name, step=prompt_list.SIZE_STEP, **told(name))
                    for name in ("width", "height")
                ),
                *sampler_inputs(),
                seed_input(words.SAMPLING["seed"]),
                max_records_input(words.SAMPLING["max_records"]),
            ],
            outputs=[
                Calibration.Output(
                    display_name="CALIBRATION", tooltip="What the UNet saw, for the Quantize node."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        """None: the text comes from another node and is not known yet."""
        if prompts is None or prompt_list.split(prompts):
            return True
        return "a calibration needs at least 1 prompt, got 0 in prompts: write one a line"

    @classmethod
    def execute(cls, prompts: str, **inputs) -> io.NodeOutput:
        made = sampling.record_prompts(prompts=prompt_list.split(prompts), **inputs)
        return io.NodeOutput(made, ui=shown(calibration_line(made.summary())))
