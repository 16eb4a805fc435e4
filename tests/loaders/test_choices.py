"""Loading by the choice table: which kernel each layer gets, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter

import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats.checkpoint import STATIC, Layer
from comfyui_modelopt.kernels import backends, choices
from comfyui_modelopt.kernels.choices import DEQUANTIZED, HANDED, LIBRARY, OURS
from comfyui_modelopt.loaders import dispatch, info
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.loaders.eight_bit import handed_over, smoothed_alike
from comfyui_modelopt.quantize.quality import sqnr_db
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils.capability import GPU

from ..cpu import INT_MM_EXACT

NAME = "NVIDIA Test 9000"
HERE = GPU("cuda", NAME, (9, 0), (13, 0), frozenset({"cuda", "eager"}), (2, 11))
LINEAR, CONV = (64, 128), (64, 128, 3, 3)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the table of HERE: (format, kind, activations, weight) -> times by way."""
    monkeypatch.setattr(choices, "FOLDER", tmp_path)

    def write(rows: dict, m: int = 154) -> None:
        made = [
            dict(zip(("format", "kind", "activations"), key[:3], strict=True))
            | {"weight": list(key[3]), "m": m, "ms": ms}
            for key, ms in rows.items()
        ]
        table = {"version": choices.VERSION, "gpu": NAME, "made": {}, "rows": made}
        (tmp_path / f"{choices.slug(NAME)}.json").write_text(json.dumps(table))

    return write


def choose(form: str, kind: str, gpu: GPU = HERE, activations: str = "", **more):
    shape = LINEAR if kind == "linear" else CONV
    return dispatch.choose(
        Layer(form, kind, activations=activations), gpu, False, shape=shape, **more
    )


SLOW = {OURS: 3.0, HANDED: 2.5, DEQUANTIZED: 1.0}


def test_16_bits_where_they_are_faster(write):
    write(
        {
            ("int8", "linear", "per token", LINEAR): SLOW | {LIBRARY: 2.0},
            ("int8", "conv2d", STATIC, CONV): SLOW,
            ("fp8", "linear", STATIC, LINEAR): {OURS: 1.0, DEQUANTIZED: 1.5},
        }
    )
    for kind, against in (("linear", "1 against 2 ms"), ("conv2d", "1 against 3 ms")):
        kernel = choose("int8", kind)
        assert kernel.name == f"int8 {kind}: dequantized" and kernel.level == "dequantized"
        assert kernel.dequantizes and kernel.eight_bit is None
        assert f"was faster on {NAME}" in kernel.why and f"{against} at M = 154" in kernel.why
    # not measured: another way to quantize activations, another format
    assert choose("int8", "linear", activations=STATIC).name == "int8 linear: Triton"
    assert choose("w4a8", "linear").name == "w4a8 linear: Triton"
    assert choose("fp8", "linear") == dispatch.Kernel("fp8 linear: Triton", "native", "")


def test_a_library_where_it_is_faster_than_what_would_run(write):
    write({("int8", "linear", "per token", LINEAR): {OURS: 3.0, HANDED: 1.0, LIBRARY: 2.0}})
    alone, fused = choose("int8", "linear"), choose("int8", "linear", handed=True)
    assert alone.name == "int8 linear: comfy-kitchen" and alone.level == "native"
    assert alone.why.startswith(f"it was faster on {NAME}") and alone.run is not None
    assert fused.name == "int8 linear: Triton" and fused.why == ""


def test_without_triton_16_bits_against_the_library(write):
    write({("int8", "linear", "per token", LINEAR): SLOW | {LIBRARY: 2.0}})
    without = dataclasses.replace(HERE, no_triton={"int8": "no C compiler"})
    assert "1 against 2 ms" in choose("int8", "linear", without).why
    turing = dataclasses.replace(HERE, capability=(7, 5))
    assert choose("int8", "linear", turing).level == "dequantized"


def test_what_is_asked_for_is_not_overruled(write):
    rows = {("int8", kind, how, shape): SLOW | {LIBRARY: 4.0} for kind, how, shape in (
        ("linear", "per token", LINEAR), ("conv2d", STATIC, CONV))}  # fmt: skip
    write(rows)
    integer = choose("int8", "conv2d", arithmetic=dispatch.INTEGER)
    assert integer.name == "int8 conv2d: Triton"
    given = choose("int8", "linear", backend=backends.REFERENCE)
    assert given.name == "int8 linear: the exact reference"
    # measured in 16 bits
    assert choose("int8", "linear", dtype=torch.float32).name == "int8 linear: Triton"
    library = choose("int8", "linear", arithmetic=dispatch.LIBRARY)
    assert library.name == "int8 linear: comfy-kitchen"
    assert library.why.endswith(dispatch.LEFT_OUT["int8"])


def test_library_kernels_only():
    convolution = choose("int8", "conv2d", arithmetic=dispatch.LIBRARY)
    assert convolution.name == "int8 conv2d: exact reference"
    assert dispatch.LEFT_OUT["int8"] in convolution.why
    assert choose("fp8", "linear", arithmetic=dispatch.LIBRARY).name == "fp8 linear: comfy-kitchen"
    cpu = GPU("cpu", "the CPU")
    for form in ("int8", "fp8"):
        assert choose(form, "linear", cpu, arithmetic=dispatch.LIBRARY) == choose(
            form, "linear", cpu
        )


def test_the_log_and_the_report_say_so(write, quantized, monkeypatch, caplog):
    """The facts of a GPU that is not here; the file, its loading and the table are real."""
    monkeypatch.setattr(loader, "describe", lambda device, kinds: HERE)
    half = lambda *_: torch.float16  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", half)
    made = quantized(Recipe("int8", "max")).checkpoint
    shapes = {n: tuple(made.tensors[f"{n}.weight"].shape) for n in made.layers}
    slow = Counter(shapes[n] for n, layer in made.layers.items() if layer.kind == "linear")
    shape, count = slow.most_common(1)[0]
    write({("int8", "linear", "per token", shape): SLOW})
    with caplog.at_level(logging.INFO):
        model = loader.load(made, where="a file")
    kernels = loader.kernels(model)
    found = {name for name, kernel in kernels.items() if kernel.level == "dequantized"}
    assert found == {n for n, s in shapes.items() if s == shape} and len(found) == count
    assert {k.name for n, k in kernels.items() if n not in found} == {
        "int8 linear: Triton",
        "int8 conv2d: Triton",
    }
    (said,) = (text for text in caplog.messages if text.startswith("ModelOpt: loaded a file"))
    times = sorted(
        {
            f"{count} layers int8 linear: dequantized (16 bits, dequantizing included, was faster on "
            f"{NAME} for {' x '.join(map(str, shape))} weights: 1 against {ms} ms at M = 154)"
            for ms, count in Counter(
                "2.5" if handed_over(name, made.layers[name]) else "3" for name in found
            ).items()
        }
    )
    for line in times:
        assert line in said
    report = info.describe(model)
    assert "run as int8 linear: dequantized: 16 bits, dequantizing included, was faster" in report


def test_a_unet_of_all_ways_is_as_near_to_16_bits(write, quantized, sd15, monkeypatch):
    """Fused blocks with some layers dequantized and some on a library's kernel."""
    monkeypatch.setattr(loader, "describe", lambda device, kinds: HERE)
    half = lambda *_: torch.float16  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", half)
    monkeypatch.setattr(backends, "triton", lambda: backends.REFERENCE)  # the same, and quick
    made = quantized(Recipe("int8", "max"))
    checkpoint, rows = made.checkpoint, {}
    for name, layer in checkpoint.layers.items():
        how = STATIC if layer.static else "per token"
        rows[layer.format, layer.kind, how, tuple(checkpoint.tensors[f"{name}.weight"].shape)] = {}
    for number, key in enumerate(rows):
        library = LIBRARY if key[1] == "linear" and INT_MM_EXACT else OURS
        ways = (OURS, DEQUANTIZED, library)
        fastest = ways[number % 3]
        slow = {OURS: 2.0, HANDED: 2.0, LIBRARY: 3.0, DEQUANTIZED: 4.0}
        rows[key] = slow | {fastest: 1.0}
    write(rows)
    integer = loader.load(checkpoint, arithmetic=dispatch.INTEGER)
    model, outputs = loader.load(checkpoint), []
    for one, dtype in ((sd15[0], torch.float32), (integer, torch.float16), (model, torch.float16)):
        comfy.model_management.load_models_gpu([one])
        args, kwargs = made.records[0].arguments("cpu", dtype)
        with torch.inference_mode():
            outputs.append(one.model.diffusion_model(*args, **kwargs).float())
    names = {kernel.name for kernel in loader.kernels(model).values()}
    assert names == {
        "int8 linear: the exact reference",
        *(["int8 linear: comfy-kitchen"] if INT_MM_EXACT else []),
        "int8 linear: dequantized",
        "int8 conv2d: the exact reference",
        "int8 conv2d: dequantized",
    }
    wanted, all_8_bit, mixed = outputs
    assert sqnr_db(wanted, mixed) > sqnr_db(wanted, all_8_bit) > 10


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("int8", "max"),
        Recipe("fp8"),
        Recipe("int8", "smoothquant", 0.5),
        Recipe("fp8", activations="per token"),
    ],
    ids=lambda r: f"{r.format}-{r.algorithm}-{r.activations[:3]}",
)
def test_which_inputs_come_in_8_bits_is_what_fused_blocks_do(recipe, quantized):
    """Every other layer quantizes its input itself, in a pass that can be counted."""
    counts: Counter = Counter()

    def counted(*args):
        counts["passes"] += 1
        return backends.REFERENCE.quantize_rows(*args)

    backend = dataclasses.replace(backends.REFERENCE, quantize_rows=counted)
    made = quantized(recipe)
    model = loader.load(made.checkpoint, arithmetic=dispatch.INTEGER, backend=backend)
    comfy.model_management.load_models_gpu([model])
    args, kwargs = made.records[0].arguments("cpu", torch.float32)
    with torch.inference_mode():
        model.model.diffusion_model(*args, **kwargs)
    layers = made.checkpoint.layers
    alike = smoothed_alike(made.checkpoint)
    assert bool(alike) == (recipe.algorithm == "smoothquant")
    handed = {name for name, one in layers.items() if handed_over(name, one, name in alike)}
    contexts = [name for name in handed if name.endswith("attn2.to_k")]
    assert contexts
    context = len(contexts) if alike else 1  # one pass for all that are not smoothed
    assert 0 < len(handed) < len(layers)
    assert counts["passes"] == len(layers) - len(handed) + context
