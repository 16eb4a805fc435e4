"""ComfyUI's description of a UNet -> the diffusers UNet of the same architecture, empty."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..utils import packages


def build(config: Mapping[str, object], projects: bool = False) -> torch.nn.Module:
    """The UNet on the meta device. projects: its vector is projected as it is (unCLIP's image
    embedding), not SDXL's pooled text and sizes. Raises ValueError where diffusers is missing or
    knows no such."""
    packages.require(packages.DIFFUSERS)
    if "channel_mult" not in config:
        raise ValueError(
            "what is exported must be a UNet (SD1.5, SDXL and their kin), this model is none: "
            "save it with Save Quantized UNet instead"
        )
    from diffusers import UNet2DConditionModel

    arguments, middle = _arguments(config, projects)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**arguments)
        if middle is not None:
            unet.mid_block = middle()
    return unet.eval()


def _arguments(config: Mapping[str, object], projects: bool) -> tuple[dict, object]:
    """Arguments of diffusers' UNet, and what makes its middle block where it is not the last level's."""
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UNetMidBlock2DCrossAttn

    channels = [int(config["model_channels"]) * m for m in config["channel_mult"]]
    blocks = list(config["num_res_blocks"])
    down = _levels(config["transformer_depth"], blocks)
    up = _levels(config["transformer_depth_output"][::-1], [n + 1 for n in blocks[::-1]])
    depth = config["transformer_depth_middle"]
    heads = [
        c // config["num_head_channels"]
        if config.get("num_head_channels", -1) > 0
        else config["num_heads"]
        for c in channels
    ]
    if any(len(set(map(bool, level))) > 1 for level in down + up) or depth < -1:
        raise ValueError(
            "the UNet must be one that diffusers knows, this one has levels with and without "
            f"transformers, {config['transformer_depth']} and {config['transformer_depth_output']}"
        )
    arguments = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": tuple(channels),
        "layers_per_block": tuple(blocks),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in down
        ),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up
        ),
        "transformer_layers_per_block": [_depths(level) for level in down],
        "reverse_transformer_layers_per_block": [_depths(level) for level in up],
        "mid_block_type": "UNetMidBlock2D",
        "cross_attention_dim": config["context_dim"],
        "attention_head_dim": tuple(heads),
        "use_linear_projection": bool(config["use_linear_in_transformer"]),
    }
    if config.get("adm_in_channels") and config.get("num_classes") == "sequential":
        arguments["projection_class_embeddings_input_dim"] = config["adm_in_channels"]
        if projects:
            arguments["class_embed_type"] = "projection"
        else:
            arguments |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    shared = {
        "in_channels": channels[-1],
        "temb_channels": 4 * channels[0],
        "resnet_groups": 32,
        "resnet_eps": 1e-5,
    }

    def middle():
        if depth < 1:
            return UNetMidBlock2D(**shared, num_layers=1, add_attention=False)
        return UNetMidBlock2DCrossAttn(
            **shared,
            transformer_layers_per_block=depth,
            num_attention_heads=heads[-1],
            cross_attention_dim=config["context_dim"],
            use_linear_projection=arguments["use_linear_projection"],
        )

    return arguments, middle


def _levels(depths, blocks: list[int]) -> list[list[int]]:
    """One depth a block, cut into levels."""
    depths, found = list(depths), []
    for count in blocks:
        found.append(depths[:count])
        depths = depths[count:]
    return found


def _depths(level: list[int]) -> list[int]:
    return [max(1, depth) for depth in level]
