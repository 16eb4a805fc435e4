"""Lines on a terminal and in a log, where a disk may be full."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest
from comfyui_modelopt.conversion import reporter
from comfyui_modelopt.conversion.reporter import CONVERTED, PAUSE, Log, Reporter, Result

FILE = Path("sdxl.safetensors")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    def write(self, text: str = "") -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = write


@pytest.fixture
def clock(monkeypatch):
    """Seconds, to be set."""
    now = [1000.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now[0])
    return now


def work(clock, stream, seconds: int, quiet: bool = False, log: Log | None = None) -> str:
    """What is written of a file that takes so long, a hundredth a second. log: around the stream."""
    told = Reporter([FILE], stream=log or stream, quiet=quiet)
    told.begin(FILE)
    told.step("Calibrating\nThe original")
    for second in range(seconds):
        clock[0] += 1
        told.count(second + 1, 100)
    told.end(FILE, Result(str(FILE), CONVERTED, "out.safetensors"))
    return stream.getvalue()


def test_a_log_says_every_half_minute_what_is_done(clock):
    lines = work(clock, io.StringIO(), 100).splitlines()
    assert PAUSE == 30
    shown = [f"{FILE}: The original {share} %" for share in (30, 60, 90)]
    assert lines[:-1] == shown and lines[-1].startswith(f"[1/1] {FILE} -> out.safetensors")


def test_a_log_of_quick_files_has_a_line_for_each(clock):
    (line,) = work(clock, io.StringIO(), 29).splitlines()
    assert line.startswith("[1/1]")


def test_a_quiet_log_stays_empty(clock):
    assert work(clock, io.StringIO(), 100, quiet=True) == ""


def test_a_terminals_line_is_written_over(clock):
    text = work(clock, Terminal(), 40)
    assert text.count("\n") == 1 and f"\r{FILE}: The original 40 %" in text


def test_a_full_disk_under_the_log_stops_nothing(clock):
    with pytest.raises(OSError, match="No space left"):
        work(clock, Full(), 40)
    full = Full()
    assert work(clock, full, 40, log=Log(full)) == ""
    held = io.StringIO()
    assert Log(held).write("abc") == 3 and held.getvalue() == "abc" and not Log(held).isatty()
    Log(Full()).writelines(["abc"])
    print("abc", file=Log(Full()), flush=True)
