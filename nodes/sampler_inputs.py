"""The sampler settings that several nodes share, as KSampler names them."""

from __future__ import annotations

from comfy.samplers import KSampler
from comfy_api.latest import io

from ..quantize import words
from ..quantize.prompts import LIMITS, Sampling


def told(name: str) -> dict[str, object]:
    """Default, limits and tooltip of a setting that `convert.py` has too."""
    limits = dict(zip(("min", "max"), LIMITS[name], strict=True)) if name in LIMITS else {}
    return {"default": getattr(Sampling, name), **limits, "tooltip": words.SAMPLING[name]}


def sampler_inputs() -> list[io.Input]:
    """Inputs steps, cfg, sampler_name, scheduler."""
    return [
        io.Int.Input("steps", **told("steps")),
        io.Float.Input("cfg", step=0.1, round=0.01, **told("cfg")),
        io.Combo.Input("sampler_name", options=KSampler.SAMPLERS, **told("sampler_name")),
        io.Combo.Input("scheduler", options=KSampler.SCHEDULERS, **told("scheduler")),
    ]


def denoise_input() -> io.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 starts from noise; less keeps some of the latent.",
    )


def seed_input(tooltip: str) -> io.Input:
    """Stays as it is after a run: a new seed would record, and then quantize, all over again."""
    return io.Int.Input(
        "seed",
        control_after_generate=io.ControlAfterGenerate.fixed,
        **told("seed") | {"tooltip": tooltip},
    )


def max_records_input(tooltip: str) -> io.Input:
    return io.Int.Input("max_records", **told("max_records") | {"tooltip": tooltip})
