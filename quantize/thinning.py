"""Which of many to keep: evenly over positions, fairly over groups. Deterministic, no tensors."""

from __future__ import annotations

from collections.abc import Sequence


def spread(positions: Sequence[int], count: int, phase: float = 0.5) -> list[int]:
    """Indices of the `count` of `positions` (ascending) that lie nearest to an even spacing.

    Two or more keep the first and the last; a single one lies at `phase` (0 first, 1 last).
    """
    if count >= len(positions):
        return list(range(len(positions)))
    fractions = [phase] if count == 1 else [i / (count - 1) for i in range(count)]
    first, span = positions[0], positions[-1] - positions[0]
    chosen: list[int] = []
    for i, fraction in enumerate(fractions):
        start = chosen[-1] + 1 if chosen else 0
        stop = len(positions) - (count - 1 - i)  # leaves one each for the targets to come
        target = first + fraction * span
        distances = [abs(positions[j] - target) for j in range(start, stop)]
        chosen.append(start + distances.index(min(distances)))
    return chosen


def shares(budget: int, sizes: Sequence[int], positions: Sequence[int] | None = None) -> list[int]:
    """How many of a budget each group of `sizes` gets: the same for all, or all that it has.

    What small groups leave goes to the large ones. With less budget than groups, groups evenly
    spaced over `positions` (their order by default) get one each.
    """
    if budget < len(sizes):
        chosen = set(spread(positions or range(len(sizes)), budget))
        return [int(i in chosen) for i in range(len(sizes))]
    given = [0] * len(sizes)
    open_groups = list(range(len(sizes)))
    while open_groups:
        fair, rest = divmod(budget, len(open_groups))
        small = [i for i in open_groups if sizes[i] <= fair]
        if not small:
            extra = {open_groups[j] for j in spread(open_groups, rest)}
            for i in open_groups:
                given[i] = fair + (i in extra)
            break
        for i in small:
            given[i] = sizes[i]
            budget -= sizes[i]
        open_groups = [i for i in open_groups if sizes[i] > fair]
    return given


def phase_of(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, … for 0, 1, 2, 3, …: even over [0, 1] however far one counts.

    The base 2 van der Corput sequence.
    """
    phase, weight, rest = 0.0, 0.5, number + 1
    while rest:
        phase += weight * (rest & 1)
        weight /= 2
        rest >>= 1
    return phase
