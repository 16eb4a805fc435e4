"""Files converted in this process: what they are, when they are skipped, and what stops one of them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import safetensors
import torch
from comfyui_modelopt.conversion import claims, identity, models, reporter, work
from comfyui_modelopt.conversion.main import main
from comfyui_modelopt.conversion.options import Lora, UsageError
from comfyui_modelopt.formats import files
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.nodes.planning import sizes
from comfyui_modelopt.nodes.quantize_and_load import quantize_and_load
from comfyui_modelopt.quantize import calibration as calibration_file
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.recipe import Recipe
from comfyui_modelopt.utils import out_of_memory, whole_file
from comfyui_modelopt.utils.progress import tell
from safetensors.torch import load_file

# few layers, for speed
SKIP = ("input_blocks.*", "output_blocks.*", "out.2", "time_embed.*", "*.emb_layers.*")
FLAGS = [
    "--format",
    "int8",
    "--algorithm",
    "max",
    *(x for pattern in SKIP for x in ("--skip", pattern)),
]
NAME = "sd15_int8-max.safetensors"

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(checkpoints) -> Path:
    return checkpoints / "sd15.safetensors"


@pytest.fixture(scope="module")
def recording(calibration, tmp_path_factory) -> Path:
    return calibration_file.save(
        calibration, tmp_path_factory.mktemp("recording") / "recording.safetensors"
    )


@pytest.fixture
def convert(tmp_path, comfyui, monkeypatch):
    """Arguments -> exit status and the rows of the summary, by name."""
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))

    def go(*arguments, flags=FLAGS, **expected) -> dict[str, dict]:
        kept = tmp_path / "summary.json"
        status = main([str(part) for part in (*flags, *arguments, "--summary", kept, "--quiet")])
        assert status == expected.get("status", 0)
        found = json.loads(kept.read_text())
        assert found["exit_status"] == status
        return {Path(row["file"]).name: row for row in found["files"]}

    return go


@pytest.fixture(scope="module")
def made(source, recording, comfyui, tmp_path_factory) -> Path:
    """A folder with the file of FLAGS and the recording."""
    out = tmp_path_factory.mktemp("made")
    flags = [*FLAGS, "--comfyui", comfyui, "--calibration", recording, "--out", out, "--quiet"]
    assert main([str(part) for part in (*flags, source)]) == 0
    return out


def test_it_is_the_nodes_file(made, source, sd15, recording, tmp_path):
    """But for the entry that says what was asked for."""
    recipe, calls = Recipe("int8", "max", skip=SKIP), calibration_file.load(recording)
    quantized, _, _ = quantize_and_load(sd15[0], recipe, calls, sizes(sd15[0], recipe, calls))
    files.write(loader.to_checkpoint(quantized), tmp_path / "nodes.safetensors")
    assert [path.name for path in made.iterdir()] == [NAME]
    ours, theirs = load_file(made / NAME), load_file(tmp_path / "nodes.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (ours, _), (theirs, _) = map(files.read_header, (made / NAME, tmp_path / "nodes.safetensors"))
    assert set(ours.pop("conversion")) == {"recipe", "loras", "calibration"}
    assert ours == theirs
    assert loader.load_file(str(made / NAME)) is not None


def test_it_is_skipped_the_second_time(made, source, recording, convert, tmp_path):
    """By what is in the files, not by their names."""
    before = (made / NAME).stat()
    row = convert(source, "--calibration", recording, "--out", made)["sd15.safetensors"]
    assert row["status"] == "skipped" and row["sqnr_db"] > 10
    assert row["bytes_after"] == before.st_size and row["output"] == str(made / NAME)
    os.link(source, tmp_path / "renamed.safetensors")
    os.link(recording, tmp_path / "recording.safetensors")
    os.link(made / NAME, made / "renamed_int8-max.safetensors")
    again = ["--calibration", tmp_path / "recording.safetensors", "--out", made]
    assert convert(tmp_path / "renamed.safetensors", *again).popitem()[1]["status"] == "skipped"
    (made / "renamed_int8-max.safetensors").unlink()
    after = (made / NAME).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


OTHERS = {
    "algorithm": (["--algorithm", "mse"], 'has recipe algorithm "max" where "mse" is asked for'),
    "layers": (["--layers", "linear only"], "has recipe layers"),
    "prompts": (["--prompts", "prompts.txt"], "has no calibration cfg where 7.0 is asked for"),
    "LoRA": (["--lora", "lora.safetensors:0.5"], "has loras [] where [{"),
    "calibration": ([], "has no calibration cfg where"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_recipe_under_its_name(made, checkpoints, recording, convert, tmp_path, case):
    flags, message = OTHERS[case]
    (tmp_path / "prompts.txt").write_text("a fox")
    places = {"prompts.txt": tmp_path, "lora.safetensors:0.5": checkpoints}
    flags = [places[x] / x if x in places else x for x in flags]
    if case not in ("prompts", "calibration"):
        flags += ["--calibration", recording]
    bytes_before = (made / NAME).read_bytes()
    row = convert(
        checkpoints / "sd15.safetensors", *flags, "--suffix", "int8-max", "--out", made, status=1
    )["sd15.safetensors"]
    assert row["status"] == "failed" and message in row["error"]
    assert "a file is never overwritten" in row["error"] and "choose another" in row["error"]
    assert (made / NAME).read_bytes() == bytes_before and len(list(made.iterdir())) == 1


@pytest.mark.parametrize("kind", ["foreign", "the node's", "another source's", "damaged"])
def test_another_file_under_its_name(made, source, recording, convert, tmp_path, kind):
    place = tmp_path / "out" / NAME
    place.parent.mkdir()
    messages = {
        "foreign": "was not quantized by this pack",
        "the node's": "was not made by convert.py",
        "another source's": "has source sha256",
        "damaged": "must be a whole safetensors file",
    }
    if kind == "foreign":
        os.link(source, place)
    elif kind == "damaged":
        place.write_bytes((made / NAME).read_bytes()[:-9])
    else:
        checkpoint = loader.read(str(made / NAME))
        if kind == "the node's":
            del checkpoint.header[identity.HEADER]
        else:
            checkpoint.header["source"]["sha256"] = 64 * "0"
        files.write(checkpoint, place)
    before = place.stat()
    row = convert(source, "--calibration", recording, "--out", place.parent, status=1)
    assert messages[kind] in row["sd15.safetensors"]["error"]
    after = place.stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    assert [path.name for path in place.parent.iterdir()] == [NAME]


def test_a_strangers_names_in_an_outputs_place(made, tmp_path):
    """In the terminal they are cut, and say nothing to it."""
    checkpoint = loader.read(str(made / NAME))
    checkpoint.header[identity.HEADER] = {"\x1b[2J" * 1000: 1}
    files.write(checkpoint, tmp_path / NAME)
    with pytest.raises(ValueError, match="a file is never overwritten") as refused:
        identity.there(
            tmp_path / NAME, {"source": {"sha256": checkpoint.header["source"]["sha256"]}}
        )
    assert len(str(refused.value)) < 600 and str(refused.value).isprintable()


@contextlib.contextmanager
def signalled(progress: Path, step: str, number: int = signal.SIGTERM):
    """Sends this process a signal once it says that it is at a step that begins so."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            if not progress.exists():
                continue
            now = json.loads(progress.read_text())["current"]
            if now and now["step"].startswith(step):
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_recording_of_prompts_survives_an_interruption(source, convert, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red fox\na hen")
    small = ["--prompts", tmp_path / "prompts.txt", "--steps", "2", "--width", "64"]
    small += ["--height", "64", "--max-records", "2"]
    out, progress = tmp_path / "out", tmp_path / "progress.json"
    with signalled(progress, "Calibrating", signal.SIGINT):
        rows = convert(source, *small, "--out", out, "--progress", progress, status=130)
    assert rows["sd15.safetensors"]["status"] == "not tried"
    (kept,) = out.iterdir()
    assert kept.name.startswith(f".{NAME}.") and kept.name.endswith(".calibration")
    assert len(calibration_file.load(kept)) == 2

    asked = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda file, with_clip: (
        asked.append(with_clip), load(file, with_clip))[1])  # fmt: skip
    assert convert(source, *small, "--out", out)["sd15.safetensors"]["status"] == "converted"
    assert [path.name for path in out.iterdir()] == [NAME], "nothing is left beside it"
    whole = convert(source, *small, "--out", tmp_path / "whole")["sd15.safetensors"]
    assert whole["status"] == "converted"
    assert asked == [False, True], "it was not sampled again"
    assert (tmp_path / "whole" / NAME).read_bytes() == (out / NAME).read_bytes()
    header, _ = files.read_header(out / NAME)
    assert header["calibration"]["prompts"] == ["a red fox", "a hen"]
    assert header["conversion"]["calibration"]["steps"] == 2

    def late(recordings, path):
        raise whole_file.NameTaken(f"{path} exists, of a process that was taken for dead")

    monkeypatch.setattr(calibration_file, "save", late)
    late = convert(source, *small, "--out", tmp_path / "late")["sd15.safetensors"]
    assert late["status"] == "converted"


def test_a_damaged_recording_is_made_again(tmp_path, caplog):
    kept = tmp_path / "kept.calibration"
    kept.write_bytes(b"half")
    assert work._read(kept) is None and not kept.exists()
    assert "recording the prompts again" in caplog.text


def test_a_recording_that_a_disk_does_not_give_is_kept(recording, tmp_path, monkeypatch):
    """Hours of sampling."""
    kept = tmp_path / "kept.calibration"
    shutil.copyfile(recording, kept)

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error", str(kept))

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", fail, raising=False)
        with pytest.raises(ValueError, match="must be a file that can be read"):
            work._read(kept)
    assert len(work._read(kept)) == len(calibration_file.load(recording))


def test_memory_that_runs_out_for_the_recordings(source, recording, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(CPU)

    monkeypatch.setattr(safetensors, "safe_open", fail)
    given = (*FLAGS, source, "--calibration", recording, "--out", tmp_path / "out", "--quiet")
    assert main([str(part) for part in given]) == 2
    assert "a conversion needs the model and its UNet calls in memory" in capsys.readouterr().err


def test_a_lora_is_baked_in(made, checkpoints, recording, convert, tmp_path):
    lora = checkpoints / "lora.safetensors"
    row = convert(
        checkpoints / "sd15.safetensors", "--lora", f"{lora}:0.8", "--calibration", recording,
        "--out", tmp_path / "out",
    )["sd15.safetensors"]  # fmt: skip
    header, _ = files.read_header(row["output"])
    assert header["baked_patches"] > 10
    (told,) = header["conversion"]["loras"]
    assert told["name"] == "lora.safetensors" and told["strength"] == 0.8
    plain, baked = load_file(made / NAME), load_file(row["output"])
    name = next(name for name in plain if name.endswith("proj_in.weight"))
    assert not torch.equal(plain[name], baked[name])


def test_a_lora_of_another_model(source, recording, convert, tmp_path):
    files.save_safetensors({"lora.up": torch.zeros(2)}, tmp_path / "other.safetensors", {})
    row = convert(
        source, "--lora", tmp_path / "other.safetensors", "--calibration", recording,
        "--out", tmp_path / "out", status=1,
    )["sd15.safetensors"]  # fmt: skip
    assert "a LoRA must change layers of the checkpoint" in row["error"]
    assert not list((tmp_path / "out").iterdir())


CPU = "DefaultCPUAllocator: can't allocate memory"
SMALLER = "sample smaller pictures (--width, --height), or record smaller ones for --calibration"


@pytest.mark.parametrize(
    "error, said",
    [
        (
            torch.OutOfMemoryError("needs 9 GB"),
            f"it ran out of it (needs 9 GB): close other programs, or {SMALLER}, or use --device cpu",
        ),
        (
            RuntimeError(CPU),
            f"it ran out of it ({CPU}): close other programs, or {SMALLER}",
        ),
        (
            RuntimeError("MPS backend out of memory"),
            "it ran out of it (MPS backend out of memory): close other programs, or "
            f"{SMALLER}, or use --device cpu",
        ),
        (MemoryError(), f"it ran out of it (MemoryError): close other programs, or {SMALLER}"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("explained", [False, True])
def test_an_error_ends_one_file(source, convert, tmp_path, monkeypatch, error, said, explained):
    """The next one is tried, with what the first one took given back. Where the nodes' code has
    explained the error, for ComfyUI, it is explained once, for this command."""
    os.link(source, tmp_path / "second.safetensors")
    freed = []

    def fail(file, *_, **__):
        raise error

    if explained:
        fail = out_of_memory.explained("loading", out_of_memory.FREE)(fail)
    monkeypatch.setattr(models, "load", fail)
    monkeypatch.setattr(models, "free", lambda: freed.append(True))
    out = tmp_path / "out"
    rows = convert(source, tmp_path / "second.safetensors", "--out", out, status=1)
    assert len(rows) == 2 and all(row["error"].endswith(said) for row in rows.values())
    assert len(freed) == 2 and not list(out.iterdir())


def test_a_device_that_is_lost_ends_the_run(source, convert, tmp_path, monkeypatch):
    os.link(source, tmp_path / "second.safetensors")
    monkeypatch.setattr(models, "lost_device", lambda: "cuda:0 no longer answers")
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    rows = convert(tmp_path / "cut.safetensors", source, "--out", tmp_path / "out", status=1)
    assert rows["cut.safetensors"]["status"] == "failed"
    assert rows["sd15.safetensors"]["status"] == "not tried"
    assert rows["sd15.safetensors"]["error"] == "cuda:0 no longer answers"


@pytest.mark.parametrize("lost", [None, "cuda:0 no longer answers"])
def test_memory_that_a_lost_device_does_not_give_back(
    source, convert, tmp_path, monkeypatch, lost, capsys
):
    """It does not end the run with a traceback: whether the device is lost decides."""
    os.link(source, tmp_path / "second.safetensors")
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(*_, **__):
        raise broken

    monkeypatch.setattr(models, "load", fail)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", fail)
    monkeypatch.setattr(models, "lost_device", lambda: lost)
    rows = convert(source, tmp_path / "second.safetensors", "--out", tmp_path / "out", status=1)
    assert str(broken) in rows["sd15.safetensors"]["error"]
    second = rows["second.safetensors"]
    assert second["status"] == ("not tried" if lost else "failed")
    assert second["error"] == lost or (not lost and str(broken) in second["error"])


def test_which_device_is_lost(monkeypatch):
    """Not one whose memory another process has filled."""

    def fail(*_, **__):
        raise error

    assert models.lost_device() is None
    monkeypatch.setattr(torch, "ones", fail)
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert models.lost_device() is None
    error = RuntimeError("CUDA error: an illegal memory access\nmore")
    assert models.lost_device().endswith("no longer answers (CUDA error: an illegal memory access)")
    monkeypatch.setattr(comfy.model_management, "get_torch_device", fail)
    assert models.lost_device().startswith("the device no longer answers")


def test_memory_that_runs_out_is_no_damaged_file(source, checkpoints, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(f"PytorchStreamReader failed: {CPU}")

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", fail)
    monkeypatch.setattr(comfy.utils, "load_torch_file", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        models.load(source, with_clip=False)
    lora = Lora(checkpoints / "lora.safetensors")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        models.with_loras(None, None, [lora])
    with pytest.raises(UsageError, match="in memory, it ran out of it .*close other programs"):
        models.check_loras([lora])


def test_a_quantized_file_is_not_quantized_again(made, source, recording, convert, tmp_path):
    ours, stock = made / NAME, tmp_path / "stock.safetensors"
    flags = ["--format", "int8", "--layers", "linear only", "--calibration", recording]
    linear = convert(source, "--out", tmp_path, flags=flags)["sd15.safetensors"]["output"]
    files.save_safetensors(load_file(linear), stock, {})  # with the marks of ComfyUI alone
    for file in (ours, Path(linear), stock):
        row = convert(file, "--calibration", recording, "--out", tmp_path / "out", status=1)
        error = row[file.name]["error"]
        assert "must be in 16 or 32 bits" in error and "is already quantized" in error
        assert str(file) in error


def test_a_checkpoint_in_float8_is_not_quantized_again(source, recording, convert, tmp_path):
    """Plain, without anybody's marks: ComfyUI widens it on a CPU."""
    unet, path = "model.diffusion_model.", tmp_path / "fp8.safetensors"
    held = load_file(source)
    for name, tensor in held.items():
        if name.startswith(unet) and tensor.ndim > 1:
            held[name] = tensor.to(torch.float8_e5m2)
    files.save_safetensors(held, path, {})
    row = convert(path, "--calibration", recording, "--out", tmp_path / "out", status=1)
    assert f"{path} is already quantized: name the original" in row[path.name]["error"]


def test_a_quantized_text_encoder_is_no_quantized_file(source, tmp_path):
    """ComfyUI marks it in the same way."""
    tensors = load_file(source)
    name = next(
        key for key in tensors if key.startswith("cond_stage_model.") and "fc1.weight" in key
    )
    marker = {"format": "float8_e4m3fn"}
    scale = tensors[name].abs().amax().float() / 448
    tensors[f"{name}_scale"] = scale
    tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    tensors[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.tensor(
        list(json.dumps(marker).encode()), dtype=torch.uint8
    )
    files.save_safetensors(tensors, tmp_path / "mixed.safetensors", {})
    assert None not in models.load(tmp_path / "mixed.safetensors", with_clip=True)


class Foreign:
    """Of no class for which torch opens a file."""


def zipped(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, "hi")
    return made.getvalue()


def saved(value: object, **options) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, **options)
    return made.getvalue()


WEIGHTS = {"a.weight": torch.zeros(300)}
# a file's name -> what is in it, what is said of it
DAMAGED = {
    "two.ckpt": (b"hi", "KeyError: 105"),
    "text.ckpt": (b"this is no checkpoint\n", "IndexError: "),
    "page.ckpt": (b"<!DOCTYPE html>", "Unsupported operand 60"),
    "empty.ckpt": (b"", "EOFError"),
    "zip.ckpt": (zipped("readme"), "file in archive is not in a subdirectory"),
    "cut.ckpt": (saved(WEIGHTS)[:-300], ""),
    "half.pt": (saved(WEIGHTS)[:400], "not a zip file"),
    "old.ckpt": (saved(WEIGHTS, _use_new_zipfile_serialization=False)[:-30], "30 more bytes"),
    "list.ckpt": (saved([torch.zeros(3)]), "no attribute"),
    "numbers.ckpt": (saved({"step": 1, "epoch": 2}), "name an SDXL or SD1.5 checkpoint"),
    "nested.ckpt": (saved({"ema": WEIGHTS, "model": WEIGHTS}), "name an SDXL or SD1.5 checkpoint"),
    "short.safetensors": (b"hi", "header too small"),
    "nothing.safetensors": (b"", "header too small"),
    "archive.safetensors": (zipped("readme"), "header too large"),
    "foreign.ckpt": (saved({"a": Foreign()}), "Foreign was not an allowed global"),
}
RULES = {
    "cut.ckpt": "must be a whole file of torch.save",
    "half.pt": "must be a whole file of torch.save",
    "foreign.ckpt": "must hold data only",
    "numbers.ckpt": "must hold a diffusion model",
    "nested.ckpt": "must hold a diffusion model",
}


def test_damaged_checkpoints_end_themselves_alone(
    made, source, recording, convert, tmp_path, caplog, monkeypatch
):
    """Whatever a reader raises over them, and without torch's advice to run what they hold."""
    monkeypatch.setattr(models, "free", lambda: None)  # a second for each
    for name, (content, _) in DAMAGED.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in DAMAGED]
    rows = convert(*files, source, "--calibration", recording, "--out", made, status=1)
    assert rows.pop("sd15.safetensors")["status"] == "skipped"
    for name, (_, found) in DAMAGED.items():
        error = rows[name]["error"]
        rule = RULES.get(name, "must be a whole file of weights")
        assert rows[name]["status"] == "failed" and error.startswith(f"a checkpoint {rule}")
        assert str(tmp_path / name) in error and found in error and "weights_only" not in error
    assert not caplog.records, "no traceback"
    assert [path.name for path in made.iterdir()] == [NAME]


def test_a_recipe_that_does_not_fit_is_refused_before_prompts_are_sampled(
    source, convert, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampling, "record_prompts", lambda *_, **__: pytest.fail("sampled"))
    flags = ["--format", "int8", "--skip", "midle_block.*"]
    row = convert(source, "--out", tmp_path / "out", flags=flags, status=1)["sd15.safetensors"]
    assert row["error"].startswith(
        "a skip pattern must match a layer, 'midle_block.*' matches none"
    )
    assert not list((tmp_path / "out").iterdir())


def test_prompts_need_a_text_encoder(source, convert, tmp_path):
    tensors = {k: x for k, x in load_file(source).items() if k.startswith("model.")}
    files.save_safetensors(tensors, tmp_path / "unet.safetensors", {})
    row = convert(tmp_path / "unet.safetensors", "--out", tmp_path / "out", status=1)
    assert "prompts need a text encoder" in row["unet.safetensors"]["error"]
    assert "--calibration" in row["unet.safetensors"]["error"]


def test_what_another_process_has_is_left_to_it(made, source, recording, convert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with claims.take(out / NAME):
        row = convert(source, "--calibration", recording, "--out", out)["sd15.safetensors"]
        assert row["status"] == "taken" and f"process {os.getpid()}" in row["error"]
        assert [path.name for path in out.iterdir()] == [f".{NAME}.claim"]

    def other() -> None:
        with claims.take(out / NAME):
            held.set()
            time.sleep(1)
            shutil.copyfile(made / NAME, out / "aside")
            os.rename(out / "aside", out / NAME)

    held = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(10)
    row = convert(source, "--calibration", recording, "--out", out, "--wait")["sd15.safetensors"]
    thread.join()
    assert row["status"] == "skipped", "the other one made it"
    assert [path.name for path in out.iterdir()] == [NAME]


def test_a_file_that_comes_while_it_is_made(
    made, source, recording, convert, tmp_path, monkeypatch
):
    """Of a process that was taken for dead."""
    out = tmp_path / "out"
    write = files.write

    def late(checkpoint, path, step):
        shutil.copyfile(made / NAME, path)
        write(checkpoint, path, step)

    monkeypatch.setattr(files, "write", late)
    row = convert(source, "--calibration", recording, "--out", out)["sd15.safetensors"]
    assert row["status"] == "skipped"
    assert (out / NAME).read_bytes() == (made / NAME).read_bytes()


def test_what_a_killed_process_left_is_removed(made, source, recording, convert, tmp_path):
    """Also where it was killed between the file and the end of its claim. Of the halves of files, the
    locks say which are nobody's: those of another machine only with time."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copyfile(made / NAME, out / NAME)
    with pytest.raises(KeyError), whole_file.whole_file(out / "a", 1) as file:
        machine = Path(file.name).name.split(".")[2]
        raise KeyError
    left = [
        f".{NAME}.{machine}.89ef4567.partial",
        f"..{NAME}.0123456789abcdef.calibration.{machine}.89ef4567.partial",
        f".{NAME}.0123456789abcdef.calibration",
    ]
    others = [
        f".{NAME}.0123abcd.89ef4567.partial",
        f".{NAME}.mine.partial",
        f".other_{NAME}.0123456789abcdef.calibration",
    ]
    for name in (*left, *others):
        (out / name).write_text("")
    claims.take(out / NAME)._ended.set()
    (path,) = claims.litter(out / NAME)
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"born": "another process"}))
    row = convert(source, "--calibration", recording, "--out", out)["sd15.safetensors"]
    assert row["status"] == "skipped"
    assert {path.name for path in out.iterdir()} == {NAME, *others}


def test_files_for_others_that_cannot_be_written_do_not_stop_it(
    made, source, recording, convert, tmp_path, capsys
):
    progress = tmp_path / "progress"
    (tmp_path / ".progress.new").mkdir()
    row = convert(source, "--calibration", recording, "--out", made, "--progress", progress)[
        "sd15.safetensors"
    ]
    assert row["status"] == "skipped"
    assert capsys.readouterr().err.count("is not kept, it cannot be written") == 1


def test_a_summary_that_cannot_be_printed(made, source, recording, comfyui):
    """In a process of its own: what Python says at its end counts too."""
    flags = [*FLAGS, "--comfyui", comfyui, "--calibration", recording, "--out", made, "--json"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, ROOT / "convert.py", *map(str, (*flags, source))],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert ended.returncode == 1 and "the summary could not be printed" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_link_that_leads_nowhere_in_an_outputs_place(source, recording, convert, tmp_path):
    place = tmp_path / "out" / NAME
    place.parent.mkdir()
    place.symlink_to(tmp_path / "nowhere")
    row = convert(source, "--calibration", recording, "--out", place.parent, status=1)
    assert "the output's name must be free" in row["sd15.safetensors"]["error"]
    assert place.is_symlink() and not (tmp_path / "nowhere").exists()


def test_a_full_disk_under_the_log_does_not_fail_a_conversion(
    made, source, tmp_path, comfyui, monkeypatch
):
    """Nor what ModelOpt prints."""

    class Full(io.StringIO):
        refused = 0

        def write(self, text=""):
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

    def convert(file, output, *_):
        print("Inserted 9 quantizers")  # noqa: T201
        tell("Calibrating")
        shutil.copyfile(made / NAME, output)
        return {"bytes_before": 1, "file_bytes": 1}

    full = Full()
    monkeypatch.setattr(work, "convert", convert)
    monkeypatch.setattr(reporter, "PAUSE", 0)
    monkeypatch.setattr(sys, "stderr", full)
    flags = [*FLAGS, "--comfyui", comfyui, "--out", tmp_path / "out"]
    assert main([str(part) for part in (*flags, source)]) == 0
    assert (tmp_path / "out" / NAME).exists() and full.refused > 5
