"""The words of a plan, for machines that are not here."""

from __future__ import annotations

import pytest
from comfyui_modelopt.formats.checkpoint import Layer
from comfyui_modelopt.loaders import dispatch
from comfyui_modelopt.utils import capability, plan_report

AMPERE = capability.GPU("cuda", "RTX 3060", (8, 6), (13, 0), frozenset({"cuda"}))
ADA = capability.GPU("cuda", "RTX 4070", (8, 9), (13, 0), frozenset({"cuda"}))


def facts(gpu, form, algorithm="max", **more) -> plan_report.Facts:
    layers = {"a": Layer(form, "linear"), "b": Layer(form, "linear")}
    kernels = [dispatch.choose(one, gpu, True, shape=(64, 64)) for one in layers.values()]
    known = {
        "recipe": {"format": form, "algorithm": algorithm, "layers": "linear only"},
        "layers": layers,
        "kernels": kernels,
        "opens_in_stock": True,
        "file": 1_234_567,
        "before": 2_469_134,
        "held": 1_200_000,
        "device": "cuda:0",
        "gpu": gpu,
        "missing": False,
        "records": 4,
        "shape": (2, 4, 64, 64),
        "call_seconds": 0.25,
        "running": 800_000,
        "reserved": 3_000_000,
        "to_quantize": (5_000_000, 1_000_000),
        "seconds": 300.0,
        "compiles": True,
        "calls": 12,
        "others": {"int8": 1_300_000, "fp8": 1_234_567},
        "convolutions": 0.0,
        "notes": ["A note."],
    }
    return plan_report.Facts(**known | more)


def test_everything_is_said():
    text = plan_report.text(facts(ADA, "fp8"))
    for line in (
        "File: 1,234,567 bytes (0.500 of the 16-bit UNet), exact if the recording calls every "
        "layer to quantize (the others stay in 16 bits)",
        "Memory to run: 1.2 MB of weights on cuda:0 and about 0.8 MB for a UNet call with a latent "
        "of 2 x 4 x 64 x 64, together about 2.0 MB (from a measured call of the MODEL as it is)",
        "Memory to quantize: about 5.0 MB of tensors on cuda:0 and 1.0 MB of RAM for the packed "
        "weights; what Python and ModelOpt themselves take is not in it",
        "Time to quantize: about 5 min here, 12 UNet calls of 0.25 s among it (one was timed); "
        "minutes more where ModelOpt builds its CUDA kernels for the first time",
        "With these layers: fp8 1.2 MB, int8 1.3 MB (each format's default algorithm)",
        "For the fastest picture: fp8 (8-bit floating-point tensor cores)",
        "A note.",
    ):
        assert f"\n{line}" in text
    assert "Mind: " not in text


@pytest.mark.parametrize(
    ("gpu", "form", "more", "words"),
    [
        (AMPERE, "fp8", {}, "2 of 2 layers are not computed in low precision on RTX 3060"),
        (AMPERE, "fp8", {}, "pictures do not get faster; int8 is computed natively."),
        (AMPERE, "int8", {"convolutions": 0.69}, "69% of the weights are in convolutions"),
        (ADA, "int8", {}, "smoothquant measured nearer to 16 bits than max"),
        (ADA, "fp8", {"missing": True}, "connect a CALIBRATION"),
    ],
)
def test_warnings(gpu, form, more, words):
    assert words in " ".join(plan_report.warnings(facts(gpu, form, **more)))


def test_a_linear_only_file_that_smoothing_keeps_from_stock_says_so():
    said = "With max it would open there."
    text = plan_report.text(facts(ADA, "int8", "smoothquant", opens_in_stock=False))
    assert f"stock ComfyUI has no such layers and refuses the file. {said}" in text
    assert said not in plan_report.text(facts(ADA, "int8"))
    assert said not in plan_report.text(facts(ADA, "int4", opens_in_stock=False))
    recipe = {"format": "int8", "algorithm": "smoothquant", "layers": "linear + conv"}
    more = facts(ADA, "int8", recipe=recipe, opens_in_stock=False)
    assert said not in plan_report.text(more)


def test_what_is_not_known_is_said():
    text = plan_report.text(
        facts(ADA, "fp8", records=0, running=None, seconds=None, to_quantize=None, missing=True)
    )
    assert "\nFile: about 1,234,567 bytes" in text and "exact once the CALIBRATION" in text
    assert "is not known: connect a CALIBRATION to measure it" in text
    assert "\nMemory to quantize: not known" in text
    assert "\nTime to quantize: not known without the CALIBRATION" in text
    slow = plan_report.text(facts(ADA, "int4", "awq_full", seconds=None))
    assert "awq_full's search for clipping is not timed" in slow


def test_kept_or_not():
    assert plan_report.kept_line((10, 2_000_000), (10, 2_000_000)) == (
        "Planned: a file of 10 bytes, 2.0 MB of weights when loaded: it came out as planned."
    )
    assert plan_report.kept_line((10, 2_000_000), (12, 3_000_000)).endswith(
        "; it is 12 bytes and 3.0 MB."
    )
