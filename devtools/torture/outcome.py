"""What a campaign tried and how it ended, and how much it may try."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from ..common import UserError


class NotHere(UserError):
    """A campaign that this system cannot run."""


@dataclass
class Row:
    """One kind of case of one campaign.

    outcomes: sentence -> how often, those that are right ("error that names the file").
    findings: what must not happen, each with what it takes to repeat it (seed, mutation, seconds).
    """

    campaign: str
    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.outcomes.total() + len(self.findings)


def not_here(campaign: str, why: object, kind: str = "") -> Row:
    """The row, with nothing tried, of what this system cannot run."""
    return Row(campaign, f"{kind}{': ' if kind else ''}not possible here: {why}")


@dataclass(frozen=True)
class Effort:
    """How much of a campaign is run: `share` of its full number of cases (1: all of them),
    from `seed` on, and no case begun after `deadline` (time.monotonic())."""

    share: float = 1.0
    seed: int = 0
    deadline: float = float("inf")

    def count(self, full: int) -> int:
        """Cases to try where the full campaign tries `full`; at least 1."""
        return max(1, round(full * self.share))

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.deadline
