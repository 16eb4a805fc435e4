"""Pictures of the pack's nodes for the help pages and the README: the real page after a real run.

`python dev.py pictures`, with a small synthetic SD1.5: what reports say there is of that model, on
the machine that it ran on.
"""

from __future__ import annotations

from .browser import Page, studio, template
from .common import ROOT, say
from .server import ComfyServer

HELP = ROOT / "web" / "docs" / "pictures"
README = ROOT / "assets"
CHECKPOINT = "synthetic_sd15.safetensors"
WINDOW = (1500, 1300)
SMALL = {"width": 64, "height": 64, "steps": 3, "max_records": 8}
IDS = "() => Object.keys(LiteGraph.registered_node_types).filter((id) => id.startsWith('ModelOpt'))"
ADD = """(id) => {
  const node = LiteGraph.createNode(id);
  app.graph.add(node);
  return node.id;
}"""
# nothing but the graph in the picture
BARE = """() => {
  const style = document.createElement("style");
  style.textContent = ".selection-toolbox, .side-tool-bar-container, .comfyui-body-top, "
    + ".graph-canvas-container nav, .p-toast, .workflow-tabs-container { display: none !important; }";
  document.head.append(style);
}"""


def nodes(page: Page) -> None:
    """Each node by itself, as it is when it is new."""
    for node_id in page.run(IDS):
        page.clear()
        made = page.run(ADD, node_id)
        page.settle(900)
        page.picture(HELP / f"{node_id}.png", clip(page, [made]))
        say(node_id)


def clip(page: Page, ids: list) -> dict[str, float]:
    found = page.frame(ids)
    page.settle(500)
    return found


def quantize(page: Page, server: ComfyServer) -> None:
    """Quantize and Info after a run."""
    page.clear()
    page.load(template(server, "quantize_sd15"))
    kinds = dict(page.run("() => app.graph.nodes.map((n) => [n.comfyClass, n.id])"))
    page.set_widget(kinds["CheckpointLoaderSimple"], "ckpt_name", CHECKPOINT)
    prompts = kinds["ModelOptCalibrationPrompts"]
    for name, value in SMALL.items():
        page.set_widget(prompts, name, value)
    info, made = kinds["ModelOptModelInfo"], kinds["ModelOptQuantize"]
    page.page.get_by_test_id("queue-button").click()
    page.wait_for(
        "(id) => app.graph.getNodeById(id).widgets?.some((w) => w.name === 'modelopt_report')",
        info,
        900,
    )
    page.settle(6000)  # until the page's messages are gone
    page.picture(README / "quantize.png", clip(page, [made]))
    page.picture(README / "info.png", clip(page, [info]))


def main() -> int:
    """Writes web/docs/pictures and assets."""
    with (
        studio(make_checkpoint) as (server, browser),
        browser.open(server, size=WINDOW) as page,
    ):
        page.run(BARE)
        nodes(page)
        quantize(page, server)
    return 0


def make_checkpoint(server: ComfyServer) -> None:
    """A small synthetic SD1.5, under a name that says so."""
    from . import inprocess

    inprocess.load()
    from . import synthetic

    path = server.models / "checkpoints" / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    synthetic.sd15(path)
