"""Runs the campaigns and writes what they found, as JSON and as the page the README links to."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path

from ..common import ROOT, say
from .outcome import Effort, Row

# modules of this package, in the order in which they run
CAMPAIGNS: tuple[str, ...] = (
    "damage", "conversions", "kills", "faults", "cancels", "soak", "side_by_side"
)  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results" / "torture.json"


def markdown(rows: list[Row], facts: dict[str, str]) -> str:
    """The page: one line a kind of case, then every finding."""
    lines = [
        "# What it survives",
        "",
        f"`{facts['command']}`, {facts['machine']}, {facts['minutes']} minutes.",
        "",
        "| campaign | kind of case | tried | outcome | findings |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        outcomes = "; ".join(f"{count} {what}" for what, count in row.outcomes.most_common())
        lines.append(
            f"| {row.campaign} | {row.kind} | {row.tried} | {outcomes} | {len(row.findings)} |"
        )
    findings = [(row, one) for row in rows for one in row.findings]
    lines += ["", f"{len(findings)} findings." if findings else "No findings."]
    lines += [f"- {row.campaign}, {row.kind}: {one}" for row, one in findings]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> int:
    """Status 1 where anything was found. args: `only`, `minutes`, `share`, `seed`, `out`."""
    started = time.monotonic()
    deadline = started + 60 * args.minutes if args.minutes else float("inf")
    names = args.only.split(",") if args.only else list(CAMPAIGNS)
    rows: list[Row] = []
    for index, name in enumerate(names):
        # what is left is shared evenly by the campaigns that are left
        left = (deadline - time.monotonic()) / (len(names) - index)
        effort = Effort(args.share, args.seed, time.monotonic() + left)
        module = importlib.import_module(f".{name}", __package__)
        say(f"{module.NAME}:", file=sys.stderr)
        for row in module.run(effort, lambda text: say(f"  {text}", file=sys.stderr)):
            rows.append(row)
            say(f"  {row.kind}: {row.tried} tried, {len(row.findings)} findings", file=sys.stderr)
    options = [f"--{k} {v}" for k in ("only", "minutes", "share", "seed")
               if (v := getattr(args, k)) not in (None, 1.0, 0)]  # fmt: skip
    facts = {
        "command": " ".join(["python dev.py torture", *options]),
        "machine": f"{platform.system()}, Python {platform.python_version()}",
        "minutes": f"{(time.monotonic() - started) / 60:.0f}",
    }
    text = markdown(rows, facts)
    say(text)
    if args.out is not None:
        write(args.out, rows, facts, text)
    return 1 if any(row.findings for row in rows) else 0


def write(path: Path, rows: list[Row], facts: dict[str, str], text: str) -> None:
    """The JSON at `path`, the page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not `asdict`: it makes a Counter anew from pairs, which then are what is counted
    result = {**facts, "rows": [vars(row) | {"tried": row.tried} for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
