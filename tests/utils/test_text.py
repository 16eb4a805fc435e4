"""JSON of strangers and values in errors stay within bounds."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_modelopt.utils import finite
from comfyui_modelopt.utils import text as limits
from comfyui_modelopt.utils.finite import all_finite
from comfyui_modelopt.utils.memory import peak_of
from comfyui_modelopt.utils.text import DEEPEST, brief, brief_repr, listed, read_json


@pytest.mark.parametrize("deep", [DEEPEST + 1, 500, 100_000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused(deep, opened, closed):
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        read_json(opened * deep + "1" + closed * deep)


@pytest.mark.parametrize("text", ["", "{", "nul", "[1," + "9" * 21 + "]", "1" * 5000, b"\xff"])
def test_what_else_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)


@pytest.mark.parametrize("form", [str, str.encode])
def test_json_of_many_parts_is_refused(form):
    """Each takes many times its text in memory."""
    tables = '[{"a":1}' + ',{"a":1}' * limits.MOST_LISTS + "]"
    with pytest.raises(ValueError, match="more than 200000 lists and tables"):
        read_json(form(tables))
    assert len(read_json(form(tables), lists=limits.MOST_LISTS + 2)) == limits.MOST_LISTS + 1
    with pytest.raises(ValueError, match="more than 1000000 names and values"):
        read_json(form('["ab"' + ',"ab"' * (limits.MOST_VALUES + 1) + "]"))


def test_what_is_read():
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(read_json(deep)) == deep
    assert read_json('{"a": [1, -9223372036854775808, 1.5e308, null]}')["a"][1] == -(2**63)


def test_values_in_errors_are_short():
    assert brief("a.b") == "a.b" and brief_repr("a") == "'a'" and brief((1, 2)) == "(1, 2)"
    assert brief("a\n\x1b[31m") == r"'a\n\x1b[31m'"  # no line of its own, no colours
    long = brief_repr("x" * 10**6)
    assert len(long) == 201 and long.startswith("'x") and long.endswith("x'")


def test_lists_in_reports_are_short():
    assert listed([1, "a"]) == ["1", "a"]
    found = listed(["\x1b[2J" * 10**5] * 10**4)
    assert len(found) == 21 and found[-1] == "and 9980 more"
    assert all(len(one) < 210 and one.isprintable() for one in found)


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.float8_e8m0fnu])
def test_values_that_cannot_be_judged_are_refused(dtype):
    with pytest.raises(ValueError, match=f"values of {dtype}, which cannot be told"):
        all_finite(torch.zeros(4, dtype=torch.uint8).view(dtype))


@pytest.mark.parametrize("dtype", sorted(finite.JUDGED, key=str))
def test_values_that_can_be_judged(dtype):
    assert all_finite(torch.ones(4).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_one_infinity_anywhere(dtype, monkeypatch):
    monkeypatch.setattr("comfyui_modelopt.utils.finite.PIECE", 7)
    for place in (0, 8, 99):
        made = torch.zeros(100)
        assert all_finite(made.to(dtype))
        made[place] = torch.inf
        assert not all_finite(made.to(dtype).reshape(10, 10).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memory_of_looking_for_infinities(dtype, monkeypatch):
    monkeypatch.setattr("comfyui_modelopt.utils.finite.PIECE", 4096)
    for size in (1000, 10_000):
        made = torch.ones(size, dtype=dtype)
        assert peak_of(lambda made=made: all_finite(made), made.device)[1] == finite.working(made)
