"""Small diffusers UNets with random weights, of the SD1.5 and the SDXL kind and their kin, and calls of
them."""

from __future__ import annotations

import comfy.model_management
import torch
from comfyui_modelopt.loaders import unet as loader

SD15 = {
    "block_out_channels": (320,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# of KOALA's depths, which ComfyUI knows as an SDXL; the middle block has those of the last level
SDXL = {
    "block_out_channels": (320, 320, 320),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 5],
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 5, 5),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2 = {
    "block_out_channels": (320, 640),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10),
    "use_linear_projection": True,
}
KINDS = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sd2": SD2,
    "inpainting": SD15 | {"in_channels": 9},
    # SD2.1 that also takes an image's embedding
    "unclip": SD2
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
}


def make(kind: str, seed: int = 0) -> torch.nn.Module:
    """A UNet2DConditionModel with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    given = {"sample_size": 8, "in_channels": 4, "out_channels": 4} | KINDS[kind]
    return UNet2DConditionModel(**given).eval()


def inputs(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Latent [2, 4 or 9, 8, 8], timestep [2], context; pooled text and sizes for SDXL, the image's
    embedding for unCLIP."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = {
        "x": normal(2, KINDS[kind].get("in_channels", 4), 8, 8),
        "t": torch.tensor([801.0, 801.0]),
    }
    found["context"] = normal(2, 77, KINDS[kind]["cross_attention_dim"])
    if kind == "sdxl":
        found["pooled"] = normal(2, 1280)
        found["sizes"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)
    if kind == "unclip":
        found["image"] = normal(2, 2048)
    return found


@torch.no_grad()
def run_diffusers(unet: torch.nn.Module, kind: str, seed: int) -> torch.Tensor:
    """The output of diffusers' UNet."""
    given = inputs(kind, seed)
    more = {}
    if kind == "sdxl":
        added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
        more["added_cond_kwargs"] = added
    if kind == "unclip":
        more["class_labels"] = given["image"]
    return unet(given["x"], given["t"], given["context"], **more).sample


@torch.no_grad()
def run_comfyui(model, kind: str, seed: int, **more) -> torch.Tensor:
    """The output of a MODEL's UNet for the same inputs."""
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    given = inputs(kind, seed)
    y = given.get("image")
    if kind == "sdxl":
        sizes = timestep_embedding(given["sizes"].flatten(), 256).reshape(2, -1)
        y = torch.cat([given["pooled"], sizes], dim=1)
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    return unet(given["x"], given["t"], context=given["context"], y=y, **more)


def output(checkpoint, kind: str, seed: int) -> torch.Tensor:
    """What the checkpoint, loaded, gives."""
    return run_comfyui(loader.load(checkpoint), kind, seed)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative: |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()
