"""Samples of two models beside each other: PSNR, classes still read, what the difference is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest, norm

from . import pictures

CONFIDENCE = 0.95


@dataclass
class Samples:
    """latents [N, 4, H, W] in the model's own space; right [N] bool: the class was read off them."""

    latents: torch.Tensor
    right: torch.Tensor


def psnr_db(reference: torch.Tensor, measured: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of latents as pictures, range 0 to 1, all of them together."""
    from kornia import metrics

    both = (pictures.rgb(one).double() for one in (reference, measured))
    return metrics.psnr(*both, 1.0).item()


def interval(right: int, count: int) -> list[float]:
    """Wilson's 95 % score interval of a share."""
    found = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return [float(found.low), float(found.high)]


def paired(reference: torch.Tensor, measured: torch.Tensor) -> dict[str, Any]:
    """Right readings [N] bool of the same wishes and seeds by two models: what changed.

    p: McNemar's exact test, two-sided. change: of the share, with the 95 % interval of Bonett and
    Price (2012), Wald's after one more pair of either kind of disagreement.
    """
    count = len(reference)
    lost = int((reference & ~measured).sum())
    won = int((~reference & measured).sum())
    p = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    down, up = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    half = norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((down + up - (up - down) ** 2) / (count + 2))
    return {
        "lost": lost,
        "won": won,
        "p": p,
        "change": (won - lost) / count,
        "change_interval": [max(up - down - half, -1.0), min(up - down + half, 1.0)],
    }


def judged(reference: Samples, measured: Samples) -> dict[str, Any]:
    """PSNR and readings of a model's samples beside those of the model in 16 bits."""
    count, right = len(measured.right), int(measured.right.sum())
    return {
        "psnr_db": round(psnr_db(reference.latents, measured.latents), 3),
        "right": right,
        "samples": count,
        "accuracy": right / count,
        "accuracy_interval": interval(right, count),
        "readings": "".join("1" if one else "0" for one in measured.right.tolist()),
        **paired(reference.right, measured.right),
    }


def bits_of(readings: str) -> torch.Tensor:
    """A row's readings as `paired` takes them."""
    return torch.tensor([one == "1" for one in readings])


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many they are (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, most = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = most
    return adjusted
