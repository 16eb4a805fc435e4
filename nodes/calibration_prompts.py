"""Calibration from Prompts: sample a list of prompts and keep what the UNet saw."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import prompts as prompt_list
from ..quantize.bridge import sampling
from ..utils.report import calibration_line
from .sampler_inputs import max_records_input, sampler_inputs, seed_input
from .shown import shown
from .types import Calibration

SIZE = {"default": 1024, "min": 16, "max": 16384, "step": 8}


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
                    default="",
                    tooltip="The negative prompt of all of them.",
                ),
                io.Int.Input("width", **SIZE, tooltip="In pixels: 1024 for SDXL, 512 for SD1.5."),
                io.Int.Input("height", **SIZE, tooltip="In pixels: 1024 for SDXL, 512 for SD1.5."),
                *sampler_inputs(),
                seed_input("The seed of the first prompt; each next one has one more."),
                max_records_input(
                    "UNet calls to keep, evenly over prompts and steps. With fewer than prompts, "
                    "only so many prompts are sampled."
                ),
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
