"""The calibration nodes: what a workflow relies on, and files inside their folder only."""

import asyncio
import json
import os
import time
from pathlib import Path

import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy_api.latest import io
from comfyui_modelopt.nodes import folders, load_calibration
from comfyui_modelopt.nodes.auto_quantize import AutoQuantize
from comfyui_modelopt.nodes.calibration_prompts import CalibrationPrompts
from comfyui_modelopt.nodes.import_checkpoint import ImportCheckpoint
from comfyui_modelopt.nodes.load_calibration import LoadCalibration
from comfyui_modelopt.nodes.load_unet import LoadUNet
from comfyui_modelopt.nodes.record_calibration import RecordCalibration
from comfyui_modelopt.nodes.save_calibration import SaveCalibration
from comfyui_modelopt.nodes.save_unet import SaveUNet
from comfyui_modelopt.quantize import calibration as calibration_file
from comfyui_modelopt.quantize import prompts as prompt_list
from comfyui_modelopt.quantize.bridge import sampling
from comfyui_modelopt.quantize.calibration import Calibration, Record, Run
from comfyui_modelopt.utils.whole_file import NameTaken

SAMPLER = ["steps", "cfg", "sampler_name", "scheduler"]
NODES = {
    RecordCalibration: (
        "ModelOptRecordCalibration",
        ["model", "seed", *SAMPLER, "positive", "negative", "latent_image", "denoise"]
        + ["max_records", "calibration"],
        ["LATENT", "MODELOPT_CALIBRATION"],
    ),
    CalibrationPrompts: (
        "ModelOptCalibrationPrompts",
        ["model", "clip", "prompts", "negative", "width", "height", *SAMPLER]
        + ["seed", "max_records"],
        ["MODELOPT_CALIBRATION"],
    ),
    SaveCalibration: ("ModelOptSaveCalibration", ["calibration", "filename_prefix"], []),
    LoadCalibration: ("ModelOptLoadCalibration", ["calibration_name"], ["MODELOPT_CALIBRATION"]),
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty models folder; gives where calibrations go."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.CALIBRATION, ([], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "models" / "modelopt" / "calibration"


def a_calibration(value: float = 1.0) -> Calibration:
    record = Record(torch.full((1, 4, 2, 2), value), torch.ones(1))
    return Calibration((Run((record,), calls=1),), {"in_channels": 4}, "a.safetensors")


def saved(prefix: str = "mine") -> Path:
    return Path(SaveCalibration.execute(a_calibration(), prefix).ui["text"][0])


# --- schemas ---


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_ids_inputs_and_outputs_are_the_contract(node, models):
    node_id, inputs, outputs = NODES[node]
    info = node.GET_NODE_INFO_V1()
    assert json.loads(json.dumps(info))["name"] == node_id
    assert info["category"] == "ModelOpt" and info["display_name"].endswith("(ModelOpt)")
    named = info["input"]["required"] | info["input"].get("optional", {})
    assert list(named) == inputs
    assert list(info["input"].get("optional", {})) == (
        ["calibration"] if node is RecordCalibration else []
    )
    assert info["output"] == outputs
    assert info["output_node"] is (node is SaveCalibration)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_everything_is_explained(node, models):
    schema = node.GET_SCHEMA()
    assert len(schema.description) > 20
    for item in (*schema.inputs, *schema.outputs):
        assert item.tooltip and item.tooltip.strip().endswith("."), item


def test_settings_are_ksamplers(models):
    import nodes

    theirs = nodes.KSampler.INPUT_TYPES()["required"]
    ours = RecordCalibration.GET_NODE_INFO_V1()["input"]["required"]
    assert [name for name in ours if name != "max_records"] == list(theirs)
    for name in ("seed", "steps", "cfg", "denoise"):
        for key in ("min", "max", "step", "round"):
            assert ours[name][1].get(key) == theirs[name][1].get(key), (name, key)
    assert ours["sampler_name"][1]["options"] == comfy.samplers.KSampler.SAMPLERS
    assert ours["scheduler"][1]["options"] == comfy.samplers.KSampler.SCHEDULERS
    records = ours["max_records"][1]
    assert (records["default"], records["min"], records["max"]) == (64, 1, 4096)


# --- what execute hands on ---


def test_record_finds_the_prompt_in_the_workflow(monkeypatch):
    seen, made = {}, a_calibration()

    def record(model, **named):
        seen.update(named, model=model)
        return {"samples": 1}, made

    monkeypatch.setattr(sampling, "record", record)
    workflow = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox"}},
        "2": {"class_type": "ModelOptRecordCalibration", "inputs": {"positive": ["1", 0]}},
    }
    hidden = io.HiddenHolder.from_dict({io.Hidden.prompt: workflow, io.Hidden.unique_id: "2"})
    node = RecordCalibration.PREPARE_CLASS_CLONE({"hidden_inputs": vars(hidden)})
    node.hidden = hidden
    out = node.execute(model="m", seed=3)
    assert out.result == ({"samples": 1}, made)
    assert out.ui["text"][0].startswith("Calibration: 1 UNet calls of 1 run at ")
    assert seen == {"model": "m", "seed": 3, "prompt": "a fox"}


def test_prompts_are_split_by_line(monkeypatch):
    seen, made = {}, a_calibration()
    monkeypatch.setattr(sampling, "record_prompts", lambda **named: seen.update(named) or made)
    assert CalibrationPrompts.execute(prompts="a\n\n b ", steps=3).result == (made,)
    assert seen == {"prompts": ["a", "b"], "steps": 3}


def test_blank_prompts_are_caught_before_the_run():
    assert "at least 1 prompt" in CalibrationPrompts.validate_inputs(prompts=" \n\t\n")
    assert CalibrationPrompts.validate_inputs(prompts="a cat") is True
    assert CalibrationPrompts.validate_inputs(prompts=None) is True
    default = CalibrationPrompts.GET_NODE_INFO_V1()["input"]["required"]["prompts"][1]["default"]
    assert tuple(prompt_list.split(default)) == prompt_list.BUILT_IN


# --- files ---


def test_nothing_is_made_before_something_is_saved(models):
    assert LoadCalibration.GET_NODE_INFO_V1()["input"]["required"]["calibration_name"][1] == {
        "tooltip": "A file of models/modelopt/calibration.",
        "options": [],
        "multiselect": False,
    }
    assert not models.parent.parent.exists()


def test_save_then_load(models):
    path = saved("sub/mine")
    assert path == models / "sub" / "mine_00001_.safetensors"
    assert folders.names(folders.CALIBRATION) == [os.path.join("sub", path.name)]
    name = folders.names(folders.CALIBRATION)[0]
    assert LoadCalibration.validate_inputs(calibration_name=name) is True
    (back,) = LoadCalibration.execute(name).result
    assert len(back) == 1 and back.source == "a.safetensors"


def test_saving_again_numbers_on(models):
    names = [saved().name for _ in range(3)]
    assert names == [f"mine_0000{i}_.safetensors" for i in (1, 2, 3)]
    assert saved("other").name == "other_00001_.safetensors"
    assert saved("mine.safetensors").name == "mine_00004_.safetensors"  # as users type it
    assert len(list(models.iterdir())) == 5


def test_a_date_in_the_prefix_is_filled_in(models):
    years = {time.strftime("%Y")}
    path = saved("%year%/mine")
    assert path.parent.name in years | {time.strftime("%Y")}  # new year's eve


BAD = [
    "../x",
    "a/../../x",
    "..",
    "/absolute/x",
    "..\\x",
    "a\\..\\..\\x",
    "C:\\x",
    "C:x",
    "\\\\pc\\d\\x",
]
BAD += ["", ".", "x\0y", "link/x", "...safetensors", "a/...safetensors"]


@pytest.mark.parametrize("prefix", BAD)
def test_a_prefix_that_leaves_the_folder_is_refused(models, prefix, tmp_path):
    models.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    if prefix == "link/x":
        try:
            (models / "link").symlink_to(outside)
        except OSError as error:  # Windows asks for a right that not everybody has
            pytest.skip(f"no links can be made here: {error}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="inside ComfyUI's models folder, got .*: use a plain"):
        saved(prefix)
    assert sorted(tmp_path.rglob("*")) == before
    assert "use a plain name" in SaveCalibration.validate_inputs(filename_prefix=prefix)


@pytest.mark.parametrize(
    "prefix",
    ["mine", "a/b/mine", "v1.5..final", "mine/", "ü %month%", ".safetensors", "a/.safetensors"],
)
def test_an_ordinary_prefix_is_accepted(models, prefix):
    assert SaveCalibration.validate_inputs(filename_prefix=prefix) is True
    assert saved(prefix).is_relative_to(models)


def test_an_unwritable_folder_is_an_error(models):
    models.parent.parent.mkdir()
    models.parent.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="writable folder, got .*: change its permissions"):
        saved()
    assert models.parent.read_text().startswith("a file")


def test_a_missing_file_is_caught_before_the_run(models):
    message = LoadCalibration.validate_inputs(calibration_name="gone.safetensors")
    assert "got 'gone.safetensors'" in message and "choose another" in message
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        LoadCalibration.execute("gone.safetensors")
    assert LoadCalibration.validate_inputs(calibration_name=None) is True


def test_how_a_missing_file_was_made_is_told_in_brief(models):
    def told(made_by):
        return LoadUNet.validate_inputs("gone.safetensors", made_by)

    assert "was made by: a.safetensors: fp8, max. Quantize" in told("a.safetensors: fp8, max")
    strange = told("\x1b[2J" * 10**5)
    assert len(strange) < 3000 and strange.isprintable()
    for no_text in ([1], {"a": 1}, 5, None, ""):
        assert "made by" not in told(no_text)


@pytest.mark.parametrize("value", [5, {}, ["a"], True, 1.5])
def test_names_that_are_no_text_are_refused(value):
    """A workflow's JSON may hold anything."""
    for node, key in (
        (LoadCalibration, "calibration_name"),
        (LoadUNet, "unet_name"),
        (ImportCheckpoint, "checkpoint_name"),
        (SaveUNet, "filename_prefix"),
    ):
        assert "got " in node.validate_inputs(**{key: value})
        if node is not SaveUNet:
            assert "missing" in node.fingerprint_inputs(value)
    target = {"target": "recipe", "recipe": value}
    assert "must be JSON text" in AutoQuantize.validate_inputs(target=target)


def test_loading_cannot_leave_the_folder(models, tmp_path):
    saved()
    calibration_file.save(a_calibration(), tmp_path / "outside.safetensors")
    name = os.path.join("..", "..", "..", "outside.safetensors")
    with pytest.raises(ValueError, match="outside"):
        LoadCalibration.execute(name)


def test_the_fingerprint_changes_with_the_file_only(models):
    name = saved().name
    path = models / name
    first = LoadCalibration.fingerprint_inputs(name)
    assert LoadCalibration.fingerprint_inputs(name) == first
    state = path.stat()
    path.unlink()
    assert LoadCalibration.fingerprint_inputs(name) != first
    calibration_file.save(a_calibration(2.0), path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert LoadCalibration.fingerprint_inputs(name) != first
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with open(path, "ab") as file:
        file.write(b" ")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert LoadCalibration.fingerprint_inputs(name) != first


def test_a_folder_of_the_users_own_comes_first(models, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, folders.CALIBRATION, ([str(mine)], set())
    )
    assert saved() == mine / "mine_00001_.safetensors"
    assert folders.names(folders.CALIBRATION) == ["mine_00001_.safetensors"]


# --- ComfyUI's own validation ---


def test_comfyui_reports_our_reason_for_a_missing_file(models, monkeypatch):
    import execution

    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "ModelOptLoadCalibration", LoadCalibration)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "ModelOptSaveCalibration", SaveCalibration)
    workflow = {
        "1": {
            "class_type": "ModelOptLoadCalibration",
            "inputs": {"calibration_name": "gone.safetensors"},
        },
        "2": {
            "class_type": "ModelOptSaveCalibration",
            "inputs": {"calibration": ["1", 0], "filename_prefix": "../x"},
        },
    }
    valid, _, _, errors = asyncio.run(execution.validate_prompt("id", workflow, None))
    assert not valid
    text = json.dumps(errors)
    assert "gone.safetensors" in text and "choose another" in text
    assert load_calibration.__name__.startswith("comfyui_modelopt.")


def test_a_number_that_another_process_takes_meanwhile(models, monkeypatch):
    """The next one is taken: what took an hour is not lost."""
    write = calibration_file.save_safetensors

    def beaten(tensors, path, *args):
        if path.name == "mine_00001_.safetensors":
            path.write_bytes(b"another's")
        write(tensors, path, *args)

    monkeypatch.setattr(calibration_file, "save_safetensors", beaten)
    assert saved().name == "mine_00002_.safetensors"
    assert (models / "mine_00001_.safetensors").read_bytes() == b"another's"
    assert len(list(models.iterdir())) == 2


def test_names_that_are_all_taken_end_the_saving(models, monkeypatch):
    def taken(tensors, path, *args):
        path.write_bytes(b"another's")
        raise NameTaken(f"a file is never overwritten, {path} exists: choose another name")

    monkeypatch.setattr(calibration_file, "save_safetensors", taken)
    with pytest.raises(FileExistsError, match="never overwritten"):
        saved()
    assert len(list(models.iterdir())) == folders.TRIES


def test_cancel_while_saving(models):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        saved()
    assert list(models.iterdir()) == []


def test_what_a_killed_save_left_in_another_subfolder_is_removed(models):
    (models / "a" / "b").mkdir(parents=True)
    left = models / "a" / "b" / f".mine.{'0' * 8}.{'0' * 8}.partial"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    saved()
    assert list((models / "a" / "b").iterdir()) == []
