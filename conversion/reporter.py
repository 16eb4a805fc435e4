"""What a person and a program are told while it runs: lines, a progress file, a summary."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from ..utils.report import megabytes

CONVERTED, SKIPPED, FAILED, TAKEN, LEFT = "converted", "skipped", "failed", "taken", "not tried"
# seconds between two writings of the progress file
INTERVAL = 1.0
# seconds without a line in a log, where none can be written over, until one says what is being done
PAUSE = 30.0


@dataclass(frozen=True)
class Result:
    """What became of a file.

    status: CONVERTED, SKIPPED (it was there), FAILED (`error` says why), TAKEN (another process,
    named in `error`, is at it) or LEFT. bytes_before: the UNet in 16 bits; bytes_after: the file.
    """

    file: str
    status: str
    output: str
    error: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    sqnr_db: float | None = None
    seconds: float = 0.0


class Log(io.TextIOBase):
    """A stream of text whose disk may be full, or whose reader gone: what it does not take is left out,
    and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    encoding = property(lambda self: self._stream.encoding)
    errors = property(lambda self: self._stream.errors)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class Reporter:
    """total: files. progress, summary: files to keep, or None. quiet: says what failed only."""

    def __init__(
        self,
        files: Sequence[Path],
        progress: Path | None = None,
        summary: Path | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.files, self.progress, self.summary, self.quiet = files, progress, summary, quiet
        self.stream = stream or sys.stderr
        self.results: dict[Path, Result] = {}
        self.started = time.time()
        self._current: dict[str, Any] | None = None
        self._written, self._logged = 0.0, time.monotonic()
        self._refused: set[Path] = set()
        self._line = 0  # letters of the line that is written over

    def say(self, text: str, always: bool = False) -> None:
        if self.quiet and not always:
            return
        self._clear()
        self.stream.write(f"{text}\n")
        self.stream.flush()
        self._logged = time.monotonic()

    def begin(self, file: Path) -> None:
        """The file that is looked at from now on."""
        self._current = {"file": str(file), "step": "", "done": 0, "total": 0}
        self._write_progress(at_once=True)

    def step(self, text: str) -> None:
        """What is done to the file."""
        if self._current is not None:
            self._current |= {"step": text.splitlines()[-1] if text else "", "done": 0, "total": 0}
            self._write_progress(at_once=True)
            self._show()

    def count(self, done: int, total: int) -> None:
        """How far that is, in pieces of any size."""
        if self._current is not None:
            self._current |= {"done": done, "total": total}
            self._write_progress()
            self._show()

    def end(self, file: Path, result: Result) -> None:
        """What became of it."""
        self.results[file] = result
        self._current = None
        number = f"[{len(self.results)}/{len(self.files)}]"
        self.say(f"{number} {words(result)}", always=result.status == FAILED)
        self._write_progress(at_once=True)
        self._keep(self.summary, self.outcome())

    def outcome(self, status: int | None = None) -> dict[str, Any]:
        """The summary, JSON-able. status: the exit status, None while it runs."""
        rows = [self.results.get(file) or Result(str(file), LEFT, "") for file in self.files]
        return {
            "exit_status": status,
            "counts": dict(Counter(row.status for row in rows)),
            "started": stamp(self.started),
            "seconds": round(time.time() - self.started, 1),
            **_where(),
            "files": [asdict(row) for row in rows],
        }

    def finish(self, status: int) -> dict[str, Any]:
        """The last words; the summary."""
        self._current = None
        found = self.outcome(status)
        self._keep(self.summary, found)
        self._write_progress(at_once=True)
        counts = ", ".join(f"{count} {what}" for what, count in found["counts"].items())
        self.say(f"{counts} in {found['seconds']:.0f} s")
        return found

    def _keep(self, path: Path | None, value: Any) -> None:
        """Writes a file that is for others: where it cannot be written, the work goes on."""
        if path is None:
            return
        try:
            write(path, value)
        except OSError as error:
            if path not in self._refused:
                self.say(f"{path} is not kept, it cannot be written: {error}", always=True)
            self._refused.add(path)

    def _write_progress(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.progress is None or (not at_once and now - self._written < INTERVAL):
            return
        self._written = now
        done = Counter(result.status for result in self.results.values())
        facts = {
            **_where(),
            "started": stamp(self.started),
            "updated": stamp(time.time()),
            "files": len(self.files),
            "counts": dict(done),
            "current": self._current,
        }
        self._keep(self.progress, facts)

    def _show(self) -> None:
        now = self._current
        if self.quiet or not now["step"]:
            return
        share = f" {100 * now['done'] // now['total']} %" if now["total"] else ""
        text = f"{Path(now['file']).name}: {now['step']}{share}"[:100]
        if not self.stream.isatty():
            if time.monotonic() - self._logged >= PAUSE:
                self.say(text)
            return
        self.stream.write(f"\r{text.ljust(self._line)}")
        self.stream.flush()
        self._line = len(text)

    def _clear(self) -> None:
        if self._line:
            self.stream.write(f"\r{' ' * self._line}\r")
            self._line = 0


def words(result: Result) -> str:
    """A result in one line."""
    name = Path(result.file).name
    if result.status == CONVERTED:
        quality = "" if result.sqnr_db is None else f", SQNR {result.sqnr_db:.1f} dB"
        return (
            f"{name} -> {Path(result.output).name}: {megabytes(result.bytes_before or 0)} -> "
            f"{megabytes(result.bytes_after or 0)}{quality}, {result.seconds:.1f} s"
        )
    if result.status == SKIPPED:
        return f"{name}: skipped, {result.output} is there"
    if result.status == TAKEN:
        return f"{name}: left to {result.error}, which is at it"
    return f"{name}: {result.status}: {result.error}"


def write(path: Path, value: Any) -> None:
    """JSON, whole at every moment. The same name each time: what a killed process left is written over."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _where() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}
