"""The Compare node: what a workflow relies on."""

import json

from comfyui_modelopt.nodes.compare import NEEDED, Compare
from comfyui_modelopt.quantize.pictures import Settings


def test_ids_inputs_and_outputs_are_the_contract():
    info = json.loads(json.dumps(Compare.GET_NODE_INFO_V1()))
    assert info["name"] == "ModelOptCompare"
    assert info["display_name"] == "Compare Quantized (ModelOpt)"
    assert info["category"] == "ModelOpt" and info["output_node"] is True
    assert list(info["input"]["required"]) == ["reference", "quantized", "calibration"]
    settings = ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"]
    assert list(info["input"]["optional"]) == [*NEEDED, "vae", *settings]
    assert info["output"] == ["STRING", "IMAGE", "IMAGE", "IMAGE"]
    assert info["output_name"] == ["text", "chart", "reference", "quantized"]


def test_defaults_in_the_browser_are_those_of_a_workflow_that_leaves_them_out():
    shown = Compare.GET_NODE_INFO_V1()["input"]["optional"]
    defaults = Settings([], [], {})
    for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"):
        assert shown[name][1]["default"] == getattr(defaults, name)


def test_everything_is_explained():
    schema = Compare.GET_SCHEMA()
    for item in (*schema.inputs, *schema.outputs):
        assert item.tooltip.strip().endswith("."), item.id
