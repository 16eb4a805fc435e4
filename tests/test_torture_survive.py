"""Kills, faults and cancels, the short form of `dev.py torture`; and what the long one found."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.devtools.torture import cancels, disks, faults, kills, points
from comfyui_modelopt.devtools.torture.outcome import Effort
from comfyui_modelopt.devtools.torture.subject import Subject, temporary_files
from comfyui_modelopt.formats.checkpoint import Layer, QuantizedCheckpoint

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork, which Windows has not")


def ended_well(row, tried: int) -> None:
    assert row.findings == []
    assert row.tried >= tried


@posix
def test_killed_saves(tmp_path, calibration):
    tensors = {
        "a.weight": torch.zeros(300, 64, dtype=torch.int8),
        "a.weight_scale": torch.ones(300, 1),
    }
    checkpoint = QuantizedCheckpoint(tensors, {"a": Layer("int8", "linear")}, {"recipe": {}})
    its = SimpleNamespace(checkpoint=checkpoint, recorded=calibration, folder=tmp_path)
    ended_well(kills.kill_saves(kills.Saves(its), Effort(), 30), 30)


@pytest.fixture(scope="module")
def its(sd15, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    patches = comfy.utils.load_torch_file(str(checkpoints / "lora.safetensors"))
    with temporary_files(folder):
        model, _ = comfy.sd.load_lora_for_models(sd15[0], sd15[1], patches, 0.8, 0.8)
        yield Subject(folder / "subject", model, sd15[1], sd15[2])


def some(where: list[int], count: int) -> list[int]:
    """So many, evenly, first and last among them."""
    return sorted({where[round(i * (len(where) - 1) / (count - 1))] for i in range(count)})


@pytest.mark.slow
@pytest.mark.parametrize("job", ["quantize", "save"])
def test_cancelled_jobs(its, job):
    where = some(range(len(points.count(its, job, cancels.looks))), 3)
    trial = points.Trial(its, job, cancels.looks, cancels.cancel, cancels.judge)
    ended_well(trial.rows("cancels", job, where, Effort(), "right"), len(where))


@pytest.mark.slow
def test_memory_that_runs_out(its):
    where = some(
        faults.of_each_line(points.count(its, "quantize", faults.allocations, faults.line)), 6
    )
    trial = points.Trial(
        its, "quantize", faults.allocations, faults.out_of_memory, faults.says_memory
    )
    ended_well(trial.rows("faults", "memory", where, Effort(), "right"), len(where))


@pytest.mark.slow
def test_modelopt_that_fails(its):
    where = some(range(len(points.count(its, "quantize", faults.quantizer_calls))), 3)
    trial = points.Trial(
        its, "quantize", faults.quantizer_calls, faults.modelopt_fails, faults.says_modelopt
    )
    ended_well(trial.rows("faults", "ModelOpt", where, Effort(), "right"), len(where))


@pytest.mark.slow
def test_disks_that_fail(its):
    def calls(reached):
        return faults.file_calls(reached, str(its.folder))

    where = some(range(len(points.count(its, "save", calls))), 6)
    trial = points.Trial(its, "save", calls, faults.disk_fails, faults.says_file)
    ended_well(trial.rows("faults", "disk", where, Effort(), "right"), len(where))
    for row in disks.rows(its, Effort(0.5)):
        ended_well(row, 2)


@posix
def test_a_copy_that_hangs_is_ended():
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    os.close(write)
    assert points.heard(pid, read, 0.1) == ["it hung for 0 s"]


@posix
@pytest.mark.e2e
def test_two_servers_and_two_prompts_save_under_one_name():
    from comfyui_modelopt.devtools.torture import side_by_side

    for row in side_by_side.run(Effort(0.2), lambda text: None):
        ended_well(row, 1)
