"""Bytes and host memory of quantizing and loading full-size UNets, each stage in its own process.

`python benchmarks/file_size.py --family sd15` writes benchmarks/results/file_size_sd15.json and a
table; `--variants awq svdquant` measures those only, and keeps the other rows. The weights are random
(shapes and bytes are those of the real architectures); quantizing replays real UNet calls of a very
small picture. Memory is what the process takes of the machine's (its resident set; on Linux without
mapped files), sampled from after the plan was made and a small UNet quantized likewise on: what a process
takes once, for libraries and their threads, is not in it. With glibc the heap is told to give back what is
freed (NO_HEAP), so that it is what is in use. Rows of earlier runs, without that, are marked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
from devtools import common  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
VARIANTS = (
    ("int8", "max", "linear + conv"),
    ("int8", "smoothquant", "linear + conv"),
    ("fp8", "mse", "linear + conv"),
    ("mxfp8", "max", "linear + conv"),
    ("nvfp4", "max", "linear + conv"),
    ("nvfp4", "max", "linear only"),
    ("int4", "max", "linear + conv"),
    ("w4a8", "max", "linear + conv"),
    ("nvfp4", "awq_lite", "linear + conv"),
    ("nvfp4", "svdquant", "linear + conv"),
    ("int4", "awq_lite", "linear + conv"),
    ("int4", "svdquant", "linear + conv"),
    ("w4a8", "awq_lite", "linear + conv"),
)
# what SVDQuant keeps of a weight beside the quantized rest: counted by itself
BRANCH = ("svd_up", "svd_down")


class PeakMemory:
    """Peak resident set of this process while the context is open, in bytes; on Linux without the
    pages of mapped files, which come and go as the system likes."""

    def __enter__(self):
        import psutil

        self.process = psutil.Process()
        self.start = self.peak = self._now()
        self.going = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _now(self) -> int:
        info = self.process.memory_info()
        return info.rss - getattr(info, "shared", 0)

    def _watch(self) -> None:
        while self.going:
            self.peak = max(self.peak, self._now())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.going = False
        self.thread.join()


def _prepare():
    from devtools import inprocess

    inprocess.load()


def _record(model):
    """Two calls of the UNet, of a 128 x 128 picture."""
    import torch
    from comfyui_modelopt.quantize.bridge import sampling

    width = model.model.model_config.unet_config["context_dim"]
    pooled = {"pooled_output": torch.randn(1, 1280)}
    conditioning = [[torch.randn(1, 77, width), pooled]]
    _, calibration = sampling.record(
        model,
        seed=0,
        steps=2,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        positive=conditioning,
        negative=conditioning,
        latent_image={"samples": torch.zeros(1, 4, 16, 16)},
        denoise=1.0,
        max_records=2,
    )
    return calibration


def _warm_up(family: str, recipe) -> None:
    """Quantizes a small UNet by a recipe."""
    import comfy.sd
    from comfyui_modelopt.devtools import synthetic
    from comfyui_modelopt.quantize import engine

    model = comfy.sd.load_diffusion_model_state_dict(synthetic.unet_state_dict(family))
    engine.quantize_model(model, recipe, _record(model))


def stage_quantize(family: str, source: str, target: str, variant: tuple[str, str, str]) -> dict:
    """Loads the 16-bit UNet, records, quantizes, writes `target`. Bytes of memory."""
    _prepare()
    import gc

    import comfy.sd
    from comfyui_modelopt.formats import files
    from comfyui_modelopt.loaders import unet as loader
    from comfyui_modelopt.nodes import planning
    from comfyui_modelopt.quantize import engine
    from comfyui_modelopt.quantize.recipe import Recipe

    form, algorithm, layers = variant
    recipe = Recipe(form, algorithm, layers=layers)
    model = comfy.sd.load_diffusion_model(source)
    calibration = _record(model)
    started = time.monotonic()
    _, planned = planning.plan(model, recipe, calibration)
    plan_seconds = time.monotonic() - started
    _warm_up(family, recipe)
    gc.collect()
    with PeakMemory() as memory:
        started = time.monotonic()
        made = engine.quantize_model(model, recipe, calibration)
        seconds = time.monotonic() - started
    engine.measure(made, loader.load(made.checkpoint))
    files.write(made.checkpoint, target)
    return {
        "memory": "without what a process takes once",
        "planned_bytes": planned["file_bytes"],
        "planned_extra": planned["quantize_bytes"],
        "planned_seconds": planned["seconds"],
        "plan_seconds": plan_seconds,
        "model_rss": memory.start,
        "extra_rss": memory.peak - memory.start,
        "seconds": seconds,
        "layers": len(made.checkpoint.layers),
        "bits": bits_by_format(made.checkpoint),
    }


def bits_by_format(checkpoint) -> dict[str, float]:
    """Format -> bits a weight of its layers, all scales included; SVDQuant's low-rank branches, in
    bits of the same weights, as `… branch`."""
    stored: dict[str, int] = {}
    weights: dict[str, int] = {}
    for name, layer in checkpoint.layers.items():
        tensors = {key: checkpoint.tensors[f"{name}.{key}"] for key in ("weight", *layer.scales)}
        count = math.prod(layer.shape or tensors["weight"].shape)
        weights[layer.format] = weights.get(layer.format, 0) + count
        for key, tensor in tensors.items():
            part = f"{layer.format} branch" if key in BRANCH else layer.format
            stored[part] = stored.get(part, 0) + 8 * tensor.nbytes
    return {part: bits / weights[part.split()[0]] for part, bits in stored.items()}


def cpu_name() -> str:
    """The processor, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def stage_load(target: str) -> dict:
    """Loads a quantized file as the Load node does. Bytes of memory."""
    _prepare()
    from comfyui_modelopt.loaders import unet as loader

    with PeakMemory() as memory:
        started = time.monotonic()
        loader.load_file(target)
        seconds = time.monotonic() - started
    return {"load_extra_rss": memory.peak - memory.start, "load_seconds": seconds}


def _run(stage: str, *arguments: str) -> dict:
    command = [sys.executable, __file__, "--stage", stage, *arguments]
    env = os.environ | common.NO_HEAP
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def _make(family: str, folder: Path) -> Path:
    """A UNet-only fp16 file of the full architecture."""
    _prepare()
    from comfyui_modelopt.devtools import synthetic
    from safetensors.torch import save_file

    path = folder / f"{family}.safetensors"
    save_file(synthetic.unet_state_dict(family, "full"), path)
    return path


def measure(family: str, folder: Path, wanted: list[str]) -> Iterator[dict]:
    """One row a variant, of those whose name holds one of the words of `wanted` (all when empty)."""
    source = Path(_run("make", family, str(folder))["path"])
    before = source.stat().st_size
    for variant in VARIANTS:
        if wanted and not any(word in " ".join(variant) for word in wanted):
            continue
        target = folder / f"{family}-{'-'.join(variant).replace(' ', '')}.safetensors"
        row = {"family": family, "variant": " ".join(variant), "bytes_before": before}
        row |= _run("quantize", family, str(source), str(target), *variant)
        row["bytes_after"] = target.stat().st_size
        row["ratio"] = row["bytes_after"] / before
        row |= _run("load", str(target))
        row["extra_over_16bit"] = row["extra_rss"] / before
        row["load_over_file"] = row["load_extra_rss"] / row["bytes_after"]
        target.unlink()
        _say(_line(row))
        yield row
    source.unlink()


HEAD = (
    "| model | recipe | bits a weight | 16-bit file | quantized file | ratio "
    "| extra memory to quantize / 16-bit file | memory to load / file | quantize s | load s "
    "| planned size | planned memory to quantize / measured | planned s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)

EARLIER = r" \*"
FOOT = (
    rf"{EARLIER.strip()} measured earlier, with the C library's ordinary heap and what a process takes "
    "once. Seconds are wall time: what else the machine did counts."
)


def _line(row: dict) -> str:
    bits = ", ".join(f"{name} {value:.3f}" for name, value in row["bits"].items())
    return (
        f"| {row['family']} | {row['variant']}{'' if 'memory' in row else EARLIER} | {bits} "
        f"| {row['bytes_before'] / 1e9:.3f} GB | {row['bytes_after'] / 1e9:.3f} GB "
        f"| {row['ratio']:.3f} "
        f"| {row['extra_over_16bit']:.2f} | {row['load_over_file']:.2f} "
        f"| {row['seconds']:.0f} | {row['load_seconds']:.1f} {_planned(row)}|"
    )


def _planned(row: dict) -> str:
    """What Plan Quantization said before, beside what came out; nothing for rows measured earlier."""
    if "planned_bytes" not in row:
        return "| | | "
    off = row["planned_bytes"] - row["bytes_after"]
    size = "exact" if off == 0 else f"{off:+,} bytes"
    return (
        f"| {size} | {row['planned_extra'] / row['extra_rss']:.2f} | {row['planned_seconds']:.0f} "
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", default=["sd15"], choices=["sd15", "sdxl"])
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--variants", nargs="+", default=[], metavar="WORD")
    args = parser.parse_args()
    if args.stage:
        stage, *rest = args.stage
        if stage == "make":
            result = {"path": str(_make(rest[0], Path(rest[1])))}
        elif stage == "quantize":
            result = stage_quantize(*rest[:3], tuple(rest[3:]))
        else:
            result = stage_load(rest[0])
        _say(json.dumps(result))
        return
    _say(HEAD)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for family in args.family:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(family, Path(folder), args.variants):
                _write(family, row)


def _write(family: str, row: dict) -> None:
    """Results of one family: a row measured now, beside those of other variants from before."""
    path = RESULTS / f"file_size_{family}.json"
    machine = f"{cpu_name()}, {platform.system()}, CPU only"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}
    kept = {row["variant"]: row for row in before["rows"] if before["machine"] == machine}
    kept[row["variant"]] = row
    order = [" ".join(variant) for variant in VARIANTS]
    rows = [kept[name] for name in order if name in kept]
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    first = f"Measured by `benchmarks/file_size.py` on: {machine}"
    table = [first, "", HEAD, *map(_line, rows), "", FOOT, ""]
    path.with_suffix(".md").write_text("\n".join(table))


if __name__ == "__main__":
    main()
