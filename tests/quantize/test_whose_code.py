"""Whose code searched and packed, as the report says it; when ModelOpt's kernels are compiled."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import comfyui_modelopt
import pytest
import torch
from comfyui_modelopt.formats import FORMATS
from comfyui_modelopt.quantize import engine, modelopt, pack, percentile, whose
from comfyui_modelopt.quantize.bridge import unet as bridge
from comfyui_modelopt.quantize.recipe import ALGORITHMS, LayerPlan, Recipe, plan

from ..counted import counted

ROOT = Path(comfyui_modelopt.__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
RECIPES = [(form, algorithm) for form, known in ALGORITHMS.items() for algorithm in known]
RECIPES.append(("mixed", "awq_lite"))
EVERY_RECIPE = pytest.mark.parametrize(
    ("form", "algorithm"), RECIPES, ids=[f"{form}-{algorithm}" for form, algorithm in RECIPES]
)
FP8_CONVOLUTION = LayerPlan("conv2d", "fp8", "max")
LAYERS = {"linear": "linear", "conv": "conv2d"}


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = torch.nn.Linear(128, 32), torch.nn.Conv2d(32, 32, 3)

    def forward(self, x):
        return self.conv(self.linear(x).permute(0, 3, 1, 2))


def plans_of(unet, form: str, algorithm: str) -> dict[str, LayerPlan]:
    if form == "mixed":
        return {"linear": LayerPlan("linear", "nvfp4", algorithm), "conv": FP8_CONVOLUTION}
    return plan(unet, Recipe(form, algorithm), LAYERS)[0]


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """What ModelOpt's quantizers and this pack's functions are called, by name."""
    from modelopt.torch.quantization import model_calib
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    counts: Counter = Counter()

    for name in ("fake_tensor_quant", "scaled_e4m3", "dynamic_block_quant"):
        original = getattr(tensor_quantizer, name)
        monkeypatch.setattr(tensor_quantizer, name, counted(counts, name, original))
    modelopt.backend.register()
    ours = tensor_quantizer._QUANT_FUNCTIONAL_BACKENDS
    name = modelopt.backend.NAME
    monkeypatch.setitem(ours, name, counted(counts, "our rounding", ours[name]))
    monkeypatch.setattr(model_calib, "svd", counted(counts, "svd", model_calib.svd))
    calibrator = percentile.calibrator()
    averaging = counted(counts, "percentile", calibrator.compute_amax)
    monkeypatch.setattr(calibrator, "compute_amax", averaging)
    weights = modelopt.weight_amax
    monkeypatch.setattr(modelopt, "weight_amax", counted(counts, "weight_amax", weights))
    for form, module in FORMATS.items():
        monkeypatch.setattr(module, "quantize", counted(counts, f"pack {form}", module.quantize))
    return counts


@EVERY_RECIPE
def test_what_is_said_is_what_is_called(form, algorithm, counts, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    unet, x = Tiny().eval(), torch.randn(2, 6, 6, 128, generator=torch.Generator().manual_seed(1))
    plans = plans_of(unet, form, algorithm)
    with torch.no_grad(), modelopt.quiet():
        modelopt.calibrate(unet, plans, lambda twin: twin(x))
        pack.pack(unet, plans, lambda: None)
    needed = whose.kernels_needed(plans, CUDA)
    assert (counts["fake_tensor_quant"] > 0) == (whose.INTEGER in needed)
    assert (counts["scaled_e4m3"] > 0) == (whose.FP8 in needed)
    assert counts["dynamic_block_quant"] == 0  # whose extension is never asked for
    *said, packed = whose.lines(plans, CPU, CPU, {})
    text = "\n".join(said)
    searched = algorithm not in ("max", "smoothquant", "percentile")
    assert ("searched by ModelOpt's PyTorch code on cpu" in text) == searched
    assert ("NVFP4 rounding by this pack's code" in text) == (counts["our rounding"] > 0)
    assert ("activation scales by this pack's code" in text) == (counts["percentile"] > 0)
    assert ("branches by ModelOpt's PyTorch code" in text) == (counts["svd"] > 0)
    assert (": scales by this pack's code on cpu" in text) == (form == "mxfp8")
    assert packed.startswith("Weights packed by this pack's code on cpu")
    for one in plans.values():
        same = sum(other.format == one.format for other in plans.values())
        assert counts[f"pack {one.format}"] == same
        assert f"layers in {one.format} ({one.algorithm}): " in text
    assert "CUDA kernels" not in text


@EVERY_RECIPE
def test_on_a_gpu(form, algorithm, monkeypatch):
    """What is compiled for weights on the GPU, and what is said of it; nothing for streamed ones."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    plans = plans_of(Tiny(), form, algorithm)
    needed = whose.kernels_needed(plans, CUDA)
    there = "\n".join(whose.lines(plans, CUDA, CUDA, dict.fromkeys(needed, True)))
    missing = "\n".join(whose.lines(plans, CUDA, CUDA, dict.fromkeys(needed, False)))
    failed = "ModelOpt's PyTorch code on cuda:0, as its CUDA kernels could not be built"
    if any(whose.extension(one) for one in plans.values()):
        assert "searched by ModelOpt's CUDA kernels on cuda:0" in there
        assert f"searched by {failed}" in missing
    else:
        assert there == missing and "CUDA kernels" not in there
    assert "cpu" not in there
    assert whose.kernels_needed(plans, CPU) == []
    streamed = whose.lines(plans, CPU, CUDA, {})
    assert "CUDA kernels" not in "\n".join(streamed)
    places = "cpu and cuda:0" if algorithm == "smoothquant" else "cpu"  # beside convolutions
    assert streamed[-1].partition(", ")[0].rstrip(".").endswith(f"code on {places}")
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's GPUs are cuda devices too
    assert whose.kernels_needed(plans, CUDA) == []


def test_sentences():
    plans = plans_of(Tiny(), "nvfp4", "svdquant")
    assert whose.lines(plans, CUDA, CUDA, {}) == [
        "Scales of 1 Linear layers in nvfp4 (svdquant): smoothing searched by ModelOpt's PyTorch code "
        "on cuda:0, around NVFP4 rounding by this pack's code; branches by ModelOpt's PyTorch code.",
        "Scales of 1 convolution layers in nvfp4 (max): largest values by ModelOpt's PyTorch code on "
        "cuda:0.",
        "Weights packed by this pack's code on cuda:0, nvfp4 as ModelOpt's tensors of that name.",
    ]
    both = {"a": plans["linear"], "b": dataclasses.replace(plans["linear"], kind="conv2d")}
    assert (
        "Scales of 1 convolution layers and 1 Linear layers" in whose.lines(both, CPU, CPU, {})[0]
    )
    mps = torch.device("mps")
    assert whose.lines({"a": plans["linear"]}, mps, mps, {})[-1].startswith(
        "Weights packed by this pack's code on cpu,"
    )


# --- compiling ---


@pytest.fixture
def compiler(monkeypatch, caplog):
    """Events: what is logged of compiling, and which extension is asked for. None can be built."""
    from modelopt.torch.quantization import extensions
    from torch.utils import cpp_extension

    events: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record):
            if "CUDA" in record.getMessage():
                events.append(record.getMessage().removeprefix("ModelOpt: "))

    def fake(name):
        def get(raise_if_failed=False):
            events.append(name)
            get.extension = None

        return get

    for name in (whose.INTEGER, whose.FP8):
        monkeypatch.setattr(extensions, name, fake(name))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    heard = Heard()
    modelopt.log.addHandler(heard)
    with caplog.at_level(logging.INFO):
        yield events
    modelopt.log.removeHandler(heard)


def test_compiling_is_announced_before_it_begins_and_once(compiler):
    steps: list[int] = []
    built = modelopt.build_kernels([whose.INTEGER, whose.FP8], lambda: steps.append(1))
    assert built == {whose.INTEGER: False, whose.FP8: False} and len(steps) == 2
    assert compiler == [modelopt.COMPILING, whose.INTEGER, whose.FP8]
    assert "minutes, once" in modelopt.COMPILING and "precompile" in modelopt.COMPILING
    del compiler[:]
    modelopt.build_kernels([whose.FP8])
    assert compiler == [whose.FP8]  # tried before


def test_without_a_compiler_nothing_is_announced(compiler, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    modelopt.build_kernels([whose.FP8])
    assert modelopt.COMPILING not in compiler
    assert "no CUDA compiler was found" in compiler[0] and compiler[-1] == whose.FP8


@pytest.mark.parametrize("resident", [True, False], ids=["on-the-GPU", "streamed"])
def test_quantizing_compiles_for_weights_on_the_gpu_alone(sd15, compiler, monkeypatch, resident):
    """The device that the engine goes by is where the weights of its copy lie."""
    if resident:
        monkeypatch.setattr(bridge, "home", lambda unet: CUDA)
    recipe = Recipe("int8", "mse", layers="linear only", skip=("*attn*", "*.ff.*"))
    made = engine.quantize_model(sd15[0], recipe)
    count = len(made.checkpoint.layers)
    said = f"Scales of {count} Linear layers in int8 (mse): scales searched by ModelOpt's PyTorch"
    (line,) = (note for note in made.notes if note.startswith("Scales of"))
    if resident:
        assert compiler == [modelopt.COMPILING, whose.INTEGER]
        assert line == f"{said} code on cuda:0, as its CUDA kernels could not be built."
    else:
        assert compiler == []
        assert line == f"{said} code on cpu."
    place = "cuda:0" if resident else "cpu"
    assert f"Weights packed by this pack's code on {place}." in made.notes


def test_precompile_without_a_cuda_compiler_fails_and_says_why():
    """As on a machine with an NVIDIA GPU and PyTorch's own CUDA, which has no nvcc."""
    here = (
        "import torch; from torch.utils import cpp_extension; cpp_extension.CUDA_HOME = None; "
        "torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: True; "
        "torch.cuda.get_device_capability = lambda *_: (9, 0)\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, types; sys.path.insert(0, sys.argv[1]); import dev; "
            "env = types.SimpleNamespace(python=sys.executable, comfyui=None); "
            "dev.run = lambda command, *_: "
            "dev.subprocess.run([*command[:-1], sys.argv[2] + command[-1]]).returncode; "
            "sys.exit(dev.cmd_precompile(env, None, []))",
            str(ROOT),
            here,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "CUDA_HOME" in done.stderr or "Ninja" in done.stderr
    assert "could not be built, for the reason above" in done.stderr
    assert "its PyTorch code runs" in done.stderr
