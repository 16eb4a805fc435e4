"""`convert.py` in processes of its own: killed, interrupted, side by side, with files that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from comfyui_modelopt.conversion import claims
from comfyui_modelopt.devtools.torture import conversions

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there are no kills here")
ROOT = Path(__file__).resolve().parent.parent
COUNT = 3


def test_its_help_needs_no_comfyui(tmp_path):
    """From any folder, in any Python that has torch."""
    away = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "convert.py", "--help"],
        cwd=tmp_path,
        env=away | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr
    for flag in ("--format", "--calibration FILE | --prompts FILE", "--lora", "exit status"):
        assert flag in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Models, their recording, and the options of all runs."""
    files, recording = conversions.make(tmp_path_factory.mktemp("models"), COUNT)
    return files, [*conversions.RECIPE, "--calibration", recording, "--json"]


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """One process, with two files among the good ones that cannot be converted."""
    files, options = given
    folder = tmp_path_factory.mktemp("undisturbed")
    cut, text = folder / "cut.safetensors", folder / "text.safetensors"
    cut.write_bytes(files[0].read_bytes()[:-1000])
    text.write_text("no model")
    given = [files[0], cut, text, *files[1:]]
    process = conversions.start(given, folder / "out", *options, "--summary", folder / "kept.json")
    said, complaints = process.communicate(timeout=conversions.LONGEST)
    return process.returncode, json.loads(said), complaints, folder


@pytest.mark.slow
def test_one_bad_file_does_not_stop_the_rest(undisturbed):
    status, summary, complaints, folder = undisturbed
    assert status == 1 and summary["exit_status"] == 1, complaints
    assert summary == json.loads((folder / "kept.json").read_text())
    assert summary["counts"] == {"converted": COUNT, "failed": 2}
    rows = {Path(row["file"]).name: row for row in summary["files"]}
    for name in ("cut.safetensors", "text.safetensors"):
        row = rows.pop(name)
        assert row["status"] == "failed" and str(folder / name) in row["error"]
        assert "must be a whole file of weights" in row["error"] and "get it again" in row["error"]
        assert f"{name}: failed: {row['error']}" in complaints
    for row in rows.values():
        made = Path(row["output"])
        assert made.stat().st_size == row["bytes_after"] < row["bytes_before"]
        assert row["sqnr_db"] > 20 and row["seconds"] > 0 and row["error"] is None
    assert {path.name for path in (folder / "out").iterdir()} == {
        Path(row["output"]).name for row in rows.values()
    }
    assert "Traceback" not in complaints


@pytest.mark.slow
def test_killed_interrupted_and_side_by_side(given, undisturbed, tmp_path):
    """Two at once; one is killed, one is told to end, a third finishes: the same files, byte for byte.

    The full form, ten files and three kills: `python dev.py torture --only conversions`.
    """
    files, options = given
    out, kept = tmp_path / "out", [tmp_path / f"progress{number}.json" for number in range(2)]
    killed, ended = (
        conversions.start(files, out, *options, "--wait", "--progress", path) for path in kept
    )
    assert conversions.when_busy([(killed, kept[0])], "Quantizing")
    killed.kill()
    killed.communicate()
    # each was at a file of its own
    now = json.loads(kept[0].read_text())["current"]
    assert now and killed.returncode == -signal.SIGKILL
    assert claims.litter(out / f"{Path(now['file']).stem}_int8-max.safetensors")
    assert conversions.when_busy([(ended, kept[1])], "Packing")
    ended.terminate()
    said, complaints = ended.communicate(timeout=conversions.LONGEST)
    assert ended.returncode == 143, complaints
    assert json.loads(said)["exit_status"] == 143
    assert "Traceback" not in complaints
    left = conversions.statuses(said)
    assert left["not tried"] > 0 and left["failed"] == 0

    third = conversions.start(files, out, *options)
    said, complaints = third.communicate(timeout=conversions.LONGEST)
    assert third.returncode == 0, complaints
    made = Counter(left) + conversions.statuses(said)
    assert made["converted"] == COUNT, "each file once"
    compared = conversions.differences(files, out, undisturbed[3] / "out")
    assert not compared.findings and compared.tried == COUNT
