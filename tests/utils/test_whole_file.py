"""What killed saves left is removed, and nothing that somebody writes now."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time

import pytest
from comfyui_modelopt.utils import sha256
from comfyui_modelopt.utils import whole_file as module
from comfyui_modelopt.utils.whole_file import NameTaken, remove_left, whole_file

posix = pytest.mark.skipif(os.name == "nt", reason="locks that go with a process are POSIX")
HOLD = (
    "import fcntl, sys; file = open(sys.argv[1], 'xb'); fcntl.flock(file, fcntl.LOCK_EX)\n"
    "print('held', flush=True); sys.stdin.read()"
)


def save(folder, name="x.safetensors", data=b"whole"):
    with whole_file(folder / name, len(data)) as file:
        file.write(data)


def left_by(machine: str, name="x.safetensors") -> str:
    return f".{name}.{machine}.{'0' * 8}.partial"


@posix
def test_the_next_save_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / left_by(module._machine())).write_bytes(b"half")
    (tmp_path / left_by(module._machine(), "another\nname")).write_bytes(b"half")
    (tmp_path / ".not.ours.partial").write_bytes(b"")
    save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".not.ours.partial", "x.safetensors"]


@posix
def test_what_is_being_written_stays(tmp_path):
    live = tmp_path / left_by(module._machine())
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD, live], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"held\n"
    os.utime(live, (0, 0))
    save(tmp_path)
    assert live.exists()
    writer.kill()
    writer.wait()
    remove_left(tmp_path)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_another_machines_and_an_earlier_versions_stay_until_they_are_given_up(tmp_path):
    for name in (left_by("0" * 8), ".x.safetensors.01234567.partial"):
        path = tmp_path / name
        path.write_bytes(b"half")
        remove_left(tmp_path)
        assert path.exists()
        os.utime(path, (0, time.time() - module.GIVEN_UP - 60))
        remove_left(tmp_path)
        assert not path.exists()


@posix
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", none)
    path = tmp_path / left_by(module._machine())
    path.write_bytes(b"perhaps being written")
    save(tmp_path)
    assert path.exists()
    os.utime(path, (0, time.time() - module.GIVEN_UP - 60))
    save(tmp_path, "y")
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors", "y"]


@posix
def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    save(tmp_path)
    with pytest.raises(NameTaken), whole_file(tmp_path / "y", 1) as file:
        file.write(b"late")
        (tmp_path / "y").write_bytes(b"faster")
    assert (tmp_path / "y").read_bytes() == b"faster"
    assert (tmp_path / "x.safetensors").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors", "y"]


@posix
def test_a_name_of_full_length(tmp_path):
    name = "ü" * 120 + ".safetensor"  # 251 bytes
    save(tmp_path, name)
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_another_process_makes_meanwhile(tmp_path, monkeypatch):
    folder, make = tmp_path / "new", os.makedirs

    def beaten(path, *args, **kwargs):
        make(path, exist_ok=True)
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", beaten)
    save(folder)
    assert os.listdir(folder) == ["x.safetensors"]


def test_a_partial_that_cannot_be_removed_is_named(tmp_path, monkeypatch, caplog):
    def fails(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module.Path, "unlink", fails)
    with pytest.raises(OSError, match="saving needs a folder"), whole_file(tmp_path / "x", 1):
        raise OSError(errno.EIO, "Input/output error")
    assert "remove it by hand" in caplog.text


def test_a_source_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "gone.safetensors"
    path.write_bytes(b"x")
    monkeypatch.setattr(module.Path, "open", broken)
    with pytest.raises(OSError, match="must be readable, for its hash.*gone.safetensors"):
        sha256.of(path)


@pytest.fixture
def windows(monkeypatch):
    """What is done there. A file that somebody has open can be neither renamed nor removed."""
    monkeypatch.setattr(module, "WINDOWS", True)
    monkeypatch.setattr(module, "BETWEEN", 0.001)


def held(monkeypatch, times: int) -> list:
    calls, rename = [], os.rename

    def refused(*args):
        calls.append(args)
        if len(calls) <= times:
            raise PermissionError(errno.EACCES, "used by another process")
        rename(*args)

    monkeypatch.setattr(os, "rename", refused)
    return calls


def test_a_virus_scanner_that_holds_the_file_for_a_moment(tmp_path, monkeypatch, windows):
    calls = held(monkeypatch, 3)
    save(tmp_path)
    assert len(calls) == 4 and os.listdir(tmp_path) == ["x.safetensors"]


def test_one_that_does_not_let_go(tmp_path, monkeypatch, windows):
    held(monkeypatch, 10**6)
    with pytest.raises(OSError, match="saving needs a folder.*used by another process"):
        save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_another_process_writes_is_not_opened(tmp_path, monkeypatch, windows):
    live, left = tmp_path / left_by("0" * 8), tmp_path / left_by("1" * 8)
    for path in (live, left):
        path.write_bytes(b"half")
    os.utime(left, (0, time.time() - module.GIVEN_UP - 60))
    monkeypatch.setattr(os, "open", lambda *_args, **_kwargs: pytest.fail("opened"))
    remove_left(tmp_path)
    assert os.listdir(tmp_path) == [live.name]


def test_only_what_was_removed_is_told(tmp_path, monkeypatch, caplog, windows):
    def fails(self, missing_ok=False):
        raise PermissionError(errno.EACCES, "used by another process")

    path = tmp_path / left_by("0" * 8)
    path.write_bytes(b"half")
    os.utime(path, (0, time.time() - module.GIVEN_UP - 60))
    with caplog.at_level("INFO"):
        monkeypatch.setattr(module.Path, "unlink", fails)
        remove_left(tmp_path)
    assert len(caplog.messages) == 1 and "remove it by hand" in caplog.text


@posix
def test_a_folder_that_goes_while_folders_are_looked_through(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    (folder / left_by("0" * 8)).write_bytes(b"half")
    (tmp_path / left_by(module._machine())).write_bytes(b"half")
    walk = os.walk

    def meanwhile(root):
        found = list(walk(root, topdown=False))
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(os, "walk", meanwhile)
    module.remove_left_below(tmp_path)
    assert os.listdir(tmp_path) == []
