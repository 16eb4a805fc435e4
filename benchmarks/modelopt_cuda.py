"""What this pack stores of a weight, dequantized, against what ModelOpt's CUDA code makes of it.

`.venv/bin/python benchmarks/modelopt_cuda.py [--only nvfp4,mxfp8] [--quick]` on an NVIDIA GPU with a
CUDA compiler: ModelOpt's extensions are built first, minutes once. Every format, shape, source dtype
and kind of weight, easy and nasty ones, against each reference, which gets the weight as float32 and
in its own dtype. Writes benchmarks/results/modelopt_cuda_<gpu>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXTENSIONS = ("get_cuda_ext_mx", "get_cuda_ext_fp8", "get_cuda_ext")
LEAST_SCALE = 1e-5  # below it ModelOpt's Triton kernel takes an NVFP4 block's scale to be 1
SUMS = ("values", "differing", "beyond", "lost", "nan")
WHY = {
    "nvfp4": "NaN is NVFP4QTensor's of a weight of zeros, which it divides by a scale of zero; ours is "
    "zeros. Fake quantization is other code: its Triton kernel (*fake quantization*) divides "
    "approximately (`div.full.f32`), the extension (`fused_amax_convert`) multiplies by a reciprocal "
    "with fast math, and it and the static kernel make a block's scale in another order of operations. "
    "So quotients at a tie, and scales at one, go to either side, in each of the three as it comes. "
    "*Scale lost*: blocks so small that their scale is E4M3's zero, where here and in NVFP4QTensor it is "
    "the smallest number, or, in the Triton kernel, below 1e-5, when it is taken to be 1: "
    "the block becomes zeros. The static kernel also takes a weight's largest magnitude up to 6 · 2^-24 to "
    "be 6 where it rounds scales, and the extension subnormal numbers to be zero.",
    "mxfp8": "The extension is built with fast math, which takes subnormal numbers to be zero.",
    "int8": "ModelOpt divides an integer by 127 / amax, this pack multiplies it with amax / 127: two last "
    "places. Channels whose largest magnitude is exactly 2^-24 are zero here, as in ModelOpt's "
    "PyTorch code (`<=`), and not in its extension (`<`).",
    "fp8": "ModelOpt's extension divides 448 by the largest magnitude in one rounding, PyTorch's "
    "`448 / amax` in ModelOpt's Python code, and here, multiplies with the reciprocal: scales may "
    "differ in the last place, and then float32 values do, and those at a rounding boundary by a "
    "step.",
    "int4": "Blocks whose largest magnitude is exactly 2^-24 are zero here, as in ModelOpt's PyTorch "
    "code (`<=`), and not in its extension (`<`).",
    "w4a8": "As int4 and then fp8. Given 16 bits ModelOpt also rounds INT4's values to them before "
    "it rounds to FP8; this pack does not.",
}


def quantizer(config: dict | list, weight: torch.Tensor | None = None) -> torch.nn.Module:
    """ModelOpt's quantizers one after another, their amax calibrated on `weight` if there is one."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.model_calib import max_calibrate
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    configs = config if isinstance(config, list) else [config]
    made = SequentialQuantizer(*(TensorQuantizer(QuantizerAttributeConfig(**c)) for c in configs))
    if weight is not None:
        made.to(weight.device)
        max_calibrate(made, lambda module: module(weight))
    return made


def preset(name: str) -> dict:
    """The weight quantizer's attributes of ModelOpt's default configuration of nvfp4 or mxfp8."""
    import modelopt.torch.quantization as mtq

    entries = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "mxfp8": mtq.MXFP8_DEFAULT_CFG}[name]["quant_cfg"]
    found = [
        e for e in entries if e.get("cfg") and e["quantizer_name"].endswith("weight_quantizer")
    ]
    return dict(found[-1]["cfg"])


def fake(name: str, flat: torch.Tensor, amax, given: torch.Tensor) -> torch.Tensor:
    from comfyui_modelopt.quantize import modelopt

    if name == "mxfp8":
        return quantizer(preset(name)).to(given.device)(given)
    return quantizer(preset(name) if name == "nvfp4" else modelopt.WEIGHTS[name], flat)(given)


def extension(name: str, flat: torch.Tensor, amax, given: torch.Tensor) -> torch.Tensor:
    from modelopt.torch.quantization.extensions import get_cuda_ext_mx

    ext = get_cuda_ext_mx(raise_if_failed=True)
    if name == "nvfp4":
        whole_amax = amax.float().reshape(())
        return ext.fused_amax_convert(given, 16, ext.Types.E2M1, ext.Types.E4M3, whole_amax)
    return ext.fused_amax_convert(given, 32, ext.Types.E4M3, ext.Types.E8M0, None)


def static(name: str, flat: torch.Tensor, amax, given: torch.Tensor) -> torch.Tensor:
    from modelopt.torch.quantization.tensor_quant import static_blockwise_fp4_fake_quant

    of_blocks = given.reshape(-1, 16).abs().amax(-1).float()
    return static_blockwise_fp4_fake_quant(given, of_blocks, amax.float().reshape(()))


def qtensor(name: str, flat: torch.Tensor, amax, given: torch.Tensor) -> torch.Tensor:
    """ModelOpt's quantized tensor, dequantized to float32."""
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    if name == "nvfp4":
        packed, scale, scale_2 = NVFP4QTensor.quantize(given, 16)
        options = {"scale": scale, "double_scale": scale_2, "block_sizes": {-1: 16}}
        return packed.dequantize(torch.float32, **options)
    packed, scale = MXFP8QTensor.quantize(given)
    return packed.dequantize(torch.float32, scale=scale)


FAKE, EXTENSION, STATIC = "fake quantization", "fused_amax_convert", "static kernel"
# format -> reference -> what makes it, and the last places it may be off by the order of operations
REFERENCES: dict[str, dict[str, tuple[Callable, int]]] = {
    "nvfp4": {
        "NVFP4QTensor": (qtensor, 0),
        FAKE: (fake, 0),
        EXTENSION: (extension, 4),
        STATIC: (static, 4),
    },
    "mxfp8": {"MXFP8QTensor": (qtensor, 0), FAKE: (fake, 0), EXTENSION: (extension, 0)},
    "int8": {FAKE: (fake, 2)},
    "fp8": {FAKE: (fake, 0)},
    "int4": {FAKE: (fake, 0)},
    "w4a8": {FAKE: (fake, 0)},
}
INTEGERS = "its integers"  # int8: what the fake-quantized weight rounds to again


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Floating-point numbers -> integers in their order, neighbours one apart."""
    wide, low = (torch.int32, -(2**31)) if values.element_size() == 4 else (torch.int16, -(2**15))
    bits = values.contiguous().view(wide).long()
    return torch.where(bits < 0, low - bits, bits)


def block_amax(name: str, flat: torch.Tensor) -> torch.Tensor:
    """[N, K] -> float32 [N, K], the largest magnitude of what shares a scale with each value."""
    from comfyui_modelopt.benchmarks.modelopt_weights import BLOCKS

    n, k = flat.shape
    block = BLOCKS.get(name, k)
    padded = torch.nn.functional.pad(flat.float(), (0, -k % block))
    found = padded.reshape(n, -1, block).abs().amax(-1)
    found = found.amax().expand_as(found) if name == "fp8" else found
    return found.repeat_interleave(block, dim=1)[:, :k]


def lost(name: str, reference: str, flat: torch.Tensor) -> torch.Tensor:
    """Which values ModelOpt's NVFP4 fake quantization makes zero because their block's scale is lost."""
    if name != "nvfp4" or reference not in (FAKE, EXTENSION, STATIC):
        return torch.zeros_like(flat, dtype=torch.bool)
    largest = flat.float().abs().amax()
    scale_2 = torch.where(largest > 0, largest, 1.0) / (6.0 * 448.0)
    scale = (block_amax(name, flat) / (6.0 * scale_2)).clamp(max=448.0)
    scale = scale.to(torch.float8_e4m3fn).float()
    return (scale == 0) | ((scale * scale_2 < LEAST_SCALE) & (reference == FAKE))


def count(ours, theirs, amax, places: int, scale_lost) -> dict[str, float]:
    """How two [N, K] of one dtype differ: at all, beyond `places` last places, of those where the
    block's scale is lost, NaN on one side; `largest` of the rest beyond, as a share of `amax`."""
    nan = torch.isnan(ours) | torch.isnan(theirs)
    differing = (ours != theirs) & ~nan
    beyond = differing & ((ordered(ours) - ordered(theirs)).abs() > places)
    share = (ours.double() - theirs.double()).abs() / amax.double().clamp(min=1e-300)
    rest = share[beyond & ~scale_lost]
    return {
        "values": ours.numel(),
        "differing": int(differing.sum()),
        "beyond": int(beyond.sum()),
        "lost": int((beyond & scale_lost).sum()),
        "nan": int((torch.isnan(ours) != torch.isnan(theirs)).sum()),
        "largest": float(rest.max()) if rest.numel() else 0.0,
    }


def add(rows: list[dict], key: dict[str, Any], kind: str, found: dict[str, float]) -> None:
    """Adds what `count` found of one weight to the row of `key`, and to its kind there."""
    row = next((row for row in rows if all(row[k] == v for k, v in key.items())), None)
    if row is None:
        row = {**key, "weights": 0, **dict.fromkeys(SUMS, 0), "largest": 0.0, "kinds": {}}
        rows.append(row)
    row["weights"] += 1
    for into in (row, row["kinds"].setdefault(kind, dict.fromkeys(SUMS, 0))):
        for name in SUMS:
            into[name] += found[name]
    row["largest"] = max(row["largest"], found["largest"])


def compare(rows: list[dict], name: str, kind: str, weight: torch.Tensor) -> None:
    """One weight against every reference of its format."""
    from comfyui_modelopt.formats import FORMATS, blocks
    from comfyui_modelopt.quantize import modelopt, recipe

    form, flat = FORMATS[name], blocks.flatten(weight).contiguous()
    layer = "linear" if weight.ndim == 2 else "conv2d"
    amax = modelopt.weight_amax(flat, recipe.LayerPlan(layer, name, recipe.MAX))
    # as an import keeps them: INT4's block maxima in 32 bits where they are not in 16
    more = {"exact": True} if name in ("int4", "w4a8") else {}
    stored = form.quantize(weight, amax, **more)
    ours = blocks.flatten(form.dequantize(stored, tuple(weight.shape))).float()
    sharing = block_amax(name, flat)
    for reference, (make, places) in REFERENCES[name].items():
        gone = lost(name, reference, flat)
        for given in [flat.float()] + ([flat] if flat.dtype != torch.float32 else []):
            theirs = make(name, flat, amax, given.clone()).reshape(flat.shape)
            allowed = places if theirs.dtype == torch.float32 else min(places, 1)
            way = "float32" if given.dtype == torch.float32 else "16 bits"
            key = {"format": name, "reference": reference, "given": way, "places": allowed}
            add(rows, key, kind, count(ours.to(theirs.dtype), theirs, sharing, allowed, gone))
            if name == "int8" and way == "float32":
                again = form.quantize(blocks.unflatten(theirs, tuple(weight.shape)), amax)["weight"]
                found = [blocks.flatten(q).float() for q in (stored["weight"], again)]
                key = {**key, "reference": INTEGERS, "places": 0}
                add(rows, key, kind, count(*found, sharing, 0, gone))


def run(names: list[str], quick: bool, device, write: Callable[[list], None]) -> None:
    """Every weight of every format; `write` after each format."""
    from comfyui_modelopt.benchmarks import modelopt_weights as weights
    from comfyui_modelopt.formats import FORMATS

    rows: list[dict] = []
    for name in names:
        for shape in weights.SMALL + ([] if quick else weights.LARGE):
            if FORMATS[name].why_not(shape) is not None:
                continue
            for kind in weights.LARGE_KINDS if shape in weights.LARGE else weights.KINDS:
                for dtype in weights.DTYPES:
                    weight = weights.weight_of(name, kind, shape, dtype)
                    if weight is not None:
                        compare(rows, name, kind, weight.to(device))
        write(rows)


def percent(part: int, of: int) -> str:
    return "0" if not part else f"{100 * part / of:.2g} %"


def markdown(result: dict) -> str:
    """A table of the rows, one of the kinds of weights, and why they differ."""
    from comfyui_modelopt.benchmarks.modelopt_weights import LARGE_KINDS

    machine = ", ".join(result[name] for name in ("gpu", "cpu") if result.get(name))
    lines = [
        "# Stored weights against ModelOpt's CUDA code",
        "",
        f"{machine}, torch {result['torch']}, Triton {result['triton']}, nvidia-modelopt "
        f"{result['nvidia-modelopt']}, {result['date']}; by `benchmarks/modelopt_cuda.py`. What the "
        "pack stores of a weight, dequantized, beside what ModelOpt makes of the same weight on the "
        "GPU, *given* it as float32 or in its own 16 bits. *Differ*: values that are not equal; "
        "*beyond*: by more than the last places that another order of operations explains (in "
        "parentheses), of those *scale lost* as said below; *largest*: of the others, as a share of the "
        "largest magnitude under the same scale.",
        "",
        *([result["note"], ""] if "note" in result else []),
        "| format | reference | given | weights | values | differ | beyond | scale lost | NaN | largest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        largest = "" if row["largest"] is None else f"{row['largest']:.3g}"
        counts = " | ".join(f"{row[n]:,}" for n in ("weights", "values", "differing"))
        lines.append(
            f"| {row['format']} | {row['reference']} | {row['given']} | {counts} | {row['beyond']:,} "
            f"({row['places']}) | {row['lost']:,} | {row['nan']:,} | {largest} |"
        )
    lines += ["", "Values beyond, less those whose scale is lost, by the kind of weight:", ""]
    kinds = list(LARGE_KINDS)
    lines += [f"| format | reference | given | {' | '.join(kinds)} | other kinds |"]
    lines += ["|---" * (len(kinds) + 4) + "|"]
    for row in result["rows"]:
        left = {k: (v["beyond"] - v["lost"], v["values"]) for k, v in row["kinds"].items()}
        cells = [percent(*left.get(kind, (0, 1))) for kind in kinds]
        others = [f"{k} {percent(*v)}" for k, v in left.items() if k not in kinds and v[0]]
        if any(beyond for beyond, _ in left.values()):
            cells = [row["format"], row["reference"], row["given"], *cells, ", ".join(others)]
            lines.append(f"| {' | '.join(cells)} |")
    formats = dict.fromkeys(row["format"] for row in result["rows"])
    lines += ["", *(f"- **{name}**: {WHY[name]}" for name in formats)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="formats, by commas; default: " + ",".join(REFERENCES))
    parser.add_argument("--quick", action="store_true", help="small weights alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.append(str(ROOT))  # last: `nodes` and `utils` must stay ComfyUI's
    from devtools import inprocess
    from devtools.common import say

    inprocess.load_or_exit()
    from comfyui_modelopt.benchmarks.speed import machine
    from comfyui_modelopt.quantize import modelopt

    if not torch.cuda.is_available():
        say("benchmarks/modelopt_cuda.py: needs an NVIDIA GPU, torch finds none", file=sys.stderr)
        return 1
    for name, built in modelopt.build_kernels(EXTENSIONS).items():
        say(f"{name}: {'built' if built else 'could not be built'}", file=sys.stderr)
    result = machine.describe()
    path = args.out / f"modelopt_cuda_{machine.slug(result, args.quick)}.json"

    def write(rows: list[dict]) -> None:
        result["rows"] = rows
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    warnings.filterwarnings("ignore")
    with torch.no_grad():
        names = args.only.split(",") if args.only else list(REFERENCES)
        run(names, args.quick, torch.device("cuda"), write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
