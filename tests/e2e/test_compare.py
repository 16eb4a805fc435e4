"""Compare Quantized in a real server: load, record, quantize, compare with pictures; cancel."""

from __future__ import annotations

import json
import math
import re

import numpy
import pytest
from comfyui_modelopt.devtools.workflows import load_workflow, node_id, one
from PIL import Image

from .workflows import SKIP, Graph, cancelled_at, quantize_inputs, recorded

pytestmark = pytest.mark.e2e
TIMEOUT = 600
WHOLE = "whole"  # id of a node that shows the whole text of Model Info


@pytest.fixture(scope="module")
def unet(server) -> str:
    """The name of a quantized file."""
    graph = Graph()
    made = graph.add(
        "ModelOptQuantize",
        **recorded(graph),
        **quantize_inputs("int8", "linear + conv"),
    )
    graph.add("ModelOptSaveUNet", model=[made, 0], filename_prefix="quantized")
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, result.error
    (path,) = (server.models / "diffusion_models").glob("quantized_*.safetensors")
    return path.name


def workflow(unet: str, pictures: bool = True, images: bool = True) -> dict:
    """The shipped workflow with a small picture; without the inputs of pictures, or the nodes that
    show them, where asked for."""
    made = load_workflow("compare_file.json")
    info = node_id(made, "ModelOptModelInfo")
    made[WHOLE] = {"class_type": "PreviewAny", "inputs": {"source": [info, 0]}}
    one(made, "CheckpointLoaderSimple")["ckpt_name"] = "sd15.safetensors"
    one(made, "ModelOptLoadUNet")["unet_name"] = unet
    one(made, "EmptyLatentImage").update(width=64, height=64)
    one(made, "ModelOptRecordCalibration")["steps"] = 4
    inputs = one(made, "ModelOptCompare")
    inputs["steps"] = 2
    if not pictures:
        for name in set(inputs) - {"reference", "quantized", "calibration"}:
            del inputs[name]
    compare = node_id(made, "ModelOptCompare")
    if not images:
        shown = ([compare, 2], [compare, 3])
        for key in [k for k, n in made.items() if any(v in shown for v in n["inputs"].values())]:
            del made[key]
    return made


@pytest.fixture(scope="module")
def done(server, unet):
    graph = workflow(unet)
    result = server.run(graph, timeout=TIMEOUT)
    assert result.error is None, result.error
    return graph, node_id(graph, "ModelOptCompare"), result


def picture(server, name: str) -> numpy.ndarray:
    (path,) = server.output.glob(f"{name}_*.png")
    return numpy.asarray(Image.open(path)).astype(float) / 255


def test_text_and_chart(server, done):
    graph, node, result = done
    shown = result.outputs[node]
    (text,) = shown["text"]
    assert re.match(r"SQNR \d+\.\d dB over 4 recorded UNet calls: noise of ", text)
    assert "  10 convolution layers in int8: median " in text
    assert "  8 1x1 convolution layers in int8: median " in text
    assert "40 Linear layers in int8: median " in text
    figures = shown["modelopt"][0]
    named = re.findall(r"^  \d\. +\d+\.\d dB  (\S+) \(int8\)(: stands out)?", text, re.MULTILINE)
    apart = [name for name, flagged in named if flagged]
    rest = sorted(figures["layers"].keys() - set(apart), key=figures["layers"].get)
    assert [name for name, _ in named] == apart + rest[: 8 - len(apart)]
    assert text.splitlines()[-8:] == [name for name, _ in named]
    # the chart, on the node and saved
    chart = picture(server, "compare_chart")
    assert chart.shape[0] > 800 and chart.shape[1] == 800
    (on_node,) = shown["images"]
    assert len(server.view(on_node)) > 10_000
    json.dumps(figures, allow_nan=False)


def test_pictures_and_their_psnr(server, done):
    first, second = (picture(server, f"compare_{name}") for name in ("reference", "quantized"))
    assert first.shape == second.shape == (64, 64, 3)
    found = done[2].outputs[done[1]]["modelopt"][0]
    psnr = -10 * math.log10(((first - second) ** 2).mean())
    assert found["psnr_db"] == [pytest.approx(psnr, abs=0.3)]  # the files hold 8 bits
    assert 0 < found["ssim"][0] < 1


def test_pictures_stand_side_by_side(done):
    shown = done[2].outputs[node_id(done[0], "ImageCompare")]
    assert len(shown["a_images"]) == len(shown["b_images"]) == 1


def test_the_whole_header_is_told(done):
    graph, _, result = done
    (shown,) = result.outputs[node_id(graph, "ModelOptModelInfo")]["text"]
    (whole,) = result.outputs[WHOLE]["text"]
    for text in (shown, whole):
        assert "Made from: sd15.safetensors\n  SHA-256 " in text
        assert "  prompts: a red fox in the snow\n" in text
        assert "18 convolution layers in int8" in text and "  comfyui: " in text
        assert "SQNR " in text
        assert "  comfyui-modelopt: " in text
    assert "and 3 more" in shown and "Architecture:" not in shown
    assert "\nFormat version of the file: 1\n" in whole
    assert SKIP.splitlines()[-1] in whole and "  model_channels: 320" in whole
    assert len(shown.splitlines()) < 50


def test_progress(done):
    bars = [m for m in done[2].of_type("progress") if m["node"] == done[1]]
    values = [m["value"] for m in bars]
    # 4 calls and 2 steps with each MODEL, and 58 layers
    assert {m["max"] for m in bars} == {20 * 12 + 58}
    assert values == sorted(values) and len(set(values)) >= 3


def test_without_pictures(server, unet):
    graph = workflow(unet, pictures=False, images=False)
    result = server.run(graph, timeout=TIMEOUT)
    assert result.error is None, result.error
    text = result.outputs[node_id(graph, "ModelOptCompare")]["text"][0]
    assert "Pictures: none. Connect positive" in text


def test_pictures_that_are_not_there_are_blocked_with_words(server, unet, done):
    """What is linked to them does not run, and the user is told why; the report stands all the same."""
    graph = workflow(unet, pictures=False)
    result = server.run(graph, timeout=TIMEOUT)
    assert "only with positive, negative, latent_image and vae" in result.error["exception_message"]
    assert "SQNR" in result.outputs[node_id(graph, "ModelOptCompare")]["text"][0]
    assert len(list(server.output.glob("compare_reference_*.png"))) == 1  # of the run before


def test_cancel(server, unet, done):
    graph, node, first = done
    inputs = one(graph, "ModelOptCompare")
    usual = dict(inputs)
    inputs.update(seed=99, steps=50)
    assert cancelled_at(server, graph, node).interrupted
    # the same MODELs, which the server holds, compare as before
    inputs.update(usual)
    again = server.run(graph, timeout=TIMEOUT)
    assert again.error is None
    shown = [run.outputs[node]["modelopt"][0] for run in (again, first)]
    assert shown[0] == shown[1]
