"""The process is killed (SIGKILL) while it saves: at a byte, at a system call, at a random moment, and a
whole server. Afterwards the name is free or holds the whole file, the file that had it before is as it
was, and the next saving in that folder removes what was left. POSIX only: it needs fork."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from .outcome import Effort, NotHere, Row
from .subject import pack, subject

NAME = "kills"
FULL = 200
ON_SERVERS = 4
# system calls of a saving, as Python makes them
CALLS = ("open", "fsync", "link", "rename", "unlink", "close", "makedirs", "scandir")
HALF_WRITTEN = "FINDING: "


def die() -> NoReturn:
    """As if somebody else had killed this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class Deadly(io.FileIO):
    """A file whose process dies with byte `last`."""

    last = 0

    def write(self, data: Any) -> int:
        if self.tell() + len(data) <= self.last:
            return super().write(data)
        super().write(memoryview(data).cast("B")[: self.last - self.tell()])
        die()


def at_byte(last: int) -> None:
    """Dooms this process: it dies when so many bytes of the file have been given to the system."""

    def opened(path: Path, mode: str) -> io.BufferedWriter:
        file = Deadly(path, mode.replace("b", ""))
        file.last = last
        return io.BufferedWriter(file)

    pack("utils.whole_file").open = opened


def at_call(number: int, before: bool) -> None:
    """Dooms this process: it dies before, or after, its `number`-th system call (from 0)."""
    count = [0]

    def doomed(call: Callable) -> Callable:
        def instead(*args: Any, **kwargs: Any) -> Any:
            mine, count[0] = count[0], count[0] + 1
            if mine == number and before:
                die()
            result = call(*args, **kwargs)
            if mine == number:
                die()
            return result

        return instead

    for name in CALLS:
        setattr(os, name, doomed(getattr(os, name)))


def without_hard_links() -> None:
    """As on exFAT: the other way of giving a name."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    os.link = refused


class Saves:
    """What is saved, by name: a function of the path, and the bytes that it must write."""

    def __init__(self, kinds: dict[str, Callable[[Path], Any]], folder: Path) -> None:
        self.kinds, self.folder = kinds, folder
        self.old = self.folder / "old.safetensors"
        self.begin()
        self.bytes = {kind: self._undisturbed(kind) for kind in self.kinds}

    def begin(self) -> None:
        """The folder as it was."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.old.write_bytes(b"mine")

    def _undisturbed(self, kind: str) -> bytes:
        path = self.folder / "whole.safetensors"
        self.kinds[kind](path)
        data = path.read_bytes()
        path.unlink()
        return data

    def killed(self, kind: str, doom: Callable[[], None], seconds: float | None = None) -> bool:
        """Saves in a copy of this process. seconds: after which it is killed from outside. Returns
        whether it was killed."""
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                doom()
                self.kinds[kind](self.folder / "new.safetensors")
                os._exit(0)
            os._exit(1)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 1:
            raise AssertionError("the saving itself failed")
        return status != 0

    def outcome(self, kind: str) -> str:
        """What the kill left, after the next saving too; begins with HALF_WRITTEN for what is wrong."""
        new, after = self.folder / "new.safetensors", self.folder / "next.safetensors"
        text = "no new file"
        if new.exists():
            text = "the whole new file"
            if new.read_bytes() != self.bytes[kind]:
                return HALF_WRITTEN + f"the new file holds {new.stat().st_size} bytes"
        self.kinds[kind](after)
        if after.read_bytes() != self.bytes[kind]:
            return HALF_WRITTEN + "the next saving writes another file"
        wanted = {"old.safetensors", "next.safetensors", *([new.name] if new.exists() else [])}
        left = {path.name for path in self.folder.iterdir()} ^ wanted
        if left or self.old.read_bytes() != b"mine":
            return HALF_WRITTEN + f"after the next saving: {sorted(left) or 'the old file differs'}"
        for path in (new, after):
            path.unlink(missing_ok=True)
        return text


def case(saves: Saves, seed: int) -> tuple[str, str, bool]:
    """Kills one saving. -> how, what was left, and whether it was killed at all."""
    choice = random.Random(seed)
    kind = choice.choice(list(saves.kinds))
    size = len(saves.bytes[kind])
    links = choice.random() < 0.7
    way = choice.choice(["byte", "byte", "call", "call", "moment"])
    seconds, number, last, before = None, -1, size + 1, choice.random() < 0.5
    if way == "byte":
        last = choice.choice([0, 8, size - 1, choice.randint(0, size)])
        how = f"byte {last} of {size}"
    elif way == "call":
        number = choice.randint(0, 12)
        how = f"{'before' if before else 'after'} system call {number}"
    else:
        seconds = choice.uniform(0, 0.1)
        how = f"after {seconds:.3f} s"

    def doom() -> None:
        if not links:
            without_hard_links()
        at_byte(last)
        at_call(number, before)

    killed = saves.killed(kind, doom, seconds)
    return f"{kind}, {how}{'' if links else ', no hard links'}", saves.outcome(kind), killed


def kill_saves(saves: Saves, effort: Effort, wanted: int) -> Row:
    """So many savings that were killed; those that were faster are not counted."""
    row = Row(NAME, "saving of a quantized UNet, a calibration or an export")
    seed = effort.seed
    while row.tried < wanted and not effort.over:
        how, left, killed = case(saves, seed)
        if left.startswith(HALF_WRITTEN):
            row.findings.append(f"seed {seed} ({how}): {left.removeprefix(HALF_WRITTEN)}")
            saves.begin()
        elif killed:
            row.outcomes[f"{left}; the next saving cleaned up"] += 1
        seed += 1
    return row


def run(effort: Effort, say: Callable[[str], None]) -> Iterator[Row]:
    from . import servers

    if not hasattr(os, "fork"):
        raise NotHere("kills need fork, which Windows has not: run them on Linux or macOS")
    with subject() as its:
        saves = Saves(its.savings(), its.folder / "saves")
        yield kill_saves(saves, effort, effort.count(FULL))
    yield servers.kills(effort, effort.count(ON_SERVERS))
