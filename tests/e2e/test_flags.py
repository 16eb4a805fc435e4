"""ComfyUI's own switches, each in a server of its own: a quantized file loads and samples."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.devtools.server import ComfyServer
from comfyui_modelopt.formats import files
from comfyui_modelopt.quantize.recipe import Recipe
from safetensors.torch import load_file

from .workflows import generate_workflow

pytestmark = pytest.mark.e2e

# switch -> how near to the latents without it, in dB
SWITCHES = {
    "--force-channels-last": 40,
    "--bf16-unet": 8,
    "--fp16-unet": 15,
    "--use-pytorch-cross-attention": 40,
}
# where activations are rounded to 8 bits, a last place of float32 moves whole steps later on, and
# four steps of a UNet with random weights make that as large as the rounding itself
ROUNDED = 1
RECIPES = {"all": Recipe("int8", "smoothquant", 0.5), "linear": Recipe("fp8", layers="linear only")}


@pytest.fixture(scope="module")
def run(comfyui, checkpoints, quantized, tmp_path_factory):
    """Switch -> name -> latent."""
    folder = tmp_path_factory.mktemp("files")
    for name, recipe in RECIPES.items():
        files.write(quantized(recipe).checkpoint, folder / f"{name}.safetensors")

    def go(switch: str | None) -> dict[str, torch.Tensor]:
        extra = [switch] if switch else []
        server = ComfyServer(comfyui, tmp_path_factory.mktemp("server"), args=extra)
        for kind, path in (
            ("checkpoints", checkpoints / "sd15.safetensors"),
            *(("diffusion_models", folder / f"{name}.safetensors") for name in RECIPES),
        ):
            (server.models / kind).mkdir(parents=True, exist_ok=True)
            (server.models / kind / path.name).symlink_to(path)
        unets = [(name, f"{name}.safetensors") for name in RECIPES]
        graph = generate_workflow("sd15.safetensors", None, unets, "ModelOptLoadUNet")
        with server:
            result = server.run(graph.nodes, timeout=600)
        assert result.error is None, result.error
        found = {}
        for name in RECIPES:
            (path,) = (server.output / "latents").glob(f"{name}_*.latent")
            found[name] = load_file(path)["latent_tensor"]
        return found

    return go


@pytest.fixture(scope="module")
def without(run):
    return run(None)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch(run, without, switch):
    for name, latent in run(switch).items():
        near = SWITCHES[switch] if name == "linear" else ROUNDED
        assert torch.isfinite(latent).all()
        noise = (latent - without[name]).square().sum()
        assert 10 * torch.log10(without[name].square().sum() / noise) > near, name
