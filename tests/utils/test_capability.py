"""The table of formats and GPUs: all architectures users own, their software, and no GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfyui_modelopt.formats import FORMATS
from comfyui_modelopt.formats.checkpoint import STATIC, Layer
from comfyui_modelopt.loaders import device, dispatch
from comfyui_modelopt.utils import capability
from comfyui_modelopt.utils.capability import EMULATED, GPU, NATIVE, REFUSED, support
from comfyui_modelopt.utils.report import capability_report

FULL = {"cuda": (13, 0), "backends": frozenset({"cuda", "eager"}), "torch": (2, 11)}
CARDS = {
    "Turing": GPU("cuda", "RTX 2080", (7, 5), **FULL),
    "Ampere": GPU("cuda", "RTX 3090", (8, 6), **FULL),
    "Ada": GPU("cuda", "RTX 4090", (8, 9), **FULL),
    "Hopper": GPU("cuda", "H200", (9, 0), **FULL),
    "Blackwell data centre": GPU("cuda", "B200", (10, 0), **FULL),
    "Blackwell": GPU("cuda", "RTX 5090", (12, 0), **FULL),
}
CPU = GPU("cpu", "the CPU")
ANY = {"int4", "fp8_e5m2"}
NATIVE_ON = {
    "Turing": {"int8"},
    "Ampere": {"int8"},
    "Ada": {"int8", "fp8", "w4a8"},
    "Hopper": {"int8", "fp8", "w4a8"},
    "Blackwell data centre": {"int8", "fp8", "w4a8", "mxfp8", "nvfp4"},
    "Blackwell": {"int8", "fp8", "w4a8", "mxfp8", "nvfp4"},
}
FASTEST = {"Turing": "int8", "Ampere": "int8", "Ada": "fp8", "Hopper": "fp8"}


def layer(name: str, kind: str = "linear") -> Layer:
    shape = (32, 32) if kind == "linear" else (32, 32, 3, 3)
    return Layer(name, kind, shape=shape)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_on_every_architecture(card, name):
    found = support(name, "linear", CARDS[card])
    if name in NATIVE_ON[card] | ANY:
        assert found.level == NATIVE
        assert name in ANY or found.why == ""
        return
    assert found.level == EMULATED
    needed, have = capability.NEEDS[name], CARDS[card].capability
    assert f"needs compute capability {needed[0]}.{needed[1]}" in found.why
    assert f"{CARDS[card].name} has {have[0]}.{have[1]}" in found.why


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", FORMATS)
def test_convolutions_on_every_architecture(card, name):
    gpu = CARDS[card]
    found = support(name, "conv2d", gpu)
    if name in ANY:
        assert found.level == NATIVE
        return
    ours = {"int8", "fp8", "w4a8"} & NATIVE_ON[card] - ({"int8"} if card == "Turing" else set())
    assert found.level == (NATIVE if name in ours else EMULATED)
    if name in ours:
        kernel = dispatch.choose(layer(name, "conv2d"), gpu, as_stock=False)
        assert kernel.name == f"{name} conv2d: Triton" and kernel.eight_bit is not None
    else:
        assert "needs compute capability" in found.why or "no " in found.why


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("name", ["int8", "fp8", "w4a8"])
def test_without_triton_the_reason_is_told(name, kind):
    product = "int8" if name == "int8" else "fp8"
    reason = {product: "Triton failed here (no C compiler)"}
    gpu = dataclasses.replace(CARDS["Ada"], no_triton=reason)
    other = "fp8" if name == "int8" else "int8"
    assert gpu.runs(other) and not gpu.runs(name)
    found = support(name, kind, gpu)
    kernel = dispatch.choose(layer(name, kind), gpu, as_stock=False)
    assert kernel.eight_bit is None
    if kind == "linear":
        assert found.level == NATIVE and kernel.name.endswith("comfy-kitchen")
        assert "no C compiler" in found.why == kernel.why
    else:
        assert found.level == EMULATED and "no C compiler" in found.why == kernel.why


def test_a_row_too_wide_for_its_scale_goes_to_comfy_kitchen():
    wide = Layer("int8", "linear", shape=(64, 15360))
    assert dispatch.choose(wide, CARDS["Ada"], False).name == "int8 linear: comfy-kitchen"
    static = dataclasses.replace(wide, activations=STATIC)
    assert dispatch.choose(static, CARDS["Ada"], False).name == "int8 linear: Triton"


@pytest.mark.parametrize("card", [*CARDS, "none"])
@pytest.mark.parametrize("as_stock", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_chosen_kernel_is_the_tables(card, name, kind, as_stock):
    gpu = CARDS.get(card, CPU)
    kernel = dispatch.choose(layer(name, kind), gpu, as_stock)
    found = support(name, kind, gpu)
    if name in ANY:
        assert kernel.level == "weight-only" and kernel.dequantizes
    elif found.level == NATIVE:
        assert kernel.level == "native" and not kernel.dequantizes
    else:
        assert kernel.level in ("emulated", "dequantized") and kernel.why
        too_old = gpu.capability is not None and gpu.capability < capability.NEEDS[name]
        as_stock_does = gpu.capability is None and as_stock and name != "int8"
        assert kernel.dequantizes == (too_old or as_stock_does)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - ANY))
def test_no_gpu_emulates(name):
    assert support(name, "linear", CPU) == capability.Support(
        EMULATED, "no low-precision units on the CPU"
    )


@pytest.mark.parametrize(
    ("name", "gpu", "level", "why"),
    [
        (
            "int8",
            GPU("cuda", "RTX 3090", (8, 6), (12, 8), no_triton={"int8": "Triton is not installed"}),
            NATIVE,
            "CUDA 13 build",
        ),
        ("int8", GPU("cuda", "RTX 2080", (7, 5), (12, 8)), NATIVE, "CUDA 13 build"),
        (
            "nvfp4",
            GPU("cuda", "RTX 5090", (12, 0), (12, 6)),
            EMULATED,
            "CUDA 12.8 in torch, found 12.6",
        ),
        (
            "mxfp8",
            GPU("cuda", "B200", (10, 0), (13, 0), torch=(2, 9)),
            EMULATED,
            "torch 2.10, found 2.9",
        ),
        ("mxfp8", GPU("cpu", "the CPU", torch=(2, 6)), REFUSED, "needs torch 2.7, found 2.6"),
        ("fp8", GPU("mps", "mps"), REFUSED, "float8"),
        ("int8", GPU("mps", "mps"), EMULATED, "no low-precision units"),
    ],
)
def test_software_counts(name, gpu, level, why):
    found = support(name, "linear", gpu)
    assert found.level == level
    assert why in found.why


def test_what_is_refused_cannot_be_loaded():
    with pytest.raises(ValueError, match="float8.*load the file on another device"):
        dispatch.choose(layer("nvfp4"), GPU("mps", "mps"), as_stock=True)


@pytest.mark.parametrize("card", CARDS)
def test_recommendations_run_natively(card):
    picks = capability.recommend(CARDS[card])
    assert picks["smallest file"][0] == "int4"  # nvfp4's are larger
    assert picks["fastest picture"][0] == FASTEST.get(card, "nvfp4")
    for name, reason in picks.values():
        assert reason
        assert support(name, "linear", CARDS[card]).level == NATIVE


@pytest.mark.parametrize("capability_", [(7, 5), (8, 7), (12, 1), (5, 2)])
def test_cards_are_named(capability_):
    text = capability_report(GPU("cuda", "Some GPU", capability_, (13, 0)))
    names = {(7, 5): "RTX 20", (8, 7): "RTX 30", (12, 1): "RTX 50", (5, 2): "older than RTX 20"}
    assert names[capability_] in text.splitlines()[0]
    for name in FORMATS:
        assert f"\n{name} Linear: " in text
        assert f"\n{name} convolution: " in text
    assert "For the fastest picture: " in text


def test_this_machine_is_described():
    gpu = device.current()
    assert gpu.torch >= (2, 4)
    assert (gpu.capability is None) == (not torch.cuda.is_available())
    assert gpu.name in capability_report(gpu)
