"""The command line: the nodes' settings under the nodes' names, and what is refused before anything runs."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from comfyui_modelopt.conversion import comfyui, options
from comfyui_modelopt.conversion.main import main
from comfyui_modelopt.conversion.options import Lora, UsageError
from comfyui_modelopt.nodes.calibration_prompts import CalibrationPrompts
from comfyui_modelopt.nodes.quantize import Quantize
from comfyui_modelopt.quantize import mixed
from comfyui_modelopt.quantize.layers import DEFAULT_SKIP
from comfyui_modelopt.quantize.prompts import BUILT_IN
from comfyui_modelopt.quantize.recipe import ALGORITHMS, CHOICES, OPTIONS, Recipe, may_calibrate

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def order(tmp_path, monkeypatch):
    """Arguments, of which files are made here -> the order."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b.ckpt", "lora.safetensors", "C:lora.safetensors"):
        Path(name).write_text("")
    Path("prompts.txt").write_text("\ufeffa fox\n\n a hen \n", encoding="utf-8")

    def make(*arguments: str) -> options.Order:
        given = [*arguments, "--out", "out", "a.safetensors"]
        return options.order(options.parser().parse_intermixed_args(given))

    return make


def options_of(input) -> dict:
    """Dotted name -> every input below a node's input."""
    found = {}
    for option in getattr(input, "options", None) or ():
        for inner in getattr(option, "inputs", ()):
            found |= {inner.id: inner} | options_of(inner)
    return found


def test_every_input_of_the_quantize_node_is_a_flag(order):
    flags = {action.dest: action for action in options.parser()._actions}
    for node_input in Quantize.define_schema().inputs:
        if node_input.id in ("model", "calibration"):
            continue
        for name, one in {node_input.id: node_input, **options_of(node_input)}.items():
            assert name in flags, name
            if name in ("format", "convolutions", "weights", "activations", "layers"):
                known = [getattr(option, "key", option) for option in one.options]
                assert list(flags[name].choices) == known
    plain = order()
    assert plain.recipe == Recipe(CHOICES[0]) and plain.suffix == "fp8-mse"


def test_prompts_are_sampled_as_the_node_does(order):
    shared = {x.id: x for x in CalibrationPrompts.define_schema().inputs}
    sampling = order().sampling
    for name in options._sampling_fields():
        assert getattr(sampling, name) == shared.pop(name).default, name
    assert shared.pop("prompts").default == "\n".join(order().prompts) == "\n".join(BUILT_IN)
    assert set(shared) == {"model", "clip"}
    given = order("--prompts", "prompts.txt", "--steps", "3", "--sampler-name", "dpmpp_2m")
    assert given.prompts == ("a fox", "a hen")
    assert given.sampling.steps == 3 and given.sampling.sampler_name == "dpmpp_2m"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_recipe_has_a_name_of_its_own(order, name):
    seen = set()
    formats = ["--format", name] if name in CHOICES else ["--format", "fp8", "--weights", "e5m2"]
    for algorithm in ALGORITHMS[name]:
        values = {"alpha": "0.7", "convolutions": "percentile", "percentile": "0.9", "rank": "16"}
        more = [x for own in OPTIONS.get(algorithm, ()) for x in (f"--{own}", values[own])]
        linear = ["--layers", "linear only"]
        for flags in ([], more, linear):
            if algorithm == "percentile" and flags == linear:
                with pytest.raises(UsageError, match="percentile is for convolutions"):
                    order(*formats, "--algorithm", algorithm, *flags)
                continue
            made = order(*formats, "--algorithm", algorithm, *flags)
            assert made.recipe.format == name and made.recipe.algorithm == algorithm
            seen.add(made.output(made.files[0]).name)
    changed = sum(bool(OPTIONS.get(x)) for x in ALGORITHMS[name])
    one_way = "percentile" in ALGORITHMS[name]
    assert len(seen) == 2 * len(ALGORITHMS[name]) + changed - one_way
    assert all(text.startswith(f"a_{name}-") for text in seen)


def test_the_default_of_int8_is_for_stock_with_linear_only(order):
    linear = ("--format", "int8", "--layers", "linear only")
    assert order("--format", "int8").recipe == Recipe("int8", "smoothquant")
    assert order(*linear).recipe == Recipe("int8", "max", layers="linear only")
    with pytest.raises(UsageError, match="got it with the algorithm max"):
        order(*linear, "--alpha", "0.5")


def test_prompts_are_sampled_only_where_recordings_are_needed(order):
    for name, needed in (("mxfp8", True), ("int4", True), ("fp8", True)):
        assert bool(order("--format", name).prompts) == needed, name
    assert order("--format", "nvfp4", "--layers", "linear only").prompts
    for flags in (
        ("--format", "mxfp8", "--layers", "linear only"),
        ("--format", "int8", "--layers", "linear only"),
        ("--format", "int4", "--algorithm", "max"),
        ("--format", "nvfp4", "--algorithm", "max", "--layers", "linear only"),
        ("--weights", "e5m2"),
    ):
        assert order(*flags).prompts == (), flags
    assert may_calibrate(Recipe("int8", "smoothquant", layers="linear only"))
    assert not may_calibrate(Recipe("fp8", "max", activations="per token", layers="linear only"))
    assert may_calibrate(Recipe("fp8", "max", activations="per token"))


def test_loras_skips_and_a_mixed_recipe(order):
    made = order("--lora", "lora.safetensors", "--lora", "lora.safetensors:-0.5", "--lora",
                 "C:lora.safetensors", "--skip-also", "middle_block.*")  # fmt: skip
    path = Path("lora.safetensors")
    assert made.loras == (Lora(path), Lora(path, -0.5), Lora(Path("C:lora.safetensors")))
    assert made.recipe.skip == (*DEFAULT_SKIP, "middle_block.*")
    assert order("--skip", "out.2", "--skip", "x.*").recipe.skip == ("out.2", "x.*")
    recipe = mixed.Mixed((Recipe("fp8"), Recipe("int4")), {"out.2": 0, "x": 1})
    Path("recipe.json").write_text(mixed.write(recipe))
    read = order("--recipe", "recipe.json")
    Path("lora:1").write_text("")
    assert order("--lora", "lora:1").loras == (Lora(Path("lora:1")),)
    assert read.recipe == recipe and read.suffix == "mixed" and read.prompts == BUILT_IN


def test_a_file_is_taken_once_and_patterns_are_expanded(order):
    Path("one").mkdir()
    Path("one/c[1].safetensors").write_text("")
    made = order("./a.safetensors", "*.ckpt", "one/c[1].safetensors")
    assert [path.name for path in made.files] == ["a.safetensors", "b.ckpt", "c[1].safetensors"]


REFUSED = {
    "no file": (["gone.safetensors"], "there is no gone.safetensors"),
    "a folder": (["."], "is a folder: name the files in it"),
    "two of one name": (["other/A.safetensors"], "must have different names"),
    "format and algorithm": (["--algorithm", "svdquant"], "algorithm of fp8 must be one of mse"),
    "an option of another algorithm": (["--rank", "8"], "--rank is an option of svdquant"),
    "an option of another format": (
        ["--format", "int8", "--weights", "e5m2"],
        "--weights is an option of fp8, got it with the format int8",
    ),
    "a value": (
        ["--format", "int8", "--algorithm", "smoothquant", "--alpha", "2"],
        "alpha must be from 0 to 1, got 2.0",
    ),
    "steps": (["--steps", "0"], "steps must be from 1 to 10000, got 0"),
    "a size": (["--width", "100"], "width must be a multiple of 8 pixels, got 100"),
    "a sampler": (["--sampler-name", "eulr"], "--sampler-name must be one of euler"),
    "sampling without prompts": (
        ["--format", "int4", "--algorithm", "max", "--steps", "3"],
        "--steps go with prompts that are sampled",
    ),
    "no prompt": (["--prompts", "empty.txt"], "at least 1 prompt, got 0 in empty.txt"),
    "no text": (["--prompts", "binary.txt"], "a text file in UTF-8, binary.txt cannot be read"),
    "a prompt of brackets": (
        ["--prompts", "deep.txt"],
        "at most 100 deep, line 2 of deep.txt has them 3000 deep",
    ),
    "no calibration": (["--calibration", "empty.txt"], "must be a whole safetensors file"),
    "no LoRA": (["--lora", "gone:0.5"], "--lora must name a file, there is no file gone"),
    "a LoRA's strength": (
        ["--lora", "lora.safetensors:nan"],
        "the strength of a --lora must be from -100 to 100, got nan for lora.safetensors",
    ),
    "a LoRA without end": (["--lora", "lora.safetensors:-inf"], "got -inf for lora.safetensors"),
    "a damaged LoRA": (
        ["--lora", "lora.safetensors:0.5"],
        "a LoRA must be a whole file of weights, lora.safetensors is not (",
    ),
    "a LoRA of text": (
        ["--lora", "empty.txt"],
        "a LoRA must be a whole file of weights, empty.txt is not (",
    ),
    "no recipe": (["--recipe", "empty.txt"], "a recipe must be JSON, empty.txt is empty"),
    "a recipe twice": (["--recipe", "empty.txt", "--format", "fp8"], "got --format beside it"),
    "a suffix": (["--suffix", "../x"], "--suffix must be part of a file's name"),
    "a timeout": (["--claim-timeout", "0"], "--claim-timeout must be above 0"),
    "no ComfyUI": (["--comfyui", "other"], "--comfyui must name the folder of ComfyUI's main.py"),
    "a summary over the checkpoint": (
        ["--summary", "./a.safetensors"],
        "--summary must name a file of its own, a.safetensors is ",
    ),
    "a summary over a LoRA": (
        ["--lora", "lora.safetensors", "--summary", "lora.safetensors"],
        "--summary must name a file of its own",
    ),
    "progress over an output": (
        ["--suffix", "x", "--progress", "out/a_x.safetensors"],
        "--progress must name a file of its own",
    ),
    "both in one": (
        ["--progress", "same.json", "--summary", "same.json"],
        "--summary must name a file of its own, same.json is same.json",
    ),
    "progress a folder": (["--progress", "other"], "--progress must name a file, other is none"),
    "a device for a checkpoint": (["/dev/zero"], "/dev/zero is a pipe or a device"),
    "a name that is too long": (["x" * 300], "files must be where they can be looked at, got"),
    "an output's name": (["--suffix", "x" * 220], "must have at most 225 bytes"),
    "a recipe's name": (
        ["--recipe", "x" * 300],
        "must be a file that can be read, got File name too long",
    ),
    "a device": (["--device", "first"], "--device must be cpu or a number from 0 on, got 'first'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_done(order, case, capsys, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui.find(None)))
    Path("other").mkdir()
    Path("other/A.safetensors").write_text("")
    Path("empty.txt").write_text("\n")
    Path("deep.txt").write_text("a fox\n" + "(" * 3000)
    Path("binary.txt").write_bytes(b"\xff\xfe\x80")
    arguments, message = REFUSED[case]
    before = sorted(Path().rglob("*"))
    assert main([*arguments, "--out", "out", "a.safetensors"]) == 2
    said = capsys.readouterr()
    assert "convert.py: " in said.err and message in said.err and not said.out
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_name_that_is_no_utf8(order):
    name = os.fsdecode(b"bad\xff.safetensors")
    Path(name).write_text("")
    with pytest.raises(UsageError, match="the path of a checkpoint must be UTF-8"):
        order(name)


@pytest.mark.parametrize("flag", ["--prompts", "--recipe"])
def test_a_text_that_the_system_does_not_give_is_not_called_misspelt(order, flag, monkeypatch):
    Path("text.txt").write_text("a cat")

    def lost(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", lost)
    with pytest.raises(UsageError, match="text.txt must be a file that can be read, got Input/out"):
        order(flag, "text.txt")


def test_out_must_be_a_folder_to_write_in(order, capsys, monkeypatch, comfyui):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    flags = ["--out", "b.ckpt/out", "--format", "mxfp8", "--layers", "linear only"]
    assert main(["a.safetensors", *flags]) == 2
    assert "--out needs a folder that can be written, got [Errno" in capsys.readouterr().err
    assert main(["a.safetensors", "--out", "b.ckpt"]) == 2
    assert "--out must be a folder, b.ckpt is a file" in capsys.readouterr().err


def own(monkeypatch, visible: str | None) -> None:
    """The variables that `choose` writes to, given back after the test."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, visible or "")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    "visible, asked, left",
    [(None, "1", "1"), ("4,7", "1", "7"), ("GPU-a,GPU-b", "0", "GPU-a"), ("4", "cpu", "4")],
)
def test_device(monkeypatch, visible, asked, left):
    """N counts those that are visible, as Slurm leaves them."""
    own(monkeypatch, visible)
    comfyui.choose(asked)
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize("visible, asked", [("4,7", "2"), ("", "0"), ("4", "-1")])
def test_no_such_device(monkeypatch, visible, asked):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match="--device must be cpu or a number below"):
        comfyui.choose(asked)


@pytest.mark.parametrize(
    "count, said",
    [
        (0, "torch finds none of the number 0: correct it"),
        (2, "--device chooses among the GPUs of NVIDIA and AMD, got it where torch finds 2 others"),
    ],
)
def test_a_device_that_torch_does_not_find(order, capsys, monkeypatch, comfyui, count, said):
    """It is not the CPU, or another one, in silence."""
    own(monkeypatch, None)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    assert main(["--device", "0", "--out", "out", "a.safetensors"]) == 2
    assert said in capsys.readouterr().err and not Path("out").exists()


def test_comfyui_is_found(monkeypatch, tmp_path, comfyui):
    from comfyui_modelopt.conversion import comfyui as finder

    for name in finder.WANTED:
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    nested = tmp_path / "ComfyUI" / "custom_nodes" / "pack"
    nested.parent.mkdir()
    nested.symlink_to(tmp_path / "checkout", target_is_directory=True)
    monkeypatch.setattr(finder, "ROOT", nested)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert finder.find(None) == tmp_path / "ComfyUI"
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert finder.find(None) == comfyui.absolute()
    assert finder.find(tmp_path / "ComfyUI") == tmp_path / "ComfyUI"
    monkeypatch.setattr(finder, "ROOT", tmp_path / "elsewhere" / "a" / "b")
    monkeypatch.delenv("COMFYUI_PATH")
    with pytest.raises(UsageError, match="there is none around"):
        finder.find(None)


def test_examples_of_the_readme(tmp_path):
    """Every command that it shows is one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?!`).*\bpython convert\.py ([^`\n]*?)(?: &)?$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        found = options.parser().parse_intermixed_args([*shlex.split(command), "one.safetensors"])
        assert str(found.out).startswith(("/models/", "/shared/"))
    assert '[sys.executable, "convert.py", file, "--out", "/shared/fp8"]' in text
