"""Every node, found by the search box: its widgets, its conditional options, what it says of the GPU."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from comfyui_modelopt.nodes import NODES, routes
from comfyui_modelopt.quantize.recipe import ALGORITHMS
from safetensors.torch import save_file

pytestmark = pytest.mark.e2e
SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in NODES}
# what the page adds of its own
PAGES_OWN = {"control_after_generate", "fixed", "modelopt_chips"}
# room that the title's words need
TITLE = """(id) => {
  const node = app.graph.getNodeById(id), context = app.canvas.ctx;
  context.save();
  context.font = "14px Arial";
  const words = context.measureText(node.title).width;
  context.restore();
  return node.size[0] - words - LiteGraph.NODE_TITLE_HEIGHT;
}"""
# how many pixels of a list of layers are out of sight
HIDDEN = """(id) => {
  const widget = app.graph.getNodeById(id).widgets.find((one) => one.name === "skip");
  const root = widget.element.isConnected ? widget.element
    : [...document.querySelectorAll("textarea")].find((one) => one.value === widget.value);
  return root.scrollHeight - root.clientHeight;
}"""


def widgets_of(server, node_id: str) -> set[str]:
    """Names of inputs with a widget, from what the server tells the page; nested ones not."""
    given = server.object_info(node_id)["input"]
    inputs = given.get("required", {}) | given.get("optional", {})
    plain = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
    return {
        name
        for name, (kind, *more) in inputs.items()
        if (isinstance(kind, list) or kind in plain) and not (more and more[0].get("forceInput"))
    }


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_added_from_the_search_box(page, server, node_id):
    display_name = SCHEMAS[node_id].display_name
    node = page.add_by_search(display_name)
    assert page.run("(id) => app.graph.getNodeById(id).comfyClass", node) == node_id
    shown = page.widgets(node)
    top = {name for name in shown if "." not in name} - PAGES_OWN
    assert top == widgets_of(server, node_id)
    assert page.run(TITLE, node) > 0, "the title is cut off"
    if "skip" in shown:
        page.settle(400)
        assert page.run(HIDDEN, node) <= 2, "the list of layers is cut off"


def test_a_format_shows_its_own_options(page):
    node = page.add_by_search("Quantize UNet (ModelOpt)")
    for name, algorithms in ALGORITHMS.items():
        if name == "fp8_e5m2":
            continue
        page.set_widget(node, "format", name)
        options = page.run(
            "(id) => app.graph.getNodeById(id).widgets"
            ".find((w) => w.name === 'format.algorithm').options.values",
            node,
        )
        assert list(options) == list(algorithms)
        shown = set(page.widgets(node))
        assert ("format.weights" in shown) == ("format.activations" in shown) == (name == "fp8")
    page.set_widget(node, "format", "int4")
    page.set_widget(node, "format.algorithm", "svdquant")
    assert page.widgets(node)["format.algorithm.rank"] == 0
    page.set_widget(node, "format", "int8")
    page.set_widget(node, "format.algorithm", "smoothquant")
    shown = page.widgets(node)
    assert shown["format.algorithm.alpha"] == 0.5 and "format.algorithm.rank" not in shown


def test_a_target_shows_its_own_value(page):
    node = page.add_by_search("Auto Quantize UNet (ModelOpt)")
    for target, name in (("bits", "bits"), ("quality", "sqnr_db"), ("size", "megabytes")):
        page.set_widget(node, "target", target)
        nested = {key for key in page.widgets(node) if key.startswith("target.")}
        assert nested == {f"target.{name}"}


def expect_chips(page, node, expected: list[str]) -> None:
    """Within ten seconds: the page asks the server."""
    for _ in range(50):
        found = [line for line in page.shown(node, "modelopt_chips").splitlines() if line]
        if found[: len(expected)] == expected:
            break
        page.settle(200)
    assert found[: len(expected)] == expected


def words(formats: list[str], layers: str = "linear + conv") -> list[str]:
    return [chip["text"] for chip in routes.formats_of(formats, layers)]


def test_the_verdict_follows_the_choice(page):
    """On this machine: without a GPU all but weight-only formats are emulated."""
    node = page.add_by_search("Quantize UNet (ModelOpt)")
    assert words(["fp8"])
    expect_chips(page, node, words(["fp8"]))
    page.set_widget(node, "format", "int4")
    assert words(["int4"]) == ["int4: memory only"]
    expect_chips(page, node, words(["int4"]))
    page.set_widget(node, "format", "fp8")
    page.set_widget(node, "format.weights", "e5m2")
    expect_chips(page, node, words(["fp8_e5m2"]))
    node = page.add_by_search("Auto Quantize UNet (ModelOpt)", at=(1000, 150))
    expect_chips(page, node, words(["int8", "fp8", "int4", "int8_weights"]))
    page.set_widget(node, "fp8", False)
    page.set_widget(node, "int8_weights", False)
    expect_chips(page, node, words(["int8", "int4"]))


# pixels between the last chip and the end of its node
BELOW = """(id) => {
  const node = app.graph.getNodeById(id);
  const root = node.widgets.find((one) => one.name === "modelopt_chips").element;
  const shell = root.closest(".lg-node");
  const [, y] = app.canvas.ds.convertOffsetToCanvas([0, node.pos[1] + node.size[1]]);
  const end = shell?.getBoundingClientRect().bottom ?? app.canvas.canvas.getBoundingClientRect().top + y;
  return end - root.lastElementChild.getBoundingClientRect().bottom;
}"""
CUT_OFF = """(id) => {
  const node = app.graph.getNodeById(id);
  const root = node.widgets.find((one) => one.name === "modelopt_chips").element;
  return root.scrollHeight - root.clientHeight;
}"""


def test_all_chips_have_room(page):
    node = page.add_by_search("Auto Quantize UNet (ModelOpt)", at=(500, 60))
    expect_chips(page, node, words(["int8", "fp8", "int4", "int8_weights"]))
    page.frame([node])
    page.settle()
    assert page.run(BELOW, node) > 4 and page.run(CUT_OFF, node) <= 1
    for name in ("mxfp8", "nvfp4", "w4a8"):
        page.set_widget(node, name, True)
    every = ["int8", "fp8", "int4", "int8_weights", "mxfp8", "nvfp4", "w4a8"]
    expect_chips(page, node, words(every))
    page.settle()
    assert page.run(BELOW, node) > 4 and page.run(CUT_OFF, node) <= 1


def test_r_asks_again(page, server):
    """Files come and go; whoever has one no more keeps how it was made."""
    folder = server.models / "diffusion_models"
    whole = folder / "sd15_fp8_00001_.safetensors"
    path = folder / "comes_and_goes.safetensors"
    node = page.add_by_search("Load Quantized UNet (ModelOpt)")
    page.set_widget(node, "unet_name", path.name)
    expect_chips(page, node, ["cannot be read"])
    refresh = "() => app.refreshComboInNodes()"  # what the key R does
    try:
        shutil.copyfile(whole, path)
        page.run(refresh)
        expect_chips(page, node, ["fp8", "linear + conv", f"{path.stat().st_size / 1e6:.1f} MB"])
        made_by = page.widgets(node)["made_by"]
        assert made_by.startswith("sd15.safetensors: fp8")
        path.write_bytes(whole.read_bytes()[:1000])
        page.run(refresh)
        expect_chips(page, node, ["cannot be read"])
        assert page.widgets(node)["made_by"] == made_by
        save_file({"a": torch.ones(1)}, path)
        page.run(refresh)
        expect_chips(page, node, ["not quantized"])
        page.settle()
        assert page.widgets(node)["made_by"] == "", "it is another file by now"
    finally:
        path.unlink(missing_ok=True)


def test_the_badge_tells_a_file_before_it_is_loaded(page, server):
    node = page.add_by_search("Load Quantized UNet (ModelOpt)")
    name = "sd15_fp8_00001_.safetensors"
    page.set_widget(node, "unet_name", name)
    size = (server.models / "diffusion_models" / name).stat().st_size
    expect_chips(page, node, ["fp8", "linear + conv", f"{size / 1e6:.1f} MB"])
    made_by = page.widgets(node)["made_by"]
    assert made_by == "sd15.safetensors: fp8, max (activations static), linear + conv"
    page.set_widget(node, "unet_name", "gone.safetensors")
    expect_chips(page, node, ["cannot be read"])
    assert page.widgets(node)["made_by"] == "", "another file's"
    saved = page.workflow()
    (made,) = saved["nodes"]
    values = ["gone.safetensors", False, made_by]
    assert [*made["widgets_values"]] == [values[0], False, "", True]
    made["widgets_values"] = values
    page.load(saved)
    expect_chips(page, node, ["cannot be read"])
    assert page.widgets(node)["made_by"] == made_by, "kept for whoever has not got the file"
    page.set_widget(node, "unet_name", "other.safetensors")
    expect_chips(page, node, ["cannot be read"])
    page.settle()
    assert page.widgets(node)["made_by"] == ""
    page.set_widget(node, "unet_name", "gone.safetensors")
    page.settle()
    assert page.widgets(node)["made_by"] == made_by, "and when one comes back to it"
    sent = page.prompt()[str(node)]["inputs"]
    assert sent["made_by"] == made_by and "modelopt_chips" not in json.dumps(sent)
