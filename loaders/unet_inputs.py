"""Random inputs for one call of a UNet of SD kind, scaled as a sampler's: for benchmarks.

Values matter to speed (a GPU's power, and so its clock, depends on the bits it switches) and to
whether a low-precision layer clips: zeros would be no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import SDXL, SDXLRefiner

TOKENS = 77
# of CLIP's embeddings, the start token has a few channels far above the rest
OUTLIERS, OUTLIER = 64, 20.0
REMEDY = "benchmark the UNet of an SD1.5, SD2 or SDXL model"


@dataclass(frozen=True)
class UNetInputs:
    """x: noisy latent float32 [N, C, H, W]; sigma: float32 [N]; conds: what `apply_model` takes
    beside them (c_crossattn, y, c_concat). N is twice the number of images: cond and uncond."""

    x: torch.Tensor
    sigma: torch.Tensor
    conds: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> UNetInputs:
        """The same on another device."""
        conds = {name: tensor.to(device) for name, tensor in self.conds.items()}
        return replace(self, x=self.x.to(device), sigma=self.sigma.to(device), conds=conds)


def why_not(model) -> str | None:
    """Why there are no inputs for a MODEL's diffusion model, or None."""
    unet, config = model.model.diffusion_model, model.model.model_config.unet_config
    if not isinstance(unet, UNetModel):
        return f"a {type(unet).__name__} ({type(model.model).__name__})"
    if any(config.get(name) for name in ("use_temporal_attention", "use_temporal_resblock")):
        return f"a video UNet ({type(model.model).__name__})"
    if config.get("num_classes") not in (None, "sequential"):
        return f"a UNet with num_classes {config['num_classes']} ({type(model.model).__name__})"
    if config.get("context_dim") is None:
        return f"a UNet without a text context ({type(model.model).__name__})"
    return None


def make(model, width: int, height: int, batch: int, seed: int = 0) -> UNetInputs:
    """Inputs on the CPU for `batch` pictures of width x height pixels, in the middle of sampling.

    Raises ValueError for a MODEL that is no UNet of SD kind, and for sizes it cannot have.
    """
    reason = why_not(model)
    if reason is not None:
        raise ValueError(
            "a benchmark needs a UNet of SD kind (SD1.5, SD2, SDXL and their kin), found "
            f"{reason} in model: {REMEDY}"
        )
    base = model.model
    factor = base.latent_format.spacial_downscale_ratio
    if width % factor or height % factor or min(width, height) < factor or batch < 1:
        raise ValueError(
            f"width and height must be multiples of {factor} pixels and batch at least 1, got "
            f"{width} x {height} and {batch}: correct them"
        )
    config = base.model_config.unet_config
    generator = torch.Generator().manual_seed(seed)
    n, h, w = 2 * batch, height // factor, width // factor

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels = min(config["in_channels"], base.latent_format.latent_channels)
    sigma = torch.tensor(float(base.model_sampling.percent_to_sigma(0.5)))
    x = _picture(normal, n, channels, h, w) + sigma * normal(n, channels, h, w)
    context = normal(n, TOKENS, config["context_dim"])
    context[:, 0, ::OUTLIERS] *= OUTLIER
    conds = {"c_crossattn": context}
    missing = config["in_channels"] - channels
    if missing:
        conds["c_concat"] = _picture(normal, n, missing, h, w)
        if missing > channels:  # a mask before the masked picture
            conds["c_concat"][:, 0] = (conds["c_concat"][:, 0] > 0).float()
    if config.get("num_classes") == "sequential":
        conds["y"] = _pooled(base, config["adm_in_channels"], normal, n, width, height)
    return UNetInputs(x, sigma.expand(n).contiguous(), conds)


def _picture(normal, n: int, channels: int, h: int, w: int) -> torch.Tensor:
    """A smooth random latent of standard deviation 1, as encoded pictures are."""
    small = normal(n, channels, max(h // 8, 2), max(w // 8, 2))
    wide = torch.nn.functional.interpolate(small, (h, w), mode="bilinear")
    return wide / wide.std()


def _pooled(base, width: int, normal, n: int, pixels_w: int, pixels_h: int) -> torch.Tensor:
    """The vector y [N, width]: SDXL's own encoding of pooled text and sizes, else plain numbers."""
    if not isinstance(base, SDXL | SDXLRefiner):
        return normal(n, width)
    y = base.encode_adm(
        pooled_output=normal(n, 1280), width=pixels_w, height=pixels_h, device="cpu"
    )
    if y.shape[1] != width:
        raise ValueError(
            f"the pooled vector must have the width of the UNet's label embedding, {width}, "
            f"ComfyUI encodes {y.shape[1]} for a {type(base).__name__}: {REMEDY}"
        )
    return y


def direct(model, inputs: UNetInputs) -> tuple[tuple[torch.Tensor, ...], dict]:
    """args, kwargs of the diffusion model itself, as `BaseModel.apply_model` calls it."""
    base, dtype = model.model, model.model.get_dtype_inference()
    x = base.model_sampling.calculate_input(inputs.sigma, inputs.x)
    conds = dict(inputs.conds)
    concat = conds.pop("c_concat", None)
    if concat is not None:
        x = torch.cat([x, concat], dim=1)
    conds["context"] = conds.pop("c_crossattn")
    t = base.model_sampling.timestep(inputs.sigma).float()
    return (x.to(dtype), t), {name: tensor.to(dtype) for name, tensor in conds.items()}
