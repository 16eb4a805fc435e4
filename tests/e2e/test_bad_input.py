"""Bad input through a real server: a clear error each time, and the server goes on working."""

from __future__ import annotations

import json
import time

import pytest
import torch
from comfyui_modelopt.devtools.server import PromptRejected
from comfyui_modelopt.utils import checksums
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .workflows import SAMPLING, Graph, cancelled_at, conditioning, quantize_inputs

pytestmark = pytest.mark.e2e
TIMEOUT = 600


def quantize_graph(save=True, record=True, **changes) -> Graph:
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    inputs = conditioning(graph, [loader, 1])
    options = quantize_inputs("int8", "linear + conv") | changes
    if record:
        recorded = graph.add(
            "ModelOptRecordCalibration",
            model=[loader, 0],
            **SAMPLING,
            **inputs,
            max_records=8,
        )
        options["calibration"] = [recorded, 1]
    quantize = graph.add("ModelOptQuantize", model=[loader, 0], **options)
    if save:
        graph.add("ModelOptSaveUNet", model=[quantize, 0], filename_prefix="good")
    else:
        graph.add("PreviewAny", source=[quantize, 1])
    return graph


def load_graph(name: str) -> Graph:
    graph = Graph()
    unet = graph.add("ModelOptLoadUNet", unet_name=name)
    graph.add("PreviewAny", source=[unet, 1])
    return graph


def message(server, graph) -> str:
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is not None
    return result.error["exception_message"]


@pytest.fixture(scope="module")
def good(server):
    result = server.run(quantize_graph().nodes, timeout=TIMEOUT)
    assert result.error is None, result.error
    (path,) = (server.models / "diffusion_models").glob("good_*.safetensors")
    return path


def test_no_calibration(server):
    assert "needs recorded activations" in message(server, quantize_graph(record=False))


def test_skip_patterns(server):
    assert "matches none" in message(server, quantize_graph(skip="*.nope"))
    assert "at least one layer" in message(server, quantize_graph(skip="*"))


def test_wrong_choices_are_refused_before_the_run(server):
    for change in (
        {"format": "int9"},
        {"format.algorithm": "awq"},
        {"format": "mxfp8", "format.algorithm": "smoothquant"},
        {"layers": "some"},
        {"format": "int4", "format.algorithm": "svdquant", "format.algorithm.rank": 257},
    ):
        with pytest.raises(PromptRejected):
            server.run(quantize_graph(**change).nodes, timeout=TIMEOUT)


def test_percentile_without_convolutions(server):
    """ComfyUI shows a node none of its nested values before it runs."""
    change = {"format.algorithm": "percentile", "format.algorithm.percentile": 1.0}
    said = message(server, quantize_graph(layers="linear only", **change))
    assert "percentile is for convolutions" in said


@pytest.mark.parametrize("prefix", ["../escape", "/absolute", "a/../../b", "..\\escape", ""])
def test_prefixes_that_leave_the_folder(server, prefix):
    graph = quantize_graph()
    save = next(n for n in graph.nodes.values() if n["class_type"] == "ModelOptSaveUNet")
    save["inputs"]["filename_prefix"] = prefix
    with pytest.raises(PromptRejected) as caught:
        server.run(graph.nodes, timeout=TIMEOUT)
    assert "filename prefix must name a file inside" in json.dumps(caught.value.node_errors)


def test_quantizing_a_quantized_model(server, good):
    graph = Graph()
    unet = graph.add("ModelOptLoadUNet", unet_name=good.name)
    again = graph.add("ModelOptQuantize", model=[unet, 0], **quantize_inputs("int8", "linear only"))
    graph.add("PreviewAny", source=[again, 1])
    assert "already quantized" in message(server, graph)


def test_saving_a_model_that_is_not_quantized(server):
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    graph.add("ModelOptSaveUNet", model=[loader, 0], filename_prefix="x")
    assert "needs a MODEL quantized by this pack" in message(server, graph)


def test_damaged_files(server, good):
    folder = good.parent
    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    sums = {checksums.ENTRY: metadata.pop(checksums.ENTRY)}
    tensors = load_file(good)
    layer = next(k for k in tensors if k.endswith("proj_in.weight"))
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-1000])
    save_file({"a": torch.ones(2)}, folder / "foreign.safetensors")
    save_file(tensors | {layer: tensors[layer][:8]}, folder / "shape.safetensors", metadata)
    gone = {k: v for k, v in tensors.items() if not k.endswith("norm1.bias")}
    save_file(gone, folder / "gone.safetensors", metadata)
    save_file(gone, folder / "fewer.safetensors", metadata | sums)
    data = bytearray(good.read_bytes())
    data[-1] ^= 1
    (folder / "flipped.safetensors").write_bytes(data)
    wanted = {
        "fewer": "tensors that were saved",
        "flipped": "must be those that were saved",
        "truncated": "damaged or incomplete",
        "foreign": "must have been saved by this pack",
        "shape": "weight_scale of",
        "gone": "must hold every tensor of the UNet",
    }
    for name, text in wanted.items():
        assert text in message(server, load_graph(f"{name}.safetensors")), name
        (folder / f"{name}.safetensors").unlink()


def test_a_file_that_changed_is_loaded_again_and_an_unchanged_one_is_not(server, good):
    def executed(result):
        return [m["node"] for m in result.of_type("executing") if m["node"]]

    graph = load_graph(good.name)
    assert server.run(graph.nodes, timeout=TIMEOUT).error is None
    assert "1" not in executed(server.run(graph.nodes, timeout=TIMEOUT))
    content = good.read_bytes()
    time.sleep(0.02)
    good.unlink()
    good.write_bytes(content)
    assert "1" in executed(server.run(graph.nodes, timeout=TIMEOUT))


def test_folder_that_cannot_be_written(server, good):
    graph = quantize_graph()
    save = next(n for n in graph.nodes.values() if n["class_type"] == "ModelOptSaveUNet")
    (good.parent / "taken").write_text("a file, not a folder")
    save["inputs"]["filename_prefix"] = "taken/unet"
    assert "writable folder" in message(server, graph)
    (good.parent / "taken").unlink()


def test_cancel_while_quantizing(server, good):
    graph = quantize_graph(skip="input_blocks.0.0\nout.2")
    before = sorted(good.parent.iterdir())
    node = next(k for k, n in graph.nodes.items() if n["class_type"] == "ModelOptQuantize")
    assert cancelled_at(server, graph.nodes, node).interrupted
    assert sorted(good.parent.iterdir()) == before
    # the server goes on, and the same graph can be run to its end
    assert server.run(quantize_graph(save=False).nodes, timeout=TIMEOUT).error is None
