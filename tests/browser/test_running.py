"""Quantizing by clicks: progress, report, chart, file; cancelling; the page reloaded; strangers' text."""

from __future__ import annotations

import pytest
from comfyui_modelopt.devtools import gallery
from comfyui_modelopt.devtools.browser import CLASSIC, NODES_2, template

pytestmark = pytest.mark.e2e
RENDERERS = [CLASSIC, NODES_2]
LINE = "$$node-text-preview"  # the page's own widget of progress
SMALL = {"width": 64, "height": 64, "steps": 2, "max_records": 4}

# height of the list of patterns to skip, and how much of it is in sight
SKIP_LIST = """(id) => {
  const { element } = app.graph.getNodeById(id).widgets.find((w) => w.name === "skip");
  const boxes = [...document.querySelectorAll(`[data-node-id="${id}"] textarea`)];
  const box = boxes.find((one) => one.value.includes("time_embed")) ?? element;
  return [box.scrollHeight, box.clientHeight];
}"""

# of report and chart of a node, whether they are marked as an earlier run's
EARLIER = """(id) => {
  const { widgets } = app.graph.getNodeById(id);
  return ["modelopt_report", "modelopt_chart"].map((name) =>
    widgets.find((w) => w.name === name).element.classList.contains("modelopt-earlier"));
}"""

# of the picture that the page puts on a node, in the graph's own units; null where there is none yet
SHOWN_PICTURE = """(id) => {
  const node = app.graph.getNodeById(id);
  const fit = (picture, width, height, scale) => {
    if (!picture?.naturalWidth) return null;
    const by = Math.min(width / picture.naturalWidth, height / picture.naturalHeight) / scale;
    return { width: by * picture.naturalWidth, height: by * picture.naturalHeight };
  };
  if (LiteGraph.vueNodesMode) {
    const picture = document.querySelector(`[data-node-id="${id}"] img`);
    const { width, height } = picture?.getBoundingClientRect() ?? {};
    return fit(picture, width, height, app.canvas.ds.scale);
  }
  const widget = node.widgets.find((one) => one.name === "$$canvas-image-preview");
  return widget?.y ? fit(node.imgs?.[0], node.size[0], node.size[1] - widget.y, 1) : null;
}"""


def node_of(page, kind: str) -> int:
    return page.run("(kind) => app.graph.nodes.find((n) => n.comfyClass === kind).id", kind)


def open_small(page, server, prompts: str = "a red fox\na tabby cat") -> tuple[int, int]:
    """The workflow *quantize_sd15*, small and quick. -> ids of calibration and Quantize."""
    page.load(template(server, "quantize_sd15"))
    prompt, quantize = (
        node_of(page, "ModelOptCalibrationPrompts"),
        node_of(page, "ModelOptQuantize"),
    )
    page.set_widget(prompt, "prompts", prompts)
    for name, value in SMALL.items():
        page.set_widget(prompt, name, value)
    page.set_widget(quantize, "format.algorithm", "max")
    return prompt, quantize


def press_run(page) -> None:
    page.page.get_by_test_id("queue-button").click()


def hear_progress(page) -> None:
    """Keeps every line of progress that the page gets, by node."""
    page.run(
        """() => {
          window.heard = [];
          app.api.addEventListener("progress_text", ({ detail }) =>
            window.heard.push([String(detail.nodeId), detail.text]));
        }"""
    )


def wait_done(page, node: int, seconds: float = 300) -> None:
    page.wait_for(
        "(id) => app.graph.getNodeById(id).widgets.some((w) => w.name === 'modelopt_report')",
        node,
        seconds,
    )


def saved(server) -> set[str]:
    return {path.name for path in (server.models / "diffusion_models").glob("sd15_fp8_*")}


def test_quantize_by_clicks(page, server):
    before = saved(server)
    prompt, quantize = open_small(page, server)
    # other text than the renderer before: ComfyUI would have it all in its cache
    page.set_widget(prompt, "seed", len(before) + 100)
    hear_progress(page)
    press_run(page)
    wait_done(page, quantize)
    wait_done(page, node_of(page, "ModelOptModelInfo"))
    heard = page.run("() => window.heard")
    told = {node: [text for one, text in heard if one == node] for node, _ in heard}
    assert told[str(prompt)] == ["Prompt 1 of 2: a red fox", "Prompt 2 of 2: a tabby cat"]
    assert told[str(quantize)][0].startswith("Planned: a file of ")
    parts = [text.split("\n")[1].split(" ")[0] for text in told[str(quantize)][1:]]
    assert parts == ["The", "Calibrating", "Packing", "The"]
    assert page.shown(prompt, "modelopt_report").startswith("Calibration: 4 UNet calls of 2 runs")
    report = page.shown(quantize, "modelopt_report")
    assert "SQNR" in report and "Quantized: fp8, max" in report
    bars = page.run(
        "(id) => app.graph.getNodeById(id).widgets.find((w) => w.name === 'modelopt_chart')"
        ".element.querySelectorAll('.modelopt-bar').length",
        quantize,
    )
    assert bars > 3
    assert LINE not in page.widgets(prompt) and LINE not in page.widgets(quantize)
    page.wait_for("() => app.graph.nodes.some((n) => n.comfyClass === 'ModelOptSaveUNet' "
                  "&& n.widgets.some((w) => w.name === 'modelopt_report'))")  # fmt: skip
    (made,) = saved(server) - before
    assert made in page.shown(node_of(page, "ModelOptSaveUNet"), "modelopt_report")
    keeps_its_report(page, quantize, report)
    # what was shown is neither saved with the workflow nor sent again
    assert "modelopt_" not in str(page.workflow()["nodes"])
    says_what_is_of_an_earlier_run(page, quantize)


def count_events(page, event: str) -> None:
    """In `window.counted`, those of ComfyUI's server from now on."""
    page.run(
        """(event) => {
          window.counted = 0;
          app.api.addEventListener(event, () => (window.counted += 1));
        }""",
        event,
    )


def says_what_is_of_an_earlier_run(page, node: int) -> None:
    """When the node is set to something else, and when it failed."""
    assert page.run(EARLIER, node) == [False, False]
    page.set_widget(node, "layers", "linear + conv")  # as it was
    assert page.run(EARLIER, node) == [False, False]
    page.set_widget(node, "layers", "linear only")
    assert page.run(EARLIER, node) == [True, True]
    page.set_widget(node, "layers", "linear + conv")
    assert page.run(EARLIER, node) == [False, False]
    skip = page.widgets(node)["skip"]
    page.set_widget(node, "skip", "nothing.*")
    count_events(page, "execution_error")
    press_run(page)
    page.wait_for("() => window.counted === 1")
    page.set_widget(node, "skip", skip)
    assert page.run(EARLIER, node) == [True, True]
    assert LINE not in page.widgets(node)
    page.settle(1500)
    page.problems.clear()  # the page logs the error
    for form in ("int4", "fp8"):  # with fewer and with more options
        page.set_widget(node, "format", form)
        page.frame([node])
        page.settle(1000)
        whole, seen = page.run(SKIP_LIST, node)
        assert whole <= seen + 2, form


def keeps_its_report(page, node: int, report: str) -> None:
    """With the side panel open, and when its workflow's tab is left and opened again."""
    page.run("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", node)
    page.page.get_by_role("button", name="Toggle properties panel").click()
    page.settle(1500)
    assert page.page.get_by_text("modelopt_report").count() == 0
    page.frame([node])  # what is out of sight has no size
    page.settle(1000)
    width, whole = page.run(
        """(id) => {
          const node = app.graph.getNodeById(id);
          const report = node.widgets.find((w) => w.name === "modelopt_report").element;
          return [report.offsetWidth, node.size[0]];
        }""",
        node,
    )
    assert width > whole - 60
    page.page.get_by_role("button", name="Toggle properties panel").click()
    page.run("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for("() => app.graph.nodes.length === 0")
    page.run("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for("(id) => app.graph.getNodeById(id)", node)
    wait_done(page, node, 20)
    assert page.shown(node, "modelopt_report") == report


def test_compare_shows_its_report_and_a_chart_that_can_be_read(page, server):
    page.load(template(server, "compare_formats"))
    page.run(
        """() => {
          const [first] = app.graph.nodes.filter((n) => n.comfyClass === "ModelOptCompare");
          const kept = ["CheckpointLoaderSimple", "ModelOptCalibrationPrompts"];
          const quantize = first.getInputNode(first.findInputSlot("quantized"));
          first.disconnectInput(first.findInputSlot("vae"));
          for (const node of [...app.graph.nodes])
            if (node !== first && node !== quantize && !kept.includes(node.comfyClass))
              app.graph.remove(node);
        }"""
    )
    prompt, compare = (
        node_of(page, "ModelOptCalibrationPrompts"),
        node_of(page, "ModelOptCompare"),
    )
    before = page.run("(id) => app.graph.getNodeById(id).size[1]", compare)
    page.set_widget(prompt, "prompts", "a red fox")
    for name, value in SMALL.items():
        page.set_widget(prompt, name, value)
    page.set_widget(node_of(page, "ModelOptQuantize"), "format.algorithm", "max")
    press_run(page)
    wait_done(page, compare)
    assert page.shown(compare, "modelopt_report").startswith("SQNR ")
    picture = page.run(SHOWN_PICTURE, compare)
    for _ in range(20):
        if picture and picture["width"] > 380:
            break
        page.settle(500)
        picture = page.run(SHOWN_PICTURE, compare)
    assert picture["width"] > 380 and 1.2 < picture["height"] / picture["width"] < 1.3
    after = page.run("(id) => app.graph.getNodeById(id).size[1]", compare)
    # about what the shipped workflows leave room for
    assert before + 400 < after <= before + gallery.ROOM["ModelOptCompare"] + 250


def test_shipped_workflows_leave_room_for_the_pages_own_pictures(page):
    """SaveImage and PreviewImage grow once they have a picture, also one that is higher than wide."""
    page.load(
        {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 512, "height": 768, "batch_size": 1, "color": 255},
            },
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            "3": {
                "class_type": "SaveImage",
                "inputs": {"images": ["1", 0], "filename_prefix": "room"},
            },
        }
    )
    page.settle(1200)
    heights = """() => Object.fromEntries(
      app.graph.nodes.map((node) => [node.comfyClass, node.size[1]]))"""
    before = page.run(heights)
    press_run(page)
    for name in ("PreviewImage", "SaveImage"):
        page.wait_for("(name) => app.graph.nodes.find((n) => n.comfyClass === name).imgs", name)
    page.settle(1500)
    after = page.run(heights)
    for name in ("PreviewImage", "SaveImage"):
        assert 150 < after[name] - before[name] <= gallery.ROOM[name]


def test_cancel_leaves_nothing_and_the_next_run_works(page, server):
    before = saved(server)
    prompt, quantize = open_small(page, server)
    page.set_widget(prompt, "steps", 60)
    page.set_widget(prompt, "seed", len(before) + 200)
    hear_progress(page)
    count_events(page, "execution_interrupted")
    press_run(page)
    page.wait_for("() => window.heard.length > 0")
    page.page.get_by_role("button", name="Cancel current run").click()
    page.wait_for("() => window.counted === 1", seconds=60)
    assert saved(server) == before
    assert "modelopt_report" not in page.widgets(quantize)
    page.set_widget(prompt, "steps", 2)
    press_run(page)
    wait_done(page, quantize)
    page.settle(1500)
    assert len(saved(server)) == len(before) + 1


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_reload_keeps_the_graph(chromium, server, renderer):
    """In a page of its own: which of many open workflows comes back is the page's business."""
    with chromium.open(server, renderer=renderer) as page:
        reload_and_compare(page, server)
        assert page.problems == []


def reload_and_compare(page, server) -> None:
    prompt, quantize = open_small(page, server, "kept over a reload")
    page.set_widget(quantize, "format", "nvfp4")
    page.set_widget(quantize, "format.algorithm", "svdquant")
    page.set_widget(quantize, "format.algorithm.rank", 48)
    page.page.mouse.click(800, 12)  # whatever one clicks: the page looks for changes
    page.settle(3000)
    sent = page.prompt()
    page.page.reload()
    page.wait_ready()
    page.wait_for("() => app.graph.nodes.some((n) => n.comfyClass === 'ModelOptQuantize')")
    again = page.prompt()
    assert again == sent
    assert again[str(quantize)]["inputs"]["format.algorithm.rank"] == 48
    assert again[str(prompt)]["inputs"]["prompts"] == "kept over a reload"


def test_text_is_shown_as_text(page, server):
    """A prompt that is HTML runs nothing, in the line of progress or in a report."""
    evil = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"
    prompt, quantize = open_small(page, server, evil)
    page.set_widget(prompt, "seed", 300 + len(saved(server)))
    hear_progress(page)
    press_run(page)
    wait_done(page, quantize)
    wait_done(page, node_of(page, "ModelOptModelInfo"))
    page.settle(800)
    assert any("‹script›" in text for _, text in page.run("() => window.heard"))
    assert page.run("() => window.ran ?? null") is None


def test_a_missing_file_says_how_it_was_made(page, server):
    workflow = template(server, "generate")
    (made,) = (node for node in workflow["nodes"] if node["type"] == "ModelOptLoadUNet")
    made_by = "sd15.safetensors: fp8, max (activations static), linear + conv"
    made["widgets_values"] = ["gone.safetensors", False, made_by]
    page.load(workflow)
    page.settle(800)
    page.run(
        """() => {
          window.refused = null;
          const post = app.api.queuePrompt.bind(app.api);
          app.api.queuePrompt = async (...given) => {
            try { return await post(...given); }
            catch (error) { window.refused = JSON.stringify(error.response ?? String(error)); throw error; }
          };
        }"""
    )
    press_run(page)
    page.wait_for("() => window.refused !== null")
    page.problems.clear()  # the page logs the server's refusal
    refused = page.run("() => window.refused")
    assert "gone.safetensors" in refused
    assert f"made by: {made_by}" in refused
