"""The tile model of kernels/tiles.py is what benchmarks/tiles.py fits to its times, and picks well."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui_modelopt.benchmarks import captured, tiles
from comfyui_modelopt.benchmarks.speed import shapes
from comfyui_modelopt.kernels import tiles as model

RESULT = json.loads((tiles.RESULTS / "tiles_nvidia-h200.json").read_text(encoding="utf-8"))
CHIP = model.Chip((9, 0), 132, 227 * 1024)


@pytest.mark.parametrize("table", model.HOPPER)
def test_rates_are_the_fitted_ones(table):
    fitted = tiles.fit(RESULT["rows"], RESULT["sms"])[table]
    for tile, numbers in model.HOPPER[table].items():
        assert numbers == pytest.approx(fitted[tile], abs=0.006), tile


@pytest.mark.parametrize("table", model.HOPPER)
def test_picks_cost_little_over_the_best(table):
    """Summed over the layers of both UNets; the model that stands for other GPUs loses more."""
    picked = best = 0.0
    for row in RESULT["rows"]:
        if tiles.table_of(row) == table:
            name = tiles.picks(row, model.HOPPER[table], RESULT["sms"])
            picked += row["layers"] * row["us"][name]
            best += row["layers"] * min(row["us"].values())
    assert best <= picked < 1.07 * best


def test_what_is_chosen_is_what_was_picked():
    for row in RESULT["rows"]:
        table = tiles.table_of(row)
        if table not in ("matmul", "conv2d"):
            continue
        found = model.choose(row["m"], row["n"], row["inner"], CHIP, row["taps"], row["weights"])
        name = tiles.NAME.format(**vars(found))
        wanted = tiles.picks(row, model.HOPPER[table], RESULT["sms"])
        # 128 wide where 128 does not divide is timed, never chosen over 64
        assert name == wanted or row["inner"] % 128, (row["key"], name, wanted)


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


def test_the_pages_are_of_the_results():
    captured_json = captured.RESULTS / "captured_nvidia-h200.json"
    found = json.loads(captured_json.read_text(encoding="utf-8"))
    assert captured_json.with_suffix(".md").read_text(encoding="utf-8") == captured.markdown(found)
    page = (tiles.RESULTS / "tiles_nvidia-h200.md").read_text(encoding="utf-8")
    assert page == tiles.markdown(RESULT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be timed")
@pytest.mark.parametrize("script", [tiles, captured])
def test_without_a_gpu_it_says_so(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script.__name__])
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    assert script.main() == 1
    assert "NVIDIA GPU" in capsys.readouterr().err
