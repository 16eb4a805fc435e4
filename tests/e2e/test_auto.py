"""Auto Quantize in a real server: a target, the same recipe again, save, reload; cancel; bad input."""

from __future__ import annotations

import json

import pytest
from comfyui_modelopt.devtools.server import PromptRejected

from .workflows import SAMPLING, SKIP, Graph, cancelled_at, conditioning, quantize_inputs, recorded

pytestmark = pytest.mark.e2e
TIMEOUT = 900
ALLOWED = {
    "int8": True,
    "int8_weights": True,
    "int4": False,  # AWQ takes long
    "fp8": False,
    "sixteen_bits": True,
    "mxfp8": False,
    "nvfp4": False,
    "w4a8": False,
}


def auto_graph(save: str, target: dict, **more) -> tuple[Graph, str]:
    graph = Graph()
    node = graph.add(
        "ModelOptAutoQuantize",
        **recorded(graph),
        layers="linear + conv",
        skip=SKIP,
        **target,
        **(ALLOWED | more),
    )
    graph.add("ModelOptSaveUNet", model=[node, 0], filename_prefix=save)
    graph.add("PreviewAny", source=[node, 2])
    return graph, node


def saved(server, name: str) -> bytes:
    (path,) = (server.models / "diffusion_models").glob(f"{name}_0*.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def done(server):
    graph, node = auto_graph("first", {"target": "bits", "target.bits": 9.0})
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, (result.error["exception_message"], result.error["traceback"])
    preview = next(k for k, n in graph.nodes.items() if n["class_type"] == "PreviewAny")
    return result, node, result.outputs[preview]["text"][0]


def test_report_and_recipe(server, done):
    result, node, recipe = done
    (text,) = result.outputs[node]["text"]
    figures = result.outputs[node]["modelopt"][0]
    assert text.startswith("Target: 9 bits a weight\nReached: ")
    assert "One recipe for all layers would give" in text
    for name in json.loads(recipe)["assignment"]["0"]:
        assert name in text
    assert figures["file_bytes"] == figures["planned_file_bytes"] == len(saved(server, "first"))
    assert {name.split()[0] for name, *_ in figures["uniform"]} == {"int8"}


def test_plan_tells_a_mix_before_it_is_made(server, done):
    """The recipe of one run, as text that was kept, into Plan of another."""
    graph = Graph()
    found = recorded(graph)
    text = graph.add("PrimitiveStringMultiline", value=done[2])
    options = quantize_inputs("fp8", "linear only")
    plan = graph.add("ModelOptPlan", recipe=[text, 0], **found, **options)
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, (result.error["exception_message"], result.error["traceback"])
    (said,), (figures,) = (result.outputs[plan][key] for key in ("text", "modelopt"))
    size = len(saved(server, "first"))
    assert figures["file_bytes"] == size and figures["exact"] is True
    assert (
        said.startswith("Plan: mixed for 9 bits a weight: ") and f"\nFile: {size:,} bytes" in said
    )
    assert "\nWith these layers: " not in said and "\nFor the best picture: " in said
    graph.nodes[text]["inputs"]["value"] = "{}"
    error = server.run(graph.nodes, timeout=TIMEOUT).error["exception_message"]
    assert "the recipe that is connected is not: take the text or file that Auto Quantize" in error


def test_the_recipe_gives_the_same_file_and_it_samples(server, done):
    graph, _ = auto_graph("second", {"target": "recipe", "target.recipe": done[2]})
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, (result.error["exception_message"], result.error["traceback"])
    assert saved(server, "second") == saved(server, "first")
    load = Graph()
    loader = load.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    inputs = conditioning(load, [loader, 1])
    (path,) = (server.models / "diffusion_models").glob("second_0*.safetensors")
    unet = load.add("ModelOptLoadUNet", unet_name=path.name)
    latent = load.add("KSampler", model=[unet, 0], **SAMPLING, **inputs)
    load.add("SaveLatent", samples=[latent, 0], filename_prefix="latents/auto")
    info = load.add("ModelOptModelInfo", model=[unet, 0])
    result = server.run(load.nodes, timeout=TIMEOUT)
    assert result.error is None, (result.error["exception_message"], result.error["traceback"])
    assert "mixed for 9 bits a weight" in result.outputs[info]["text"][0]


def test_a_second_target_measures_nothing_anew(server, done):
    graph, node = auto_graph("third", {"target": "size", "target.megabytes": 40.0})
    told = []

    def on_message(event):
        told.append(json.dumps(event, default=str))

    result = server.run(graph.nodes, timeout=TIMEOUT, on_message=on_message)
    assert result.error is None, (result.error["exception_message"], result.error["traceback"])
    assert 0.99 * 40e6 <= len(saved(server, "third")) <= 40e6
    assert not [one for one in told if "Sensitivity" in one]


def test_cancel(server, done):
    graph, node = auto_graph("fourth", {"target": "bits", "target.bits": 9.5}, fp8=True)
    assert cancelled_at(server, graph.nodes, node).interrupted
    # afterwards the server goes on as before
    graph, node = auto_graph("fifth", {"target": "bits", "target.bits": 9.0})
    result = server.run(graph.nodes, timeout=TIMEOUT)
    assert result.error is None, (result.error["exception_message"], result.error["traceback"])
    assert saved(server, "fifth") == saved(server, "first")


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ({"target": "size", "target.megabytes": 3.0}, {}, "cannot be reached"),
        ({"target": "bits", "target.bits": 9.0}, dict.fromkeys(ALLOWED, False), "at least one"),
        ({"target": "recipe", "target.recipe": "<script>"}, {}, "must be JSON"),
    ],
)
def test_bad_input_is_named(server, done, target, more, message):
    graph, _ = auto_graph("none", target, **more)
    try:
        error = server.run(graph.nodes, timeout=TIMEOUT).error
    except PromptRejected as rejected:
        error = {"exception_message": str(rejected)}
    assert message in error["exception_message"]
