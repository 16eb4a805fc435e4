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

from ..cpu import assert_as_stock
from .workflows import (
    SAMPLING,
    Graph,
    conditioning,
    generate_workflow,
    load_checkpoint,
    quantize_inputs,
    quantize_workflow,
)

pytestmark = pytest.mark.e2e

ALL, LINEAR = "linear + conv", "linear only"
# name -> format, layers, options of the Quantize node
VARIANTS = {
    "int8-all": ("int8", ALL, {}),
    "int8-linear": ("int8", LINEAR, {}),
    "int8-all-smooth": ("int8", ALL, {"algorithm": "smoothquant", "alpha": 0.5}),
    "fp8-all": ("fp8", ALL, {}),
    "fp8-linear": ("fp8", LINEAR, {}),
    "nvfp4-linear": ("nvfp4", LINEAR, {}),
    "int4-all": ("int4", ALL, {"algorithm": "awq_lite"}),
    "int8-all-percentile": ("int8", ALL, {"algorithm": "percentile", "percentile": 0.5}),
    "e5m2-linear": ("fp8", LINEAR, {"weights": "e5m2"}),
    "mxfp8-linear": ("mxfp8", LINEAR, {}),
    "mxfp8-all": ("mxfp8", ALL, {}),
    "nvfp4-awq-linear": ("nvfp4", LINEAR, {"algorithm": "awq_lite"}),
    "nvfp4-all-svd": ("nvfp4", ALL, {"algorithm": "svdquant", "rank": 4}),
    "w4a8-all": ("w4a8", ALL, {"algorithm": "max"}),
}
FAMILIES = {"sd15": list(VARIANTS), "sdxl": list(VARIANTS)[:7]}
STOCK = [name for name in VARIANTS if name.endswith("-linear")]
EVERY = [(family, name) for family, names in FAMILIES.items() for name in names]
IN_STOCK = [(family, name) for family, name in EVERY if name in STOCK]
REFUSED = [(family, name) for family, name in EVERY if name not in STOCK]
TIMEOUT = 900
LORA = 4.0  # the strength of the LoRA that is put on top


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
            for name in FAMILIES[self.family]
            for fmt, layers, extra in [VARIANTS[name]]
        ]
        graph = quantize_workflow("model.safetensors", "lora.safetensors", options)
        with self.first as server:
            self.made = server.run(graph.nodes, timeout=TIMEOUT)
        self.quantizers = {
            key for key, node in graph.nodes.items() if node["class_type"] == "ModelOptQuantize"
        }
        assert self.made.error is None, self.made.error
        self.files = {name: self.file(name) for name in FAMILIES[self.family]}
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
        self.with_loras(graph, unets)
        with self.second as server:
            self.generated = server.run(graph.nodes, timeout=TIMEOUT)
        assert self.generated.error is None, self.generated.error

    def with_loras(self, graph: Graph, unets: list[tuple[str, str]]) -> None:
        """The same LoRA on top of every loaded UNet, and of the checkpoint's own: `latents/lora-<name>`."""
        loader, _, clip = load_checkpoint(graph, "model.safetensors", "lora.safetensors")
        inputs = conditioning(graph, clip)
        own = graph.add("CheckpointLoaderSimple", ckpt_name="model.safetensors")
        baked = self.on_top(graph, [own, 0], 0.8)  # as it was when it was quantized
        for name, model in (
            ("16", [baked, 0]),
            *((name, [graph.add("ModelOptLoadUNet", unet_name=file), 0]) for name, file in unets),
        ):
            for prefix, given in (("", model), ("lora-", [self.on_top(graph, model, LORA), 0])):
                if name != "16" and not prefix:
                    continue  # sampled already
                sampled = graph.add("KSampler", model=given, **SAMPLING, **inputs)
                graph.add(
                    "SaveLatent", samples=[sampled, 0], filename_prefix=f"latents/{prefix}{name}"
                )

    def on_top(self, graph: Graph, model: list, strength: float) -> str:
        return graph.add(
            "LoraLoaderModelOnly",
            model=model,
            lora_name="lora.safetensors",
            strength_model=strength,
        )

    def open_in_stock(self) -> None:
        unets = [(n, path.name) for n, path in self.files.items() if n in STOCK]
        graph = generate_workflow("model.safetensors", "lora.safetensors", unets, "UNETLoader")
        with self.stock as server:
            self.opened = server.run(graph.nodes, timeout=TIMEOUT)
            assert self.opened.error is None, self.opened.error
            self.refused = {}
            for name in set(self.files) - set(STOCK):
                one = generate_workflow(
                    "model.safetensors",
                    "lora.safetensors",
                    [(name, self.files[name].name)],
                    "UNETLoader",
                )
                self.refused[name] = server.run(one.nodes, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def ways(comfyui, folders):
    """Family -> its WholeWay, made once."""

    def make(family: str) -> WholeWay:
        run = WholeWay(family, comfyui, folders.mktemp(family))
        run.quantize()
        run.generate()
        run.open_in_stock()
        return run

    made: dict[str, WholeWay | None] = {}

    def get(family: str) -> WholeWay:
        if family not in made:
            made[family] = None  # stays so if a stage fails: it is not tried again for every test
            made[family] = make(family)
        assert made[family] is not None, "a stage failed in the first test of this family"
        return made[family]

    return get


@pytest.fixture(params=FAMILIES)
def way(request, ways) -> WholeWay:
    return ways(request.param)


def test_record_samples_exactly_as_ksampler(way):
    assert torch.equal(latent(way.first, "record"), latent(way.first, "ksampler"))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_reloaded_equals_quantized_bit_for_bit(ways, family, name):
    way = ways(family)
    before, after = latent(way.first, name), latent(way.second, name)
    assert torch.equal(before, after)
    assert after.std() > 0.01
    assert not torch.equal(after, latent(way.first, "ksampler"))


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_pictures_come_out(ways, family, name):
    way = ways(family)
    pictures = list((way.second.output / "images").glob(f"{name}_*.png"))
    assert len(pictures) == 1
    assert pictures[0].stat().st_size > 500


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_a_lora_on_top_changes_the_picture_as_it_does_in_16_bits(ways, family, name):
    """By the direction of the change: its size is the quantized picture's own."""
    way = ways(family)
    change = latent(way.second, f"lora-{name}") - latent(way.second, name)
    wanted = latent(way.second, "lora-16") - latent(way.second, "16")
    likeness = torch.nn.functional.cosine_similarity(change.flatten(), wanted.flatten(), 0)
    assert torch.isfinite(change).all() and change.norm() > 0.01 * wanted.norm()
    # of 256 random numbers it is 0.06; 4 bits move random weights' pictures by themselves
    if not name.startswith(("nvfp4", "int4", "w4a8")):
        assert likeness > (0.5 if name in STOCK else 0.15)


@pytest.mark.parametrize(("family", "name"), IN_STOCK)
def test_stock_comfyui_gives_the_same_latent(ways, family, name):
    way = ways(family)
    ours, theirs = latent(way.second, name), latent(way.stock, name)
    assert_as_stock(ours, theirs)


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_stock_comfyui_refuses_what_it_cannot_compute(ways, family, name):
    way = ways(family)
    error = way.refused[name].error
    assert error is not None
    assert "Could not detect model type" in error["exception_message"]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_header_and_markers(ways, family, name):
    way = ways(family)
    with safe_open(way.files[name], framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    header = json.loads(metadata["modelopt"])
    fmt, layers, extra = VARIANTS[name]
    assert header["recipe"]["format"] == ("fp8_e5m2" if "weights" in extra else fmt)
    assert header["recipe"]["layers"] == layers
    assert header["quality"]["sqnr_db"] > 8
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
    assert len(bars) == len(way.files)
    for values in bars.values():
        assert values == sorted(values)
        assert len(set(values)) >= 3
