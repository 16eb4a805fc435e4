"""How `dev.py test` runs the whole suite: several processes, each with whole files of tests."""

from __future__ import annotations

from collections.abc import Sequence

MOST_WORKERS = 4  # each with models of its own: up to 4 GB
# whole files, for what a file makes once; in their order, servers and pages come first
SHARED_OUT = ["--dist", "loadfile", "--no-loadscope-reorder"]


def shared_out(
    extra: Sequence[str], processors: int, gpu: bool
) -> tuple[list[str], dict[str, str]]:
    """pytest's arguments and environment variables for what `dev.py test` was given.

    Anything given goes to pytest as it is. Nothing is shared where there is a GPU, which all
    processes would share too."""
    workers = 1 if gpu else min(processors, MOST_WORKERS)
    if extra or workers < 2:
        return list(extra), {}
    return ["-n", str(workers), *SHARED_OUT], {"OMP_NUM_THREADS": str(processors // workers)}
