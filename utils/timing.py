"""Times of calls: CUDA events on a GPU, `time.perf_counter` elsewhere; contenders take turns.

Contenders are called in rounds, in a new order each round, so that a clock that drifts with heat
or with other programs moves all of them alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles of `calls` calls."""

    median: float
    low: float
    high: float
    calls: int

    @property
    def iqr(self) -> float:
        """Distance between the quartiles."""
        return self.high - self.low

    def as_dict(self) -> dict[str, float]:
        """JSON-able: median_ms, low_ms, high_ms, iqr_ms, calls."""
        facts = {f"{name}_ms": round(x, 5) for name, x in asdict(self).items() if name != "calls"}
        return facts | {"iqr_ms": round(self.iqr, 5), "calls": self.calls}


def summarize(samples: Sequence[float]) -> Timing:
    """Median and quartiles (linear between order statistics). Raises ValueError for no samples."""
    if not samples:
        raise ValueError("a median needs at least 1 sample, got 0: measure before summing up")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize()


def time_calls(
    call: Callable[[], object],
    count: int,
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Milliseconds of each of `count` calls, one after the other; `step` comes after each.

    On a GPU between two events around the call, so that time in which the GPU waits for the call's
    next launch counts and `step` does not; the device is waited for before and after all of them.
    """
    synchronize(device)
    if device.type == "cuda":
        pairs = []
        for _ in range(count):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
            step()
        synchronize(device)
        return [start.elapsed_time(end) for start, end in pairs]
    samples = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        synchronize(device)
        samples.append(1e3 * (time.perf_counter() - started))
        step()
    return samples


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> list[list[str]]:
    """For each round all names, shuffled anew; the same for the same seed."""
    shuffler = random.Random(seed)
    return [shuffler.sample(list(names), len(names)) for _ in range(rounds)]


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    warm_up: int,
    rounds: int,
    repeats: int,
    step: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Milliseconds of `rounds` x `repeats` calls of each contender, after `warm_up` calls of each."""
    for call in calls.values():
        time_calls(call, warm_up, device, step)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for order in orders(list(calls), rounds, seed):
        for name in order:
            samples[name] += time_calls(calls[name], repeats, device, step)
    return samples
