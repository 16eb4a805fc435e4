"""Compare Quantized: a MODEL beside the one it was made from."""

from __future__ import annotations

from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..loaders import info
from ..quantize import compare as measures
from ..quantize.pictures import Settings
from ..utils.compare_chart import compare_chart
from ..utils.compare_report import compare_report
from .sampler_inputs import denoise_input, sampler_inputs, seed_input
from .shown import shown
from .types import Calibration

NEEDED = ("positive", "negative", "latent_image")
BLOCKED = "there are pictures only with positive, negative, latent_image and vae: connect them"


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = [
            seed_input("Pictures: the random seed of the noise, the same for both."),
            *sampler_inputs(),
            denoise_input(),
        ]
        for one in settings:
            one.optional = True
        return io.Schema(
            node_id="ModelOptCompare",
            display_name="Compare Quantized (ModelOpt)",
            category="ModelOpt",
            description="Tells how near a quantized MODEL is to the original: the UNet's output by "
            "timestep, every layer by itself with the worst ones named, and same-seed pictures if "
            "you connect what they need. Takes MODELs quantized elsewhere too.",
            search_aliases=["quality", "SQNR", "PSNR", "SSIM", "difference"],
            inputs=[
                io.Model.Input(
                    "reference", tooltip="The MODEL that was quantized, LoRAs included."
                ),
                io.Model.Input("quantized", tooltip="The quantized MODEL."),
                Calibration.Input(
                    "calibration",
                    tooltip="Recorded UNet calls to replay; best of other prompts than those it was "
                    "calibrated on.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Pictures: what they should show."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Pictures: what they should not show."
                ),
                io.Latent.Input(
                    "latent_image", optional=True, tooltip="Pictures: the latent to start from."
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Pictures: decodes them; without it latents are compared.",
                ),
                *settings,
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report, as text."),
                io.Image.Output(display_name="chart", tooltip="SQNR by timestep and by layer."),
                io.Image.Output(
                    display_name="reference",
                    tooltip="Pictures of the original, for Compare Images.",
                ),
                io.Image.Output(
                    display_name="quantized", tooltip="The same of the quantized MODEL."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, reference, quantized, calibration, vae=None, **inputs) -> io.NodeOutput:
        settings = settings_of(vae, inputs)
        layers = info.quantized_layers(quantized)
        found = measures.compare(reference, quantized, calibration, layers, settings)
        text, chart = compare_report(found), compare_chart(found)
        images = found.images or [ExecutionBlocker(BLOCKED)] * 2
        page = shown(text, figures=found.figures()) | ui.PreviewImage(chart).as_dict()
        return io.NodeOutput(text, chart, *images, ui=page)


def settings_of(vae, inputs: dict) -> Settings | None:
    """What to sample, or None where nothing for pictures is connected. Raises for a part of it."""
    missing = [name for name in NEEDED if inputs.get(name) is None]
    if len(missing) == len(NEEDED) and vae is None:
        return None
    if missing:
        raise ValueError(
            f"pictures need {', '.join(NEEDED)}, got nothing in {', '.join(missing)}: connect it, or "
            "disconnect the others and vae to compare without pictures"
        )
    return Settings(latent=inputs.pop("latent_image"), vae=vae, **inputs)
