"""Record what a MODEL's UNet is called with while ComfyUI's own sampler runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.sample
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...utils import out_of_memory
from ...utils.progress import tell
from ..calibration import Calibration
from ..records import Recorder, Run
from ..thinning import shares
from .tap import Tap
from .unet import source_file

ARCHITECTURE = (
    "in_channels",
    "out_channels",
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "transformer_depth",
    "transformer_depth_middle",
    "transformer_depth_output",
    "context_dim",
    "adm_in_channels",
    "use_linear_in_transformer",
)


def signature(model: Any) -> dict[str, Any]:
    """JSON-able facts of the architecture of a MODEL's UNet, or of what stands in its place."""
    base = model.model
    config = base.model_config.unet_config
    if isinstance(base.diffusion_model, UNetModel):
        facts = {name: config[name] for name in ARCHITECTURE if config.get(name) is not None}
    else:
        facts = {f"config.{name}": x for name, x in config.items() if _plain(x) and x is not None}
        facts["class"] = type(base.diffusion_model).__name__
    lists = {name: list(value) for name, value in facts.items() if isinstance(value, list | tuple)}
    return {"model": type(base).__name__} | facts | lists


def _plain(value: Any) -> bool:
    """Whether JSON holds a value of a model's configuration."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


@out_of_memory.explained("recording", out_of_memory.SMALLER)
def record(
    model: Any,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list,
    negative: list,
    latent_image: dict[str, Any],
    denoise: float,
    max_records: int,
    calibration: Calibration | None = None,
    prompt: str | None = None,
) -> tuple[dict[str, Any], Calibration]:
    """Sample as KSampler does, and add what the UNet saw to `calibration` (a new one when None).

    Returns KSampler's LATENT, bit for bit, and the calibration of at most `max_records` records.
    The MODEL is not changed. Raises ValueError before sampling when `calibration` is of another
    architecture, and after it when the model ran into NaN; ComfyUI's interrupt passes through.
    """
    import nodes  # ComfyUI's own

    base = _base_for(model, calibration)
    recorder = Recorder(max_records)
    (latent,) = nodes.common_ksampler(
        _recording(model, recorder),
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        latent_image,
        denoise=denoise,
    )
    settings = {"steps": steps, "cfg": cfg, "sampler": sampler_name, "scheduler": scheduler}
    run = _run(model, recorder, latent, prompt=prompt, seed=seed, denoise=denoise, **settings)
    return latent, base.add_run(run, max_records) if run.records else base


@out_of_memory.explained("recording", out_of_memory.SMALLER)
def record_prompts(
    model: Any,
    clip: Any,
    prompts: Sequence[str],
    negative: str,
    width: int,
    height: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    seed: int,
    max_records: int,
) -> Calibration:
    """Sample an empty latent for each prompt, with seed, seed + 1, …, and record what the UNet saw.

    width, height in pixels. With fewer records than prompts, evenly spaced prompts are sampled.
    Raises ValueError for no CLIP, or no prompt.
    """
    import nodes  # ComfyUI's own

    made = _base_for(model, None)
    if clip is None:
        raise ValueError(
            "prompts need a text encoder, got no CLIP in clip: load a checkpoint that has one, or "
            "connect a CLIP loader"
        )
    if not prompts:
        raise ValueError(
            "a calibration needs at least 1 prompt, got 0 in prompts: write one a line"
        )
    if max_records < 1:
        raise ValueError(
            f"a calibration keeps at least 1 record, got {max_records} in max_records: raise it"
        )
    quotas = shares(max_records, [max_records] * len(prompts))
    chosen = [
        (i, prompt, quota)
        for i, (prompt, quota) in enumerate(zip(prompts, quotas, strict=True))
        if quota
    ]
    unwanted = _encode(clip, negative)
    wanted = [_encode(clip, prompt) for _, prompt, _ in chosen]
    (empty,) = nodes.EmptyLatentImage().generate(width, height)
    bar = comfy.utils.ProgressBar(len(chosen) * steps)
    runs = []
    for done, (number, prompt, quota) in enumerate(chosen):
        recorder = Recorder(max_records)
        own_seed = (seed + number) % 2**64
        tell(f"Prompt {done + 1} of {len(chosen)}: {prompt}")
        latent = sample(
            _recording(model, recorder),
            own_seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            wanted[done],
            unwanted,
            empty,
            _overall_progress(model, bar, done, len(chosen)),
        )
        settings = {"steps": steps, "cfg": cfg, "sampler": sampler_name, "scheduler": scheduler}
        run = _run(model, recorder, latent, prompt=prompt, seed=own_seed, number=number, **settings)
        runs.append(run.thinned(quota))
    return Calibration(tuple(runs), made.signature, made.source)


def _base_for(model: Any, calibration: Calibration | None) -> Calibration:
    """What a new run of this model is added to."""
    facts = signature(model)
    if calibration is None or not len(calibration):
        path = source_file(model)
        return Calibration(signature=facts, source=path.name if path else "")
    calibration.check_matches(facts)
    return calibration


def _recording(model: Any, recorder: Recorder) -> Any:
    """A clone of a MODEL whose UNet calls go to `recorder`; no tensor is copied."""
    clone = model.clone()
    Tap(recorder).put_on(clone)
    return clone


def _run(model: Any, recorder: Recorder, latent: dict[str, Any], **facts: Any) -> Run:
    records = recorder.records
    for record in records:
        if not bool(torch.isfinite(record.x).all()):
            raise ValueError(
                "a calibration needs finite UNet inputs, got NaN or infinity at UNet call "
                f"{record.index + 1} of {recorder.calls}: the checkpoint is damaged, or breaks down "
                "with these settings; try another precision, sampler or cfg, or another copy of it"
            )
    height, width = latent["samples"].shape[-2:]
    pixels = model.model.latent_format.spacial_downscale_ratio
    size = {"width": pixels * width, "height": pixels * height}
    return Run(records, calls=recorder.calls, **size, **facts)


def _encode(clip: Any, text: str) -> list:
    """As CLIPTextEncode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _overall_progress(model: Any, bar: Any, done: int, total: int) -> Callable:
    """A sampler callback that counts run `done` of `total` on one bar, with previews."""
    import latent_preview

    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
        bar.update_absolute(done * steps + step + 1, total * steps, preview)

    return callback


def sample(
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list,
    negative: list,
    latent: dict[str, Any],
    callback: Callable,
    denoise: float = 1.0,
) -> dict[str, Any]:
    """nodes.common_ksampler with a callback of our own."""
    ratios = [latent.get(f"downscale_ratio_{name}") for name in ("spacial", "temporal")]
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
    samples = comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(image, seed, latent.get("batch_index")),
        steps,
        cfg,
        sampler_name,
        scheduler,
        positive,
        negative,
        image,
        denoise=denoise,
        noise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {"samples": samples}


def decode(vae: Any, latent: dict[str, Any]) -> torch.Tensor:
    """As VAEDecode does: IMAGE [N, H, W, 3], 0 to 1."""
    import nodes  # ComfyUI's own

    return nodes.VAEDecode().decode(vae, latent)[0]


def sigma(model: Any, timestep: float) -> float:
    """The noise level that a MODEL's UNet is told as `timestep`."""
    return float(model.get_model_object("model_sampling").sigma(torch.tensor([timestep])))
