"""The help page that the page really shows, and the names it shows, in both languages."""

from __future__ import annotations

import json

import pytest
from comfyui_modelopt.devtools.common import ROOT
from comfyui_modelopt.nodes import NODES

pytestmark = pytest.mark.e2e
IDS = [node.define_schema().node_id for node in NODES]
LANGUAGES = ["en", "zh"]
# until the help of this node is there: its heading, and its picture loaded
SHOWN = """([title, id]) => {
  const heading = [...document.querySelectorAll("h1")].some((h) => h.textContent.trim() === title);
  const picture = [...document.images].find((i) => i.src.endsWith(`/pictures/${id}.png`));
  return heading && picture?.complete && picture.naturalWidth > 0;
}"""


@pytest.fixture(scope="module", params=LANGUAGES)
def opened(request, chromium, server):
    with chromium.open(server, locale=request.param) as page:
        page.locale = request.param
        yield page


def first_line(node_id: str, locale: str) -> str:
    page = f"{node_id}.md" if locale == "en" else f"{node_id}/{locale}.md"
    text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
    return text.splitlines()[0].removeprefix("# ").strip()


@pytest.mark.parametrize("node_id", IDS)
def test_the_page_shows_it(opened, node_id):
    opened.clear()
    node = opened.run(
        "(id) => { const node = LiteGraph.createNode(id); app.graph.add(node);"
        " node.pos = [300, 300]; app.canvas.selectNode(node); return node.id; }",
        node_id,
    )
    names = json.loads((ROOT / "locales" / opened.locale / "nodeDefs.json").read_text("utf-8"))
    title = opened.run("(id) => app.graph.getNodeById(id).title", node)
    assert title == names[node_id]["display_name"]
    opened.page.get_by_test_id("info-button").click()
    opened.wait_for(SHOWN, [first_line(node_id, opened.locale), node_id], seconds=30)
