"""How alike two pictures are: PSNR and SSIM by kornia."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

WINDOW = 11  # of SSIM, in pixels, Gaussian with sigma 1.5 (Wang et al. 2004)


@dataclass
class Settings:
    """What is sampled with both MODELs, as KSampler takes it. vae None: latents are compared."""

    positive: list
    negative: list
    latent: dict[str, Any]
    vae: Any = None
    seed: int = 0
    steps: int = 20
    cfg: float = 7.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    denoise: float = 1.0


def likeness(reference: torch.Tensor, other: torch.Tensor) -> list[tuple[float, float]]:
    """PSNR in dB and SSIM of each of two batches of pictures [N, H, W, C], values from 0 to 1. SSIM is
    the mean over all windows that lie within the picture."""
    from kornia import metrics

    found = []
    for pair in zip(reference, other, strict=True):
        a, b = (one.detach().cpu().double().movedim(-1, 0)[None].clamp(0, 1) for one in pair)
        small = min(a.shape[-2:])
        window = min(WINDOW, small - 1 + small % 2)  # odd, and no larger than the picture
        alike = metrics.ssim(a, b, window, eps=0.0, padding="valid").mean().item()
        found.append((metrics.psnr(a, b, 1.0).item(), alike))
    return found


def of_latents(reference: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    """Latents [N, C, (T,) H, W] as pictures [N', H, W, C]: the range of each reference is 0 to 1,
    what lies outside of it is cut."""
    low = reference.flatten(1).amin(1).reshape(-1, *[1] * (reference.ndim - 1))
    span = reference.flatten(1).amax(1).reshape(low.shape) - low
    span = torch.where(span > 0, span, 1.0)
    both = [((one - low) / span) for one in (reference, other)]
    return [_frames(one).movedim(1, -1) for one in both]


def _frames(latent: torch.Tensor) -> torch.Tensor:
    """[N, C, T, H, W] -> [N * T, C, H, W]; [N, C, H, W] as it is."""
    return latent if latent.ndim == 4 else latent.movedim(2, 1).flatten(0, 1)
