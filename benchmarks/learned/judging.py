"""Samples of two models beside each other: PSNR, classes still read, what the difference is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap, norm

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


def errors(reference: torch.Tensor, measured: torch.Tensor) -> list[float]:
    """Mean squared error of each of the latents [N, 4, H, W] as pictures, range 0 to 1."""
    both = (pictures.rgb(one).double() for one in (reference, measured))
    return [float(f"{one:.5g}") for one in torch.sub(*both).square().mean((1, 2, 3)).tolist()]


def gain(before: Sequence[float], after: Sequence[float], together: int = 1) -> dict[str, Any]:
    """How many dB lower the errors are that the same N cases have after than before.

    db: 10 log10(sum before / sum after). interval: its 95 % one, by a paired bootstrap (percentiles,
    SciPy's) over the cases, `together` consecutive ones drawn as one.
    """

    def decibels(before, after, axis=-1):
        return 10 * np.log10(before.sum(axis=axis) / after.sum(axis=axis))

    both = [np.asarray(one, float).reshape(-1, together).sum(1) for one in (before, after)]
    if not both[1].sum() or np.array_equal(*both):  # exact, or the same: nothing to draw from
        db = math.inf if both[0].sum() > both[1].sum() else 0.0
        return {"db": db, "interval": [db, db]}
    found = bootstrap(
        both,
        decibels,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"db": float(decibels(*both)), "interval": [float(found.low), float(found.high)]}


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
        "errors": errors(reference.latents, measured.latents),
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
