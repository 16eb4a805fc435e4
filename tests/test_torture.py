"""The frame of the campaigns: what they found as JSON and as a page."""

from __future__ import annotations

import json
from collections import Counter

from comfyui_modelopt.devtools.torture import main
from comfyui_modelopt.devtools.torture.outcome import Row


def test_results_are_written(tmp_path):
    rows = [Row("Kills", "a kill", Counter({"the old file": 2, "the new one": 1}), ["seed 7"])]
    facts = {"command": "dev.py torture", "machine": "any", "minutes": "1"}
    main.write(tmp_path / "out" / "found.json", rows, facts, main.markdown(rows, facts))
    (row,) = json.loads((tmp_path / "out" / "found.json").read_text())["rows"]
    assert row == {
        "campaign": "Kills",
        "kind": "a kill",
        "outcomes": {"the old file": 2, "the new one": 1},
        "findings": ["seed 7"],
        "tried": 4,
    }
    page = (tmp_path / "out" / "found.md").read_text()
    assert "| Kills | a kill | 4 | 2 the old file; 1 the new one | 1 |" in page
    assert "1 findings." in page and "- Kills, a kill: seed 7" in page
