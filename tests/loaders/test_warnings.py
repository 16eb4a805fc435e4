"""Loading says once, by the file's name, what a GPU of any maker does not compute in few bits."""

from __future__ import annotations

import logging

import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.nodes import folders
from comfyui_modelopt.nodes.load_unet import LoadUNet
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils.capability import GPU

FULL = {"cuda": (13, 0), "backends": frozenset({"cuda", "eager"}), "torch": (2, 11)}
GPUS = {
    "AMD": GPU("cuda", "AMD Radeon RX 7900"),
    "Apple": GPU("mps", "an Apple GPU"),
    "Turing": GPU("cuda", "RTX 2080", (7, 5), **FULL),
    "Ampere": GPU("cuda", "RTX 3090", (8, 6), **FULL),
    "Ada": GPU("cuda", "RTX 4090", (8, 9), **FULL),
    "CPU": GPU("cpu", "the CPU"),
}
OTHER_MAKER = "this pack's low-precision kernels need an NVIDIA GPU, this is "
INT8_BOTH, INT8, FP8, INT4 = (
    Recipe("int8", "max"),
    Recipe("int8", "max", layers="linear only"),
    Recipe("fp8", "max", layers="linear only"),
    Recipe("int4", "max", layers="linear only"),
)
# GPU, recipe, what the warning says of layers and why; () where there is none
CASES = [
    ("AMD", INT8_BOTH, ("int8 linear: exact reference", "int8 conv2d: exact reference")),
    ("AMD", FP8, ("fp8 linear: dequantized",)),
    ("AMD", INT4, ()),  # computed in 16 bits everywhere
    ("Apple", INT8_BOTH, ("int8 linear: exact reference", "int8 conv2d: exact reference")),
    ("Turing", INT8, ()),
    ("Turing", INT8_BOTH, ("int8 conv2d: exact reference",)),
    ("Ampere", INT8_BOTH, ()),
    ("Ampere", FP8, ("fp8 linear: dequantized",)),
    ("Ada", FP8, ()),
    ("CPU", INT8_BOTH, ()),
]


@pytest.mark.parametrize(
    ("card", "recipe", "wanted"),
    CASES,
    ids=[f"{card}-{one.format}-{one.layers.replace(' ', '')}" for card, one, _ in CASES],
)
def test_one_warning_a_load(quantized, tmp_path, monkeypatch, caplog, card, recipe, wanted):
    loads = 2 if (card, recipe) == ("AMD", FP8) else 1
    gpu, path = GPUS[card], str(tmp_path / "my unet.safetensors")
    files.write(quantized(recipe).checkpoint, path)
    monkeypatch.setattr(loader, "describe", lambda device, kinds: gpu)
    half = lambda *_: torch.float16  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", half)
    monkeypatch.setattr(folders, "find", lambda folder, name: path)
    with caplog.at_level(logging.INFO):
        for _ in range(loads):
            LoadUNet.execute("my unet.safetensors", cuda_graphs=False)
    told = [r for r in caplog.records if "ModelOpt: loaded" in r.getMessage()]
    assert len(told) == loads
    level = logging.WARNING if wanted else logging.INFO
    for record in told:
        text = record.getMessage()
        assert record.levelno == level and "my unet.safetensors" in text
        for words in wanted:
            assert f"layers {words} (" in text
        if gpu.capability is None and wanted:
            assert text.count(OTHER_MAKER + gpu.name) == len(wanted)
    others = [r for r in caplog.records if r.levelno >= logging.WARNING and r not in told]
    assert not [r for r in others if r.name.startswith("comfyui_modelopt")]


def test_what_an_apple_gpu_cannot_hold_is_refused(quantized, monkeypatch):
    monkeypatch.setattr(loader, "describe", lambda device, kinds: GPUS["Apple"])
    with pytest.raises(
        ValueError,
        match="a.safetensors cannot run here: fp8 needs float8.*load the file on another device",
    ):
        loader.load(quantized(FP8).checkpoint, where="a.safetensors")
