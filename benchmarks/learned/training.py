"""Trains ComfyUI's SD1.5 UNet, 26 M parameters, on the drawings: eps prediction, EMA, same by seed.

Every step's drawings, noise and dropped contexts depend on the seed and the step only, so that a
run that was cut off goes on from its last state exactly as it would have. Another processor or
number of threads adds in another order, so that the weights differ.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import pictures

PREFIX = "model.diffusion_model."
VERSION = 2  # of the drawings and of the training: raise it when either changes
STATE_EVERY = 50  # steps
WARM_UP = 30  # steps


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights. batches: (latent size, drawings a step), taken in turn."""

    steps: int = 1200
    batches: tuple[tuple[int, int], ...] = (*[(8, 32)] * 5, (16, 8))
    rate: float = 4e-4
    decay: float = 0.01
    ema: float = 0.995
    snr: float = 5.0  # above this signal-to-noise ratio, timesteps are drawn less often
    dropped: float = 0.12  # share of contexts that are empty, for classifier-free guidance
    bf16: bool = True  # autocast; weights, gradients and sums stay in fp32
    seed: int = 0

    @property
    def key(self) -> str:
        """12 hex digits that name the trained file."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


QUICK = Settings(steps=4, batches=((8, 4),))  # shows that it runs, learns nothing


def new_unet(seed: int) -> torch.nn.Module:
    """ComfyUI's UNetModel with fresh fp32 weights; residual branches start at 0, as in ADM."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from ...devtools.synthetic import unet_config

    operations = comfy.ops.disable_weight_init
    unet = UNetModel(**unet_config("sd15", "tiny"), dtype=torch.float32, operations=operations)
    generator = torch.Generator().manual_seed(seed)
    for name, module in unet.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            with torch.no_grad():
                if p.ndim == 1:
                    p.fill_(1.0 if leaf == "weight" else 0.0)
                elif name.endswith(("out_layers.3", "proj_out", "out.2")):
                    p.zero_()
                else:
                    p.normal_(0, 1 / math.sqrt(p[0].numel()), generator=generator)
    return unet


def loss(
    unet: torch.nn.Module, sigmas: torch.Tensor, settings: Settings, step: int
) -> torch.Tensor:
    """Mean squared error of the predicted noise for one step's batch (DDPM's simple loss).

    sigmas: [1000] of ComfyUI's ModelSamplingDiscrete; 1 / (sigma² + 1) is the share of the drawing.
    Timesteps are drawn by the weights that Min-SNR (Hang et al. 2023) gives them, min(1, snr σ²).
    """
    from ...quantize.bridge import unet as bridge

    size, count = settings.batches[step % len(settings.batches)]
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    labels = torch.randint(pictures.CLASSES, (count,), generator=generator)
    clean = pictures.latents(labels, size, generator)
    shares = (settings.snr * sigmas.double() ** 2).clamp(max=1).cumsum(0)
    # one timestep from each of `count` even parts of their distribution
    at = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t = torch.searchsorted(shares / shares[-1], at.double()).clamp(max=len(sigmas) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = sigmas[t].view(-1, 1, 1, 1)
    noisy = (clean + sigma * noise) / (sigma**2 + 1).sqrt()
    empty = torch.rand(count, generator=generator) < settings.dropped
    asked = pictures.context(torch.where(empty, pictures.EMPTY, labels))
    options = bridge.differentiable_attention()
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
        predicted = unet(noisy, t.float(), context=asked, transformer_options=options)
    return (predicted.float() - noise).square().mean()


def _rate(settings: Settings, step: int) -> float:
    """Warm-up, then half a cosine down to 5 %."""
    if step < WARM_UP:
        return settings.rate * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(settings.steps - WARM_UP, 1)
    return settings.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def train(settings: Settings, folder: Path, say: Callable[[str], None]) -> Path:
    """The trained fp16 file of these settings in `folder`, trained where it is not there yet.

    A state beside it is written every 50 steps, gone on from, and removed at the end.
    """
    done = folder / f"sd15_drawings_{settings.key}.safetensors"
    if done.is_file():
        return done
    import comfy.model_sampling

    folder.mkdir(parents=True, exist_ok=True)
    state = done.with_suffix(".state")
    unet = new_unet(settings.seed).train()
    average = copy.deepcopy(unet)
    optimizer = torch.optim.AdamW(
        unet.parameters(), settings.rate, (0.9, 0.99), weight_decay=settings.decay
    )
    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
    first = 0
    if state.is_file():
        held = torch.load(state, weights_only=True)
        unet.load_state_dict(held["unet"])
        average.load_state_dict(held["average"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["steps"]
        say(f"Training goes on from step {first}")
    started, sums, seen = time.monotonic(), 0.0, 0
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(settings, step)
        optimizer.zero_grad(set_to_none=True)
        value = loss(unet, sigmas, settings, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        keep = min(settings.ema, (step + 1) / (step + 10))  # short memory while little is learned
        with torch.no_grad():
            for mine, p in zip(average.parameters(), unet.parameters(), strict=True):
                mine.lerp_(p, 1 - keep)
        sums, seen = sums + value.item(), seen + 1
        if (step + 1) % STATE_EVERY == 0 and step + 1 < settings.steps:
            held = {"unet": unet.state_dict(), "average": average.state_dict()}
            held |= {"optimizer": optimizer.state_dict(), "steps": step + 1}
            _replace(state, lambda path, held=held: torch.save(held, path))
            each = (time.monotonic() - started) / (step + 1 - first)
            say(f"step {step + 1} of {settings.steps}: loss {sums / seen:.4f}, {each:.2f} s a step")
            sums, seen = 0.0, 0
    save(average, done, settings)
    state.unlink(missing_ok=True)
    return done


def save(unet: torch.nn.Module, path: Path, settings: Settings) -> None:
    """As a diffusion_models file, fp16."""
    from safetensors.torch import save_file

    tensors = {PREFIX + name: t.half().contiguous() for name, t in unet.state_dict().items()}
    facts = {"modelopt.drawings": json.dumps(asdict(settings), sort_keys=True)}
    _replace(path, lambda aside: save_file(tensors, aside, metadata=facts))


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Writes aside first: a run that is cut off leaves the old file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
