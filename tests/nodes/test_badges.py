"""What the page is told of a format or a file before anything runs, on every kind of GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import badge as of_files
from comfyui_modelopt.loaders.device import describe
from comfyui_modelopt.nodes import routes
from comfyui_modelopt.nodes.load_unet import LoadUNet
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils import badge
from comfyui_modelopt.utils.capability import GPU
from safetensors.torch import save_file

BOTH = ("linear", "conv2d")
ADA = GPU("cuda", "RTX 4090", (8, 9), (13, 0), frozenset({"cuda"}), (2, 11))
TURING = GPU("cuda", "RTX 2080", (7, 5), (13, 0), frozenset({"cuda"}), (2, 11))
APPLE = GPU("mps", "mps")


def words(name: str, gpu: GPU) -> list[tuple[str, str]]:
    chips = badge.verdicts([(name, kind) for kind in BOTH], gpu)
    return [(chip["text"], chip["tone"]) for chip in chips]


def test_one_word_where_both_kinds_run_alike_and_two_where_not():
    assert words("fp8", ADA) == [("fp8: native", "good")]
    assert words("int8", TURING) == [
        ("int8 Linear: native", "good"),
        ("int8 convolutions: emulated", "warning"),
    ]
    assert words("int4", ADA) == words("int4", TURING) == [("int4: memory only", "plain")]
    assert words("fp8", APPLE) == [("fp8: refused", "bad")]


def test_every_verdict_but_a_plain_native_has_its_reason():
    for gpu in (ADA, TURING, APPLE, describe(torch.device("cpu"))):
        for name in ("int8", "fp8", "mxfp8", "nvfp4", "int4", "w4a8"):
            for chip in badge.verdicts([(name, kind) for kind in BOTH], gpu):
                assert chip["why"] or chip["tone"] == badge.GOOD, (gpu.name, chip)


def test_a_file_is_told_without_its_tensors(quantized, tmp_path):
    path = tmp_path / "one.safetensors"
    files.write(quantized(Recipe("int8", "max", layers="linear only")).checkpoint, path)
    chips, made_by = of_files.of_file(str(path))
    texts = [chip["text"] for chip in chips]
    assert texts[:2] == ["int8", "linear only"] and texts[2].endswith(" MB")
    assert texts[3].startswith("int8: ")
    assert made_by == "sd15.safetensors: int8, max, linear only"


def test_a_strangers_words_are_told_in_brief(quantized, tmp_path):
    long, made = "A" * 10**6, quantized(Recipe("int8", "max", layers="linear only")).checkpoint
    recipe = dict.fromkeys(("format", "algorithm", "layers"), long)
    header = made.header | {"recipe": recipe, "source": {"name": long, "sha256": ""}}
    files.write(replace(made, header=header), tmp_path / "one.safetensors")
    chips, made_by = of_files.of_file(str(tmp_path / "one.safetensors"))
    assert len(str(chips)) < 3000 and len(made_by) < 3000


def test_other_files(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"a": torch.ones(1)}, path)
    (first, _), made_by = of_files.of_file(str(path))
    assert first["text"] == "not quantized" and first["tone"] == badge.WARNING
    assert made_by == ""
    for content, said in (
        ({"modelopt": "{"}, "must be JSON"),
        ({"modelopt": "[]"}, "must be a table"),
    ):
        save_file({"a": torch.ones(1)}, path, content)
        with pytest.raises(ValueError, match=said):
            of_files.of_file(str(path))
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="whole safetensors file"):
        of_files.of_file(str(path))


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "gone", "a\0b"])
def test_no_file_outside_the_folder_is_opened(name):
    with pytest.raises(ValueError, match="must lie in ComfyUI's diffusion_models folder"):
        routes.file_of(name)


def test_unknown_formats_get_no_words():
    assert routes.formats_of(["nonsense", "fp8_e5m2", "int8_weights"], "linear + conv") == [
        *routes.formats_of(["fp8_e5m2"], "linear + conv"),
        of_files.memory_only("int8_weights"),
    ]
    json.dumps(routes.formats_of(["int8", "fp8", "w4a8"], "linear only"), allow_nan=False)


def test_a_missing_file_is_refused_with_how_it_was_made():
    made_by = "mine.safetensors: fp8, mse, linear + conv"
    said = LoadUNet.validate_inputs(unet_name="gone.safetensors", made_by=made_by)
    assert "gone.safetensors" in said and made_by in said and "Quantize UNet" in said
    assert "made by" not in LoadUNet.validate_inputs(unet_name="gone.safetensors")


def test_without_modelopt_no_format_is_promised(monkeypatch):
    assert [chip["text"] for chip in routes.formats_of(["int4"], "")] == ["int4: memory only"]
    monkeypatch.setattr(routes.packages.importlib.util, "find_spec", lambda _: None)
    (chip,) = routes.formats_of(["fp8", "int4"], "linear + conv")
    assert chip["text"] == "ModelOpt is not installed" and chip["tone"] == badge.BAD
    assert "pip install" in chip["why"]
