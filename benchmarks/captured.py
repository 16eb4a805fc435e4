"""Whole UNets on a GPU with and without the time that Python takes: the same call once as it is, and
once captured in a CUDA graph, which leaves its kernels alone.

`.venv/bin/python benchmarks/captured.py [--family sdxl|sd15]` takes full models of random weights in
fp16, `int8` and `fp8` (Linear layers and convolutions), as they are loaded, with the Load node's
`cuda_graphs`, with their blocks compiled (its `compile`), and compiled as a whole with CUDA graphs; `--ways
0,1` takes those of these four. Writes benchmarks/results/captured_<gpu>.json and .md. `dev.py bench` compares with other packs; this is short.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FP16 = "fp16"
AS_LOADED, REPLAYED = "as loaded", "cuda_graphs"
BLOCKS, WHOLE = "blocks compiled", "whole UNet compiled, CUDA graphs"
WAYS = (AS_LOADED, REPLAYED, BLOCKS, WHOLE)
ROWS = [
    (form, way)
    for form in (FP16, "int8", "fp8")
    for way in WAYS
    if (form, way) != (FP16, REPLAYED)  # the switch is of quantized files
]
WARM_UP, CALLS = 5, 60


def captured(call: Callable) -> Callable:
    """Replays one call from a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(call: Callable, device) -> dict[str, float]:
    """`ms` (median) and `iqr` of CALLS."""
    from comfyui_modelopt.utils import timing

    timing.time_calls(call, WARM_UP, device)
    found = timing.summarize(timing.time_calls(call, CALLS, device))
    return {"ms": found.median, "iqr": found.iqr}


def build(form: str, way: str, setting, folder: Path):
    """One way to run a UNet: `benchmarks.speed.arms.Built`."""
    from comfyui_modelopt.benchmarks.speed import arms
    from comfyui_modelopt.loaders import compiling

    if form == FP16:
        name = "compiled-graphs" if way == WHOLE else "eager"
    else:
        name = f"{form}-all" + {WHOLE: "-graphs", REPLAYED: "-replayed"}.get(way, "")
    (arm,) = (arm for arm in arms.ARMS if arm.name == name)
    built = arm.build(setting, folder)
    if way == BLOCKS:
        compiling.compile_blocks(built.model)
    return built


def measure(form: str, way: str, setting, folder: Path) -> dict[str, Any]:
    """Times, bytes, and the kernels of a call."""
    import comfy.model_management
    import torch
    from comfyui_modelopt.benchmarks.speed import arms
    from comfyui_modelopt.utils import kernel_split

    device = comfy.model_management.get_torch_device()
    row: dict[str, Any] = {"family": setting.family, "format": form, "way": way}
    built = build(form, way, setting, folder)
    with torch.no_grad():
        for _ in range(3):  # the second is captured
            built.call()
        row["weight_bytes"] = arms.weight_bytes(built)
        row["called"] = timed(built.call, device)
        if way in (AS_LOADED, BLOCKS):
            row["captured"] = timed(captured(built.call), device)
            row["split_ms"] = kernel_split.profile(built.call, device)["split_ms"]
    return row


def run(
    families: list[str],
    chosen: list[tuple[str, str]],
    report: Callable[[str], None],
    write: Callable[[list], None],
) -> None:
    """The chosen of ROWS; `write` after each."""
    import comfy.model_management
    from comfyui_modelopt.benchmarks.speed import making
    from comfyui_modelopt.benchmarks.speed.settings import setting
    from comfyui_modelopt.quantize.layers import LINEAR_AND_CONV

    rows: list[dict] = []
    for family in families:
        one = setting(family, quick=False, gpu=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            making.sixteen(one, folder)
            for form in ("int8", "fp8"):
                making.quantized(one, folder, (form, LINEAR_AND_CONV))
            for form, way in chosen:
                rows.append(measure(form, way, one, folder))
                write(rows)
                report(f"{family} {form}, {way}: {cell(rows[-1], 'called')} ms")
                gc.collect()
                comfy.model_management.unload_all_models()


def cell(row: dict, name: str) -> str:
    found = row.get(name)
    return f"{found['ms']:.1f} ({found['iqr']:.1f})" if found else ""


def markdown(result: dict) -> str:
    """A table of the rows, and where a call's time goes."""
    from comfyui_modelopt.benchmarks.speed.settings import PIXELS

    facts = f"{result['gpu']}, {result['cpu']}, torch {result['torch']}, Triton {result['triton']}"
    lines = [
        "# Whole UNets, with and without the time that Python takes",
        "",
        f"{facts}, {result['date']}; by `benchmarks/captured.py`. Random weights of the full "
        "architectures, one picture with guidance (batch 2), "
        + ", ".join(f"{family} at {pixels} px" for family, pixels in PIXELS.items())
        + ". Milliseconds of a UNet call, median and (IQR); *captured*: the same call replayed from a "
        "CUDA graph, its kernels alone.",
        "",
        *([result["note"], ""] if "note" in result else []),
        "| UNet | format | way | called | captured | weights |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["family"], row["format"], row["way"], cell(row, "called")]
        cells += [cell(row, "captured"), f"{row['weight_bytes'] / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    split = [row for row in result["rows"] if "split_ms" in row]
    if split:
        kinds = sorted({kind for row in split for kind in row["split_ms"]})
        lines += ["", "Milliseconds of a call by the kind of kernel:", ""]
        lines += [f"| UNet | format | way | {' | '.join(kinds)} |", "|---" * (len(kinds) + 3) + "|"]
        for row in split:
            times = (f"{row['split_ms'].get(kind, 0):.1f}" for kind in kinds)
            lines.append(
                f"| {row['family']} | {row['format']} | {row['way']} | {' | '.join(times)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=["sdxl", "sd15"], help="default: both")
    parser.add_argument("--out", type=Path, default=RESULTS)
    numbers = ", ".join(f"{number}: {way}" for number, way in enumerate(WAYS))
    parser.add_argument("--ways", default="0,1,2,3", help=f"by number, default: all. {numbers}")
    args = parser.parse_args()
    ways = [WAYS[int(number)] for number in args.ways.split(",")]
    sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
    from devtools import inprocess
    from devtools.common import say

    inprocess.load_or_exit()
    import torch
    from comfyui_modelopt.benchmarks.speed import machine

    if not torch.cuda.is_available():
        say("benchmarks/captured.py: needs an NVIDIA GPU, torch finds none here", file=sys.stderr)
        return 1
    result = machine.describe()
    path = args.out / f"captured_{machine.slug(result, False)}.json"

    def write(rows: list[dict]) -> None:
        result["rows"] = rows
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    families = [args.family] if args.family else ["sdxl", "sd15"]
    chosen = [row for row in ROWS if row[1] in ways]
    run(families, chosen, lambda text: say(text, file=sys.stderr), write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
