"""`dev.py bench` inside the venv."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ...devtools.common import say
from . import arms, choice_table, worker
from .run import Run
from .settings import ALL, FAMILIES, setting

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main(args) -> int:
    """args: of dev.py. Raises ValueError for an arm that there is not."""
    if args.worker:
        return worker.main(json.loads(args.worker))
    names = args.arms.split(",") if args.arms else None
    chosen = arms.chosen([name.strip() for name in names] if names else None)
    families = FAMILIES if args.family == ALL else (args.family,)
    run = Run(args.out or RESULTS, args.quick, say)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not args.quick:
        say("No CUDA device: full models take hours on a CPU; --quick takes minutes.")
    try:
        for family in families:
            run.family(setting(family, args.quick, on_gpu), args.only, chosen)
    except KeyboardInterrupt:
        run.result["interrupted"] = True
        run.write()
        raise
    finally:
        say(f"Written to {run.path} and {run.path.with_suffix('.md').name}")
    said = choice_table.write(run.result, run.path.parent, install=args.out is None)
    if said is not None:
        say(said)
    return 0
