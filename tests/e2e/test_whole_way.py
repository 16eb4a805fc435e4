"""The main job in real servers: quantize and save in one, load and sample in a second, stock in a third."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.devtools.server import ComfyServer
from safetensors import safe_open
from safetensors.torch import load_file

from .workflows import generate_workflow, quantize_inputs, quantize_workflow

pytestmark = pytest.mark.e2e

VARIANTS = {
    f"{fmt}-{'linear' if layers == 'linear only' else 'all'}{'-smooth' if extra else ''}": (
        fmt,
        layers,
        extra,
    )
    for fmt, layers, extra in (
        ("int8", "linear + conv", {}),
        ("int8", "linear only", {}),
        ("int8", "linear + conv", {"algorithm": "smoothquant", "alpha": 0.5}),
        ("fp8", "linear + conv", {}),
        ("fp8", "linear only", {}),
    )
}
STOCK = [name for name in VARIANTS if name.endswith("-linear")]
TIMEOUT = 900


def latent(server: ComfyServer, name: str) -> torch.Tensor:
    (path,) = sorted((server.output / "latents").glob(f"{name}_*.latent"))
    return load_file(path)["latent_tensor"]


class WholeWay:
    """Files and servers' outputs of one family, each stage run once."""

    def __init__(self, family: str, comfyui: Path, folder: Path):
        self.comfyui, self.folder, self.family = comfyui, folder, family
        self.first = ComfyServer(comfyui, folder / "first")
        self.second = ComfyServer(comfyui, folder / "second")
        self.stock = ComfyServer(comfyui, folder / "stock", pack=False)
        checkpoint = folder / "model.safetensors"
        getattr(synthetic, family)(checkpoint)
        synthetic.lora(folder / "lora.safetensors", checkpoint)
        for server in (self.first, self.second, self.stock):
            for kind, file in (("checkpoints", checkpoint), ("loras", folder / "lora.safetensors")):
                target = server.models / kind
                target.mkdir(parents=True, exist_ok=True)
                (target / file.name).symlink_to(file)

    def quantize(self) -> None:
        options = [
            (name, quantize_inputs(fmt, layers, **extra))
            for name, (fmt, layers, extra) in VARIANTS.items()
        ]
        graph = quantize_workflow("model.safetensors", "lora.safetensors", options)
        with self.first as server:
            self.made = server.run(graph.nodes, timeout=TIMEOUT)
        self.quantizers = {
            key for key, node in graph.nodes.items() if node["class_type"] == "ModelOptQuantize"
        }
        assert self.made.error is None, self.made.error
        self.files = {name: self.file(name) for name in VARIANTS}
        for server in (self.second, self.stock):
            target = server.models / "diffusion_models"
            target.mkdir(parents=True, exist_ok=True)
            for path in self.files.values():
                (target / path.name).symlink_to(path)

    def file(self, name: str) -> Path:
        (path,) = (self.first.models / "diffusion_models").glob(f"{name}_0*.safetensors")
        return path

    def generate(self) -> None:
        unets = [(name, path.name) for name, path in self.files.items()]
        graph = generate_workflow(
            "model.safetensors", "lora.safetensors", unets, "ModelOptLoadUNet"
        )
        with self.second as server:
            self.generated = server.run(graph.nodes, timeout=TIMEOUT)
        assert self.generated.error is None, self.generated.error

    def open_in_stock(self) -> None:
        unets = [(name, self.files[name].name) for name in STOCK]
        graph = generate_workflow("model.safetensors", "lora.safetensors", unets, "UNETLoader")
        with self.stock as server:
            self.opened = server.run(graph.nodes, timeout=TIMEOUT)
            assert self.opened.error is None, self.opened.error
            self.refused = {}
            for name in set(VARIANTS) - set(STOCK):
                one = generate_workflow(
                    "model.safetensors",
                    "lora.safetensors",
                    [(name, self.files[name].name)],
                    "UNETLoader",
                )
                self.refused[name] = server.run(one.nodes, timeout=TIMEOUT)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def way(request, comfyui, tmp_path_factory) -> WholeWay:
    run = WholeWay(request.param, comfyui, tmp_path_factory.mktemp(request.param))
    run.quantize()
    run.generate()
    run.open_in_stock()
    return run


def test_record_samples_exactly_as_ksampler(way):
    assert torch.equal(latent(way.first, "record"), latent(way.first, "ksampler"))


@pytest.mark.parametrize("name", VARIANTS)
def test_reloaded_equals_quantized_bit_for_bit(way, name):
    before, after = latent(way.first, name), latent(way.second, name)
    assert torch.equal(before, after)
    assert after.std() > 0.01
    assert not torch.equal(after, latent(way.first, "ksampler"))


@pytest.mark.parametrize("name", VARIANTS)
def test_pictures_come_out(way, name):
    pictures = list((way.second.output / "images").glob(f"{name}_*.png"))
    assert len(pictures) == 1
    assert pictures[0].stat().st_size > 500


@pytest.mark.parametrize("name", STOCK)
def test_stock_comfyui_gives_the_same_latent(way, name):
    ours, theirs = latent(way.second, name), latent(way.stock, name)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(STOCK)))
def test_stock_comfyui_refuses_what_it_cannot_compute(way, name):
    error = way.refused[name].error
    assert error is not None
    assert "Could not detect model type" in error["exception_message"]


@pytest.mark.parametrize("name", VARIANTS)
def test_header_and_markers(way, name):
    with safe_open(way.files[name], framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    header = json.loads(metadata["modelopt"])
    fmt, layers, extra = VARIANTS[name]
    assert header["recipe"]["format"] == fmt
    assert header["recipe"]["layers"] == layers
    assert header["quality"]["sqnr_db"] > 10
    assert header["calibration"]["records"] == 4
    assert header["baked_patches"] > 0
    assert header["source"]["name"] == "model.safetensors"
    marked = json.loads(metadata["_quantization_metadata"])["layers"]
    assert len(marked) == len(header["layers"]) > 10
    assert all(f"{layer}.comfy_quant" in keys for layer in marked)
    assert ("comfyui" in header["opens_in"]) == (name in STOCK)
    assert all(key.startswith("modelopt.") for key in keys) == (name not in STOCK)


def test_progress_was_shown_while_quantizing(way):
    """ComfyUI sends ten a second at most: how many depends on the machine."""
    bars: dict[str, list[int]] = {}
    for message in way.made.of_type("progress"):
        if message["node"] in way.quantizers:
            bars.setdefault(message["node"], []).append(message["value"])
            assert message["max"] > 100
    assert len(bars) == len(VARIANTS)
    for values in bars.values():
        assert values == sorted(values)
        assert len(set(values)) >= 3
