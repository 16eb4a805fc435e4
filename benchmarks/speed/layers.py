"""All candidates of one layer shape: time, error against the exact result; and the choice table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ...formats.checkpoint import PER_TOKEN
from ...utils import timing
from ...utils.speed_report import in_one_line
from .candidates import CANDIDATES, SIXTEEN, Candidate
from .problem import Problem
from .settings import Plan
from .shapes import Shape


class ContextLost(Exception):
    """A candidate left the GPU in an error that only a new process gets rid of."""

    def __init__(self, candidate: str, error: str):
        super().__init__(f"{candidate} lost the GPU: {error}")
        self.candidate, self.error = candidate, error


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    plan: Plan,
    failed: Mapping[str, str] | None = None,
) -> list[dict]:
    """One row a candidate, in the order of CANDIDATES: times, `tflops`, errors against the exact
    result; or `why_not`; or the `error` it raised.

    failed: candidates that lost the GPU before, and their errors. Raises ContextLost for a new one.
    """
    problem = Problem(shape, device, dtype)
    rows: dict[Candidate, dict] = {}
    calls = {}
    for candidate in CANDIDATES:
        if candidate.kind != shape.kind:
            continue
        row = rows[candidate] = {
            "candidate": candidate.name,
            "format": candidate.format,
            "activations": candidate.activations,
            "takes": candidate.takes,
            "gives": candidate.gives,
            "way": candidate.way,
        }
        if failed and candidate.name in failed:
            row["error"] = failed[candidate.name]
            continue
        reason = candidate.why_not(problem)
        if reason is not None:
            row["why_not"] = reason
            continue
        try:
            call = candidate.prepare(problem)
            row |= errors(call(), problem, candidate)
            timing.synchronize(device)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            row["error"] = in_one_line(error)
            if not _alive(device):
                raise ContextLost(candidate.name, row["error"]) from error
            continue
        if candidate.ran is not None:
            row["ran"] = candidate.ran(problem)
        calls[candidate] = call
    names = {f"{number}": candidate for number, candidate in enumerate(calls)}
    for name, found in _times(names, calls, device, plan).items():
        row = rows[names[name]]
        row |= found.as_dict() | {"tflops": shape.flop / found.median / 1e9}
    return [rows[candidate] for candidate in rows]


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: a wild write on a GPU ends everything after it."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _times(names: dict[str, Candidate], calls: dict, device, plan: Plan):
    """Takes turns; a candidate so slow that its calls would exceed the plan's seconds gets fewer."""
    repeats = {}
    for name, candidate in names.items():
        once = timing.time_calls(calls[candidate], 1, device)[0] / 1e3
        affordable = int(plan.seconds / plan.rounds / max(once, 1e-9))
        repeats[name] = max(1, min(plan.repeats, affordable))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name, candidate in names.items():
        timing.time_calls(calls[candidate], min(plan.warm_up, repeats[name]), device)
    for order in timing.orders(list(names), plan.rounds):
        for name in order:
            samples[name] += timing.time_calls(calls[names[name]], repeats[name], device)
    return {name: timing.summarize(found) for name, found in samples.items()}


def errors(output: torch.Tensor, problem: Problem, candidate: Candidate) -> dict:
    """`max_error`, `rms_error` relative to the exact result's largest and RMS magnitude; for
    accumulators whether every one is `exact`."""
    if candidate.gives == "int32":
        activations = candidate.activations or PER_TOKEN
        # of a kernel that dequantizes on its way out: int32 sums rounded to float32 once
        same = torch.equal(output, problem.accumulators(activations).to(output.dtype))
        return {"accumulators_exact": bool(same)}
    exact = problem.exact(candidate.format, candidate.activations)
    off = output.double() - exact
    if not bool(torch.isfinite(off).all()):
        return {"max_error": math.inf, "rms_error": math.inf}
    rms = (off.square().mean() / exact.square().mean()).sqrt()
    return {"max_error": (off.abs().amax() / exact.abs().amax()).item(), "rms_error": rms.item()}


# a result further from the exact one than this is wrong, whatever its speed; float32 sums and one
# rounding to 16 bits stay below 0.001 RMS
WRONG = 0.01


def choices(layers: Iterable[dict]) -> list[dict]:
    """The choice table: the fastest candidate for each shape, format, way to quantize activations
    and form of the input, which together say what a layer computes.

    layers: entries with `shape`, `key` and `rows`. Of a row that is not measured, wrong or a bare
    product nothing is chosen. `faster_than_16_bits`: None where 16 bits were not measured.
    """
    table = []
    for layer in layers:
        right = [row for row in layer["rows"] if usable(row)]
        sixteen = [row["median_ms"] for row in right if row["format"] == SIXTEEN]
        best_16 = min(sixteen, default=None)
        for same in dict.fromkeys(map(_computes, right)):
            rows = (row for row in right if _computes(row) == same)
            best = min(rows, key=lambda row: row["median_ms"])
            form, activations, takes = same
            faster = None if best_16 is None else best["median_ms"] < best_16
            table.append(
                {
                    "key": layer["key"],
                    "shape": layer["shape"],
                    "format": form,
                    "activations": activations,
                    "takes": takes,
                    "fastest": best["candidate"],
                    "ms": best["median_ms"],
                    "ms_16_bits": best_16,
                    "faster_than_16_bits": None if form == SIXTEEN else faster,
                }
            )
    return table


def _computes(row: dict) -> tuple[str, str, str]:
    return row["format"], row["activations"], row["takes"]


def usable(row: dict) -> bool:
    """Whether a row is measured, right, and a way to run the layer."""
    measured = "median_ms" in row and row["gives"] == "output"
    return measured and row["rms_error"] < WRONG
