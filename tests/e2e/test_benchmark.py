"""Benchmark Model in a real server: on an ordinary MODEL and on a quantized one."""

from __future__ import annotations

import re

import pytest
from comfyui_modelopt.devtools.server import ComfyServer
from comfyui_modelopt.formats import files
from comfyui_modelopt.quantize import engine
from comfyui_modelopt.quantize.recipe import Recipe

from .workflows import Graph

pytestmark = pytest.mark.e2e

SETTINGS = {"width": 64, "height": 64, "batch": 1, "repeats": 1}
SETTINGS |= {"compare_eager": True, "compare_compiled": False}


def test_both_kinds_of_model(comfyui, checkpoints, sd15, calibration, tmp_path):
    server = ComfyServer(comfyui, tmp_path / "server")
    for kind in ("checkpoints", "diffusion_models"):
        (server.models / kind).mkdir(parents=True)
    (server.models / "checkpoints" / "sd15.safetensors").symlink_to(
        checkpoints / "sd15.safetensors"
    )
    made = engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration).checkpoint
    files.write(made, server.models / "diffusion_models" / "int8.safetensors")
    graph = Graph()
    plain = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    quantized = graph.add("ModelOptLoadUNet", unet_name="int8.safetensors")
    ids = [
        graph.add("ModelOptBenchmark", model=[loader, 0], **SETTINGS)
        for loader in (plain, quantized)
    ]
    sampled = graph.add("PreviewAny", source=[ids[1], 0])
    with server:
        result = server.run(graph.nodes, timeout=600)
    assert result.error is None, result.error
    texts = [result.outputs[key]["text"][0] for key in ids]
    for text in texts:
        assert re.search(r"^this MODEL: [\d.]+ ms a UNet call", text, re.MULTILINE), text
    assert "16 bits, eager" not in texts[0] and "layers: Linear with" in texts[0]
    assert re.search(r"^16 bits, eager: [\d.]+ ms", texts[1], re.MULTILINE), texts[1]
    assert "18 layers: int8 conv2d" in texts[1]
    assert result.outputs[sampled]["text"] == [texts[1]]
