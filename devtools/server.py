"""A ComfyUI server of one's own: start it, queue workflows, watch them, stop it.

Runs inside the venv (needs aiohttp, which ComfyUI brings). All calls are synchronous and may come
from any thread, so that one thread can interrupt what another one runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .common import has_gpu, link_pack

MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae", "modelopt")
START_SECONDS = 300
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerDied(RuntimeError):
    """The server process ended; the message holds the end of its log."""


class PromptRejected(RuntimeError):
    """The server refused a workflow (HTTP 400). `.response` is its JSON."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response
        super().__init__(self.explain())

    @property
    def node_errors(self) -> dict[str, Any]:
        return self.response.get("node_errors") or {}

    def explain(self) -> str:
        error = self.response.get("error") or {}
        lines = [error.get("message", str(error)) if isinstance(error, dict) else str(error)]
        for node, found in self.node_errors.items():
            lines += [
                f"{found.get('class_type')} (node {node}): {e.get('message')}: {e.get('details')}"
                for e in found.get("errors", [])
            ]
        return "\n".join(lines)


@dataclass
class Result:
    """What one run of a workflow gave. `outputs` is the history's, by node id."""

    prompt_id: str
    outputs: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    interrupted: bool = False
    seconds: float = 0.0

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The data of every message of one type, in order."""
        return [m["data"] for m in self.messages if m["type"] == kind]


@functools.cache
def cuda_works() -> bool:
    """Whether torch can use a GPU here. Asked in a process of its own: ours needs no CUDA."""
    if not has_gpu():
        return False
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """A ComfyUI process on a private base directory. Use as a context manager.

    `base` gets its own models, input, output, temp, user and custom_nodes; with `pack`, this pack
    is linked there, else it is a stock ComfyUI. `args` go to main.py, `env` adds to the environment
    (a value of None removes a variable). The log is `base/server.log`, begun anew at each start.
    """

    def __init__(
        self,
        comfyui: Path | str,
        base: Path | str,
        pack: bool = True,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
    ) -> None:
        self.comfyui = Path(comfyui).resolve()
        self.base = Path(base).resolve()
        self.pack = pack
        self.args = list(args)
        self.env = dict(env or {})
        self.models = self.base / "models"
        self.output = self.base / "output"
        self.log_file = self.base / "server.log"
        self.port = 0
        self.process: subprocess.Popen | None = None

    # --- life ---

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it answers. Raises ServerDied with the log's end if it does not."""
        for folder in MODEL_FOLDERS:
            (self.models / folder).mkdir(parents=True, exist_ok=True)
        for folder in ("input", "output", "temp", "user", "custom_nodes"):
            (self.base / folder).mkdir(exist_ok=True)
        if self.pack:
            link_pack(self.base / "custom_nodes")
        self.port = _free_port()
        database = (self.base / "user" / "comfyui.db").as_posix()
        command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", f"sqlite:///{database}"]
        command += ["--disable-api-nodes"]
        if not cuda_works() and "--cpu" not in self.args:
            command += ["--cpu"]
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **self.env}
        env = {name: value for name, value in env.items() if value is not None}
        # a process group of its own: stop() must reach the children, Ctrl-C must come to us first
        group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                command + self.args,
                cwd=self.comfyui,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **group,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the whole process tree. Does nothing if it is not running."""
        self.kill()
        process, self.process = self.process, None
        if process is not None:
            process.wait()

    def kill(self) -> None:
        """The same at once, from any thread, while another one watches what runs."""
        process = self.process
        if process is None:
            return
        if os.name == "nt":
            command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
            subprocess.run(command, capture_output=True)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        try:
            return self.log_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _died(self) -> ServerDied:
        status = "stopped" if self.process is None else f"ended with status {self.process.poll()}"
        return ServerDied(f"ComfyUI {status}. {self._log_end()}")

    def _log_end(self) -> str:
        return f"End of {self.log_file}:\n" + "\n".join(self.log.splitlines()[-40:])

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self.alive:
                raise self._died()
            try:
                self.get("/system_stats", timeout=5)
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not answer within {START_SECONDS} s, see {self.log_file}")

    # --- HTTP ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, path: str, body: Any = None, timeout: float = 60) -> bytes:
        """GET, or POST `body` as JSON. Raises urllib's HTTPError on a refusal."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, headers)
        with _opener.open(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str, timeout: float = 60) -> Any:
        return json.loads(self.request(path, timeout=timeout))

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The schema of every node, or of one (empty if the server has no such node)."""
        if node is None:
            return self.get("/object_info")
        return self.get(f"/object_info/{urllib.parse.quote(node)}").get(node, {})

    def queue(self, workflow: dict[str, Any], client_id: str | None = None) -> str:
        """Queue an API-format workflow and return its prompt id, without waiting for it."""
        body = {"prompt": workflow, "client_id": client_id or uuid.uuid4().hex}
        try:
            return json.loads(self.request("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.loads(error.read())) from None

    def interrupt(self) -> None:
        """Cancel what runs now."""
        self.request("/interrupt", {})

    def history(self, prompt_id: str) -> dict[str, Any]:
        return self.get(f"/history/{prompt_id}").get(prompt_id, {})

    def view(self, image: dict[str, str]) -> bytes:
        """The bytes of a file that an output names ({filename, subfolder, type})."""
        return self.request("/view?" + urllib.parse.urlencode(image))

    # --- running a workflow ---

    def run(
        self,
        workflow: dict[str, Any],
        timeout: float = 600,
        on_message: Callable[[dict[str, Any]], None] | None = None,
    ) -> Result:
        """Queue a workflow and wait for its end, however it ends.

        Raises PromptRejected, ServerDied, or TimeoutError (after cancelling the run).
        """
        return asyncio.run(self._run(workflow, timeout, on_message))

    async def _run(self, workflow: dict, timeout: float, on_message: Callable | None) -> Result:
        import aiohttp

        started = time.monotonic()
        client = uuid.uuid4().hex
        prompt_id = None
        result = None
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket,
            ):
                prompt_id = await asyncio.to_thread(self.queue, workflow, client)
                result = Result(prompt_id)
                while True:
                    if time.monotonic() - started > timeout:
                        self.interrupt()
                        raise TimeoutError(f"not done after {timeout:g} s\n{self._log_end()}")
                    try:
                        message = await asyncio.wait_for(socket.receive(), 1.0)
                    except asyncio.TimeoutError:
                        if not self.alive:
                            raise self._died() from None
                        continue
                    if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                        raise await self._lost()
                    if message.type != aiohttp.WSMsgType.TEXT:
                        continue  # binary: preview pictures
                    event = json.loads(message.data)
                    data = event.get("data") or {}
                    if data.get("prompt_id") != prompt_id:
                        continue
                    result.messages.append(event)
                    if on_message is not None:
                        on_message(event)
                    if event["type"] == "execution_error":
                        result.error = data
                    elif event["type"] == "execution_interrupted":
                        result.interrupted = True
                    elif event["type"] == "executing" and data.get("node") is None:
                        break  # sent last, after the history has been written
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise await self._lost() from error
        result.outputs = self.history(prompt_id).get("outputs", {})
        result.seconds = time.monotonic() - started
        return result

    async def _lost(self) -> Exception:
        """The connection broke: give a dying process a moment, then say what is known."""
        for _ in range(50):
            if not self.alive:
                return self._died()
            await asyncio.sleep(0.1)
        return ConnectionError(f"lost the connection to ComfyUI, see {self.log_file}")
