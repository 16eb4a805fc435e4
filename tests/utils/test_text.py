"""JSON of strangers and values in errors stay within bounds."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_modelopt.utils import finite
from comfyui_modelopt.utils.finite import all_finite
from comfyui_modelopt.utils.memory import peak_of
from comfyui_modelopt.utils.text import DEEPEST, brief, brief_repr, read_json


@pytest.mark.parametrize("deep", [DEEPEST + 1, 500, 100_000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused(deep, opened, closed):
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        read_json(opened * deep + "1" + closed * deep)


@pytest.mark.parametrize("text", ["", "{", "nul", "[1," + "9" * 21 + "]", "1" * 5000, b"\xff"])
def test_what_else_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)


def test_what_is_read():
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert json.dumps(read_json(deep)) == deep
    assert read_json('{"a": [1, -9223372036854775808, 1.5e308, null]}')["a"][1] == -(2**63)


def test_values_in_errors_are_short():
    assert brief("a.b") == "a.b" and brief_repr("a") == "'a'" and brief((1, 2)) == "(1, 2)"
    assert brief("a\n\x1b[31m") == r"'a\n\x1b[31m'"  # no line of its own, no colours
    long = brief_repr("x" * 10**6)
    assert len(long) == 201 and long.startswith("'x") and long.endswith("x'")


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
