"""torch.compile sees every producer's kernels: one graph, whatever the resolution."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_one_graph_in_which_only_outputs_are_written():
    """A kernel that seemed to write its input would make torch.compile copy that input."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("traced.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["graphs"] == 1
    assert found["written"] == [["scale", "q"], ["q"], ["scale", "q"], ["partial"], ["q"]]
