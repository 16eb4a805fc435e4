"""Times every tile of the matrix kernels on the quantized layers of SDXL and SD1.5, and fits the model
of kernels/tiles.py to them.

`.venv/bin/python benchmarks/tiles.py` on an NVIDIA GPU writes benchmarks/results/tiles_<gpu>.json and
.md; `--fit FILE` fits to times that are there already. A kernel is launched ten times in one CUDA
graph, its data in the cache, beside PyTorch's fp16 and torch's fp8 product of the same layer. The
first launch of each kernel compiles it: minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CANDIDATES = [
    (128, 256, 8),
    (256, 128, 8),
    (128, 128, 8),
    (128, 128, 4),
    (128, 64, 4),
    (64, 128, 4),
    (64, 64, 4),
    (64, 256, 4),
]
SPLITS = (1, 2, 4)
CALLS, ROUNDS = 10, 3
NAME = "{bm}x{bn}x{bk} w{warps} s{stages} /{split}"


def kernels_of(shape) -> list[str]:
    """The kernels that run a layer: matmul, geglu (a feed-forward's first Linear) or conv2d."""
    if shape.kind == "conv2d":
        return ["conv2d"]
    return ["matmul", "geglu"] if shape.n == 8 * shape.k else ["matmul"]


def size(shape, kernel: str) -> tuple[int, int, int, int, int]:
    """m, n, inner dimension, taps, weights: as `kernels.tiles.choose` takes them."""
    if kernel == "conv2d":
        return shape.rows, shape.k, shape.c, shape.r * shape.r, 1
    if kernel == "geglu":
        return shape.m, shape.n // 2, shape.k, 0, 2
    return shape.m, shape.n, shape.k, 0, 1


def tiles_for(shape, kernel: str, chip) -> list:
    """Tiles that fit the chip; as many stages as fit, and 3 of 128 x 128."""
    from comfyui_modelopt.kernels.tiles import LEAST_STEPS, Tiles

    m, n, inner, taps, weights = size(shape, kernel)
    found = []
    for bk in (128,) if inner % 128 == 0 else (64, 128):
        for bm, bn, warps in CANDIDATES:
            most = min(4, chip.shared // ((bm + bn) * bk))
            for stages in dict.fromkeys([most, *([3] if (bm, bn, warps) == (128, 128, 8) else [])]):
                if stages < 2:
                    continue
                programs = -(-m // bm) * -(-n // (bn // weights))
                steps = max(taps, 1) * -(-inner // bk)
                for split in SPLITS if weights == 1 else (1,):
                    few = steps < LEAST_STEPS * split or programs * split > 2 * chip.sms
                    if split == 1 or not few:
                        found.append(Tiles(bm, bn // weights, bk, warps, stages, split))
    return found


def operands(shape, form: str) -> tuple:
    """x, weight and their scales and bias, random, on the GPU."""
    import torch

    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[form]

    def eight(*dims: int) -> torch.Tensor:
        return (torch.randn(dims, device="cuda") * 30).clamp_(-127, 127).to(dtype)

    step = torch.tensor(0.5, device="cuda")
    if shape.kind == "linear":
        x, weight, outputs = eight(shape.m, shape.k), eight(shape.n, shape.k), shape.n
        x_scale = torch.rand(shape.m, 1, device="cuda") + 0.5
    else:
        last = torch.channels_last
        x = eight(shape.batch, shape.c, shape.h, shape.w).contiguous(memory_format=last)
        weight = eight(shape.k, shape.c, shape.r, shape.r).contiguous(memory_format=last)
        x_scale, outputs = step, shape.k
    columns = torch.rand(outputs, *[1] * (weight.ndim - 1), device="cuda") + 0.5
    bias = torch.randn(outputs, device="cuda").half()
    return x, weight, x_scale, columns if form == "int8" else step, bias


def call_of(shape, kernel: str, given: tuple, chosen):
    """One launch of our kernel of triton_matmul.py with tiles of our choice."""
    from comfyui_modelopt.kernels import conv, gemm, hopper, library, tiles

    def call():
        usual = tiles.choose, library.takes
        tiles.choose, library.takes = (lambda *_, **__: chosen), (lambda *_: False)
        off = hopper.off.setdefault(given[0].device, "another kernel is timed")
        try:
            if kernel == "conv2d":
                return conv.conv2d(*given, (shape.stride,) * 2, (shape.padding,) * 2)
            run = gemm.scaled_mm_geglu if kernel == "geglu" else gemm.scaled_mm
            return run(*given)
        finally:
            tiles.choose, library.takes = usual
            if off == "another kernel is timed":
                del hopper.off[given[0].device]

    return call


def microseconds(call) -> float:
    """Of one launch among CALLS in a CUDA graph, the median of ROUNDS."""
    import torch

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / CALLS * 1e3)
    return sorted(times)[len(times) // 2]


def others(shape, kernel: str, form: str, given: tuple) -> dict[str, float]:
    """PyTorch's fp16, and torch's fp8 and int8 products (the latter gives int32)."""
    import torch
    import torch.nn.functional as F

    x, weight, _, _, bias = given
    if kernel == "geglu":
        return {}
    wide, plain = x.half(), weight.half()
    if kernel == "conv2d":
        stride, padding = shape.stride, shape.padding
        return {"fp16": microseconds(lambda: F.conv2d(wide, plain, bias, stride, padding))}
    found = {"fp16": microseconds(lambda: F.linear(wide, plain, bias))}
    if form == "fp8":
        one = torch.ones((), device="cuda")
        named = {"bias": bias, "out_dtype": torch.float16, "use_fast_accum": True}
        found["torch._scaled_mm"] = microseconds(
            lambda: torch._scaled_mm(x, weight.t(), one, one, **named)
        )
    elif shape.m > 16:
        found["torch._int_mm"] = microseconds(lambda: torch._int_mm(x, weight.t()))
    return found


def sweep(report, write) -> None:
    """All shapes; `write` after each."""
    import torch
    from comfyui_modelopt.benchmarks.speed import shapes
    from comfyui_modelopt.benchmarks.speed.settings import BATCH, PIXELS
    from comfyui_modelopt.kernels import tiles

    chip, rows = tiles.chip(torch.device("cuda")), []
    for family, pixels in PIXELS.items():
        for shape, count in shapes.count(family, "full", pixels, pixels, BATCH).items():
            if not count.quantized:
                continue
            for form in ("int8", "fp8"):
                given = operands(shape, form)
                for kernel in kernels_of(shape):
                    m, n, inner, taps, weights = size(shape, kernel)
                    row: dict[str, Any] = {"family": family, "key": shape.key, "kernel": kernel}
                    row |= {"format": form, "layers": count.quantized, "flop": shape.flop}
                    row |= {"m": m, "n": n, "inner": inner, "taps": taps, "weights": weights}
                    row["us"] = {
                        NAME.format(**vars(one)): microseconds(call_of(shape, kernel, given, one))
                        for one in tiles_for(shape, kernel, chip)
                    }
                    row["others_us"] = others(shape, kernel, form, given)
                    rows.append(row)
                    report(f"{family} {kernel} {form} {shape.key}")
                    write(rows)


# --- the model


def parsed(name: str) -> tuple[int, ...]:
    """bm, bn, bk, warps, stages, split."""
    return tuple(int(number) for number in re.findall(r"\d+", name))


def terms(row: dict, name: str, sms: int) -> tuple[tuple, tuple[float, float, float, float]]:
    """Which tile (columns of all weights), and what its three numbers and the partial sums count."""
    bm, bn, bk, warps, stages, split = parsed(name)
    programs = -(-row["m"] // bm) * -(-row["n"] // bn) * split
    steps = -(-max(row["taps"], 1) * -(-row["inner"] // bk) // split)
    rounds = -(-programs // sms)
    partial = row["m"] * row["n"] * split / 1e6 if split > 1 else 0.0
    return (bm, bn * row["weights"], bk, warps, stages), (1.0, rounds, rounds * steps, partial)


def fit(rows: list[dict], sms: int) -> dict[str, dict[tuple, tuple[float, float, float]]]:
    """Table -> tile -> microseconds a launch, a program, a step: least squares of relative errors,
    none below 0."""
    import numpy
    from comfyui_modelopt.kernels.tiles import kernel_name
    from scipy.optimize import nnls

    seen: dict[tuple, list] = {}
    for row in rows:
        table = kernel_name(row["format"] == "int8", row["taps"], row["weights"])
        for name, us in row["us"].items():
            tile, counts = terms(row, name, sms)
            seen.setdefault((table, tile), []).append([x / us for x in counts])
    found: dict[str, dict] = {}
    for (table, tile), equations in seen.items():
        numbers, _ = nnls(numpy.array(equations), numpy.ones(len(equations)))
        found.setdefault(table, {})[tile] = tuple(round(float(x), 3) for x in numbers[:3])
    return found


def picked(row: dict, chip) -> str:
    """The tile that kernels/tiles.py chooses for a layer."""
    from comfyui_modelopt.kernels import tiles

    found = tiles.choose(
        row["m"], row["n"], row["inner"], chip, row["taps"], row["weights"],
        row["format"] == "int8", row["weights"] == 1,
    )  # fmt: skip
    return NAME.format(**vars(found))


def chip_of(result: dict):
    """The GPU of a result, as `choose` takes it."""
    from comfyui_modelopt.kernels.tiles import Chip

    return Chip(tuple(result["capability"]), result["sms"], result["shared"])


def markdown(result: dict) -> str:
    """A table of the layers, with the time of the tile that is chosen for them today."""
    chip = chip_of(result)
    lines = [
        "# Tiles of the matrix kernels",
        "",
        f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}, {result['date']}; by "
        "`benchmarks/tiles.py`. Microseconds of one launch in a CUDA graph, data in the cache. A cell "
        "without a number was not measured.",
        "",
        *([result["note"], ""] if "note" in result else []),
        "| layer | of | kernel | format | best tile | best | chosen | fp16 | torch's 8-bit product |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        best = min(row["us"], key=row["us"].get)
        chosen = row["us"].get(picked(row, chip))
        other = row["others_us"]
        eight = other.get("torch._scaled_mm") or other.get("torch._int_mm")
        cells = [row["key"], f"{row['layers']} × {row['family']}", row["kernel"], row["format"]]
        cells += [best, f"{row['us'][best]:.1f}"]
        cells += [f"{x:.1f}" if x else "" for x in (chosen, other.get("fp16"), eight)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, metavar="FILE", help="no timing: fit to these times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
    from devtools import inprocess
    from devtools.common import say

    inprocess.load_or_exit()
    import torch
    from comfyui_modelopt.benchmarks.speed import machine
    from comfyui_modelopt.kernels import tiles

    if args.fit:
        result = json.loads(args.fit.read_text(encoding="utf-8"))
        path = args.fit
    elif not torch.cuda.is_available():
        say("benchmarks/tiles.py: needs an NVIDIA GPU, torch finds none here", file=sys.stderr)
        return 1
    else:
        chip = tiles.chip(torch.device("cuda"))
        result = machine.describe() | {"sms": chip.sms, "shared": chip.shared}
        path = args.out / f"tiles_{machine.slug(result, False)}.json"

        def write(rows: list[dict]) -> None:
            result["rows"] = rows
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        sweep(lambda text: say(text, file=sys.stderr), write)
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    for table, rates in fit(result["rows"], result["sms"]).items():
        say(f"{table}:")
        for tile, numbers in sorted(rates.items()):
            say(f"  {tile}: {numbers},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
