"""Every node shows what it found: a report, the facts of a recording, a path."""

from __future__ import annotations

import inspect

from comfyui_modelopt.nodes import NODES


def test_every_node_shows_something_on_itself():
    silent = [
        node.define_schema().node_id for node in NODES if "shown(" not in inspect.getsource(node)
    ]
    assert silent == []
