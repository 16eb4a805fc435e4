"""The shipped workflow example_workflows/api/auto_mixed_precision.json in a real server: plan, search, compare, save."""

from __future__ import annotations

import pytest
from comfyui_modelopt.devtools import workflows

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def ran(server):
    """The workflow, small, and what came of it."""
    graph = workflows.load_workflow("auto_mixed_precision.json")
    workflows.one(graph, "CheckpointLoaderSimple")["ckpt_name"] = "sd15.safetensors"
    prompts = workflows.one(graph, "ModelOptCalibrationPrompts")
    prompts["prompts"] = "\n".join(prompts["prompts"].splitlines()[:2])
    prompts |= {"width": 64, "height": 64, "steps": 3, "max_records": 6}
    workflows.one(graph, "EmptyLatentImage").update(width=64, height=64)
    workflows.one(graph, "ModelOptCompare")["steps"] = 2
    workflows.one(graph, "ModelOptAutoQuantize").update(fp8=False, int4=False)  # saves minutes
    workflows.one(graph, "ModelOptAutoQuantize")["target.bits"] = 9.0
    result = server.run(graph, timeout=900)
    assert result.error is None, result.error
    return graph, result, server


def test_every_node_says_what_it_found(ran):
    graph, result, server = ran
    (report,) = workflows.output(result, graph, "ModelOptAutoQuantize", "text")
    assert report.startswith("Target: 9 bits a weight")
    (file,) = (server.models / "diffusion_models").glob("auto_*.safetensors")
    (figures,) = workflows.output(result, graph, "ModelOptAutoQuantize", "modelopt")
    assert figures["file_bytes"] == file.stat().st_size
    (plan,) = workflows.output(result, graph, "ModelOptPlan", "text")
    assert "fp8" in plan
    (compared,) = workflows.output(result, graph, "ModelOptCompare", "text")
    assert compared.startswith("SQNR ")
    (info,) = workflows.output(result, graph, "ModelOptModelInfo", "text")
    assert "mixed for 9 bits a weight" in info
    for name in ("chart", "original", "quantized"):
        assert list((server.output / "compare").glob(f"{name}_*.png"))


def test_progress_is_shown_by_each(ran):
    graph, result, _ = ran
    for name in ("ModelOptAutoQuantize", "ModelOptCompare", "ModelOptPlan"):
        key = workflows.node_id(graph, name)
        assert [m for m in result.of_type("progress") if m["node"] == key], name
