"""Checkpoints and LoRAs of strangers: each is told by its name, before much is done with it."""

from __future__ import annotations

import io
import json
import math
import pickletools
import zipfile
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfyui_modelopt.conversion import models, work
from comfyui_modelopt.conversion.options import Lora, UsageError
from safetensors.torch import load_file, save_file

UNET = "model.diffusion_model."
# a table whose key is a pair of pairs of pairs ..., which takes years to hash
BOMB = b"\x80\x02K\x00K\x00\x86q\x00"
BOMB += b"".join(b"h%ch%c\x86q%c" % (i - 1, i - 1, i) for i in range(1, 60)) + b"}h\x3bK\x01s."
LINEAR = "lora_unet_input_blocks_1_0_emb_layers_1"


def zipped(content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


def after(count: int, content: bytes) -> bytes:
    """In the old form: in place of what comes after so many pickles."""
    made = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, made, _use_new_zipfile_serialization=False)
    made.seek(0)
    for _ in range(count):
        list(pickletools.genops(made))
    return made.getvalue()[: made.tell()] + content


HOSTILE = {
    "zip": (zipped(BOMB), "many of them the same one"),
    "old, first": (after(0, BOMB), "many of them the same one"),
    "old, fourth": (after(3, BOMB), "many of them the same one"),
    "old, long": (b"\x80\x02X\0\0\0\2" + b"a" * 2**25 + BOMB[2:], "a pickle of more than 16777216"),
    "deep": (zipped(b"\x80\x02}K\x00" + b"\x85" * 2 * 10**6 + b"K\x01s."), "more than 200 deep"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_no_reader_should_open(tmp_path, kind):
    content, found = HOSTILE[kind]
    for name in ("a.ckpt", "a.pt"):
        path = tmp_path / name
        path.write_bytes(content)
        for opened in (models.load, lambda x, _: models.check_loras([Lora(x)])):
            with pytest.raises((ValueError, UsageError), match="hold little beside") as refused:
                opened(path, False)
            assert str(path) in str(refused.value) and found in str(refused.value)


def test_a_lora_in_every_form(checkpoints, tmp_path):
    held = load_file(checkpoints / "lora.safetensors")
    torch.save(held, tmp_path / "new.pt")
    torch.save({"state_dict": held}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        read, _ = models._read_lora(tmp_path / name)
        assert read.keys() == held.keys() and all(torch.equal(read[k], held[k]) for k in held)


def changed(source: Path, path: Path, shapes: dict, **metadata: str) -> Path:
    """The checkpoint with other shapes and all zeros, in a sparse file; None: without a tensor."""
    with source.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header["__metadata__"] = metadata
    end = 0
    for name, shape in shapes.items():
        header[UNET + name] |= {"shape": shape}
        if shape is None:
            del header[UNET + name]
    for name, one in header.items():
        if name != "__metadata__":
            size = math.prod(one["shape"]) * {"F16": 2, "F32": 4, "I64": 8}[one["dtype"]]
            one["data_offsets"] = [end, end := end + size]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


STRANGE = {
    "a weight is missing": ({"input_blocks.1.0.out_layers.3.weight": None}, {}),
    "a weight of one dimension": ({"input_blocks.0.0.weight": [320]}, {}),
    "a bias of another shape": ({"time_embed.0.bias": [3]}, {}),
    "metadata without an end": ({}, {"_quantization_metadata": "[" * 100000}),
    "metadata without layers": ({}, {"_quantization_metadata": "{}"}),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_comfyui_meets_in_a_checkpoint_names_it(checkpoints, tmp_path, kind):
    shapes, metadata = STRANGE[kind]
    path = changed(checkpoints / "sd15.safetensors", tmp_path / "a.safetensors", shapes, **metadata)
    with pytest.raises(ValueError, match="a checkpoint must be a whole file of weights") as refused:
        models.load(path, with_clip=False)
    assert str(path) in str(refused.value) and str(refused.value).isprintable()


def lora(path: Path, tensors: dict[str, torch.Tensor], layer: str = LINEAR) -> Lora:
    save_file({f"{layer}.{name}": one.contiguous() for name, one in tensors.items()}, path)
    return Lora(path)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_lora_with_nan(sd15, tmp_path, number):
    """It is not the checkpoint that is damaged."""
    broken = lora(tmp_path / "nan.safetensors", pair((320, 2), (2, 1280)))
    tensors = load_file(broken.path)
    tensors[f"{LINEAR}.lora_up.weight"][3, 1] = number
    save_file(tensors, broken.path)
    with pytest.raises(ValueError, match="a LoRA must hold finite numbers") as refused:
        models.with_loras(sd15[0], None, [broken])
    assert str(broken.path) in str(refused.value) and "emb_layers.1.weight" in str(refused.value)
    tensors[f"{LINEAR}.lora_up.weight"][3, 1] = 0
    tensors["lora_te_x.lora_up.weight"] = torch.full((2, 2), number)  # of what is not loaded
    save_file(tensors, broken.path)
    models.with_loras(sd15[0], None, [broken])


@pytest.mark.parametrize("first", [b"\x80\x02", b"\x93", b"\0"])
def test_a_large_file_of_another_kind(tmp_path, first):
    path = tmp_path / "a.ckpt"
    path.write_bytes(first + b"}\xfe" * 2**24)
    with pytest.raises(ValueError, match="a checkpoint must be a whole file of weights"):
        models.load(path, with_clip=False)


def test_a_lora_of_more_numbers_than_its_file(tmp_path):
    """One number as a tensor of a million million."""
    path = tmp_path / "a.pt"
    torch.save({"a.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(UsageError, match="it holds tensors of 4000000000000 bytes") as refused:
        models.check_loras([Lora(path)])
    assert str(path) in str(refused.value)


def pair(up: tuple[int, ...], down: tuple[int, ...], **more) -> dict[str, torch.Tensor]:
    return {"lora_up.weight": torch.zeros(up), "lora_down.weight": torch.zeros(down), **more}


MISFITS = {
    "a product of 144 million": (pair((12000, 2), (2, 12000)), "does not fit"),
    "three rows more": (pair((323, 2), (2, 1280)), "does not fit"),
    "two ranks": (pair((320, 2), (3, 1280)), "does not fit"),
    "no rank": (pair((320, 0), (0, 1280), alpha=torch.ones(())), "does not fit"),
    "a shape of its own": (
        pair((320, 2), (2, 1280), reshape_weight=torch.tensor([10**6, 10**6])),
        "does not fit",
    ),
    "one of a pair": ({"lora_up.weight": torch.zeros(320, 2)}, "KeyError"),
    "three alphas": (pair((320, 2), (2, 1280), alpha=torch.ones(3)), "cannot be converted"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_lora_that_does_not_fit_is_named(sd15, tmp_path, kind):
    tensors, found = MISFITS[kind]
    misfit = lora(tmp_path / "misfit.safetensors", tensors)
    with pytest.raises(ValueError, match="a LoRA must be") as refused:
        models.with_loras(sd15[0], None, [misfit])
    assert str(misfit.path) in str(refused.value) and found in str(refused.value)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            {f"input_blocks.{i}.x": torch.zeros(1) for i in range(600)},
            "at most 512 blocks in a row",
        ),
        ({"x.weight": torch.zeros(2**30, 0)}, "weights must have values"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_that_detection_would_believe(checkpoints, tmp_path, added, message, suffix):
    tensors = load_file(checkpoints / "sd15.safetensors") | {
        f"{UNET}{name}": one for name, one in added.items()
    }
    path = tmp_path / f"strange{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    with pytest.raises(ValueError, match=message) as refused:
        models.load(path, with_clip=False)
    assert str(path) in str(refused.value)


def test_a_folder_named_as_a_leftover_recording(tmp_path):
    output = tmp_path / "x.safetensors"
    output.write_bytes(b"")
    folder, file = (tmp_path / f".{output.name}.{one * 16}.calibration" for one in "ab")
    folder.mkdir()
    file.write_bytes(b"")
    work.clear(output)
    assert folder.is_dir() and not file.exists()


FITTING = {
    "dora": pair((320, 2), (2, 1280), dora_scale=torch.ones(320, 1)),
    "lokr": {"lokr_w1": torch.zeros(2, 2), "lokr_w2": torch.zeros(160, 640)},
    "loha": {
        "hada_w1_a": torch.zeros(320, 2),
        "hada_w1_b": torch.zeros(2, 1280),
        "hada_w2_a": torch.zeros(320, 2),
        "hada_w2_b": torch.zeros(2, 1280),
    },
    "oft": {"oft_blocks": torch.zeros(2, 160, 160), "alpha": torch.tensor(1e-3)},
    "wider": pair((320, 2), (2, 2560), reshape_weight=torch.tensor([320, 2560])),
    "a difference": {"diff": torch.zeros(320, 1280), "diff_b": torch.zeros(320)},
}


@pytest.mark.parametrize("kind", FITTING)
def test_a_lora_of_every_kind_fits(sd15, tmp_path, kind):
    fitting = lora(tmp_path / "fitting.safetensors", FITTING[kind])
    model, _ = models.with_loras(sd15[0], None, [fitting, fitting])
    assert sum(map(len, model.patches.values())) == 2 * (1 + ("diff_b" in FITTING[kind]))
    assert not sd15[0].patches


@pytest.mark.parametrize(
    "lost",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        ModuleNotFoundError("No module named 'sentencepiece'"),
    ],
)
def test_an_error_of_the_machine_says_nothing_of_the_file(checkpoints, monkeypatch, lost):
    def fail(*_, **__):
        raise lost

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", fail)
    with pytest.raises(type(lost)) as raised:
        models.load(checkpoints / "sd15.safetensors", with_clip=False)
    assert raised.value is lost
