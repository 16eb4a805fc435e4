"""What the plan says before the run is what comes out of it, in a real server."""

from __future__ import annotations

import pytest

from .workflows import SAMPLING, Graph, conditioning, load_checkpoint, quantize_inputs

pytestmark = pytest.mark.e2e
VARIANTS = {
    "int8": ("int8", "linear + conv", {}),
    "int4": ("int4", "linear only", {"algorithm": "awq_lite"}),
}


def test_plan_then_quantize(server):
    graph = Graph()
    _, model, clip = load_checkpoint(graph, "sd15.safetensors", "lora.safetensors")
    inputs = conditioning(graph, clip)
    record = graph.add(
        "ModelOptRecordCalibration", model=model, **SAMPLING, **inputs, max_records=4
    )
    plans, quantizers = {}, {}
    for name, (form, layers, more) in VARIANTS.items():
        options = quantize_inputs(form, layers, **more)
        plans[name] = graph.add("ModelOptPlan", model=model, calibration=[record, 1], **options)
        made = graph.add("ModelOptQuantize", model=model, calibration=[record, 1], **options)
        quantizers[name] = made
        graph.add("ModelOptSaveUNet", model=[made, 0], filename_prefix=name)
    alone = graph.add("ModelOptPlan", model=model, **quantize_inputs("int8", "linear + conv"))
    result = server.run(graph.nodes, timeout=600)
    assert result.error is None, result.error
    for name in VARIANTS:
        (text,) = result.outputs[plans[name]]["text"]
        (figures,) = result.outputs[plans[name]]["modelopt"]
        (path,) = (server.models / "diffusion_models").glob(f"{name}_0*.safetensors")
        size = path.stat().st_size
        assert figures["file_bytes"] == size
        assert f"\nFile: {size:,} bytes (" in text and "exact" in text
        assert figures["seconds"] > 0 and figures["call_bytes"] > 0
        (report,) = result.outputs[quantizers[name]]["text"]
        assert report.startswith(f"Planned: a file of {size:,} bytes, ")
        assert report.splitlines()[0].endswith("when loaded: it came out as planned.")
        assert f"ModelOpt: Planned: a file of {size:,} bytes" in server.log
    (text,) = result.outputs[alone]["text"]
    assert "\nMind: this recipe needs recorded activations: connect a CALIBRATION." in text
    assert result.outputs[alone]["modelopt"][0]["exact"] is False


def test_a_wrong_recipe_is_refused_before_the_run(server):
    graph = Graph()
    loader, *_ = load_checkpoint(graph, "sd15.safetensors", None)
    inputs = quantize_inputs("int8", "linear only") | {"skip": "no.such.layer"}
    graph.add("ModelOptPlan", model=[loader, 0], **inputs)
    result = server.run(graph.nodes, timeout=300)
    assert "'no.such.layer' matches none" in result.error["exception_message"]
