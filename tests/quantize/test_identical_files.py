"""Files made from the same inputs on the same machine are the same byte for byte: in one process, in
another one, and after loading and saving again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import comfy.sd
import pytest
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize import calibration as calibration_file
from comfyui_modelopt.quantize import engine, mixed
from comfyui_modelopt.quantize.calibration import Calibration
from comfyui_modelopt.quantize.recipe import Recipe

pytestmark = pytest.mark.slow
# the searches are slow: of layers in the middle alone
MIDDLE = ("input_blocks.*", "output_blocks.*", "out.2", "time_embed.*", "*.emb_layers.*")
RECIPES = {
    "int8": Recipe("int8", "smoothquant", 0.5, convolutions="percentile"),
    "fp8": Recipe("fp8", "mse"),
    "int4": Recipe("int4", "awq_lite", layers="linear only", skip=MIDDLE),
    "svd": Recipe("int4", "svdquant", rank=4, layers="linear only", skip=MIDDLE),
    "stock": Recipe("fp8", "max", layers="linear only"),
    "mix": mixed.Mixed(
        (Recipe("int4", "awq_lite"), Recipe("int8", "smoothquant"), Recipe("fp8", "mse")),
        {
            "input_blocks.1.1.transformer_blocks.0.ff.net.2": 0,
            "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0": 0,
            "middle_block.0.in_layers.2": 0,
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q": 1,
            "middle_block.0.out_layers.3": 2,
        },
    ),
}
ELSEWHERE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
import conftest
import torch
torch.set_num_threads(int(sys.argv[4]))
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
import test_identical_files as here
here.make_all(*map(Path, sys.argv[1:4]))
"""


def make(model, recipe: Recipe, recorded, path: Path) -> Path:
    """Quantized, measured and saved, as the nodes do it."""
    made = engine.quantize_model(model, recipe, recorded)
    quantized = loader.load(made.checkpoint)
    engine.measure(made, quantized)
    loader.loaded(quantized).header.update(made.checkpoint.header)
    files.write(loader.to_checkpoint(quantized), path)
    return path


def make_all(checkpoint: Path, recorded: Path, folder: Path) -> None:
    model = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[0]
    calls = calibration_file.load(recorded)
    for name, recipe in RECIPES.items():
        make(model, recipe, calls, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def short(calibration) -> Calibration:
    """Two of the recorded calls."""
    run = calibration.runs[0].thinned(2)
    return Calibration((run,), calibration.signature, calibration.source)


@pytest.fixture(scope="module")
def made(checkpoints, short, folders) -> Path:
    """A folder with a file of each recipe."""
    folder = folders.mktemp("first")
    calibration_file.save(short, folder / "calibration.modelopt")
    make_all(checkpoints / "sd15.safetensors", folder / "calibration.modelopt", folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_made_again(made, sd15, short, tmp_path, name):
    """Of a MODEL loaded before, and with the calibration that was recorded and not read."""
    again = make(sd15[0], RECIPES[name], short, tmp_path / "again.safetensors")
    assert again.read_bytes() == (made / f"{name}.safetensors").read_bytes()


@pytest.fixture(scope="module")
def elsewhere(made, checkpoints, folders) -> Path:
    import torch

    folder = folders.mktemp("elsewhere")
    arguments = [checkpoints / "sd15.safetensors", made / "calibration.modelopt", folder]
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, arguments), str(torch.get_num_threads())],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        check=True,
        timeout=600,
    )
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_made_in_another_process(made, elsewhere, name):
    first, second = (folder / f"{name}.safetensors" for folder in (made, elsewhere))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_loaded_and_saved_again(made, tmp_path, name):
    path = made / f"{name}.safetensors"
    copy = tmp_path / "copy.safetensors"
    files.write(loader.to_checkpoint(loader.load_file(str(path))), copy)
    assert copy.read_bytes() == path.read_bytes()
