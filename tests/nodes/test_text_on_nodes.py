"""The page shows the text of every node that has one."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import comfyui_modelopt
from comfyui_modelopt.nodes import NODES

SCRIPT = Path(comfyui_modelopt.__file__).parent / "web" / "modelopt.js"


def test_every_node_with_text_is_known_to_the_page():
    listed = re.search(r"const NODES = new Set\(\[(.*?)\]\)", SCRIPT.read_text(), re.DOTALL)
    known = set(re.findall(r'"(\w+)"', listed[1]))
    with_text = {
        node.define_schema().node_id
        for node in NODES
        if re.search('"text"|PreviewText', inspect.getsource(node))
    }
    assert "ModelOptQuantize" in with_text
    assert known == with_text
