"""The whole family of UNets: record, quantize, save, load, sample."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.recipe import Recipe

import nodes as comfy_nodes

# synthetic family -> ComfyUI's class
FAMILIES = {
    "inpainting": "SD15",
    "sd2": "SD20",
    "refiner": "SDXLRefiner",
    "ssd1b": "SSD1B",
    "vega": "Segmind_Vega",
    "koala1b": "KOALA_1B",
}
SAMPLING = {"seed": 1, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


def conditioning(width: int, seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 77, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def sample(model, positive, negative) -> torch.Tensor:
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    with torch.no_grad():
        (out,) = comfy_nodes.common_ksampler(model, *SAMPLING.values(), positive, negative, latent)
    return out["samples"]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_way(family, tmp_path):
    model = comfy.sd.load_diffusion_model_state_dict(synthetic.unet_state_dict(family))
    assert type(model.model.model_config).__name__ == FAMILIES[family]
    width = model.model.model_config.unet_config["context_dim"]
    given = [conditioning(width, seed) for seed in (1, 2)]
    expected, calibration = sampling.record(
        model,
        **SAMPLING,
        positive=given[0],
        negative=given[1],
        latent_image={"samples": torch.zeros(1, 4, 16, 16)},
        denoise=1.0,
        max_records=6,
    )
    made = engine.quantize_model(model, Recipe("fp8"), calibration)
    quantized = loader.load(made.checkpoint)
    assert type(quantized.model.model_config).__name__ == FAMILIES[family]
    engine.measure(made, quantized)
    assert made.figures["sqnr_db"] > 12
    ours = sample(quantized, *given)
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, expected["samples"])
    path = tmp_path / "x.safetensors"
    files.write(made.checkpoint, path)
    assert torch.equal(sample(loader.load_file(str(path)), *given), ours)
