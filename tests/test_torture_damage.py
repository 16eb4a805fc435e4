"""The campaign of damaged files in its short form, and that it would notice."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections import Counter

import pytest
import torch
from comfyui_modelopt.devtools.torture import damage
from comfyui_modelopt.devtools.torture.mutations import cases, samples, torch_files
from comfyui_modelopt.devtools.torture.outcome import Effort

SEED = 1000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture") / "samples"
    with torch.random.fork_rng():
        samples.make_small(folder)
    return folder


def test_some_hundred_damaged_files(made):
    rows = list(damage.run_on(made, Effort(share=0.03, seed=SEED), lambda text: None))
    assert [finding for row in rows for finding in row.findings] == []
    tried = Counter()
    for row in rows:
        tried += row.outcomes
    assert sum(tried.values()) > 200
    assert tried[cases.ERROR] > 100 and tried[cases.SAME] > 5
    expected = {kind for kind, one in cases.KINDS.items() if any(made.glob(one.samples))}
    assert {row.kind for row in rows} == expected


def test_a_case_is_the_same_again(made, tmp_path):
    for kind in ("quantized file, lying header", "calibration, hostile, checksums right"):
        found = []
        for again in ("a", "b"):
            (tmp_path / again).mkdir(exist_ok=True)
            path, words = cases.damaged(kind, 3, SEED, made, tmp_path / again)
            found.append((path.read_bytes(), words))
            path.unlink()
        assert found[0] == found[1]


# a worker that does what a test says, in place of opening files
SCRIPTED = """
import json, os, sys, time
print(json.dumps({"ready": 1}), flush=True)
for line in sys.stdin:
    if line.startswith("prepare"):
        print(json.dumps({"words": "w", "bytes": 1000}), flush=True)
        continue
    what = sys.argv[1]
    if what == "die": os.abort()
    if what == "hang": time.sleep(60)
    if what == "swell": held = bytearray(b"x" * (1 << 28)); time.sleep(0.2)
    print(json.dumps({"outcome": "fine"}), flush=True)
"""


def test_hostile_pickles_would_leave_a_trace(made, tmp_path):
    """Opened without care, those that act at once make the canary."""
    data = (made / "saved-int8.pt").read_bytes()
    acted = set()
    for seed in range(120):
        canary = tmp_path / f"{seed}"
        pickled, words = torch_files.hostile(random.Random(seed), data, canary)
        name, form = words.split(", ")
        if name in ("open", "exec", "Path.touch", "torch.save") and form in ("zip", "key"):
            with contextlib.suppress(Exception):
                torch.load(io.BytesIO(pickled), weights_only=False)
            assert canary.exists(), words
            acted.add(name)
    assert len(acted) == 4


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("die", "w: the process ended with status -6"),
        ("hang", "w: took more than 1 s"),
        ("swell", "MB for a file of 0.00 MB"),
        ("", None),
    ],
)
def test_what_it_would_notice(monkeypatch, tmp_path, what, found):
    if what == "swell" and not os.path.exists("/proc/self/statm"):
        pytest.skip("the system does not tell how much memory a process holds")
    if what == "hang":
        monkeypatch.setattr(damage, "SECONDS", 1.0)
    monkeypatch.setattr(damage, "CODE", SCRIPTED)
    real = damage.subprocess.Popen
    monkeypatch.setattr(
        damage.subprocess, "Popen", lambda command, **more: real([*command[:3], what], **more)
    )
    with damage._Process(tmp_path, tmp_path) as process:
        outcome, finding = process.case("any", 0, 0)
    if found is None:
        assert (outcome, finding) == ("fine", None)
    else:
        assert found in finding


def test_an_error_that_does_not_name_the_file_is_a_finding(tmp_path):
    from comfyui_modelopt.devtools.torture.mutations.worker import Worker

    worker = Worker(tmp_path, tmp_path)
    worker.path = tmp_path / "x.safetensors"
    judged = {
        "it is broken": "does not name the file",
        f"{worker.path} is broken": "says no remedy",
        f"{worker.path} is broken: {'x' * 3000}": "an error of 30",
        f"{worker.path} is broken: get it again": None,
        str(FileNotFoundError(2, "No such file", str(worker.path))): "says no remedy",
        f"No such file or directory: {worker.path}": "says no remedy",
        f"cannot open '{worker.path}': ": "says no remedy",
    }
    for text, finding in judged.items():
        found = worker.judged(text, ValueError(text))
        assert finding in found["finding"] if finding else found == {"outcome": cases.ERROR}
