"""Kills, faults and cancels, the short form of `dev.py torture`; and what the long one found."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui_modelopt.devtools.server import Result
from comfyui_modelopt.devtools.torture import (
    cancels,
    disks,
    faults,
    kills,
    points,
    servers,
    soak,
    subject,
)
from comfyui_modelopt.devtools.torture.outcome import Effort, Row
from comfyui_modelopt.devtools.torture.subject import Subject, temporary_files
from comfyui_modelopt.formats import files
from comfyui_modelopt.formats.checkpoint import Layer, QuantizedCheckpoint
from comfyui_modelopt.quantize import records
from comfyui_modelopt.quantize.calibration import save

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
    kinds = {
        "quantized UNet": partial(files.write, checkpoint),
        "calibration": partial(save, calibration),
    }
    ended_well(kills.kill_saves(kills.Saves(kinds, tmp_path / "saves"), Effort(), 30), 30)


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
@pytest.mark.parametrize("job", ["quantize", "save", "export"])
def test_cancelled_jobs(its, job):
    where = some(range(len(points.count(its, job, cancels.looks))), 3)
    trial = points.Trial(its, job, cancels.looks, cancels.cancel, cancels.judge)
    ended_well(trial.rows("cancels", job, where, Effort(), "right"), len(where))


def test_allocations_of_the_campaign_itself_are_none_of_the_pack():
    its = Subject.__new__(Subject)
    rows = torch.zeros(4, 3).T
    its.jobs = {"made": partial(torch.zeros, 3), "kept": partial(records.keep, rows)}
    assert points.count(its, "made", faults.allocations, faults.line) == [""]
    kept = points.count(its, "kept", faults.allocations, faults.line)
    assert any("records.py:" in line for line in kept)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["quantize", "plan", "export"])
def test_memory_that_runs_out(its, job):
    where = some(faults.of_each_line(points.count(its, job, faults.allocations, faults.line)), 6)
    trial = points.Trial(its, job, faults.allocations, faults.out_of_memory, faults.says_memory)
    ended_well(trial.rows("faults", "memory", where, Effort(), "right"), len(where))


@pytest.mark.slow
def test_modelopt_that_fails(its):
    where = some(range(len(points.count(its, "quantize", faults.quantizer_calls))), 3)
    trial = points.Trial(
        its, "quantize", faults.quantizer_calls, faults.modelopt_fails, faults.says_modelopt
    )
    ended_well(trial.rows("faults", "ModelOpt", where, Effort(), "right"), len(where))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["save", "load", "load calibration", "import"])
def test_disks_that_fail(its, job):
    def calls(reached):
        return faults.file_calls(reached, str(its.folder))

    where = some(range(len(points.count(its, job, calls))), 6)
    assert len(where) > 3
    trial = points.Trial(its, job, calls, faults.disk_fails, faults.says_file)
    ended_well(trial.rows("faults", "disk", where, Effort(), "right"), len(where))


@pytest.mark.slow
def test_disks_that_are_really_full_and_folders_really_read_only(its):
    if (why := disks.why_not()) is not None:
        pytest.skip(f"no file systems of our own: {why}")
    full, locked = disks.rows(its, Effort(0.5))
    ended_well(full, 8)
    ended_well(locked, 2)


def test_disks_of_our_own_that_are_refused_are_told(monkeypatch):
    def refused():
        raise PermissionError(1, "unshare: Operation not permitted")

    monkeypatch.setattr(disks, "own_mounts", refused)
    rows = disks.rows(None, Effort())
    assert [row.tried for row in rows] == [0, 0]
    for row, kind in zip(rows, ("disk really full", "folder really read-only"), strict=True):
        assert row.kind.startswith(f"{kind}: not possible here: ")


class InAThread:
    """A job that passes three points in a thread of its own and one here, as a subject."""

    reached = staticmethod(lambda: None)

    def run(self, job):
        self.errors: list[Exception] = []
        thread = threading.Thread(target=self.work)
        thread.start()
        thread.join()
        for error in self.errors:
            raise error
        self.reached()
        return 7

    def work(self):
        try:
            for _ in range(3):
                self.reached()
        except OSError as error:
            self.errors.append(error)

    def state(self, whole=True):
        return {"threads": threading.active_count()}

    @contextmanager
    def install(self, reached):
        self.reached = reached
        yield
        del self.reached


def test_points_in_a_thread_are_met_as_those_of_the_job_itself(monkeypatch):
    monkeypatch.setattr(points, "HANG_SECONDS", 5)
    job = InAThread()
    where = range(len(points.count(job, "load", job.install)))
    assert len(where) == 4
    trial = points.Trial(
        job, "load", job.install, faults.disk_fails,
        lambda error: None if isinstance(error, OSError) else f"it ended with {error!r}",
    )  # fmt: skip
    ended_well(trial.rows("faults", "a thread", where, Effort(), "right"), 4)


class BesideAThread(InAThread):
    """A job that passes a point while a thread of its own reads a file, and one afterwards."""

    def run(self, job):
        opened, enough = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.read, opened, enough)
            opened.wait(5)
            try:
                self.reached()
            finally:
                enough.set()
        self.reached()
        return 7

    def read(self, opened, enough):
        with open(__file__, "rb"):
            opened.set()
            enough.wait(5)

    def state(self, whole=True):
        return {"open files": subject.open_files()}


@posix
def test_points_beside_a_thread_that_reads_are_met_with_that_thread(monkeypatch):
    """A copy of the process would have its file open for ever."""
    copies, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: (copies.append(1), fork())[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = BesideAThread()
    trial = points.Trial(
        job, "load", job.install, faults.disk_fails,
        lambda error: None if isinstance(error, OSError) else f"it ended with {error!r}",
    )  # fmt: skip
    ended_well(trial.rows("faults", "a thread", range(2), Effort(), "right"), 2)
    assert len(copies) == 1, "of the second point"


def judged(memory: list[int], wrong: dict[int, list[str]] | None = None, left=()) -> Row:
    row = Row("soak", "cycles")
    soak.judge(row, memory, [(wrong or {}).get(i, []) for i in range(len(memory))], list(left))
    return row


def test_the_soak_finds_what_grows_and_counts_what_was_right():
    growing = [10**9 + 2 * 10**7 * i for i in range(soak.LEAST)]
    (finding,) = judged(growing).findings
    assert finding == "1180 MB after cycle 10, 1260 MB after cycle 16 (+6.8%)"
    assert judged([10**9] * soak.LEAST).findings == []
    row = judged([10**9] * soak.LEAST, {3: ["a", "b"], 4: ["c"] * 20}, ["still open: /x"])
    assert len(row.findings) == 23
    assert list(row.outcomes.values()) == [soak.LEAST - 2]
    every = judged([10**9] * soak.LEAST, dict.fromkeys(range(soak.LEAST), ["a"]))
    assert not every.outcomes


class GpuServer:
    """A server with a GPU, which frees some looks after it was told to."""

    def __init__(self, kept: int, kind: str = "cuda"):
        self.kept, self.kind, self.looks, self.told = kept, kind, 0, []

    def request(self, path, body):
        self.told.append((path, body))
        self.looks = 0

    def get(self, path):
        assert path == "/system_stats"
        self.looks += 1
        held = 10**9 if self.looks < soak.ALIKE else self.kept
        torch_held = held - 2 * 10**7
        return {"devices": [{
            "type": self.kind, "index": 0, "vram_total": 10**10, "vram_free": 10**10 - held,
            "torch_vram_total": 2 * 10**9, "torch_vram_free": 2 * 10**9 - torch_held,
        }]}  # fmt: skip


def test_the_soak_finds_what_a_gpu_still_holds(monkeypatch):
    monkeypatch.setattr(soak, "LOOK", 0)
    server = GpuServer(3 * 10**7)
    first = soak.on_gpus(server)
    assert first == {"cuda:0 vram": 3 * 10**7, "cuda:0 torch_vram": 10**7}
    assert server.told == [("/free", {"unload_models": True, "free_memory": True})]
    server.kept += 9 * 10**6
    (torch_alone,) = soak.kept(first, soak.on_gpus(server))
    assert torch_alone == "still in use: 19 MB of cuda:0 torch_vram, 10 MB after cycle 1"
    server.kept += 10**8
    assert len(soak.kept(first, soak.on_gpus(server))) == 2
    assert soak.kept(first, first) == []
    assert soak.on_gpus(GpuServer(3 * 10**7, "cpu")) == {}


def ended(interrupted=False, seconds: float | None = None, error: str | None = None) -> Result:
    """A prompt that ended so many seconds after 100."""
    done = {"type": "execution_success", "data": {"timestamp": int(1000 * (100 + (seconds or 0)))}}
    return Result(
        "id",
        messages=[done] if seconds is not None else [],
        error={"exception_message": error} if error else None,
        interrupted=interrupted,
    )


def test_how_a_cancelled_prompt_must_end():
    assert servers.cancelled(ended(interrupted=True), 100) == ("cancelled", [])
    assert servers.cancelled(ended(seconds=-0.01), 100) == ("was faster", [])
    assert servers.cancelled(ended(seconds=9), 100)[1] == ["it went on for 9.0 s to its end"]
    (found,) = servers.cancelled(ended(error="it broke"), 100)[1]
    assert "it broke" in found


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
