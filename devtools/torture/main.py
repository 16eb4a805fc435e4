"""Runs the campaigns and writes what they found, as JSON and as a page: `benchmarks/results/torture.md`
is one, linked from the README."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common import UserError, say
from .outcome import Effort, NotHere, Row, not_here

# modules of this package, in the order in which they run
CAMPAIGNS: tuple[str, ...] = (
    "damage", "conversions", "kills", "faults", "cancels", "soak", "side_by_side"
)  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The page: how each campaign was run, one line a kind of case, then every finding."""
    rows = [row for one in result.values() for row in one["rows"]]
    findings = [(row, one) for row in rows for one in row["findings"]]
    lines = [
        "# What it survives",
        "",
        f"{sum(row['tried'] for row in rows):,} cases, {len(findings)} findings. To repeat it:",
        "",
        *(
            f"- {name}: `{one['command']}` ({one['minutes']} minutes; {one['machine']}"
            + (f"; {one['cut']}" if one["cut"] else "")
            + ")"
            for name, one in result.items()
        ),
        "",
        "| campaign | kind of case | tried | outcome | findings |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        counts = sorted(row["outcomes"].items(), key=lambda item: -item[1])
        outcomes = "; ".join(f"{count} {what}" for what, count in counts)
        lines.append(
            f"| {row['campaign']} | {row['kind']} | {row['tried']} | {outcomes} "
            f"| {len(row['findings'])} |"
        )
    lines += ["", *(f"- {row['campaign']}, {row['kind']}: {one}" for row, one in findings)]
    return "\n".join(lines).rstrip() + "\n"


def command_of(args: argparse.Namespace, name: str, seconds: float) -> str:
    """What runs this campaign alone, the same way. seconds: the time it was given, inf for any."""
    words = [f"python dev.py torture --only {name}"]
    if args.share != 1:
        words.append(f"--share {args.share:g}")
    if args.seed != 0:
        words.append(f"--seed {args.seed}")
    if seconds < float("inf"):
        words.append(f"--minutes {round(seconds / 60, 1):g}")
    return " ".join(words)


def campaign(name: str, effort: Effort, tell: Callable[[str], None]) -> list[Row]:
    """Its rows; what ends the campaign itself is a finding. Raises NotHere where it cannot be run."""
    module = importlib.import_module(f".{name}", __package__)
    rows: list[Row] = []
    try:
        for row in module.run(effort, tell):
            rows.append(row)
            tell(f"{row.kind}: {row.tried} tried, {len(row.findings)} findings")
    except UserError:
        raise
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        tell(text)
        rows.append(Row(module.NAME, "the campaign", findings=[f"it ended with {error!r}"]))
    return rows


def main(args: argparse.Namespace) -> int:
    """Status 1 where anything was found. args: `only`, `minutes`, `share`, `seed`, `out`."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    names = args.only.split(",") if args.only else list(CAMPAIGNS)
    unknown = [name for name in names if name not in CAMPAIGNS]
    if unknown:
        raise UserError(
            f"--only must name campaigns of {', '.join(CAMPAIGNS)}, got {', '.join(unknown)}: "
            "correct it"
        )
    result: dict[str, Any] = {}
    for index, name in enumerate(names):
        started = time.monotonic()
        # what is left is shared evenly by the campaigns that are left
        left = (deadline - started) / (len(names) - index)
        effort = Effort(args.share, args.seed, started + left)
        say(f"{name}:", file=sys.stderr)
        try:
            rows = campaign(name, effort, lambda text: say(f"  {text}", file=sys.stderr))
        except NotHere as error:
            if len(names) == 1:
                raise
            say(f"  not possible here: {error}", file=sys.stderr)
            rows = [not_here(name, error)]
        result[name] = {
            "command": command_of(args, name, left),
            "machine": f"{platform.system()}, Python {platform.python_version()}, "
            f"{os.cpu_count()} cores",
            "minutes": round((time.monotonic() - started) / 60),
            "cut": "the time was up before all cases were tried" if effort.over else "",
            # not `asdict`: it makes a Counter anew from pairs, which then are what is counted
            "rows": [vars(row) | {"tried": row.tried} for row in rows],
        }
        if args.out is not None:
            write(args.out, result)
    say(markdown(result))
    return 1 if any(row["findings"] for one in result.values() for row in one["rows"]) else 0


def write(path: Path, result: dict[str, Any]) -> None:
    """The JSON at `path`, the page beside it. What is there of other campaigns stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known |= result
    whole = {name: known[name] for name in CAMPAIGNS if name in known}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(whole), encoding="utf-8")
