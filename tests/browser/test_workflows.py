"""Every shipped workflow opens whole in the page, says what its API twin says, and keeps doing so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfyui_modelopt.devtools import gallery
from comfyui_modelopt.devtools.browser import template

pytestmark = pytest.mark.e2e
UNDECIDED = ("made_by", "compare_view")
FROZEN = Path(__file__).parent / "frozen"
# nodes of the graph that are unknown, flagged, or hold a value that their widget does not offer
WRONG = """() => {
  const wrong = [];
  for (const node of app.graph.nodes) {
    const known = node.type in LiteGraph.registered_node_types;
    if (!known || node.has_errors) wrong.push(`${node.type}: unknown or faulty`);
    for (const widget of node.widgets ?? []) {
      const { values, min, max } = widget.options ?? {};
      const offered = typeof values === "function" ? values() : values;
      if (Array.isArray(offered) && offered.length && !offered.includes(widget.value))
        wrong.push(`${node.type}.${widget.name}: ${widget.value} is not offered`);
      if (typeof widget.value === "number" && (widget.value < min || widget.value > max))
        wrong.push(`${node.type}.${widget.name}: ${widget.value} is not in ${min} to ${max}`);
    }
  }
  return wrong;
}"""
# of nodes as they are once they have run
OVERLAPS = """([room, wide]) => {
  const found = [], nodes = app.graph.nodes, TITLE = 30;
  const box = (n) => {
    const more = room[n.comfyClass] ?? 0;
    const across = Math.max(n.size[0], wide[n.comfyClass] ?? 0);
    return [n.pos[0], n.pos[1] - TITLE, n.pos[0] + across, n.pos[1] + n.size[1] + more];
  };
  for (const [i, one] of nodes.entries())
    for (const other of nodes.slice(i + 1)) {
      const [a, b] = [box(one), box(other)];
      if (a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3])
        found.push(`${one.title} and ${other.title}`);
    }
  return found;
}"""


def without_titles(prompt: dict) -> dict:
    """What decides the run. Not the state of a slider, nor how a file was made: that is filled in
    where the server has the file."""
    return {
        key: {
            "class_type": node["class_type"],
            "inputs": {n: v for n, v in node["inputs"].items() if n not in UNDECIDED},
        }
        for key, node in prompt.items()
    }


def api_twin(name: str) -> dict:
    return json.loads((gallery.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_lists_them_with_thumbnails(server):
    listed = server.get("/workflow_templates")["comfyui-modelopt"]
    assert sorted(listed) == gallery.names() == sorted(gallery.NOTES)
    for name in listed:
        picture = server.request(f"/api/workflow_templates/comfyui-modelopt/{name}.jpg")
        assert picture[:3] == b"\xff\xd8\xff" and len(picture) > 5_000


@pytest.mark.parametrize("name", gallery.names())
def test_opens_whole(page, server, name):
    page.load(template(server, name))
    page.settle(1200)
    assert page.run(WRONG) == []
    assert page.run(OVERLAPS, [gallery.ROOM, gallery.WIDE]) == []
    notes = page.run("() => app.graph.nodes.filter((n) => n.type === 'MarkdownNote').length")
    assert notes == 1
    assert without_titles(page.prompt()) == without_titles(api_twin(name))


@pytest.mark.parametrize("file", sorted(FROZEN.rglob("*.json")), ids=lambda file: file.stem)
def test_a_workflow_saved_with_an_older_version_opens(page, file):
    """frozen/<version>/ holds workflows as that version saved them, and what they sent. They are never
    made anew: an input that is renamed or gone fails here, one that is added may not change a run."""
    held = json.loads(file.read_text(encoding="utf-8"))
    page.load(held["workflow"])
    page.settle(1200)
    assert page.run(WRONG) == []
    sent = without_titles(page.prompt())
    for key, node in held["prompt"].items():
        assert sent[key]["class_type"] == node["class_type"]
        for name, value in node["inputs"].items():
            if name not in UNDECIDED:
                assert sent[key]["inputs"].get(name, "gone") == value, (key, name)


def test_opened_by_clicks(page):
    """Templates, the pack's own among them, one of its workflows."""
    page.page.get_by_role("button", name="Templates").first.click()
    page.page.get_by_text("comfyui-modelopt", exact=True).first.click()
    page.page.get_by_text("quantize_sd15", exact=True).first.click()
    page.wait_for("() => app.graph.nodes.some((n) => n.comfyClass === 'ModelOptQuantize')")
    page.settle(800)
    assert page.run(WRONG) == []
