"""What a file holds is checked at loading: every bit of it, with the name of what differs."""

from __future__ import annotations

import errno
import json
import os
import threading
import time

import pytest
import torch
from comfyui_modelopt.utils import checksums
from comfyui_modelopt.utils.files import save_safetensors
from safetensors.torch import load_file, save_file


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"b": torch.arange(40, dtype=torch.int8), "a": torch.randn(3, 5), "c": torch.ones(0)}
    save_safetensors(tensors, path, {"ours": "{}", "more": "ä"})
    return path


def start_of_data(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_a_good_file(saved):
    assert checksums.check(saved)


def test_every_flipped_bit_of_the_data_is_found(saved):
    data = saved.read_bytes()
    start = start_of_data(data)
    for place in range(start, len(data)):
        for bit in (0, 7):
            made = bytearray(data)
            made[place] ^= 1 << bit
            saved.write_bytes(made)
            name = "a" if place < start + 60 else "b"  # wide dtypes come first
            with pytest.raises(ValueError, match=f"the bytes of {name} must be.*x.safetensors"):
                checksums.check(saved)


def test_tensors_that_changed_places(saved):
    """Alike in dtype and shape, so that nothing else shows it."""
    save_safetensors(
        {"a": torch.ones(4), "b": torch.zeros(4)}, saved.with_name("y.safetensors"), {"ours": "{}"}
    )
    path = saved.with_name("y.safetensors")
    data = path.read_bytes()
    swapped = data.replace(b'"a":', b'"?":').replace(b'"b":', b'"a":').replace(b'"?":', b'"b":')
    path.write_bytes(swapped)
    assert torch.equal(load_file(path)["a"], torch.zeros(4))
    with pytest.raises(ValueError, match="the bytes of a must be those that were saved"):
        checksums.check(path)


def rewritten(path, change):
    """Saved by other code, with the metadata of before."""
    data = path.read_bytes()
    metadata = json.loads(data[8 : start_of_data(data)])["__metadata__"]
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("a"), "the 3 tensors that were saved, found 2"),
        (lambda t, m: t.update(a=t["a"].half()), "the bytes of a must be"),
        (lambda t, m: t.update(a=t["a"].reshape(5, 3)), "the bytes of a must be"),
        (lambda t, m: m.update(ours="[]"), "ours of the header must be as it was saved"),
        (lambda t, m: m.pop("more"), "more is missing"),
        (lambda t, m: m.update({checksums.ENTRY: "{}"}), "must list checksums, found '{}'"),
        (lambda t, m: m.update({checksums.ENTRY: "[" * 9999}), "must list checksums"),
    ],
)
def test_what_else_is_found(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        checksums.check(saved)
    assert str(saved) in str(caught.value)


def test_what_may_change(saved):
    """Other order, other padding, metadata of others; and files without checksums."""
    rewritten(saved, lambda t, m: m.update({"modelspec.title": "mine"}))
    assert checksums.check(saved)
    rewritten(saved, lambda t, m: m.pop(checksums.ENTRY))
    assert not checksums.check(saved)


def test_a_file_that_is_cut_off_while_it_is_read(saved, monkeypatch):
    """A short read is an error with the file's name; a mapped file would end the process."""
    header = checksums._header

    def cut(file, path):
        found = header(file, path)
        data = saved.read_bytes()
        saved.write_bytes(data[: start_of_data(data) + 30])
        return found

    monkeypatch.setattr(checksums, "_header", cut)
    with pytest.raises(ValueError, match="30 bytes of a are missing at the end of .*x.safetensors"):
        checksums.check(saved)


def test_in_several_threads_as_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "WORTH_A_THREAD", 1000)
    monkeypatch.setattr(checksums, "PIECE", 333)
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": torch.randint(0, 9, (100 + i,), dtype=torch.uint8) for i in range(50)}
    save_safetensors(tensors, path, {"ours": "{}"})
    assert checksums.check(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the bytes of t9 must be"):
        checksums.check(path)


class Broken:
    """A file of a disk that fails after the header."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def seek(self, *_):
        raise self.error


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (
            errno.EIO,
            ValueError,
            "must be a file that can be read, got .*Input/output.*permissions and the disk",
        ),
        (errno.ENOMEM, OSError, "Cannot allocate memory"),
    ],
)
def test_a_disk_that_fails_while_it_is_read(saved, monkeypatch, number, kind, message):
    def opened(path, mode, buffering=-1):
        return (
            open(path, mode, buffering)
            if buffering
            else Broken(OSError(number, os.strerror(number)))
        )

    monkeypatch.setattr(checksums, "open", opened, raising=False)
    with pytest.raises(kind, match=message):
        checksums.check(saved)


def settled(path):
    """As if it had been written a minute ago."""
    os.utime(path, (time.time() - 60,) * 2)


def test_progress(saved):
    told, threads = [], set()

    def step(size: int) -> None:
        told.append(size)
        threads.add(threading.current_thread())

    checksums.check(saved, step)
    assert sum(told) == 3 * 5 * 4 + 40
    assert threads == {threading.current_thread()}


def test_cancel(saved, monkeypatch):
    """Ends the threads too, long before the end."""
    calls, crc32 = [], checksums.zlib.crc32

    def slow(*args):
        time.sleep(0.02)
        calls.append(args)
        return crc32(*args)

    def cancel(size: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checksums, "PIECE", 1)
    monkeypatch.setattr(checksums, "TICK", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(checksums.zlib, "crc32", slow)
        patch.setattr(checksums, "check_metadata", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            checksums.check(saved, cancel)
    assert len(calls) < 20


def test_what_was_checked_is_not_checked_again_until_it_changes(saved, monkeypatch):
    monkeypatch.setattr(checksums, "UNSETTLED", 0.0)
    settled(saved)
    assert checksums.check(saved)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_check", lambda *_: pytest.fail("checked again"))
        assert checksums.check(saved)
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    settled(saved)
    with pytest.raises(ValueError, match="the bytes of b must be"):
        checksums.check(saved)


def test_what_was_written_while_it_was_checked_is_checked_again(saved, monkeypatch):
    """A check may take longer than a change needs to be told by its time."""
    monkeypatch.setattr(checksums, "UNSETTLED", 0.3)
    check = checksums._check

    def slow(*given):
        time.sleep(0.5)
        return check(*given)

    monkeypatch.setattr(checksums, "_check", slow)
    os.utime(saved)
    assert checksums.check(saved)
    assert not any(key[0] == str(saved) for key in checksums._checked)


def test_what_was_written_just_now_is_checked_again(saved):
    """Its next change may have the same time."""
    assert checksums.check(saved)
    assert not any(key[0] == str(saved) for key in checksums._checked)
