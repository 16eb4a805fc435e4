"""Compare Quantized in a real server: load, record, quantize, compare with pictures; cancel."""

from __future__ import annotations

import json
import math
import re
import threading

import numpy
import pytest
from comfyui_modelopt.devtools.server import ComfyServer
from PIL import Image

from .workflows import SAMPLING, Graph, conditioning, quantize_inputs

pytestmark = pytest.mark.e2e
TIMEOUT = 600


@pytest.fixture(scope="module")
def server(comfyui, checkpoints, tmp_path_factory):
    made = ComfyServer(comfyui, tmp_path_factory.mktemp("compare"))
    target = made.models / "checkpoints"
    target.mkdir(parents=True)
    (target / "sd15.safetensors").symlink_to(checkpoints / "sd15.safetensors")
    with made:
        yield made


def compare_graph(pictures: bool = True, images: bool = True) -> tuple[Graph, str]:
    """The graph and the id of its Compare node; the inputs of pictures and outputs of it are linked
    if asked for."""
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    inputs = conditioning(graph, [loader, 1])
    record = graph.add(
        "ModelOptRecordCalibration", model=[loader, 0], **SAMPLING, **inputs, max_records=8
    )
    quantize = graph.add(
        "ModelOptQuantize",
        model=[loader, 0],
        calibration=[record, 1],
        **quantize_inputs("int8", "linear + conv"),
    )
    more = {**SAMPLING, **inputs, "steps": 2, "vae": [loader, 2]} if pictures else {}
    compare = graph.add(
        "ModelOptCompare",
        reference=[loader, 0],
        quantized=[quantize, 0],
        calibration=[record, 1],
        **more,
    )
    graph.add("PreviewAny", source=[compare, 0])
    graph.add("SaveImage", images=[compare, 1], filename_prefix="chart")
    if images:
        for index, name in ((2, "reference"), (3, "quantized")):
            graph.add("SaveImage", images=[compare, index], filename_prefix=name)
    return graph, compare


@pytest.fixture(scope="module")
def done(server):
    graph, node = compare_graph()
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, result.error
    return graph, node, result


def picture(server, name: str) -> numpy.ndarray:
    (path,) = server.output.glob(f"{name}_*.png")
    return numpy.asarray(Image.open(path)).astype(float) / 255


def test_text_and_chart(server, done):
    graph, node, result = done
    shown = result.outputs[node]
    (text,) = shown["text"]
    assert re.match(r"SQNR \d+\.\d dB over 4 recorded UNet calls: noise of ", text)
    assert "18 convolution layers in int8: median " in text
    assert "40 Linear layers in int8: median " in text
    figures = shown["modelopt"][0]
    worst = sorted(figures["layers"], key=figures["layers"].get)[:8]
    assert text.splitlines()[-8:] == worst
    # the chart, on the node and saved
    chart = picture(server, "chart")
    assert chart.shape[0] > 800 and chart.shape[1] == 800
    (on_node,) = shown["images"]
    assert len(server.view(on_node)) > 10_000
    preview = next(k for k, n in graph.nodes.items() if n["class_type"] == "PreviewAny")
    assert result.outputs[preview]["text"] == [text]
    json.dumps(figures, allow_nan=False)


def test_pictures_and_their_psnr(server, done):
    first, second = picture(server, "reference"), picture(server, "quantized")
    assert first.shape == second.shape == (64, 64, 3)
    found = done[2].outputs[done[1]]["modelopt"][0]
    psnr = -10 * math.log10(((first - second) ** 2).mean())
    assert found["psnr_db"] == [pytest.approx(psnr, abs=0.3)]  # the files hold 8 bits
    assert 0 < found["ssim"][0] < 1


def test_progress(done):
    bars = [m for m in done[2].of_type("progress") if m["node"] == done[1]]
    values = [m["value"] for m in bars]
    # 4 calls and 2 steps with each MODEL, and 58 layers
    assert {m["max"] for m in bars} == {20 * 12 + 58}
    assert values == sorted(values) and len(set(values)) >= 3


def test_without_pictures(server):
    graph, node = compare_graph(pictures=False, images=False)
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, result.error
    assert "Pictures: none. Connect positive" in result.outputs[node]["text"][0]


def test_pictures_that_are_not_there_are_blocked_with_words(server):
    """What is linked to them does not run, and the user is told why; the report stands all the same."""
    graph, node = compare_graph(pictures=False)
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert "only with positive, negative, latent_image and vae" in result.error["exception_message"]
    assert "SQNR" in result.outputs[node]["text"][0]
    assert len(list(server.output.glob("reference_*.png"))) == 1  # of the run before


def test_cancel(server, done):
    graph, node = compare_graph()
    graph.nodes[node]["inputs"]["seed"] = 99
    graph.nodes[node]["inputs"]["steps"] = 50
    stopped = threading.Event()

    def on_message(event):
        data = event.get("data") or {}
        if event["type"] == "progress" and data.get("node") == node and not stopped.is_set():
            stopped.set()
            server.interrupt()

    result = server.run(graph.nodes, timeout=TIMEOUT, on_message=on_message)
    assert stopped.is_set() and result.interrupted
    # the same MODELs, which the server holds, compare as before
    graph.nodes[node]["inputs"]["steps"] = 2
    graph.nodes[node]["inputs"]["seed"] = SAMPLING["seed"]
    again = server.run(graph.nodes, timeout=TIMEOUT)
    assert again.error is None
    shown = [run.outputs[node]["modelopt"][0] for run in (again, done[2])]
    assert shown[0] == shown[1]
