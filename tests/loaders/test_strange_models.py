"""Strangers' quantized UNets, ours and in stock's form: ComfyUI's detection believes every name and shape."""

from __future__ import annotations

import time

import pytest
import torch
from comfyui_modelopt.devtools.torture.mutations import samples
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import bounds, stock, unet
from comfyui_modelopt.utils import checksums
from safetensors import safe_open
from safetensors.torch import save_file

pytest.importorskip("modelopt.torch.quantization")
FILES = {"ours": ("whole-stock", unet.load_file), "stock": ("stock-form", stock.load)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = tmp_path_factory.mktemp("whole")
    with torch.random.fork_rng():
        samples._whole(made)
    return made


def changed(path, place, change):
    """The file with other tensors, without checksums."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    metadata.pop(checksums.ENTRY, None)
    change(tensors, metadata)
    save_file(tensors, place / "strange.safetensors", metadata)
    return str(place / "strange.safetensors")


def refused(whole, tmp_path, kind, change, message, seconds=10):
    name, load = FILES[kind]
    path = changed(whole / f"{name}.safetensors", tmp_path, change)
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert time.process_time() - started < seconds
    assert path in str(caught.value) and len(str(caught.value)) < 3000


def add(names):
    return lambda tensors, metadata: tensors.update({name: torch.zeros(1).half() for name in names})


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("row", ["input_blocks", "middle_block.1.transformer_blocks"])
def test_thousands_of_blocks(whole, tmp_path, kind, row):
    names = [f"{row}.{i}.x" for i in range(12_000)]
    message = f"at most 512 blocks in a row, .* has 12000 in {row}"
    refused(whole, tmp_path, kind, add(names), message)


def test_as_many_blocks_as_there_may_be():
    names = [f"blocks.{i}.{j}.weight" for i in range(bounds.MOST_BLOCKS) for j in range(40)]
    bounds.check([*names, "12", "scale"], "the file")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_blocks.0.0.weight", (0, 4, 3, 3)),
        ("input_blocks.1.0.out_layers.3.weight", (320 * 60_000, 0, 3, 3)),
    ],
)
def test_weights_of_no_values(whole, tmp_path, kind, name, shape):
    def change(tensors, metadata):
        tensors[name] = torch.zeros(shape).half()

    refused(whole, tmp_path, kind, change, f"weights must have values, {name} in .* is of shape")


@pytest.mark.parametrize("kind", FILES)
def test_a_first_convolution_of_one_dimension(whole, tmp_path, kind):
    def change(tensors, metadata):
        tensors["input_blocks.0.0.weight"] = torch.zeros(1).half()

    refused(whole, tmp_path, kind, change, "must")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"format":"int8_tensorwise","convrot":true,"convrot_groupsize":1e400}', "is not"),
        (b'{"format":"int8_tensorwise","x":[' + b"[]," * 2000 + b"[]]}", "comfy_quant of"),
    ],
)
def test_markers(whole, tmp_path, text, message):
    def change(tensors, metadata):
        metadata.pop(files.COMFY_HEADER, None)  # it would be read instead
        name = next(name for name in tensors if name.endswith(stock.MARKER))
        tensors[name] = torch.tensor(list(text), dtype=torch.uint8)

    refused(whole, tmp_path, "stock", change, f"one that stock ComfyUI opens, .*{message}")
