"""Record Calibration: a KSampler that keeps what the UNet saw."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import prompts
from ..quantize.bridge import sampling
from ..utils.report import calibration_line
from .sampler_inputs import denoise_input, max_records_input, sampler_inputs, seed_input
from .shown import shown
from .types import Calibration


class RecordCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptRecordCalibration",
            display_name="Record Calibration (ModelOpt)",
            category="ModelOpt",
            description="Samples exactly as KSampler does, and records what the UNet is called "
            "with on the way. Quantizing with that recording fits the scales to your own pictures.",
            search_aliases=["calibrate", "quantize", "KSampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with and to record."),
                seed_input("The random seed of the noise."),
                *sampler_inputs(),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to start from."),
                denoise_input(),
                max_records_input(
                    "UNet calls to keep, evenly over the steps and over all runs recorded so far."
                ),
                Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="An earlier recording of the same model to add to.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="LATENT", tooltip="The sampled latent, the same as KSampler's."
                ),
                Calibration.Output(
                    display_name="CALIBRATION", tooltip="What the UNet saw, for the Quantize node."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        hidden = cls.hidden
        text = hidden and prompts.find(hidden.prompt, hidden.unique_id, "positive")
        latent, made = sampling.record(prompt=text, **inputs)
        return io.NodeOutput(latent, made, ui=shown(calibration_line(made.summary())))
