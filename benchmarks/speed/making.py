"""The checkpoints that arms load: random weights, and the pack's own quantization of them."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import torch

from ...devtools import random_weights, synthetic
from ...formats import files
from ...loaders import unet_inputs
from ...quantize import engine
from ...quantize.bridge import sampling
from ...quantize.recipe import Recipe
from .arms import file_of
from .settings import Setting


def sixteen(setting: Setting, folder: Path) -> None:
    """The UNet in fp16 with random weights whose outlier channels a quantizer meets in real ones."""
    specs = synthetic.unet_specs(setting.family, setting.size)
    random_weights.write(file_of(folder, None), specs)


def quantized(setting: Setting, folder: Path, needs: tuple[str, str]) -> None:
    """The same quantized as the Quantize node does, with scales from one sampled step."""
    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)))
    made = unet_inputs.make(model, setting.pixels, setting.pixels, 1)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=torch.Generator().manual_seed(0))}
    cond, uncond = ([[made.conds["c_crossattn"][i : i + 1], pooled]] for i in (1, 0))
    with torch.no_grad():
        _, calibration = sampling.record(
            model,
            seed=0,
            steps=1,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            positive=cond,
            negative=uncond,
            latent_image={"samples": torch.zeros(1, 4, *made.x.shape[2:])},
            denoise=1.0,
            max_records=2,
        )
        recipe = Recipe(needs[0], "max", layers=needs[1])
        files.write(
            engine.quantize_model(model, recipe, calibration).checkpoint, file_of(folder, needs)
        )
