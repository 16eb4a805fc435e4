"""Quality, size and time of every recipe on one model, on UNet calls it was not calibrated on.

`.venv/bin/python benchmarks/recipes.py [--checkpoint FILE | --family sd15|sdxl]` writes a JSON and
a Markdown table to benchmarks/results. The loaded UNet runs its low-precision arithmetic, exactly
emulated on a CPU, so that the quality does not depend on the device; the kernels are in the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
VARIANTS = {
    "smoothquant": (
        *({"alpha": alpha} for alpha in (0.25, 0.5, 0.75, 1.0)),
        {"alpha": 0.5, "convolutions": "percentile"},
    ),
    "percentile": tuple({"percentile": share} for share in (0.25, 0.5, 1.0)),
}
# of SVDQuant: what is taken where no rank is asked for, and the common one
RANKS = ({}, {"rank": 32})
SAMPLING = {"cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
NEGATIVE = "blurry, low quality"
# neither this prompt nor this seed is among those of the calibration
HELD_OUT_PROMPT = "an old steam locomotive crossing a stone bridge in autumn, photograph"
HELD_OUT_SEED = 10_000
MAX_RECORDS = 64


def recipes(slow: bool, variants: bool = True) -> list:
    """Every recipe of the pack, with each choice of layers; awq_full only if `slow`.

    variants: also other values of the algorithms' own options than the default ones, which SVDQuant's
    rank always has.
    """
    from comfyui_modelopt.quantize.layers import LINEAR_AND_CONV, MODES
    from comfyui_modelopt.quantize.recipe import (
        ACTIVATIONS,
        ALGORITHMS,
        AWQ_FULL,
        MAX,
        SVDQUANT,
        Recipe,
    )

    chosen = (VARIANTS if variants else {}) | {SVDQUANT: RANKS}
    found = []
    for layers in MODES:
        for form, algorithms in ALGORITHMS.items():
            for algorithm in algorithms:
                if algorithm == AWQ_FULL and not slow:
                    continue
                if algorithm == "percentile" and layers != LINEAR_AND_CONV:
                    continue  # is max there
                found += [
                    Recipe(form, algorithm, layers=layers, **options)
                    for options in chosen.get(algorithm, ({},))
                    if layers == LINEAR_AND_CONV or options.get("convolutions") != "percentile"
                ]
            found += [
                Recipe(form, MAX, layers=layers, activations=choice)
                for choice in ACTIVATIONS.get(form, ())[1:]
            ]
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    from comfyui_modelopt.benchmarks.file_size import cpu_name
    from comfyui_modelopt.quantize.engine import versions

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if gpu else None,
        **versions(),
    }


def record(model, clip, prompts, seed: int, args: argparse.Namespace, max_records: int):
    """A calibration of these prompts, sampled with seed, seed + 1, …"""
    from comfyui_modelopt.quantize.bridge import sampling

    return sampling.record_prompts(
        model,
        clip,
        prompts,
        NEGATIVE,
        width=args.size,
        height=args.size,
        steps=args.steps,
        seed=seed,
        max_records=max_records,
        **SAMPLING,
    )


def bits(checkpoint) -> float:
    """Bits a weight of the quantized layers, all scales and low-rank branches included."""
    stored = weights = 0
    for name, layer in checkpoint.layers.items():
        tensors = {key: checkpoint.tensors[f"{name}.{key}"] for key in ("weight", *layer.scales)}
        stored += sum(8 * t.nbytes for t in tensors.values())
        weights += math.prod(layer.shape or tensors["weight"].shape)
    return stored / weights


def identity(recipe) -> dict[str, str]:
    """What a row says of its recipe: format, algorithm, options and layers."""
    from comfyui_modelopt.utils.report import OPTIONS

    facts = recipe.describe()
    options = [f"{name} {facts[name]}" for name in OPTIONS if name in facts]
    return {
        "format": recipe.format,
        "algorithm": recipe.algorithm,
        "options": ", ".join(options),
        "layers": recipe.layers,
    }


def measure(
    model, recipe, calibration, records: list, references: list
) -> tuple[dict[str, Any], Any, list]:
    """Quantizes and loads: facts, the quantized MODEL and its outputs for `records`.

    Facts are SQNR in dB of the loaded UNet's output for `records`, bytes, seconds.
    """
    from comfyui_modelopt.loaders import dispatch
    from comfyui_modelopt.loaders import unet as loader
    from comfyui_modelopt.quantize import engine, quality
    from comfyui_modelopt.quantize.bridge import unet as bridge

    made = engine.quantize_model(model, recipe, calibration)
    quantized = loader.load(made.checkpoint, arithmetic=dispatch.INTEGER)
    outputs = bridge.run_loaded(quantized, records, lambda: None)
    row = {
        **identity(recipe),
        **quality.summary(references, outputs),
        "bits": round(bits(made.checkpoint), 3),
        "bytes": made.checkpoint.nbytes(),
        "ratio": round(made.checkpoint.nbytes() / made.bytes_before, 4),
        "seconds": round(made.seconds, 2),
        "quantized_layers": len(made.checkpoint.layers),
        "opens_in_stock": made.checkpoint.opens_in_stock,
        "kernels": sorted({kernel.name for kernel in loader.kernels(quantized).values()}),
    }
    return row, quantized, outputs


def run(path: Path, synthetic: bool, args: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark on one checkpoint. Prints a table row a recipe."""
    import comfy.sd
    import torch
    from comfyui_modelopt.quantize import prompts
    from comfyui_modelopt.quantize.bridge import unet as bridge

    from devtools.common import say

    model, clip = comfy.sd.load_checkpoint_guess_config(str(path))[:2]
    chosen = prompts.BUILT_IN[: args.prompts]
    with torch.no_grad():
        calibration = record(model, clip, chosen, args.seed, args, MAX_RECORDS)
        seed = args.seed + HELD_OUT_SEED
        held_out = record(model, clip, [HELD_OUT_PROMPT], seed, args, 2 * args.steps)
        records = list(held_out)
        references = bridge.run_loaded(model, records, lambda: None)
        say(HEAD)
        rows = []
        for recipe in recipes(args.slow):
            rows.append(measure(model, recipe, calibration, records, references)[0])
            say(line(rows[-1]))
    unet = model.model.diffusion_model
    source = {"source": path.name}  # ComfyUI's name for it may be a temporary one
    return {
        "machine": machine(),
        "checkpoint": {
            "name": path.name,
            "synthetic": synthetic,
            "architecture": type(model.model.model_config).__name__,
            "unet_parameters": sum(p.numel() for p in unet.parameters()),
        },
        "calibration": calibration.summary() | source | {"seed": args.seed},
        "held_out": held_out.summary() | source | {"seed": seed},
        "rows": rows,
    }


HEAD = (
    "| format | algorithm | options | layers | SQNR, held out | worst call | bits a weight | UNet "
    "| of 16 bits | quantizing | opens in stock ComfyUI |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {row['format']} | {row['algorithm']} | {row['options']} | {row['layers']} "
        f"| {row['sqnr_db']:.2f} dB | {row['worst_sqnr_db']:.2f} dB "
        f"| {row['bits']:.2f} | {row['bytes'] / 1e6:.1f} MB | {row['ratio']:.3f} "
        f"| {row['seconds']:.1f} s | {'yes' if row['opens_in_stock'] else 'no'} |"
    )


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: what, on which machine, the table."""
    where, what = result["machine"], result["checkpoint"]
    weights = "synthetic weights (random)" if what["synthetic"] else "the user's checkpoint"
    seen, asked = result["calibration"], result["held_out"]
    return "\n".join(
        [
            f"# Recipes on {what['name']}",
            "",
            f"UNet: {what['architecture']}, {what['unet_parameters'] / 1e6:.1f} M parameters, "
            f"{weights}.",
            *(
                ["Random weights show how the recipes compare, not what a trained model gives."]
                if what["synthetic"]
                else []
            ),
            "",
            f"Calibrated on {seen['records']} UNet calls of {seen['runs']} prompts, measured on "
            f"{asked['records']} calls of a prompt and a seed that were not among them; "
            f"{seen['steps'][0]} steps, {seen['resolutions'][0]} px, seeds from {seen['seed']}.",
            "",
            f"Machine: {where['gpu'] or 'no GPU'}; {where['cpu']}, torch on {where['threads']} thread(s); "
            f"torch {where['torch']}, ModelOpt {where['modelopt']}, ComfyUI {where['comfyui']}. "
            "Made by `benchmarks/recipes.py`.",
            "Bits a weight: of quantized layers, scales and SVDQuant's branches included; the small "
            "layers of a small model make scales count more than in a full one.",
            "",
            HEAD,
            *map(line, result["rows"]),
            "",
        ]
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=Path, help="default: a small synthetic one")
    model.add_argument(
        "--family",
        choices=["sd15", "sdxl"],
        default="sd15",
        help="of the synthetic checkpoint, default: sd15",
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--prompts", type=int, default=4, help="to calibrate on, 1 to 16")
    parser.add_argument("--slow", action="store_true", help="awq_full too, which is slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it as .md")
    args = parser.parse_args()
    if args.checkpoint and not args.checkpoint.is_file():
        parser.error(f"--checkpoint {args.checkpoint}: there is no such file")
    if args.size < 64 or args.size % 64:
        parser.error(f"--size must be a multiple of 64, got {args.size}")
    if args.steps < 1 or not 1 <= args.prompts <= 16:
        parser.error("--steps must be at least 1 and --prompts from 1 to 16")
    if args.out and args.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {args.out}")
    if args.out is None:
        stem = args.checkpoint.stem if args.checkpoint else f"{args.family}_tiny"
        args.out = RESULTS / f"recipes_{stem}.json"
    return args


def main() -> int:
    args = options()
    sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
    from devtools import inprocess
    from devtools.common import say

    inprocess.load_or_exit()
    if args.checkpoint:
        result = run(args.checkpoint, False, args)
    else:
        from comfyui_modelopt.devtools import synthetic

        say(
            f"No --checkpoint: a small synthetic {args.family} with random weights", file=sys.stderr
        )
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"synthetic_{args.family}_tiny.safetensors"
            make = {"sd15": synthetic.sd15, "sdxl": synthetic.sdxl}[args.family]
            result = run(make(path), True, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    say(f"Written to {args.out} and {args.out.with_suffix('.md').name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
