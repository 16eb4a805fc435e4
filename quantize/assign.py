"""The best choice for every group of layers under a budget: a knapsack with one item of each kind.

Noise of the layers adds up, as their sizes do: solved exactly, to a part in 10^4, by SciPy's HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

SECONDS = 60
ROUNDS = 4


@dataclass(frozen=True)
class Option:
    """One way to store a group of layers. size: bytes, or bits; noise: what it adds to the output's
    squared error."""

    size: float
    noise: float


def least_noise(groups: Sequence[Sequence[Option]], size: float) -> list[int] | None:
    """Of each group the index of its option: least noise in at most `size`; None where none fits."""
    noise = _values(groups, "noise")
    scale = max(float(noise.max()), 1e-300)
    return _solve(groups, noise / scale, _values(groups, "size"), size)


def least_size(groups: Sequence[Sequence[Option]], noise: float) -> list[int] | None:
    """Likewise: least size with at most `noise`."""
    size = _values(groups, "size")
    return _solve(groups, size / float(size.max()), _values(groups, "noise"), noise)


def total(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Option:
    """Size and noise of a choice."""
    taken = [options[i] for options, i in zip(groups, chosen, strict=True)]
    return Option(sum(one.size for one in taken), sum(one.noise for one in taken))


def _values(groups, name: str) -> numpy.ndarray:
    return numpy.array([getattr(option, name) for options in groups for option in options], float)


def _solve(groups, objective, limited, limit: float) -> list[int] | None:
    spans = [list(_span(groups, number)) for number in range(len(groups))]
    if sum(limited[span].min() for span in spans) > limit:
        return None
    if limit <= 0:  # nothing that counts may be taken
        return [int(limited[span].argmin()) for span in spans]
    allowed = limit
    for _ in range(ROUNDS):
        chosen = _milp(groups, spans, objective, limited, allowed)
        taken = sum(limited[span[i]] for span, i in zip(spans, chosen, strict=True))
        if taken <= limit:
            return chosen
        allowed -= 2 * (taken - limit)  # the solver keeps to the limit but for a part in 10^6
    return [int(limited[span].argmin()) for span in spans]  # all but the smallest is over it


def _milp(groups, spans, objective, limited, limit: float) -> list[int]:
    # here and not above: importing it takes ComfyUI's start longer than all of the pack
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    kinds = [number for number, options in enumerate(groups) for _ in options]
    count = len(kinds)
    one_each = coo_matrix((numpy.ones(count), (kinds, range(count))), shape=(len(groups), count))
    found = milp(
        objective,
        integrality=numpy.ones(count),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(limited[None] / limit, -numpy.inf, 1),
        ],
        options={"mip_rel_gap": 1e-4, "time_limit": SECONDS},
    )
    if found.x is None:  # a solution exists: the smallest
        if found.status != 1:
            return [int(limited[span].argmin()) for span in spans]
        raise ValueError(
            f"the best mix must be found within {SECONDS} s, it was not among {count} choices for "
            f"{len(groups)} groups of layers: allow fewer formats"
        )
    return [int(numpy.argmax(found.x[span])) for span in spans]


def _span(groups, number: int) -> range:
    """Where a group's options are among all of them."""
    start = sum(len(options) for options in groups[:number])
    return range(start, start + len(groups[number]))
