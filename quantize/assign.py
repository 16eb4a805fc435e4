"""The best choice for every group of layers under a budget: a knapsack with one item of each kind.

Noise of the layers adds up, as their sizes do: solved to a part in 10^4 by SciPy's HiGHS. What it may
ignore is absolute, so that all is scaled by a choice that fits, and options that no choice as good can
have are left out. Layers below 10^-6 of the budget, its tolerance, may get less than their best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

SECONDS = 60  # at most, of one search; what is known by then is taken
ROUNDS = 4
PRECISION = 1e-4


@dataclass(frozen=True)
class Option:
    """One way to store a group of layers. size: bytes, or bits; noise: what it adds to the output's
    squared error."""

    size: float
    noise: float


def least_noise(groups: Sequence[Sequence[Option]], size: float) -> list[int] | None:
    """Of each group the index of its option: least noise in at most `size`; None where none fits."""
    return _solve(groups, _values(groups, "noise"), _values(groups, "size"), size)


def least_size(groups: Sequence[Sequence[Option]], noise: float) -> list[int] | None:
    """Likewise: least size with at most `noise`."""
    return _solve(groups, _values(groups, "size"), _values(groups, "noise"), noise)


def total(groups: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Option:
    """Size and noise of a choice."""
    taken = [options[i] for options, i in zip(groups, chosen, strict=True)]
    return Option(sum(one.size for one in taken), sum(one.noise for one in taken))


def _values(groups, name: str) -> numpy.ndarray:
    return numpy.array([getattr(option, name) for options in groups for option in options], float)


def _solve(groups, objective, limited, limit: float) -> list[int] | None:
    """Least of the objective with at most `limit` of the other."""
    spans = [list(_span(groups, number)) for number in range(len(groups))]

    def of(values, chosen) -> float:
        return float(sum(values[span[i]] for span, i in zip(spans, chosen, strict=True)))

    best = _lightest(spans, objective, limited)
    if of(limited, best) > limit:
        return None
    best = _greedy(spans, objective, limited, limit, best)
    for _ in range(ROUNDS):
        known = of(objective, best)
        if known <= 0:
            return best
        # what is left for an option where the others of a choice are the least there are
        spare = limit - sum(limited[span].min() for span in spans)
        better = known - sum(objective[span].min() for span in spans)
        allowed = numpy.ones(len(objective), bool)
        for span in spans:
            allowed[span] = limited[span] - limited[span].min() <= spare
            allowed[span] &= objective[span] - objective[span].min() <= better
        for span, i in zip(spans, best, strict=True):
            allowed[span[i]] = True  # also where a sum lost its last digits
        found = _within(groups, spans, objective / known, limited, limit, allowed)
        if found is None or of(objective, found) >= known * (1 - PRECISION):
            return best if found is None or of(objective, found) >= known else found
        best = found
    return best


def _lightest(spans, objective, limited) -> list[int]:
    return [min(range(len(s)), key=lambda i, s=s: (limited[s[i]], objective[s[i]])) for s in spans]


def _greedy(spans, objective, limited, limit: float, chosen: list[int]) -> list[int]:
    """From a choice that fits on, what saves most for what it takes, while it fits."""
    shape = (len(spans), max(map(len, spans)))
    cost, taken = numpy.full(shape, numpy.inf), numpy.full(shape, numpy.inf)
    for number, span in enumerate(spans):
        cost[number, : len(span)], taken[number, : len(span)] = objective[span], limited[span]
    every, chosen = numpy.arange(len(spans)), numpy.array(chosen)
    while True:
        now = taken[every, chosen]
        saved, more = cost[every, chosen][:, None] - cost, taken - now[:, None]
        gain = numpy.where((saved > 0) & (now.sum() + more <= limit), saved, 0.0)
        if not gain.any():
            return chosen.tolist()
        # what takes nothing first
        gain = numpy.where(gain > 0, gain / numpy.maximum(more, limit * 1e-12), 0.0)
        number, to = numpy.unravel_index(gain.argmax(), shape)
        chosen[number] = to


def _within(groups, spans, objective, limited, limit: float, allowed) -> list[int] | None:
    """The solver's choice, None where it finds none that keeps to the limit."""
    limit_now = limit
    for _ in range(ROUNDS):
        chosen = _milp(groups, objective, limited, limit_now, allowed)
        if chosen is None:
            return None
        taken = sum(limited[span[i]] for span, i in zip(spans, chosen, strict=True))
        if taken <= limit:
            return chosen
        limit_now -= 2 * (taken - limit)  # it keeps to the limit but for a part in 10^6
    return None


def _milp(groups, objective, limited, limit: float, allowed) -> list[int] | None:
    # here and not above: importing it takes ComfyUI's start longer than all of the pack
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    if limit <= 0:
        return None
    kinds = [number for number, options in enumerate(groups) for _ in options]
    count = len(kinds)
    one_each = coo_matrix((numpy.ones(count), (kinds, range(count))), shape=(len(groups), count))
    found = milp(
        numpy.where(allowed, objective, 0.0),
        integrality=numpy.ones(count),
        bounds=Bounds(0, allowed.astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(numpy.where(allowed, limited, 0.0)[None] / limit, -numpy.inf, 1),
        ],
        options={"mip_rel_gap": PRECISION, "time_limit": SECONDS},
    )
    if found.x is None:
        return None
    starts = numpy.cumsum([0, *map(len, groups)])
    return [int(found.x[a:b].argmax()) for a, b in zip(starts, starts[1:], strict=False)]


def _span(groups, number: int) -> range:
    """Where a group's options are among all of them."""
    start = sum(len(options) for options in groups[:number])
    return range(start, start + len(groups[number]))
