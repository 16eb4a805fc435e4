"""The choice table: reading it, damaged ones, and each answer."""

from __future__ import annotations

import json
import logging

import pytest
from comfyui_modelopt.kernels import choices
from comfyui_modelopt.kernels.choices import DEQUANTIZED, HANDED, LIBRARY, OURS, SIXTEEN

GPU = "NVIDIA Test 9000"
WEIGHT = (1280, 2048)


def row(m: int = 154, weight=WEIGHT, **ms: float) -> dict:
    names = {"ours": OURS, "handed": HANDED, "library": LIBRARY, "dense": DEQUANTIZED}
    facts = {"format": "int8", "kind": "linear", "activations": "per token"}
    times = {names[name]: value for name, value in ms.items()} | {SIXTEEN: 0.001}
    return facts | {"weight": list(weight), "m": m, "ms": times}


def made(*rows: dict, **more) -> str:
    return json.dumps({"version": choices.VERSION, "gpu": GPU, "made": {}, "rows": rows} | more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    return tmp_path


def ask(*ways: str, weight=WEIGHT, kind="linear") -> choices.Answer | None:
    return choices.ask(GPU, "int8", kind, "per token", weight, ways)


def test_without_a_table_nothing_changes_and_it_is_said_once(folder, caplog):
    with caplog.at_level(logging.INFO):
        assert ask(OURS, LIBRARY) is None and ask(OURS) is None
    (said,) = caplog.messages
    assert f"{GPU} was not measured" in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "must have version 1, found list"),
        (made(version=99), "must have version 1, found 99"),
        (made(gpu="Another"), f"must be of this GPU, {GPU}, found Another"),
        (made(rows=3), "must have a list `rows`"),
        (made("row"), "must name format, kind, activations, found row"),
        (made(row() | {"format": 8}), "must name format"),
        (made(row() | {"weight": [1280, "x"]}), "must be a list of integers"),
        (made(row() | {"m": 1.5}), "must be a list of integers"),
        (made(row() | {"ms": {"warp": 1.0}}), "`ms` must be of ours"),
        (made(row(ours=0)), "must be above 0"),
        (made(row(ours="0.1")), "must be above 0"),
        (made(row() | {"ms": {"ours": float("nan")}}), "must be above 0"),
    ],
)
def test_a_damaged_table_is_none_and_is_said_once(folder, caplog, text, reason):
    (folder / "nvidia-test-9000.json").write_text(text)
    assert ask(OURS) is None and ask(OURS, LIBRARY) is None
    (said,) = caplog.messages
    assert "nvidia-test-9000.json is not used" in said and reason in said


def test_what_was_measured_here_goes_before_what_was_shipped(folder):
    (folder / "nvidia-test-9000.json").write_text(made(row(ours=2, dense=1)))
    assert ask(OURS).way == DEQUANTIZED
    assert choices.table(GPU, folder) is choices.table(GPU, folder)  # read once
    (folder / "nvidia-test-9000.local.json").write_text(made(row(ours=1, dense=2)))
    choices.table.cache_clear()
    assert ask(OURS) is None


CASES = {
    "ours is fastest": ([row(ours=1, library=2, dense=3)], (OURS, LIBRARY), None),
    "16 bits": ([row(ours=3, library=2, dense=1)], (OURS, LIBRARY), DEQUANTIZED),
    "the library": ([row(ours=3, library=2, dense=2.5)], (OURS, LIBRARY), LIBRARY),
    "a tie": ([row(ours=2, library=2, dense=2)], (OURS, LIBRARY), None),
    "the library where it is usual": ([row(library=1, dense=2)], (LIBRARY,), None),
    "16 bits instead of the library": ([row(library=2, dense=1)], (LIBRARY,), DEQUANTIZED),
    # a library's kernel that cannot run here does not hold 16 bits up
    "no library here": ([row(ours=3, library=1, dense=2)], (OURS,), DEQUANTIZED),
    # quantizing is what makes ours slow, and a fused block does not do it
    "fused": ([row(ours=3, handed=1, library=2, dense=2.5)], (HANDED, LIBRARY), None),
    "not fused": ([row(ours=3, handed=1, library=2, dense=2.5)], (OURS, LIBRARY), LIBRARY),
    "not at every M": ([row(ours=3, dense=2), row(2048, ours=3, dense=4)], (OURS,), None),
    "at every M": ([row(ours=3, dense=2), row(2048, ours=5, dense=4)], (OURS,), DEQUANTIZED),
    "one M twice": ([row(ours=3, dense=2), row(ours=3, dense=4)], (OURS,), None),
    # 16 bits without dequantizing is no way to run a weight of 8 bits
    "16 bits alone": ([row(ours=3)], (OURS,), None),
    "ours failed": ([row(library=2, dense=1)], (OURS, LIBRARY), None),
    "not measured at one M": ([row(ours=3, dense=2), row(2048, ours=3)], (OURS,), None),
    "another weight": ([row(weight=(8, 8), ours=3, dense=2)], (OURS,), None),
}


@pytest.mark.parametrize("case", CASES)
def test_answers(folder, case):
    rows, ways, way = CASES[case]
    (folder / "nvidia-test-9000.json").write_text(made(*rows))
    found = ask(*ways)
    assert (None if found is None else found.way) == way
    assert ask(*ways, kind="conv2d") is None


def test_the_reason_has_the_times_that_decided(folder):
    rows = row(2048, ours=0.5, library=0.45, dense=0.4), row(ours=0.153, library=0.2, dense=0.1204)
    (folder / "nvidia-test-9000.json").write_text(made(*rows))
    assert ask(OURS, LIBRARY).why == (
        "16 bits, dequantizing included, was faster on NVIDIA Test 9000 for 1280 x 2048 weights: "
        "0.12 against 0.153 ms at M = 154, 0.4 against 0.45 ms at M = 2048"
    )


def test_what_is_shipped_can_be_read():
    for path in choices.FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        gpu = json.loads(text)["gpu"]
        assert choices.parse(text, gpu) and path.name.split(".")[0] == choices.slug(gpu)
