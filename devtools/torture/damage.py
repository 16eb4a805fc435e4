"""Damaged and hostile files: each a clear error that names the file, or a model equal to the undamaged
one; no crash, no hang over 10 s, nothing executed, memory bounded by the file's size.

Files are opened in a process of its own. Its memory is looked at from outside every other millisecond:
what is resident without being a page of a file (Linux only), because a mapped file counts as resident
though the system takes its pages back at will. A finding is repeated by its kind, number and seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..common import ROOT
from .mutations import cases
from .outcome import Effort, Row

NAME = "damage"
SECONDS = 10.0
SHARE, CONSTANT = 1.3, 96 * 2**20  # of the file, and bytes
LOOK = 0.002  # seconds between two looks at the memory
START = 300.0
CODE = (
    f"import sys; sys.path.append({str(ROOT)!r}); del sys.path[0]; "
    "from devtools.torture.mutations import worker; sys.exit(worker.main())"
)
MAKE = (
    f"import sys; sys.path.append({str(ROOT)!r}); del sys.path[0]; "
    "from pathlib import Path; from devtools import inprocess; inprocess.load(); "
    "from devtools.torture.mutations import samples; samples.make_all(Path(sys.argv[1]))"
)


def run(effort: Effort, say: Callable[[str], None]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        say("making the undamaged files")
        made = Path(folder) / "samples"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MAKE, str(made)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        yield from run_on(made, effort, say)


def run_on(made: Path, effort: Effort, say: Callable[[str], None], only: str = "") -> Iterator[Row]:
    """made: the folder of samples; kinds whose name holds `only` and whose samples are there."""
    with tempfile.TemporaryDirectory() as folder, _Process(made, Path(folder)) as process:
        for kind, one in cases.KINDS.items():
            if only not in kind or not any(made.glob(one.samples)):
                continue
            row = Row(NAME, kind)
            for number in range(effort.count(one.count)):
                if effort.over:
                    break
                outcome, finding = process.case(kind, number, effort.seed)
                if finding is None:
                    row.outcomes[outcome] += 1
                else:
                    row.findings.append(f"number {number}, seed {effort.seed}, {finding}")
                    say(f"{kind}: {row.findings[-1]}")
            yield row


class _Process:
    """Started where it is needed, and again after it ended."""

    def __init__(self, made: Path, folder: Path):
        self.made, self.folder = made, folder
        self.process: subprocess.Popen | None = None
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def start(self) -> None:
        self.count += 1
        place = self.folder / str(self.count)
        place.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(self.made), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.folder / "stderr", "wb"),  # noqa: SIM115
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.answer(START)

    def case(self, kind: str, number: int, seed: int) -> tuple[str, str | None]:
        """-> outcome, and None or what was found."""
        if self.process is None:
            self.start()
        prepared, _ = self.ask(f"prepare\t{kind}\t{number}\t{seed}", START)
        if "ended" in prepared:
            said = (self.folder / "stderr").read_text(errors="replace")[-3000:]
            raise RuntimeError(
                f"case {number} of {kind!r}, seed {seed}, could not be made:\n{said}"
            )
        before = self.anonymous()
        answer, highest = self.ask("open", SECONDS)
        words = answer.get("words") or prepared["words"]
        if answer.get("ended") == "time":
            self.stop()
            return "", f"{words}: took more than {SECONDS:.0f} s"
        if "ended" in answer:
            status = self.process.wait()
            self.stop()
            if status == -signal.SIGBUS and cases.KINDS[kind].opens == "changing":
                return cases.KILLED, None
            return "", f"{words}: the process ended with status {status}"
        allowed = SHARE * prepared["bytes"] + CONSTANT
        if highest - before > allowed:
            return "", (
                f"{words}: took {(highest - before) / 2**20:.0f} MB for a file of "
                f"{prepared['bytes'] / 2**20:.2f} MB"
            )
        if "finding" in answer:
            return "", f"{words}: {answer['finding']}"
        return answer["outcome"], None

    def ask(self, command: str, seconds: float) -> tuple[dict, int]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{command}\n".encode())
            self.process.stdin.flush()
        return self.answer(seconds)

    def answer(self, seconds: float) -> tuple[dict, int]:
        """The next line, and the most memory that was held until it came."""
        end, highest = time.monotonic() + seconds, 0
        line = b""
        for ready in self.looks(end):
            if ready:
                more = os.read(self.process.stdout.fileno(), 2**16)
                line += more
                if not more:
                    return {"ended": "process"}, highest
                if line.endswith(b"\n"):
                    return json.loads(line), highest
            highest = max(highest, self.anonymous())
        return {"ended": "time"}, highest

    def looks(self, end: float) -> Iterator[bool]:
        while time.monotonic() < end:
            yield bool(select.select([self.process.stdout], [], [], LOOK)[0])

    def anonymous(self) -> int:
        """Bytes that are resident and no page of a file; 0 where the system does not tell."""
        try:
            numbers = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except OSError:
            return 0
        if len(numbers) < 3:
            return 0
        return (int(numbers[1]) - int(numbers[2])) * os.sysconf("SC_PAGE_SIZE")
