"""The sampler settings that several nodes share, as KSampler names them."""

from __future__ import annotations

from comfy.samplers import KSampler
from comfy_api.latest import io


def sampler_inputs() -> list[io.Input]:
    """Inputs steps, cfg, sampler_name, scheduler."""
    return [
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip="Sampling steps. Use as many as you will use later.",
        ),
        io.Float.Input(
            "cfg",
            default=7.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How closely to follow the prompt.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=KSampler.SAMPLERS,
            default="euler",
            tooltip="The sampling algorithm.",
        ),
        io.Combo.Input(
            "scheduler",
            options=KSampler.SCHEDULERS,
            default="normal",
            tooltip="How the noise is taken away over the steps.",
        ),
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
        default=0,
        min=0,
        max=2**64 - 1,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
    )


def max_records_input(tooltip: str) -> io.Input:
    return io.Int.Input("max_records", default=64, min=1, max=4096, tooltip=tooltip)
