"""What automatic mixed precision gains over one recipe for all layers, on a model with learned weights.

`.venv/bin/python benchmarks/auto.py` takes the UNet that benchmarks/quality.py trained (and trains it
where it has not). Targets are the file sizes and qualities of the uniform recipes and sizes between
them; SQNR on the calls that were searched on, and on calls of other seeds and classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / ".cache" / "quality"
SETS = {
    "int8, fp8, int4, 16 bits": ["int8", "fp8", "int4"],
    "the same and int8 weights only": ["int8", "fp8", "int4", "int8_weights"],
}
STEPS = 8
NEAR = 0.001
HEAD = (
    "| allowed | target | file | of the target | predicted | measured | held out "
    "| best uniform within the target (quality, bits: within the file), measured | seconds |\n|---|---|---|---|---|---|---|---|---|"
)


def alone(model, calibration, held_out: list, references: list, recipe) -> float:
    """SQNR in dB of one recipe for all layers, on the held-out calls."""
    from comfyui_modelopt.nodes.auto_and_load import low_precision
    from comfyui_modelopt.quantize import engine, quality
    from comfyui_modelopt.quantize.bridge import unet as bridge

    made = engine.quantize_model(model, recipe, calibration)
    outputs = bridge.run_loaded(low_precision(made.checkpoint), held_out, lambda: None)
    return quality.summary(references, outputs)["sqnr_db"]


def measure(
    model, calibration, held_out: list, references: list, allowed, goal
) -> tuple[dict, dict]:
    """One search: what was asked, what came out; and the recipes that were tried alone, by their words."""
    from comfyui_modelopt.formats import files
    from comfyui_modelopt.nodes.auto_and_load import low_precision
    from comfyui_modelopt.quantize import auto, candidates, quality
    from comfyui_modelopt.quantize.bridge import unet as bridge
    from comfyui_modelopt.quantize.layers import DEFAULT_SKIP, LINEAR_AND_CONV

    started = time.monotonic()
    found = auto.auto_quantize(
        model, calibration, allowed, goal, LINEAR_AND_CONV, DEFAULT_SKIP, low_precision
    )
    seconds = time.monotonic() - started
    outputs = bridge.run_loaded(low_precision(found.made.checkpoint), held_out, lambda: None)
    size = files.size(found.made.checkpoint)
    room = goal.value if goal.kind == auto.SIZE else size
    fit = [(sqnr, candidates.words(one)) for one, own, sqnr in found.uniform if own <= room]
    row = {
        "goal": goal.describe(),
        "bytes": size,
        "predicted_db": round(found.predicted, 2),
        "measured_db": round(found.measured, 2),
        "held_out_db": quality.summary(references, outputs)["sqnr_db"],
        "best_uniform": max(fit, default=None),
        "uniform": [[candidates.words(one), own, round(q, 2)] for one, own, q in found.uniform],
        "recipe": found.recipe.describe(),
        "notes": found.notes,
        "seconds": round(seconds, 1),
    }
    return row, {candidates.words(one): one for one, *_ in found.uniform}


def line(allowed: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    kind, value = row["goal"]["kind"], row["goal"]["value"]
    words = {
        "size": f"{value / 1e6:.2f} MB",
        "bits": f"{value:g} bits",
        "quality": f"{value:.2f} dB",
    }
    target = words[kind]
    share = f"{row['bytes'] / value:.4f}" if kind == "size" else ""
    best = row["best_uniform"]
    uniform = f"{best[0]:.2f} dB ({best[1]})" if best else "none"
    return (
        f"| {allowed} | {target} | {row['bytes'] / 1e6:.2f} MB | {share} "
        f"| {row['predicted_db']:.2f} dB | {row['measured_db']:.2f} dB "
        f"| {row['held_out_db']:.2f} dB | {uniform} | {row['seconds']:.0f} |"
    )


def just_over(allowed: str, row: dict[str, Any]) -> list[str]:
    """Sentences on the recipes that measured better than the mix, in a file that is over a target of
    size by at most NEAR of it."""
    goal = row["goal"]
    if goal["kind"] != "size":
        return []
    return [
        f"{allowed}, {goal['value'] / 1e6:.2f} MB: {name} for all layers measures {q:.2f} dB in a file "
        f"that is {size - goal['value']:,.0f} bytes over the target."
        for name, size, q in row["uniform"]
        if goal["value"] < size <= goal["value"] * (1 + NEAR) and q > row["measured_db"]
    ]


def run(path: Path, after_each) -> dict[str, Any]:
    """The whole table for one trained file."""
    import comfy.sd
    import torch
    from comfyui_modelopt.benchmarks import quality as learned
    from comfyui_modelopt.benchmarks import recipes
    from comfyui_modelopt.quantize.auto import Goal
    from comfyui_modelopt.quantize.bridge import unet as bridge

    model = comfy.sd.load_diffusion_model(str(path))
    result: dict[str, Any] = {"machine": recipes.machine(), "file": path.name, "rows": []}
    result["alone_held_out_db"] = {}
    with torch.no_grad():
        calibration = learned.record(model, 3, 0, STEPS, 12)
        held_out = list(learned.record(model, 2, learned.HELD_OUT_SEED, STEPS, 8, first=3))
        references = bridge.run_loaded(model, held_out, lambda: None)
        result["calibration"] = calibration.summary()

        def one(name: str, goal: Goal) -> dict[str, Any]:
            row, tried = measure(model, calibration, held_out, references, SETS[name], goal)
            result["rows"].append([name, row])
            for words, recipe in tried.items():
                if words not in result["alone_held_out_db"]:
                    found = alone(model, calibration, held_out, references, recipe)
                    result["alone_held_out_db"][words] = found
            after_each(result)
            return row

        first = one(next(iter(SETS)), Goal("bits", 6.0))
        int8 = max((u for u in first["uniform"] if u[0].startswith("int8 mse")), key=lambda u: u[2])
        int4 = max((u for u in first["uniform"] if u[0].startswith("int4")), key=lambda u: u[2])
        for name in SETS:
            one(name, Goal("size", int8[1]))
            one(name, Goal("quality", int8[2]))
            one(name, Goal("size", (int8[1] + int4[1]) / 2))
            one(name, Goal("size", int8[1] * 1.15))
    return result


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    where, seen = result["machine"], result["calibration"]
    uniform = {name: (size, q) for _, row in result["rows"] for name, size, q in row["uniform"]}
    return "\n".join(
        [
            f"# Auto Quantize on {result['file']}",
            "",
            "The small UNet of benchmarks/quality.py, trained on drawings: it shows what the search "
            "does, not what it gives on SDXL. SQNR in low-precision arithmetic, exactly emulated, "
            f"on up to 8 of {seen['records']} recorded calls; held out: other seeds and classes.",
            "",
            f"Machine: {where['gpu'] or 'no GPU'}; {where['cpu']}, torch on {where['threads']} "
            f"thread(s); torch {where['torch']}, ModelOpt {where['modelopt']}, ComfyUI "
            f"{where['comfyui']}. Made by `benchmarks/auto.py`. The first row of each set includes "
            "what is measured once.",
            "",
            "| one recipe for all layers | file | measured | held out |",
            "|---|---|---|---|",
            *(
                f"| {name} | {size / 1e6:.2f} MB | {q:.2f} dB "
                f"| {result['alone_held_out_db'][name]:.2f} dB |"
                for name, (size, q) in uniform.items()
            ),
            "",
            HEAD,
            *(line(name, row) for name, row in result["rows"]),
            "",
            *(text for name, row in result["rows"] for text in just_over(name, row)),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a trained file, default: that of quality.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "auto_sd15.json")
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
    from devtools import inprocess
    from devtools.common import say

    inprocess.load_or_exit()
    from comfyui_modelopt.benchmarks.learned import training

    def report(text: str) -> None:
        say(text, file=sys.stderr)

    path = args.model or training.train(training.Settings(), CACHE, report)
    say(HEAD)

    def after_each(result: dict[str, Any]) -> None:
        say(line(*result["rows"][-1]))
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    run(path, after_each)
    report(f"Written to {args.out} and {args.out.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
