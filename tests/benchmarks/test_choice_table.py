"""A run's result -> the choice table -> what loading makes of it."""

from __future__ import annotations

import copy
import json

import pytest
from comfyui_modelopt.benchmarks.speed import choice_table, machine, shapes
from comfyui_modelopt.benchmarks.speed.candidates import CANDIDATES
from comfyui_modelopt.benchmarks.speed.shapes import Conv, Linear
from comfyui_modelopt.formats.checkpoint import PER_TOKEN, STATIC
from comfyui_modelopt.kernels import choices
from comfyui_modelopt.kernels.choices import DEQUANTIZED, HANDED, LIBRARY, OURS, SIXTEEN

GPU = "NVIDIA Test 9000"
LINEAR, CONV = Linear(154, 1280, 2048), Conv(2, 320, 128, 128, 640, 3, 2, 1)


def layer(shape, **ms: float) -> dict:
    """Every candidate of a shape, with milliseconds of its own (or those given by its name)."""
    rows = []
    for number, candidate in enumerate(CANDIDATES, start=1):
        if candidate.kind == shape.kind:
            facts = {"candidate": candidate.name, "format": candidate.format}
            facts |= {"activations": candidate.activations, "takes": candidate.takes}
            facts |= {"gives": candidate.gives, "way": candidate.way, "rms_error": 1e-4}
            rows.append(facts | {"median_ms": ms.get(candidate.name, float(number))})
    return {
        "key": shape.key,
        "shape": shapes.as_dict(shape),
        "layers": 1,
        "quantized": 1,
        "rows": rows,
    }


@pytest.fixture
def result() -> dict:
    facts = machine.describe() | {"gpu": GPU, "capability": [9, 0]}
    sdxl, sd15 = {"layers": [layer(LINEAR), layer(CONV)]}, {"layers": [layer(LINEAR)]}
    made = {"machine": facts, "quick": False, "families": {"sdxl": sdxl, "sd15": sd15}}
    return json.loads(json.dumps(made))


def ms_of(result: dict, shape, **wanted) -> float:
    rows = (x for f in result["families"].values() for x in f["layers"] if x["key"] == shape.key)
    found = [r for r in next(rows)["rows"] if all(r[k] == v for k, v in wanted.items())]
    return min(row["median_ms"] for row in found)


def test_every_way_comes_back(result):
    text = choice_table.text(choice_table.of(result))
    rows = choices.parse(text, GPU)
    linear = {
        (form, "linear", how, (1280, 2048))
        for form in ("int8", "fp8")
        for how in (PER_TOKEN, STATIC)
    }
    convs = {(form, "conv2d", STATIC, (640, 320, 3, 3)) for form in ("int8", "fp8")}
    assert set(rows) == linear | convs
    for key, measured in rows.items():
        form, kind, how, _ = key
        shape = LINEAR if kind == "linear" else CONV
        ((m, ms),) = measured  # a shape of both families once
        assert m == (154 if kind == "linear" else 2 * 64 * 64)
        eight = {"format": form, "activations": how}
        wanted = {way: ms_of(result, shape, way=way, **eight) for way in (OURS, HANDED)}
        wanted[DEQUANTIZED] = ms_of(result, shape, way=DEQUANTIZED, format=form)
        wanted[SIXTEEN] = ms_of(result, shape, way=SIXTEEN)
        if kind == "linear" and (form, how) != ("int8", STATIC):
            wanted[LIBRARY] = ms_of(result, shape, way=LIBRARY, **eight)
        assert ms == wanted
    made = json.loads(text)["made"]
    assert made["date"] and made["torch"] == result["machine"]["torch"]
    assert sum(line.startswith('  {"format"') for line in text.splitlines()) == len(rows)


def test_what_is_wrong_or_not_measured_is_no_way(result):
    for family in result["families"].values():
        for entry in family["layers"]:
            for row in entry["rows"]:
                if row["way"] == OURS:
                    row["rms_error"] = 0.5
                if row["way"] in (HANDED, LIBRARY):
                    del row["median_ms"]
                    row["why_not"] = "no"
    assert choice_table.of(result) is None


def test_runs_that_give_no_table(result):
    for more in ({"quick": True}, {"interrupted": True}, {"families": {}}):
        assert choice_table.of(result | more) is None
    on_cpu = copy.deepcopy(result)
    on_cpu["machine"]["gpu"] = None
    assert choice_table.of(on_cpu) is None


def test_written_where_loading_finds_it(result, tmp_path, monkeypatch):
    found, out = tmp_path / "choices", tmp_path / "out"
    found.mkdir(), out.mkdir()
    monkeypatch.setattr(choices, "FOLDER", found)
    said = choice_table.write(result, out, install=False)
    assert "copy it to" in said and str(found / "nvidia-test-9000.local.json") in said
    assert choices.table(GPU, found) is None
    choices.table.cache_clear()
    said = choice_table.write(result, out, install=True)
    assert "Loading goes by it from the next start" in said
    assert (1280, 2048) in {key[3] for key in choices.table(GPU, found)}
    assert [path.name for path in out.iterdir()] == ["choices_nvidia-test-9000.local.json"]
    assert choice_table.write(result | {"quick": True}, out, install=True) is None
    monkeypatch.setattr(choices, "FOLDER", tmp_path / "none")
    (out / "choices_nvidia-test-9000.local.json").unlink()
    said = choice_table.write(result, out, install=True)
    assert "copy it to" in said and "No such file" in said
    assert [path.name for path in out.iterdir()] == ["choices_nvidia-test-9000.local.json"]
