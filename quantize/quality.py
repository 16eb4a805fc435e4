"""How much quantizing changed the UNet: SQNR of its output on recorded inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .thinning import spread


@dataclass(frozen=True)
class Energy:
    """Sums of squares of a signal and of what was added to it; those of several parts add up."""

    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, reference: torch.Tensor, measured: torch.Tensor) -> Energy:
        """Of tensors of one shape, summed in float64."""
        reference, measured = reference.double(), measured.double()
        noise = (reference - measured).square().sum().item()
        return cls(reference.square().sum().item(), noise)

    def __add__(self, other: Energy) -> Energy:
        return Energy(self.signal + other.signal, self.noise + other.noise)

    @property
    def db(self) -> float:
        """Signal over noise in dB; infinite without noise, minus infinity where it is NaN."""
        if self.noise == 0.0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def sqnr_db(reference: torch.Tensor, measured: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 log10(sum ref² / sum (ref - measured)²)."""
    return Energy.of(reference, measured).db


def decibel(references: Sequence[torch.Tensor], measured: Sequence[torch.Tensor]) -> float:
    """SQNR in dB of several outputs together."""
    return sum(map(Energy.of, references, measured), Energy()).db


def pick(records: Sequence, count: int) -> list:
    """At most `count` of the records, evenly spaced, first and last among them."""
    return [records[i] for i in spread(list(range(len(records))), min(count, len(records)), 0.5)]


@torch.no_grad()
def outputs(
    unet: torch.nn.Module,
    records: Sequence,
    device: torch.device,
    dtype: torch.dtype | None,
    after_each: Callable[[], None],
) -> list[torch.Tensor]:
    """The UNet's outputs for the records, float32 on the CPU. `after_each` reports progress."""
    results = []
    for record in records:
        args, kwargs = record.arguments(device, dtype)
        results.append(unet(*args, **kwargs).float().cpu())
        after_each()
    return results


def summary(references: list[torch.Tensor], measured: list[torch.Tensor]) -> dict:
    """SQNR over all outputs together and the worst single one, in dB, JSON-able."""
    each = [sqnr_db(r, m) for r, m in zip(references, measured, strict=True)]
    whole = sqnr_db(
        torch.cat([r.flatten() for r in references]), torch.cat([m.flatten() for m in measured])
    )
    return {"sqnr_db": round(whole, 3), "worst_sqnr_db": round(min(each), 3), "records": len(each)}
