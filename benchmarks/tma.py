"""Times the kernels that TMA feeds on Hopper (kernels/hopper.py) beside the usual ones, on the quantized
layers of SDXL and SD1.5, and PyTorch's attention backends on their attentions.

`.venv/bin/python benchmarks/tma.py` on a GPU of compute capability 9.0 writes
benchmarks/results/tma_<gpu>.json and .md; `--fit FILE` fits the tables of kernels/tiles.py to times that
are there already. As benchmarks/tiles.py: ten launches in one CUDA graph, data in the cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# heads, pixels, channels a head: the self-attentions; each has one across to 77 tokens
ATTENTIONS = {
    "sdxl": ((10, 4096, 64, 10), (20, 1024, 64, 60)),
    "sd15": ((8, 4096, 40, 5), (8, 1024, 80, 5), (8, 256, 160, 5), (8, 64, 160, 1)),
}
TOKENS = 77


def table_of(row: dict) -> str:
    """The name in `kernels.tiles.TMA`, "geglu" for the one that has one tile."""
    if row["kernel"] == "conv2d":
        return f"conv2d {row['format']}"
    return row["kernel"]


def tiles_for(row: dict, chip) -> list:
    """Every tile of the table, its sum divided as often as `choose_tma` may."""
    from comfyui_modelopt.kernels import tiles

    if row["kernel"] == "geglu":
        return [tiles.TMA_GEGLU]
    found = []
    steps = max(row["taps"], 1) * -(-row["inner"] // 128)
    for bm, bn, bk, warps, stages in tiles.TMA[table_of(row)]:
        programs = -(-row["m"] // bm) * -(-row["n"] // bn)
        for split in tiles.TMA_SPLITS if row["taps"] else (1,):
            few = steps < tiles.LEAST_STEPS * split or programs * split > 4 * chip.sms
            if split == 1 or not few:
                found.append(tiles.Tiles(bm, bn, bk, warps, stages, split))
    return found


def call_of(shape, kernel: str, given: tuple, tile):
    """One launch of a kernel of hopper.py."""
    from comfyui_modelopt.kernels import hopper

    if kernel == "conv2d":
        return lambda: hopper.conv2d(*given, (shape.padding,) * 2, tile=tile)
    run = hopper.scaled_mm_geglu if kernel == "geglu" else hopper.scaled_mm
    return lambda: run(*given, tile=tile)


def same(found, wanted, integer: bool) -> bool:
    """int8 equal; fp8 within the sums of Hopper's matrix units."""
    if integer:
        return bool((found == wanted).all())
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() < 1e-2 * wanted.norm())


def measured(shape, kernel: str, form: str, chip) -> dict[str, Any] | None:
    """Times of one layer, None where these kernels do not take it."""
    import torch
    from comfyui_modelopt.benchmarks import tiles as usual
    from comfyui_modelopt.kernels import hopper, tiles

    x, weight, x_scale, scale, bias = usual.operands(shape, form)
    given = (x, weight, x_scale * 0.001, scale, bias)  # results that 16 bits hold
    if kernel == "conv2d":
        if not hopper.takes_conv(x, weight, (shape.stride,) * 2, (1, 1)):
            return None
    elif not hopper.takes_product(x, weight):
        return None
    m, n, inner, taps, weights = usual.size(shape, kernel)
    row: dict[str, Any] = {"key": shape.key, "kernel": kernel, "format": form, "m": m, "n": n}
    row |= {"inner": inner, "taps": taps, "weights": 1}
    chosen = tiles.Tiles(*usual.parsed(usual.picked({**row, "weights": weights}, chip)))
    theirs = usual.call_of(shape, kernel, given, chosen)
    row["usual_us"] = usual.microseconds(theirs)
    wanted = theirs()
    row["us"], row["wrong"] = {}, []
    for tile in tiles_for(row, chip):
        call, name = call_of(shape, kernel, given, tile), usual.NAME.format(**vars(tile))
        if not same(call(), wanted, form == "int8"):
            row["wrong"].append(name)
        row["us"][name] = usual.microseconds(call)
    if kernel == "matmul" and form == "fp8":
        one = torch.ones((), device=x.device)
        named = {"bias": given[4], "out_dtype": torch.float16, "use_fast_accum": True}
        row["library_us"] = usual.microseconds(
            lambda: torch._scaled_mm(x, weight.t(), one, one, **named)
        )
    return row


def sweep(report, write) -> None:
    """All shapes; `write` after each."""
    import torch
    from comfyui_modelopt.benchmarks import tiles as usual
    from comfyui_modelopt.benchmarks.speed import shapes
    from comfyui_modelopt.benchmarks.speed.settings import BATCH, PIXELS
    from comfyui_modelopt.kernels import tiles

    chip, rows = tiles.chip(torch.device("cuda:0")), []
    for family, pixels in PIXELS.items():
        for shape, count in shapes.count(family, "full", pixels, pixels, BATCH).items():
            if not count.quantized:
                continue
            for form in ("int8", "fp8"):
                for kernel in usual.kernels_of(shape):
                    row = measured(shape, kernel, form, chip)
                    if row is None:
                        continue
                    rows.append({"family": family, "layers": count.quantized, **row})
                    report(f"{family} {kernel} {form} {shape.key}")
                    write(rows)


def attentions(report) -> list[dict[str, Any]]:
    """Microseconds of each of PyTorch's backends, fp16, batch 2."""
    import torch
    import torch.nn.functional as F
    from comfyui_modelopt.benchmarks import tiles as usual
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    for family, found in ATTENTIONS.items():
        for heads, pixels, wide, layers in found:
            for keys in (pixels, TOKENS):
                q, k, v = (
                    torch.randn(2, n, heads, wide, device="cuda", dtype=torch.float16).transpose(
                        1, 2
                    )
                    for n in (pixels, keys, keys)
                )
                row = {"family": family, "layers": layers, "heads": heads, "queries": pixels}
                row |= {"keys": keys, "wide": wide, "us": {}}
                for name in names:
                    with sdpa_kernel([getattr(SDPBackend, name)]):
                        call = functools.partial(F.scaled_dot_product_attention, q, k, v)
                        row["us"][name] = usual.microseconds(call)
                rows.append(row)
                report(f"{family} attention {heads} x {pixels} x {keys} x {wide}")
    return rows


def fit(rows: list[dict], sms: int) -> dict[str, dict[tuple, tuple[float, float, float]]]:
    """As benchmarks/tiles.py: table -> tile -> microseconds a launch, a program, a step."""
    import numpy
    from comfyui_modelopt.benchmarks import tiles as usual
    from scipy.optimize import nnls

    seen: dict[tuple, list] = {}
    for row in rows:
        if row["kernel"] == "geglu":
            continue
        for name, us in row["us"].items():
            tile, counts = usual.terms(row, name, sms)
            seen.setdefault((table_of(row), tile), []).append([x / us for x in counts])
    found: dict[str, dict] = {}
    for (table, tile), equations in seen.items():
        numbers, _ = nnls(numpy.array(equations), numpy.ones(len(equations)))
        found.setdefault(table, {})[tile] = tuple(round(float(x), 3) for x in numbers[:3])
    return found


def picked(row: dict, chip) -> str:
    """The tile that kernels/tiles.py chooses for a layer today."""
    from comfyui_modelopt.benchmarks import tiles as usual
    from comfyui_modelopt.kernels import tiles

    if row["kernel"] == "geglu":
        return usual.NAME.format(**vars(tiles.TMA_GEGLU))
    found = tiles.choose_tma(row["m"], row["n"], row["inner"], chip, table_of(row), row["taps"])
    return usual.NAME.format(**vars(found))


def markdown(result: dict) -> str:
    """Layers: the usual kernel, the best tile and the chosen one; then attention."""
    from comfyui_modelopt.benchmarks import tiles as usual

    chip = usual.chip_of(result)
    lines = [
        "# Kernels fed by TMA, and attention",
        "",
        f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}, {result['date']}; by "
        "`benchmarks/tma.py`. Microseconds of one launch in a CUDA graph, data in the cache. *Usual*: "
        "the kernel of kernels/triton_matmul.py with the tile that kernels/tiles.py takes for it.",
        "",
        *([result["note"], ""] if "note" in result else []),
        "| layer | of | kernel | format | usual | best tile | best | chosen | torch's fp8 product |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        best = min(row["us"], key=row["us"].get)
        numbers = (row["us"].get(picked(row, chip)), row.get("library_us"))
        cells = [row["key"], f"{row['layers']} × {row['family']}", row["kernel"], row["format"]]
        cells += [f"{row['usual_us']:.1f}", best, f"{row['us'][best]:.1f}"]
        cells += [f"{x:.1f}" if x else "" for x in numbers]
        lines.append(f"| {' | '.join(cells)} |")
    compared = [row for row in result["rows"] if row["wrong"] is not None]
    wrong = [f"{row['key']} {name}" for row in compared for name in row["wrong"]]
    lines += ["", f"{sum(len(row['us']) for row in compared)} results were compared with the usual "
              f"kernel's; these differ: {', '.join(wrong) or 'none'}."]  # fmt: skip
    if result.get("attention"):
        names = list(result["attention"][0]["us"])
        lines += [
            "",
            "Attention of fp16, batch 2:",
            "",
            f"| attention | of | {' | '.join(names)} |",
        ]
        lines.append("|---" * (len(names) + 2) + "|")
        for row in result["attention"]:
            size = f"{row['heads']} heads, {row['queries']} x {row['keys']} x {row['wide']}"
            times = " | ".join(f"{row['us'][name]:.1f}" for name in names)
            lines.append(f"| {size} | {row['layers']} × {row['family']} | {times} |")
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
    from comfyui_modelopt.kernels import hopper, tiles

    device = torch.device("cuda:0")
    if args.fit:
        result, path = json.loads(args.fit.read_text(encoding="utf-8")), args.fit
    elif not torch.cuda.is_available() or (reason := hopper.why_not(device)):
        found = reason if torch.cuda.is_available() else "torch finds no NVIDIA GPU here"
        say(f"benchmarks/tma.py: needs compute capability 9.0: {found}", file=sys.stderr)
        return 1
    else:
        chip = tiles.chip(device)
        result = machine.describe() | {"sms": chip.sms, "shared": chip.shared}
        path = args.out / f"tma_{machine.slug(result, False)}.json"

        def report(text: str) -> None:
            say(text, file=sys.stderr)

        def write(rows: list[dict]) -> None:
            result["rows"] = rows
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        result["attention"] = attentions(report)
        sweep(report, write)
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    for table, rates in fit(result["rows"], result["sms"]).items():
        say(f"{table}:")
        for tile, numbers in sorted(rates.items()):
            say(f"  {tile}: {numbers},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
