"""What every recipe costs a model with learned weights: SQNR, PSNR of samples, classes still read.

`.venv/bin/python benchmarks/quality.py [--quick]` trains a small SD1.5 UNet on drawings of its own
(kept in .cache/quality and gone on with where it was cut off), quantizes it with every recipe and
samples. Low-precision arithmetic is exactly emulated on a CPU: the figures hold for any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "quality"
RESULTS = ROOT / "benchmarks" / "results"
SAMPLING = {"cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
SIZE = 8  # of the latents that are sampled
# classes a calibration run samples together: every class is in one run
TOGETHER = 4
MAX_RECORDS = 24
# every class twice
HELD_OUT_RUNS = 12
# of seeds: calibration 0, …; neither the held-out calls nor the judged samples share one
HELD_OUT_SEED, SAMPLES_SEED = 10_000, 20_000


@dataclass(frozen=True)
class Extent:
    """How much is done. samples: a multiple of the 24 classes. classifier: its training steps."""

    samples: int
    sampling_steps: int
    classifier: int
    recipes: list
    calibration_runs: int = 6
    held_out_runs: int = HELD_OUT_RUNS


def conditioning(labels) -> list:
    """ComfyUI's CONDITIONING that asks for one class a sample."""
    from comfyui_modelopt.benchmarks.learned import pictures

    return [[pictures.context(labels), {}]]


def _sampler_arguments(labels, seed: int, steps: int) -> dict[str, Any]:
    """Arguments of both KSampler's function and `sampling.record`."""
    import torch
    from comfyui_modelopt.benchmarks.learned import pictures

    return SAMPLING | {
        "seed": seed,
        "steps": steps,
        "positive": conditioning(labels),
        "negative": conditioning(torch.tensor([pictures.EMPTY])),
        "denoise": 1.0,
    }


def record(model, runs: int, seed: int, steps: int, max_records: int, first: int = 0):
    """A calibration of `runs` sampling runs of 4 classes each, seeds from `seed`."""
    import torch
    from comfyui_modelopt.benchmarks.learned import pictures
    from comfyui_modelopt.quantize.bridge import sampling

    calibration = None
    for run in range(runs):
        # 7 and 24 share no factor: the classes of a run differ in shape and colour
        labels = (first + 7 * (run * TOGETHER + torch.arange(TOGETHER))) % pictures.CLASSES
        latent = {"samples": torch.zeros(TOGETHER, 4, SIZE, SIZE)}
        calibration = sampling.record(
            model,
            latent_image=latent,
            max_records=max_records,
            calibration=calibration,
            prompt=", ".join(pictures.name(int(label)) for label in labels),
            **_sampler_arguments(labels, seed + run, steps),
        )[1]
    return calibration


def sample(model, judge, count: int, steps: int):
    """`count` samples, each class as often, by ComfyUI's own sampler; the same noise every time."""
    import torch
    from comfyui_modelopt.benchmarks.learned import classifier, pictures
    from comfyui_modelopt.benchmarks.learned.judging import Samples

    import nodes  # ComfyUI's own

    labels = torch.arange(pictures.CLASSES)
    found, right = [], []
    for batch in range(count // pictures.CLASSES):
        arguments = _sampler_arguments(labels, SAMPLES_SEED + batch, steps)
        latent = {"samples": torch.zeros(len(labels), 4, SIZE, SIZE)}
        (made,) = nodes.common_ksampler(model, latent=latent, **arguments)
        found.append(model.model.latent_format.process_in(made["samples"].float()))
        right.append(classifier.read(judge, found[-1]) == labels)
    return Samples(torch.cat(found), torch.cat(right))


def known_rows(earlier: dict[str, Any] | None, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier result, None for none. Raises ValueError where it is of another run."""
    if earlier is None:
        return []
    for name in ("file", "machine", "sampling", "calibration", "held_out"):
        if earlier[name] != result[name]:
            raise ValueError(
                f"rows can be kept of the same run only, {name} is {earlier[name]} in the file and "
                f"{result[name]} here: leave out --keep, or name another --out"
            )
    if earlier["reference"]["readings"] != result["reference"]["readings"]:
        raise ValueError(
            "rows can be kept of the same run only, the 16-bit model's samples read otherwise than "
            "in the file: leave out --keep, or name another --out"
        )
    return [
        {key: math.inf if value is None else value for key, value in row.items()}
        for row in earlier["rows"]
    ]


def is_default(row: dict[str, Any]) -> bool:
    """Whether a row is of its format's default recipe, as it is now."""
    from comfyui_modelopt.benchmarks import recipes
    from comfyui_modelopt.quantize.recipe import Recipe

    own = recipes.identity(Recipe(row["format"], layers=row["layers"]))
    return own.items() <= row.items()


def run(
    path: Path,
    judge,
    extent: Extent,
    after_each: Callable[[dict], None],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The table for one trained file. `after_each` gets the result so far after every recipe.

    earlier: a result that was cut off, whose rows are kept. Raises ValueError for another run's.
    """
    import comfy.sd
    import torch
    from comfyui_modelopt.benchmarks import recipes
    from comfyui_modelopt.benchmarks.learned import classifier
    from comfyui_modelopt.benchmarks.learned.judging import judged
    from comfyui_modelopt.quantize import quality
    from comfyui_modelopt.quantize.bridge import unet as bridge

    model = comfy.sd.load_diffusion_model(str(path))
    steps = extent.sampling_steps
    with torch.no_grad():
        calibration = record(model, extent.calibration_runs, 0, steps, MAX_RECORDS)
        runs = extent.held_out_runs
        held_out = record(model, runs, HELD_OUT_SEED, steps, runs * steps, first=3)
        records = list(held_out)
        references = bridge.run_loaded(model, records, lambda: None)
        own = sample(model, judge, extent.samples, steps)
        again = bridge.run_loaded(model, records, lambda: None)
        result = {
            "machine": recipes.machine(),
            "file": path.name,
            "unet_parameters": sum(p.numel() for p in model.model.diffusion_model.parameters()),
            "classifier_accuracy": classifier.accuracy(judge, (SIZE,)),
            "calibration": calibration.summary(),
            "held_out": held_out.summary(),
            "sampling": SAMPLING | {"steps": steps, "size": SIZE, "first_seed": SAMPLES_SEED},
            "reference": quality.summary(references, again) | judged(own, own),
            "rows": [],
        }
        result["rows"] = known_rows(earlier, result)
        for row in result["rows"]:
            row["default"] = is_default(row)
        for recipe in extent.recipes:
            asked = recipes.identity(recipe).items()
            if any(asked <= row.items() for row in result["rows"]):
                continue
            row, quantized, outputs = recipes.measure(
                model, recipe, calibration, records, references
            )
            row["noise"] = [
                float(f"{quality.Energy.of(*both).noise:.5g}")
                for both in zip(references, outputs, strict=True)
            ]
            row |= judged(own, sample(quantized, judge, extent.samples, steps))
            row |= {"activations": recipe.activations, "calls_a_run": steps}
            row["default"] = is_default(row)
            result["rows"].append(row)
            after_each(result)
    return result


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--samples", type=int, default=192, help="a recipe, a multiple of 24")
    parser.add_argument("--sampling-steps", type=int, default=6)
    parser.add_argument("--slow", action="store_true", help="awq_full too, which is slow")
    parser.add_argument("--quick", action="store_true", help="little of everything: does it run?")
    parser.add_argument("--keep", action="store_true", help="go on with the rows that --out holds; their "
                        "page is written anew, by the defaults of now")  # fmt: skip
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the trained files")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_sd15.json")
    args = parser.parse_args()
    if args.samples < 24 or args.samples % 24:
        parser.error(f"--samples must be a multiple of 24, got {args.samples}")
    if args.sampling_steps < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--steps and --sampling-steps must be at least 1")
    if args.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {args.out}")
    if args.quick and args.out == RESULTS / "quality_sd15.json":
        parser.error("--quick measures nothing worth keeping: name another --out")
    if args.keep and not args.out.is_file():
        parser.error(f"--keep: there is no {args.out} to go on with")
    return args


def main() -> int:
    args = options()
    sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
    from devtools import inprocess
    from devtools.common import say

    inprocess.load_or_exit()
    from comfyui_modelopt.benchmarks import recipes
    from comfyui_modelopt.benchmarks.learned import classifier, page, training
    from comfyui_modelopt.quantize.recipe import Recipe

    settings = training.QUICK if args.quick else training.Settings()
    if args.steps is not None:
        settings = dataclasses.replace(settings, steps=args.steps)
    if args.quick:
        extent = Extent(
            24, 2, 30, [Recipe("fp8"), Recipe("int8")], calibration_runs=1, held_out_runs=2
        )
    else:
        chosen = recipes.recipes(args.slow, variants=False)
        extent = Extent(args.samples, args.sampling_steps, classifier.STEPS, chosen)

    def report(text: str) -> None:
        say(text, file=sys.stderr)

    path = training.train(settings, args.cache, report)
    judge = classifier.train(steps=extent.classifier)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    say(page.HEAD)

    def write(result: dict[str, Any]) -> None:
        result["training"] = dataclasses.asdict(settings)
        text = json.dumps(page.without_infinity(result), indent=1, allow_nan=False)
        args.out.write_text(text + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(page.markdown(result), encoding="utf-8")

    def after_each(result: dict[str, Any]) -> None:
        say(page.line(result["rows"][-1]))
        write(result)

    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.keep else None
    write(run(path, judge, extent, after_each, earlier))
    report(f"Written to {args.out} and {args.out.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
