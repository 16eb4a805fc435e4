"""Small whole checkpoints and LoRAs with random weights, for tests and the demo.

A direct path carries the noisy latent to the output and the prompt moves it a little, so that
sampling stays near the range of a real model. `comfy` must be importable (ComfyUI on sys.path).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .random_weights import Specs, fan_in, module_specs, normal, state_dict, write, zeros

if TYPE_CHECKING:
    import torch

UNET = "model.diffusion_model."
LORA_LEFT_OUT = "middle_block.1.proj_out"
_SD15 = {
    "num_heads": 8,
    "context_dim": 768,
    "use_linear_in_transformer": False,
}
_SDXL = {
    "num_head_channels": 64,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
# without a transformer in the middle, as the distilled ones are
_THREE_LEVELS = _SDXL | {
    "channel_mult": [1, 1, 1],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": -1,
}
# ComfyUI reads all of this off the shapes. What it insists on: SD1.5 has 320 channels and context
# 768; an SDXL has 320, 2048, 2816 and one of the known lists of transformer depths, but the widths
# of the levels, their number and the output blocks are free.
UNETS: dict[tuple[str, str], dict[str, Any]] = {
    ("sd15", "tiny"): _SD15
    | {
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1,
    },
    ("sd15", "small"): _SD15
    | {
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    # as many blocks a level as T2I-Adapters expect
    ("sd15", "two levels"): _SD15
    | {
        "channel_mult": [1, 2],
        "num_res_blocks": [2, 2],
        "transformer_depth": [1, 1, 1, 1],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    ("sd15", "full"): _SD15
    | {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    # detected as KOALA_700M, an SDXL with fewer blocks
    ("sdxl", "tiny"): _SDXL
    | {
        "channel_mult": [1, 1, 1],
        "num_res_blocks": [1, 1, 1],
        "transformer_depth": [0, 2, 5],
        "transformer_depth_output": [0, 0, 0, 0, 1, 1],
        "transformer_depth_middle": 1,
    },
    # detected as SDXL itself
    ("sdxl", "small"): _SDXL
    | {
        "channel_mult": [1, 1, 1],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
        "transformer_depth_middle": 1,
    },
    ("sdxl", "full"): _SDXL
    | {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
    # the rest of the family, told apart by their transformer depths, context and channels
    ("inpainting", "tiny"): _SD15
    | {
        "in_channels": 9,
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1,
    },
    ("sd2", "tiny"): {
        "num_head_channels": 64,
        "context_dim": 1024,
        "use_linear_in_transformer": True,
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "transformer_depth_middle": 1,
    },
    ("refiner", "tiny"): {
        "model_channels": 384,
        "num_head_channels": 64,
        "context_dim": 1280,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2560,
        "channel_mult": [1, 1, 1, 1],
        "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    ("ssd1b", "tiny"): _THREE_LEVELS | {"transformer_depth": [0, 0, 2, 2, 4, 4]},
    ("vega", "tiny"): _THREE_LEVELS | {"transformer_depth": [0, 0, 1, 1, 2, 2]},
    ("koala1b", "tiny"): _SDXL
    | {
        "channel_mult": [1, 1, 1],
        "num_res_blocks": [1, 1, 1],
        "transformer_depth": [0, 2, 6],
        "transformer_depth_output": [0, 0, 0, 0, 1, 1],
        "transformer_depth_middle": 1,
    },
}

# --- the parts of a checkpoint ---


def unet_config(family: str, size: str) -> dict[str, Any]:
    """Arguments of ComfyUI's UNetModel."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "legacy": False,
    } | UNETS[family, size]


def unet_specs(family: str, size: str) -> Specs:
    import comfy.ops
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = unet_config(family, size)
    meta = {"device": "meta", "dtype": torch.float16, "operations": comfy.ops.disable_weight_init}
    residual = 0.5  # branches added to a stream: the stream must not grow with the depth
    gains = {"out_layers.3": residual, "proj_out": residual, "ff.net.2": 2 * residual}
    # the prompt moves the output a little, as in a trained model: guidance multiplies that by 7
    gains |= {"attn1.to_out.0": residual, "attn2.to_out.0": 0.2 * residual, "label_emb.0.2": 0.2}
    specs = module_specs(UNetModel(**config, **meta), UNET, gains)
    _add_direct_path(specs)
    return specs


def unet_state_dict(family: str, size: str = "tiny", seed: int = 0) -> dict[str, torch.Tensor]:
    """The UNet of such a checkpoint in memory, fp16, in the UNet's own names."""
    return state_dict(unet_specs(family, size), seed, UNET)


def _add_direct_path(specs: Specs) -> None:
    """Let channels 0..7 carry x and -x from the first conv over the last skip to the last conv."""
    last = [k for k in specs if k.endswith(".0.skip_connection.weight")][-1]
    (width, joined, _, _), _ = specs[last]

    def patch(name: str, change: Callable[[torch.Tensor], None]) -> None:
        shape, values = specs[name]

        def patched(g: torch.Generator) -> torch.Tensor:
            tensor = values(g)
            change(tensor)
            return tensor

        specs[name] = (shape, patched)

    def first_conv(w: torch.Tensor) -> None:
        w[:8] = 0
        for c in range(4):
            w[c, c, 1, 1], w[c + 4, c, 1, 1] = 1, -1

    def damp(w: torch.Tensor) -> None:
        w[:10] *= 0.2

    def skip(w: torch.Tensor) -> None:
        damp(w)
        for c in range(8):  # the second half of the joined channels comes from the first conv
            w[c, joined - width + c] = 1

    def gain(w: torch.Tensor) -> None:
        w[:10] = 1

    def last_conv(w: torch.Tensor) -> None:
        w *= 0.35
        w[:, :10] = 0
        for c in range(4):  # silu(x) - silu(-x) = x
            w[c, c, 1, 1], w[c, c + 4, 1, 1] = 0.9, -0.9

    patch(f"{UNET}input_blocks.0.0.weight", first_conv)
    patch(last, skip)
    patch(last.replace("skip_connection", "out_layers.3"), damp)
    patch(f"{UNET}out.0.weight", gain)
    patch(f"{UNET}out.2.weight", last_conv)


def clip_l_specs(prefix: str, live_layers: int = 12) -> Specs:
    """CLIP-L in transformers' names. ComfyUI wants all 12 layers; those beyond `live_layers` are
    zero, which in a residual network means that they pass their input on."""
    d, names = 768, {}
    specs: Specs = {
        f"{prefix}embeddings.token_embedding.weight": ((49408, d), normal((49408, d), 0.5)),
        f"{prefix}embeddings.position_embedding.weight": ((77, d), normal((77, d), 0.2)),
    }
    for part in ("q", "k", "v", "out"):
        names[f"self_attn.{part}_proj"] = (d, d)
    names |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for layer in range(12):
        at = f"{prefix}encoder.layers.{layer}."
        _layer(specs, at, names, ("layer_norm1", "layer_norm2"), d, layer < live_layers)
    _norm(specs, f"{prefix}final_layer_norm", d)
    return specs


def clip_g_specs(prefix: str, live_layers: int = 32) -> Specs:
    """CLIP-G in OpenCLIP's names, as SDXL checkpoints have it; `live_layers` as for CLIP-L."""
    d = 1280
    specs: Specs = {
        f"{prefix}token_embedding.weight": ((49408, d), normal((49408, d), 0.5)),
        f"{prefix}positional_embedding": ((77, d), normal((77, d), 0.2)),
        f"{prefix}text_projection": ((d, d), fan_in((d, d), 1.0)),
    }
    names = {"attn.out_proj": (d, d), "mlp.c_fc": (4 * d, d), "mlp.c_proj": (d, 4 * d)}
    for layer in range(32):
        at, live = f"{prefix}transformer.resblocks.{layer}.", layer < live_layers
        _layer(specs, at, names, ("ln_1", "ln_2"), d, live)
        fused = (3 * d, d)
        specs[f"{at}attn.in_proj_weight"] = (fused, fan_in(fused, 1.0) if live else zeros(fused))
        specs[f"{at}attn.in_proj_bias"] = ((3 * d,), zeros((3 * d,)))
    _norm(specs, f"{prefix}ln_final", d)
    return specs


def _layer(
    specs: Specs, at: str, names: dict[str, tuple], norms: tuple, d: int, live: bool
) -> None:
    for norm in norms:
        _norm(specs, at + norm, d)
    for name, shape in names.items():
        specs[f"{at}{name}.weight"] = (shape, fan_in(shape, 0.5) if live else zeros(shape))
        bias = (shape[0],)
        specs[f"{at}{name}.bias"] = (bias, normal(bias, 0.02) if live else zeros(bias))


def _norm(specs: Specs, name: str, width: int) -> None:
    specs[f"{name}.weight"] = ((width,), normal((width,), 0.1, 1.0))
    specs[f"{name}.bias"] = ((width,), normal((width,), 0.05))


def vae_specs(prefix: str, decoder_width: int = 128) -> Specs:
    """ComfyUI reads the decoder's width off its shapes; the encoder's is always 128."""
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    config |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
    config |= {"dropout": 0.0}
    with torch.device("meta"):
        decoder = config | {"ch": decoder_width}
        vae = AutoencoderKL(ddconfig=config, embed_dim=4, decoder_ddconfig=decoder)
    return module_specs(vae, prefix, {"conv2": 0.5, "proj_out": 0.5, "conv_out": 0.6})


# --- whole files ---


def sd15(path: Path, seed: int = 0, size: str = "tiny") -> Path:
    """An SD1.5 checkpoint; `size` tiny (26 M UNet parameters), small (107 M) or full (860 M)."""
    specs = unet_specs("sd15", size)
    specs |= clip_l_specs("cond_stage_model.transformer.text_model.")
    specs |= vae_specs("first_stage_model.", 128 if size == "full" else 32)
    return write(path, specs, seed)


def sdxl(path: Path, seed: int = 0, size: str = "tiny") -> Path:
    """An SDXL checkpoint; `size` tiny, small or full (2.57 G). CLIP-G is 1.4 GB in all of them."""
    full = size == "full"
    specs = unet_specs("sdxl", size)
    specs |= clip_l_specs("conditioner.embedders.0.transformer.text_model.")
    specs |= clip_g_specs("conditioner.embedders.1.model.", 32 if full else 3)
    specs |= vae_specs("first_stage_model.", 128 if full else 32)
    return write(path, specs, seed)


# --- LoRA ---


def lora_keys(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """kohya name -> (weight name inside the UNet, its shape), by ComfyUI's own tables.

    Reads the file's header only. Norms and biases, which a LoRA does not reach, are left out.
    """
    import comfy.lora
    import comfy.model_detection
    import torch
    from safetensors import safe_open

    with safe_open(checkpoint, framework="pt") as file:
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    unet = {k: torch.empty(s, device="meta") for k, s in shapes.items() if k.startswith(UNET)}

    class Model:
        model_config = comfy.model_detection.model_config_from_unet(unet, UNET)

        @staticmethod
        def state_dict() -> dict[str, torch.Tensor]:
            return {k.replace(UNET, "diffusion_model."): v for k, v in unet.items()}

    names = comfy.lora.model_lora_keys_unet(Model, {})
    found = {}
    for name, target in names.items():
        weight = unet.get(target.replace("diffusion_model.", UNET))  # the tables name more layers
        if name.startswith("lora_unet_") and weight is not None and weight.ndim >= 2:
            found[name] = (target.removeprefix("diffusion_model."), tuple(weight.shape))
    return found


def lora(
    path: Path,
    checkpoint: Path,
    rank: int = 4,
    seed: int = 0,
    conv: bool = True,
    scale: float = 0.1,
) -> Path:
    """A kohya LoRA over the Linears (and convs) of the blocks of a checkpoint's UNet.

    At strength 1 each delta's norm is about `scale` of its weight's. Layers are named as kohya
    names SD models, through diffusers' layout, where ComfyUI knows that name. `LORA_LEFT_OUT` gets
    no delta.
    """
    import torch
    from safetensors.torch import save_file

    chosen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (target, shape) in lora_keys(checkpoint).items():
        if target.startswith(LORA_LEFT_OUT):
            continue
        inside = "block" in target and not target.startswith("input_blocks.0.")
        if inside and (conv or len(shape) == 2):
            chosen[target] = (name, shape)  # the diffusers name comes after ComfyUI's own
    tensors = {}
    for name, shape in chosen.values():
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        # |up @ down| ~ sqrt(out * in * rank) against a weight's norm of sqrt(out)
        std = scale / math.sqrt(math.prod(shape[1:]) * rank)
        kernel = [1] * (len(shape) - 2)
        down = torch.randn((rank, *shape[1:]), generator=g)
        up = torch.randn((shape[0], rank, *kernel), generator=g) * std
        tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_file(tensors, partial, metadata={"ss_network_module": "networks.lora"})
    os.replace(partial, path)
    return path
