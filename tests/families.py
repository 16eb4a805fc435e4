"""Small models of ComfyUI's classes beyond UNets, with random weights, and what they are called with.

Sizes are the smallest that ComfyUI's detection finds again from the weights (Qwen-Image's are fixed
but for the number of blocks). FLUX's takes the conditioning of an SD1.5 text encoder, so that graphs
can make one.
"""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from safetensors.torch import save_file

MODELS = {
    "flux": (
        Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 768,
            "context_in_dim": 768,
            "hidden_size": 256,
            "num_heads": 2,
            "mlp_ratio": 4.0,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
    ),
    "sd3": (
        OpenAISignatureMMDITWrapper,
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 4,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 256},
            },
            "num_patches": 576,
            "pos_embed_max_size": 24,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
        },
    ),
    "qwen_image": (
        QwenImageTransformer2DModel,
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1},
    ),
    "wan": (
        WanModel,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 256,
            "out_dim": 16,
            "in_dim": 16,
            "num_heads": 2,
            "ffn_dim": 512,
            "num_layers": 2,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
        },
    ),
    # without a list of layers to skip
    "ltxv": (
        LTXVModel,
        {
            "image_model": "ltxv",
            "num_layers": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 256,
        },
    ),
}
# latent, width of the context, width of the pooled vector
CALLS = {
    "flux": ((1, 16, 8, 8), 768, 768),
    "sd3": ((1, 16, 8, 8), 4096, 2048),
    "qwen_image": ((1, 16, 1, 8, 8), 3584, 0),
    "wan": ((1, 16, 2, 8, 8), 4096, 0),
    "ltxv": ((1, 128, 2, 4, 4), 4096, 0),
}


def write(kind: str, path: Path) -> Path:
    """A diffusion model's file in fp16, as "Load Diffusion Model" takes it."""
    cls, config = MODELS[kind]
    kwargs = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    with torch.no_grad():
        model = cls(**config, **kwargs)
        generator = torch.Generator().manual_seed(0)
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.ndim < 2:  # norms' scales and biases
                norm = any(word in name for word in ("norm", "scale", "ln_"))
                scale = norm and not name.endswith("bias")
                tensor.copy_(torch.ones_like(tensor) if scale else torch.zeros_like(tensor))
            else:
                spread = 1 / max(tensor[0].numel(), 1) ** 0.5
                tensor.normal_(0, spread, generator=generator)
        state = {name: t.half().contiguous() for name, t in model.state_dict().items()}
    save_file(state, path)
    return path


def conditioning(kind: str, seed: int = 0) -> list:
    """A conditioning of random numbers in the shapes of the family's text encoders."""
    generator = torch.Generator().manual_seed(seed)
    _, width, pooled = CALLS[kind]
    facts = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    if kind == "flux":
        facts["guidance"] = 3.5
    if kind == "ltxv":
        facts["attention_mask"] = torch.ones(1, 24, dtype=torch.int64)
    return [[torch.randn(1, 24, width, generator=generator), facts]]


def latent(kind: str) -> dict:
    """An empty latent."""
    return {"samples": torch.zeros(CALLS[kind][0])}
