"""Workers: started, asked with a time limit, and ended. Standard library only."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = (sys.executable, str(ROOT / "dev.py"), "bench", "--worker")


class Failed(Exception):
    """A worker died or was too slow; the message says which."""


class Worker:
    """One process of `worker.main`; each has a compile cache of its own, so that the first call of
    a compiled arm really compiles. `command` goes before the spec: dev.py's, but in tests."""

    def __init__(self, spec: dict, folder: Path, log: Path, command: Sequence[str] = COMMAND):
        cache = folder / "cache" / log.stem
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
        env |= {"TRITON_CACHE_DIR": str(cache / "triton"), "PYTHONUNBUFFERED": "1"}
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [*command, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
            )
        self.answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(b"")

    def ask(self, message: dict) -> None:
        """Sends a message; `answer` waits for what it gives."""
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Failed(self._died()) from error

    def answer(self, limit: float) -> dict:
        """The next answer within `limit` seconds; else the worker is ended. Raises Failed."""
        try:
            line = self.answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise Failed(f"stopped after its limit of {limit:.0f} s") from None
        if not line:
            raise Failed(self._died())
        return json.loads(line)

    def said(self, lines: int) -> str:
        """The end of what the worker wrote to standard error."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join([x for x in text.splitlines() if x.strip()][-lines:])

    def _died(self) -> str:
        status = self.process.wait(timeout=60)
        return f"its process ended with status {status}: {self.said(1).strip()}"

    def close(self) -> None:
        """Ends the process and all its memory."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                continue
