"""A MODEL beside the original: SQNR of the UNet's output by timestep, of each layer by itself, and
PSNR and SSIM of same-seed pictures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..formats.checkpoint import Layer
from ..utils import out_of_memory
from ..utils.compare_report import OTHER_WEIGHTS, POINTWISE
from ..utils.progress import detail, progress
from . import local, pictures
from .engine import CALL
from .pictures import Settings
from .quality import Energy, outputs, pick

# SQNR in dB of weights in 16 bits: below it they are others, not the same ones rounded (bf16 has 50)
SAME = 40.0
STEP = 2.0**-24  # of float16 near zero, where a tensor of tiny values has no digits left
NAMED = 6  # modules in a sentence


@dataclass(frozen=True)
class Step:
    """SQNR of the UNet's output over the records of one timestep."""

    timestep: float
    sigma: float
    calls: int
    energy: Energy


@dataclass(frozen=True)
class LayerResult:
    """A layer by itself, on the original's inputs. layer: what the file says of it, or the words of
    another pack's format, or OTHER_WEIGHTS. kind: "linear", "conv2d" or POINTWISE. weights: how many
    numbers its weight has."""

    name: str
    layer: Layer | str
    kind: str
    weights: int
    energy: Energy


@dataclass
class Compared:
    """What `compare` found. steps: falling in sigma, as sampling goes. layers: in the UNet's order.

    sampled: UNet calls and positions of a call that layers were compared on. left_out: layer -> why
    it was not. likeness: PSNR in dB and SSIM of each picture; images: reference and quantized,
    [N, H, W, 3], where a VAE decoded them. notes: sentences for the report.
    """

    steps: list[Step]
    worst: Step
    layers: list[LayerResult]
    sampled: tuple[int, int] = (0, 0)
    left_out: dict[str, str] = field(default_factory=dict)
    likeness: list[tuple[float, float]] = field(default_factory=list)
    images: tuple[torch.Tensor, torch.Tensor] | None = None
    settings: Settings | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def energy(self) -> Energy:
        """Of all records together."""
        return sum((step.energy for step in self.steps), Energy())

    @property
    def calls(self) -> int:
        return sum(step.calls for step in self.steps)

    def figures(self) -> dict:
        """JSON-able; None stands for an infinite SQNR or PSNR, or for one of NaN: such layers are
        named in "lost"."""
        return {
            "sqnr_db": _plain(self.energy.db),
            "worst_sqnr_db": _plain(self.worst.energy.db),
            "records": self.calls,
            "timesteps": [[s.timestep, s.sigma, _plain(s.energy.db)] for s in self.steps],
            "layers": {one.name: _plain(one.energy.db) for one in self.layers},
            "lost": [one.name for one in self.layers if one.energy.db == -math.inf],
            "psnr_db": [_plain(psnr) for psnr, _ in self.likeness],
            "ssim": [_plain(ssim) for _, ssim in self.likeness],
        }


def _plain(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


@out_of_memory.explained("comparing", out_of_memory.RECORD_SMALLER)
def compare(
    reference,
    quantized,
    calibration,
    layers: Mapping[str, Layer | str],
    settings: Settings | None = None,
) -> Compared:
    """Replays a calibration's records with both MODELs, one after the other; neither is changed.

    layers: the quantized MODEL's quantized layers by name. settings: of the pictures to sample, or
    None. Samples of layers' inputs and outputs are kept in at most `local.LIMIT` bytes of memory.
    Raises ValueError (rule, value, where, remedy) for MODELs or records of another architecture,
    and ComfyUI's InterruptProcessingException on cancel; hooks are gone either way.
    """
    from .bridge import sampling
    from .bridge import unet as bridge

    _check_pair(sampling.signature(reference), sampling.signature(quantized))
    calibration.check_matches(sampling.signature(reference))
    records = list(calibration)
    others = _other_weights(reference, quantized, layers)
    layers = {**layers, **{name: OTHER_WEIGHTS for name, kind in others.items() if kind}}
    names, left_out = _common(reference, quantized, layers)
    calls = 2 * (len(records) + (settings.steps if settings else 0))
    step = progress(CALL * calls + len(names))

    def one_call(*_) -> None:
        step(CALL)

    with torch.no_grad():
        unet, device, dtype = bridge.load(reference, records)
        modules = {name: unet.get_submodule(name) for name in names}
        sampled = local.budget(modules, dtype.itemsize) if modules else (0, 0)
        listener = local.Listener(modules, sampled[1])
        chosen = {id(record) for record in pick(records, sampled[0])} if modules else set()
        wanted = []
        detail(f"The reference: {len(records)} UNet calls")
        for record in records:
            heard = contextlib.nullcontext()
            if id(record) in chosen:
                listener.next_call()
                heard = listener.listening()
            with heard:
                wanted += outputs(unet, [record], device, dtype, one_call)
        latents = [_sampled(sampling, reference, settings, step)] if settings else []

        unet, device, dtype = bridge.load(quantized, records)
        detail(f"The quantized model: {len(records)} UNet calls")
        found = outputs(unet, records, device, dtype, one_call)
        left_out |= {name: "never called" for name in names if not listener.samples[name]}
        results = []
        detail(f"{len(modules)} layers, each by itself")
        for name, original in modules.items():
            if name not in left_out:
                samples, module = listener.samples.pop(name), unet.get_submodule(name)
                energy = sum((one.compare(module, device, dtype) for one in samples), Energy())
                shape = original.weight.shape
                kind = POINTWISE if tuple(shape[2:]) == (1, 1) else local.kind(original)
                results.append(LayerResult(name, layers[name], kind, math.prod(shape), energy))
            step()
        latents += [_sampled(sampling, quantized, settings, step)] if settings else []
    each = [Energy.of(a, b) for a, b in zip(wanted, found, strict=True)]
    steps, worst = _by_timestep(records, each, lambda time: sampling.sigma(reference, time))
    made = Compared(steps, worst, results, sampled, left_out, settings=settings)
    if bridge.quantized_parameter(reference) is not None:
        made.notes.append(
            "The reference MODEL is quantized itself: figures are against it, not against the "
            "original in 16 bits."
        )
    if others:
        made.notes.append(_other_words(list(others)))
    for which, results in (("reference", wanted), ("quantized", found)):
        if broken := sum(not bool(torch.isfinite(one).all()) for one in results):
            made.notes.append(
                f"The {which} MODEL gives NaN or infinity on {broken} of {len(results)} recorded "
                "calls: its pictures cannot be used."
            )
    if settings is not None:
        with torch.no_grad():
            _judge(made, [one["samples"] for one in latents], sampling)
    return made


def _check_pair(reference: Mapping, quantized: Mapping) -> None:
    for name in sorted(reference.keys() | quantized.keys()):
        seen, wanted = quantized.get(name), reference.get(name)
        if seen != wanted:
            raise ValueError(
                "two MODELs to compare must be of one architecture, got "
                f"{name} {seen} in quantized where reference has {wanted}: connect the MODEL that "
                "the quantized one was made from"
            )


def _common(reference, quantized, layers: Mapping) -> tuple[list[str], dict[str, str]]:
    """Names of layers that both have, in the UNet's order, and why others cannot be compared."""
    ours = dict(reference.model.diffusion_model.named_modules())
    theirs = dict(quantized.model.diffusion_model.named_modules())
    left_out = {}
    for name in layers:
        one, other = ours.get(name), theirs.get(name)
        if local.kind(one) is None or other is None:
            left_out[name] = "the reference has no such layer"
        elif tuple(one.weight.shape) != tuple(other.weight.shape):
            left_out[name] = f"its weight is {tuple(one.weight.shape)} in the reference"
    return [name for name in ours if name in layers and name not in left_out], left_out


def _other_weights(reference, quantized, layers: Mapping) -> dict[str, str | None]:
    """Modules that are not quantized and have other weights than the reference's -> `local.kind`.
    What carries patches (LoRA) in either is left out, as those are part of what is compared."""
    theirs = dict(quantized.model.diffusion_model.named_modules())
    found = {}
    for name, module in reference.model.diffusion_model.named_modules():
        if name in layers or name not in theirs:
            continue
        for part, ours in module.named_parameters(recurse=False):
            other = theirs[name]._parameters.get(part)
            key = f"diffusion_model.{name}.{part}"
            if other is None or key in reference.patches or key in quantized.patches:
                continue
            if not _same(_own(reference, key, ours), _own(quantized, key, other)):
                found[name] = local.kind(module)
    return found


def _own(model, key: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight without the LoRA of another MODEL that shares it and was loaded last."""
    kept = model.backup.get(key)
    return (weight if kept is None else kept.weight).detach()


def _same(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether weights are the same ones, or rounded to another 16 bits. Those of other packs' classes,
    or without values here, cannot be told."""
    plain = type(ours) is type(other) is torch.Tensor and not (ours.is_meta or other.is_meta)
    if not plain or ours.shape != other.shape:
        return True
    if ours.dtype == other.dtype and ours.device == other.device and torch.equal(ours, other):
        return True
    ours, other = ours.cpu().double(), other.cpu().double()
    return Energy.of(ours, other).db >= SAME or (ours - other).abs().max().item() <= STEP


def _other_words(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" * (len(names) > NAMED))
    return (
        f"Not quantized, but with other weights than the reference's: {shown}. The quantized MODEL was "
        "made from another model, or is damaged there."
    )


def _sampled(sampling, model, settings: Settings, step: Callable[[int], None]) -> dict:
    """What KSampler makes. A sampler may call the UNet more or less often than `steps` says: the bar
    moves by that many calls."""
    left = settings.steps

    def one_call(*_) -> None:
        nonlocal left
        step(CALL if left > 0 else 0)
        left -= 1

    made = _ksampler(sampling, model, settings, one_call)
    step(CALL * max(left, 0))
    return made


def _ksampler(sampling, model, settings: Settings, one_call: Callable) -> dict:
    return sampling.sample(
        model,
        settings.seed,
        settings.steps,
        settings.cfg,
        settings.sampler_name,
        settings.scheduler,
        settings.positive,
        settings.negative,
        settings.latent,
        one_call,
        settings.denoise,
    )


def _judge(made: Compared, latents: Sequence[torch.Tensor], sampling) -> None:
    """PSNR and SSIM of what both MODELs sampled, decoded where there is a VAE."""
    if made.settings.vae is None:
        made.likeness = pictures.likeness(*pictures.of_latents(*(one.float() for one in latents)))
        return
    first, second = (sampling.decode(made.settings.vae, {"samples": one}) for one in latents)
    made.images = (first, second)
    made.likeness = pictures.likeness(first, second)


def _by_timestep(
    records: Sequence, each: Sequence[Energy], sigma: Callable
) -> tuple[list[Step], Step]:
    """Records of one timestep together, and the worst single record."""
    groups: dict[float, list[Energy]] = {}
    for record, energy in zip(records, each, strict=True):
        groups.setdefault(record.timesteps.flatten()[0].item(), []).append(energy)
    steps = [
        Step(time, sigma(time), len(found), sum(found, Energy())) for time, found in groups.items()
    ]
    steps.sort(key=lambda one: one.sigma, reverse=True)
    worst = min(range(len(each)), key=lambda i: each[i].db)
    time = records[worst].timesteps.flatten()[0].item()
    return steps, Step(time, sigma(time), 1, each[worst])
