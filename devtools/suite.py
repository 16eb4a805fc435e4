"""How `dev.py test` runs the whole suite: several processes, each with whole files of tests."""

from __future__ import annotations

import os
from collections.abc import Sequence

MOST_WORKERS = 4
MEMORY = 5 << 30  # of a worker, which has models and servers of its own
# whole files, for what a file makes once; in their order, servers and pages come first
SHARED_OUT = ["--dist", "loadfile", "--no-loadscope-reorder"]


def processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Bytes of RAM; where the system does not say, as much as two workers need."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; a name that is not known
        return 2 * MEMORY


def shared_out(
    extra: Sequence[str], processors: int, memory: int, gpu: bool
) -> tuple[list[str], dict[str, str]]:
    """pytest's arguments and environment variables for what `dev.py test` was given.

    Anything given goes to pytest as it is. Nothing is shared where there is a GPU, which all
    processes would share too. memory: bytes."""
    workers = 1 if gpu else min(processors, memory // MEMORY, MOST_WORKERS)
    if extra or workers < 2:
        return list(extra), {}
    return ["-n", str(workers), *SHARED_OUT], {"OMP_NUM_THREADS": str(processors // workers)}
