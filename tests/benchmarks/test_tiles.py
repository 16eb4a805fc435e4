"""The tile model of kernels/tiles.py is what benchmarks/tiles.py fits to its times, and picks well."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_modelopt.benchmarks import captured, tiles, tma
from comfyui_modelopt.benchmarks.speed import arms, shapes
from comfyui_modelopt.kernels import tiles as model
from comfyui_modelopt.loaders import compiling

RESULT = json.loads((tiles.RESULTS / "tiles_nvidia-h200.json").read_text(encoding="utf-8"))
CHIP = tiles.chip_of(RESULT)


@pytest.mark.parametrize("table", model.HOPPER)
def test_rates_are_the_fitted_ones(table):
    fitted = tiles.fit(RESULT["rows"], RESULT["sms"])[table]
    for tile, numbers in model.HOPPER[table].items():
        assert numbers == pytest.approx(fitted[tile], abs=0.006), tile


@pytest.mark.parametrize("table", model.HOPPER)
def test_what_is_chosen_costs_little_over_the_best(table):
    """Summed over the layers of both UNets; the rule that stands for other GPUs costs more."""
    chosen = best = ruled = 0.0
    for row in RESULT["rows"]:
        integer = row["format"] == "int8"
        if model.kernel_name(integer, row["taps"], row["weights"]) != table:
            continue
        rule = model._modelled(
            row["m"], row["n"], row["inner"], CHIP, row["taps"], row["weights"],
            model.SPLITS if row["weights"] == 1 else (1,),
        )  # fmt: skip
        chosen += row["layers"] * row["us"][tiles.picked(row, CHIP)]
        ruled += row["layers"] * row["us"][tiles.NAME.format(**vars(rule))]
        best += row["layers"] * min(row["us"].values())
    assert chosen < 1.07 * best
    assert chosen < ruled


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_every_tile_that_is_timed_fits(family):
    pixels = {"sdxl": 1024, "sd15": 512}[family]
    for shape in shapes.count(family, "full", pixels, pixels, 2):
        for kernel in tiles.kernels_of(shape):
            weights = tiles.size(shape, kernel)[-1]
            found = tiles.tiles_for(shape, kernel, CHIP)
            assert len(set(found)) == len(found) >= 5
            for one in found:
                assert one.stages * one.bk * (one.bm + weights * one.bn) <= CHIP.shared


def test_every_way_of_the_page_has_an_arm(monkeypatch):
    """Down to the name: building one needs a full model."""
    asked = []
    monkeypatch.setattr(arms, "ARMS", [Named(arm.name, asked) for arm in arms.ARMS])
    monkeypatch.setattr(compiling, "compile_blocks", lambda model: None)
    for form, way in captured.ROWS:
        captured.build(form, way, None, None)
    assert len(asked) == len(captured.ROWS) == 11
    assert [asked[2], asked[6], asked[10]] == [
        "compiled-graphs", "int8-all-graphs", "fp8-all-graphs",
    ]  # fmt: skip
    assert [asked[4], asked[8]] == ["int8-all-replayed", "fp8-all-replayed"]


class Named:
    """An arm that only says that it was built."""

    def __init__(self, name: str, asked: list):
        self.name, self.asked = name, asked
        self.model = None

    def build(self, setting, folder):
        self.asked.append(self.name)
        return self


def test_the_pages_are_of_the_results():
    captured_json = captured.RESULTS / "captured_nvidia-h200.json"
    found = json.loads(captured_json.read_text(encoding="utf-8"))
    assert captured_json.with_suffix(".md").read_text(encoding="utf-8") == captured.markdown(found)
    result = json.loads((tma.RESULTS / "tma_nvidia-h200.json").read_text(encoding="utf-8"))
    page = (tma.RESULTS / "tma_nvidia-h200.md").read_text(encoding="utf-8")
    assert page == tma.markdown(result)
    page = (tiles.RESULTS / "tiles_nvidia-h200.md").read_text(encoding="utf-8")
    assert page == tiles.markdown(RESULT)


@pytest.mark.parametrize("script", [tiles, tma, captured])
def test_without_a_gpu_it_says_so(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [script.__name__])
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    assert script.main() == 1
    assert "NVIDIA GPU" in capsys.readouterr().err
