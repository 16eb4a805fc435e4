"""What benchmarks/modelopt_cuda.py counts and writes; its comparison itself needs a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_modelopt.benchmarks import modelopt_cuda as script
from comfyui_modelopt.benchmarks import modelopt_weights as weights
from comfyui_modelopt.formats import FORMATS

H200 = script.RESULTS / "modelopt_cuda_nvidia-h200.json"
RESULT = json.loads(H200.read_text(encoding="utf-8"))
KEY = {"format": "nvfp4", "reference": script.FAKE, "given": "float32", "places": 1}


def up(value: float, places: int) -> float:
    """A positive float32 so many last places up."""
    return (torch.tensor([float(value)]).view(torch.int32) + places).view(torch.float32).item()


def test_what_differs_is_counted():
    ours = torch.tensor([[1.0, 1.0, 1.0, 2.0, -0.0, torch.nan, 0.0, 8.0]])
    theirs = torch.tensor([[1.0, up(1, 1), up(1, 2), 3.0, 0.0, torch.nan, torch.nan, 0.0]])
    gone = torch.tensor([[False] * 7 + [True]])
    found = script.count(ours, theirs, torch.full((1, 8), 4.0), 1, gone)
    assert found == {
        "values": 8, "differing": 4, "beyond": 3, "lost": 1, "nan": 1, "largest": 0.25
    }  # fmt: skip


@pytest.mark.parametrize("dtype", weights.DTYPES)
def test_neighbours_are_one_apart(dtype):
    values = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0], dtype=dtype)
    above = torch.nextafter(values, torch.tensor(torch.inf, dtype=dtype))
    assert (script.ordered(above) - script.ordered(values)).tolist() == [1] * 5


def test_a_weight_is_added_to_its_row_and_kind():
    rows = []
    found = {"values": 8, "differing": 4, "beyond": 3, "lost": 1, "nan": 0, "largest": 0.25}
    script.add(rows, KEY, "normal", found)
    script.add(rows, KEY, "ties", {**found, "largest": 0.125})
    script.add(rows, {**KEY, "given": "16 bits"}, "ties", found)
    first, second = rows
    assert (first["weights"], first["values"], first["beyond"], first["largest"]) == (
        2,
        16,
        6,
        0.25,
    )
    assert first["kinds"]["ties"] == {k: found[k] for k in script.SUMS}
    assert second["weights"] == 1 and list(second["kinds"]) == ["ties"]


def test_scales_that_are_lost():
    flat = torch.full((1, 48), 100.0)
    flat[:, 16:32] = 5e-5  # of a scale below 1e-5, and below half of E4M3's smallest number
    flat[:, 32:] = 0.5
    in_the_kernel = script.lost("nvfp4", script.FAKE, flat)
    assert in_the_kernel[0].tolist() == [False] * 16 + [True] * 16 + [False] * 16
    flat /= 1e4  # now the third block's scale is 8e-6
    assert script.lost("nvfp4", script.FAKE, flat)[0, 32:].all()
    assert not script.lost("nvfp4", script.STATIC, flat)[0, 32:].any()
    assert not script.lost("nvfp4", "NVFP4QTensor", flat).any()


@pytest.mark.parametrize("name", script.REFERENCES)
@pytest.mark.parametrize("kind", weights.KINDS)
@pytest.mark.parametrize("shape", [(17, 64), (6, 32, 3, 3)])
def test_every_kind_of_weight_can_be_stored(name, kind, shape):
    for dtype in weights.DTYPES:
        weight = weights.weight_of(name, kind, shape, dtype)
        if weight is None:
            assert (kind, dtype) == ("subnormal", torch.float16)
            continue
        assert weight.shape == shape and weight.dtype == dtype and weight.isfinite().all()
        form = FORMATS[name]
        again = form.dequantize(form.quantize(weight, form.weight_amax(weight)), shape)
        assert again.shape == shape and again.isfinite().all()


@pytest.mark.parametrize("name", script.REFERENCES)
def test_ties_are_ties(name):
    """Rounded from just below and just above, values come out different: of most of them."""
    weight = weights.weight_of(name, "ties", (17, 128), torch.float32)
    form = FORMATS[name]
    amax = form.weight_amax(weight)
    found = [
        form.dequantize(form.quantize(weight * (1 + off), amax), (17, 128))
        for off in (-(2.0**-12), 2.0**-12)
    ]
    apart = (found[0] - found[1]).abs() > weight.abs() * 2.0**-10
    assert apart.float().mean() > 0.5


def test_quantized_tensors_equal_what_is_stored():
    """What the script compares, as far as it goes without a GPU."""
    rows = []
    for name in ("nvfp4", "mxfp8"):
        make = dict(list(script.REFERENCES[name].items())[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(script.REFERENCES, name, make)
            for kind in weights.KINDS:
                weight = weights.weight_of(name, kind, (6, 32, 3, 3), torch.bfloat16)
                script.compare(rows, name, kind, weight)
    assert [row["reference"] for row in rows[::2]] == ["NVFP4QTensor", "MXFP8QTensor"]
    for row in rows:
        assert row["differing"] == row["beyond"] == 0 and row["weights"] == len(weights.KINDS)
        assert row["nan"] == (6 * 32 * 9 if row["format"] == "nvfp4" else 0)


def test_the_page_is_of_the_results():
    page = H200.with_suffix(".md").read_text(encoding="utf-8")
    assert page == script.markdown(RESULT)
    assert [row["format"] for row in RESULT["rows"] if row["reference"] == script.FAKE][
        ::2
    ] == list(script.REFERENCES)
    for row in RESULT["rows"]:
        for name in script.SUMS:
            assert row[name] == sum(kind[name] for kind in row["kinds"].values())


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [script.__name__])
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    assert script.main() == 1
    assert "NVIDIA GPU" in capsys.readouterr().err
