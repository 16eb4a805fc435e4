"""The table of formats and GPUs: all architectures users own, their software, other makers' GPUs and none."""

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
    "Ampere data centre": GPU("cuda", "A100", (8, 0), **FULL),
    "Ampere": GPU("cuda", "RTX 3090", (8, 6), **FULL),
    "Orin": GPU("cuda", "Orin", (8, 7), **FULL),
    "Ada": GPU("cuda", "RTX 4090", (8, 9), **FULL),
    "Hopper": GPU("cuda", "H200", (9, 0), **FULL),
    "Blackwell data centre": GPU("cuda", "B200", (10, 0), **FULL),
    "Blackwell Ultra": GPU("cuda", "B300", (10, 3), **FULL),
    "Thor": GPU("cuda", "Thor", (11, 0), **FULL),
    "Blackwell": GPU("cuda", "RTX 5090", (12, 0), **FULL),
    "Spark": GPU("cuda", "GB10", (12, 1), **FULL),
}
CPU = GPU("cpu", "the CPU")
AMD = GPU("cuda", "AMD Radeon RX 9070 XT")
APPLE = GPU("mps", "an Apple GPU")
OTHERS = {"CPU": CPU, "AMD": AMD, "Apple": APPLE}
ANY = {"int4", "fp8_e5m2"}
EIGHT_BIT = {"int8", "fp8", "w4a8"}
BLOCKS = {*EIGHT_BIT, "mxfp8", "nvfp4"}
NATIVE_ON = {
    "Turing": {"int8"},
    "Ampere data centre": {"int8"},
    "Ampere": {"int8"},
    "Orin": {"int8"},
    "Ada": EIGHT_BIT,
    "Hopper": EIGHT_BIT,
    "Blackwell data centre": BLOCKS,
    "Blackwell Ultra": BLOCKS - {"int8"},
    "Thor": BLOCKS,
    "Blackwell": BLOCKS,
    "Spark": BLOCKS,
}
FASTEST = {card: "int8" if "fp8" not in names else "fp8" for card, names in NATIVE_ON.items()}
FASTEST |= {card: "nvfp4" for card, names in NATIVE_ON.items() if "nvfp4" in names}


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
    if (card, name) == ("Blackwell Ultra", "int8"):
        assert found.why == "int8 units are slower than those of 16 bits on B300"
        return
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
    ours = EIGHT_BIT & NATIVE_ON[card] - ({"int8"} if card == "Turing" else set())
    assert found.level == (NATIVE if name in ours else EMULATED)
    if name in ours:
        kernel = dispatch.choose(layer(name, "conv2d"), gpu, as_stock=False)
        assert kernel.name == f"{name} conv2d: Triton" and kernel.eight_bit is not None
    elif (card, name) == ("Blackwell Ultra", "int8"):
        assert found == support(name, "linear", gpu)
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


@pytest.mark.parametrize("card", [*CARDS, "CPU", "AMD", "Apple"])
@pytest.mark.parametrize("as_stock", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_chosen_kernel_is_the_tables(card, name, kind, as_stock):
    gpu = (CARDS | OTHERS)[card]
    found = support(name, kind, gpu)
    if found.level == REFUSED:
        assert card == "Apple" and name not in ("int8", "int4")
        with pytest.raises(ValueError, match="float8.*load the file on another device"):
            dispatch.choose(layer(name, kind), gpu, as_stock)
        return
    kernel = dispatch.choose(layer(name, kind), gpu, as_stock)
    if name in ANY:
        assert kernel.level == "weight-only" and kernel.dequantizes
    elif found.level == NATIVE:
        assert kernel.level == "native" and not kernel.dequantizes
    else:
        assert kernel.level in ("emulated", "dequantized") and kernel.why
        slower = gpu.capability is not None and name not in NATIVE_ON[card]
        as_stock_does = gpu.capability is None and as_stock and name != "int8"
        assert kernel.dequantizes == (slower or as_stock_does)
        told = "; stock ComfyUI computes this file the same way"
        # stock ComfyUI has kernels of its own for AMD's
        assert kernel.why == found.why + (told if as_stock_does and card == "CPU" else "")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - ANY))
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_no_nvidia_gpu_emulates(name, kind):
    assert support(name, kind, CPU) == capability.Support(
        EMULATED, "no low-precision units on the CPU"
    )
    why = "this pack's low-precision kernels need an NVIDIA GPU, this is AMD Radeon RX 9070 XT"
    assert support(name, kind, AMD) == capability.Support(EMULATED, why)
    if name == "int8":
        assert support(name, kind, APPLE).why == why.replace(AMD.name, "an Apple GPU")
        assert support(name, kind, APPLE).level == EMULATED
    else:
        assert support(name, kind, APPLE).level == REFUSED


@pytest.mark.parametrize("card", OTHERS)
def test_nothing_gets_faster_without_an_nvidia_gpu(card):
    picks = capability.recommend(OTHERS[card])
    assert [name for name, _ in picks.values()] == ["int4", "int8", "int8"]
    assert picks["fastest picture"][1].startswith("nothing gets faster here")
    assert "computes in fewer" not in picks["best picture"][1]


def test_other_makers_gpus_are_described(monkeypatch):
    assert device.describe(torch.device("mps")).name == "an Apple GPU"
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: AMD.name)
    found = device.describe(torch.device("cuda"))
    assert (found.device, found.name, found.capability) == ("cuda", AMD.name, None)
    assert "compute capability" not in capability_report(found).splitlines()[0]
    # started with --cpu
    assert device.describe(torch.device("cpu")).name == "the CPU"


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
            GPU("cuda", "GB10", (12, 1), (13, 0)),
            NATIVE,
            "kernels are missing or do not load",
        ),
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
    ],
)
def test_software_counts(name, gpu, level, why):
    found = support(name, "linear", gpu)
    assert found.level == level
    assert why in found.why


@pytest.mark.parametrize("card", CARDS)
def test_recommendations_run_natively(card):
    picks = capability.recommend(CARDS[card])
    assert picks["smallest file"][0] == "int4"  # nvfp4's are larger
    assert picks["fastest picture"][0] == FASTEST[card]
    for name, reason in picks.values():
        assert reason
        slow = (card, name) == ("Blackwell Ultra", "int8")
        assert support(name, "linear", CARDS[card]).level == (EMULATED if slow else NATIVE)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("5.2", "older than RTX 20"),
        ("7.5", "GeForce RTX 20"),
        ("8.0", "A100"),
        ("8.6", "GeForce RTX 30"),
        ("8.7", "Jetson Orin"),
        ("8.9", "GeForce RTX 40"),
        ("9.0", "H100"),
        ("10.0", "B100"),
        ("10.3", "B300"),
        ("11.0", "Jetson Thor"),
        ("12.0", "GeForce RTX 50"),
        ("12.1", "DGX Spark"),
    ],
)
def test_cards_are_named(card, name):
    major, minor = map(int, card.split("."))
    text = capability_report(GPU("cuda", "Some GPU", (major, minor), (13, 0)))
    assert f"compute capability {card}: {name}" in text.splitlines()[0]
    for form in FORMATS:
        assert f"\n{form} Linear: " in text
        assert f"\n{form} convolution: " in text
    assert "For the fastest picture: " in text


@pytest.mark.parametrize("card", CARDS)
def test_the_list_of_cards_says_what_they_run(card):
    gpu = CARDS[card]
    native = ", ".join(name for name in FORMATS if name in NATIVE_ON[card])
    dotted = ".".join(map(str, gpu.capability))
    rows = [row for row in capability_report(CPU).splitlines() if row.startswith(f"{dotted} ")]
    (row,) = rows
    assert sorted(row.rpartition(": ")[2].split(", ")) == sorted(native.split(", "))


def test_this_machine_is_described():
    gpu = device.current()
    assert gpu.torch >= (2, 4)
    assert (gpu.capability is None) == (not torch.cuda.is_available())
    assert gpu.name in capability_report(gpu)
