"""Faults in the running code: memory that runs out at any allocation, ModelOpt that fails, disks that are
full, read-only or broken. After each: an error that says what to do, the MODEL as it was, nothing left,
and the same process does the same job with the same result."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from ..common import ROOT
from . import disks
from .outcome import Effort, Row
from .points import Trial, chosen, count
from .subject import Subject, pack, subject

NAME = "faults"
RIGHT = "error that says what to do; nothing changed, nothing left"
# torch's own words
CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 5242880 bytes."
GPU_MEMORY = "CUDA out of memory. Tried to allocate 5.00 MiB."
# of one line of the pack, the allocations that are tried, of the first, the last and between
PER_LINE = 3
# folders of a clone that hold no code of the pack
OTHERS = ("devtools", ".venv", ".comfyui")
# what of ComfyUI tries again with less memory: file -> functions, none for all. Attention, and the VAE,
# which then decodes in tiles
TRIES_AGAIN = {
    "sub_quadratic_attention.py": (),
    "modules/attention.py": (),
    "comfy/sd.py": ("decode", "encode"),
}
# jobs whose memory runs out, and whose disk fails
MEMORY = (
    "record", "quantize", "plan", "auto-quantize", "compare", "load", "export", "import", "benchmark"
)  # fmt: skip
FILES = ("save", "save calibration", "load", "load calibration", "quantize", "export", "import")
_tries_again = False


# --- memory ---


@contextlib.contextmanager
def allocations(reached: Callable[[], None]) -> Iterator[None]:
    """`reached` is called before every operation that makes a tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(one.alias_info is None for one in func._schema.returns):
                reached()
            return func(*args, **(kwargs or {}))

    with Watched():
        yield


def line() -> str:
    """The line of the pack that is at work; "" for what the job itself makes before and after it."""
    frame, others = sys._getframe(1), tuple(f"{ROOT / one}{os.sep}" for one in OTHERS)
    job = Subject.run.__code__.co_filename
    while frame is not None and frame.f_code.co_filename != job:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}{os.sep}") and not name.startswith(others):
            # a file is mapped into memory: its tensors take none
            reads = frame.f_code.co_name in ("read", "tensors_of")
            return "" if reads else f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def out_of_memory(point: int) -> None:
    """By turns as a GPU says it and as the CPU does."""
    import torch

    global _tries_again
    frame, _tries_again = sys._getframe(), False
    while frame is not None and not _tries_again:
        code, frame = frame.f_code, frame.f_back
        _tries_again = any(
            code.co_filename.endswith(name) and (not functions or code.co_name in functions)
            for name, functions in TRIES_AGAIN.items()
        )
    if point % 2:
        raise torch.OutOfMemoryError(GPU_MEMORY)
    raise RuntimeError(CPU_MEMORY)


def of_each_line(lines: list[str]) -> list[int]:
    """Points: some of every line that allocates."""
    places: dict[str, list[int]] = {}
    for point, where in enumerate(lines):
        places.setdefault(where, []).append(point)
    places.pop("", None)
    found = set()
    for those in places.values():
        found |= {those[round(i * (len(those) - 1) / (PER_LINE - 1))] for i in range(PER_LINE)}
    return sorted(found)


def says_memory(error: BaseException | None) -> str | None:
    """Right is what says whose memory ran out, in words of ours: a GPU's makes ComfyUI unload all
    models."""
    import torch

    if error is None and _tries_again:
        return None
    if not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"it ended with {error!r}" if error else "it went on to its end"
    if "needs" not in str(error) or "nothing was changed" not in str(error):
        return f"it says only: {error}"
    return None


# --- ModelOpt ---


@contextlib.contextmanager
def quantizer_calls(reached: Callable[[], None]) -> Iterator[None]:
    """`reached` is called in each of ModelOpt's quantizers, each time it is called."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    original = TensorQuantizer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reached()
        return original(self, *args, **kwargs)

    TensorQuantizer.forward = forward
    try:
        yield
    finally:
        TensorQuantizer.forward = original


def modelopt_fails(point: int) -> None:
    raise (RuntimeError, AssertionError, KeyError, AttributeError)[point % 4](
        "injected in ModelOpt"
    )


def says_modelopt(error: BaseException | None) -> str | None:
    if isinstance(error, ValueError) and "ModelOpt" in str(error) and "injected" in str(error):
        return None if "nothing was changed" in str(error) else f"it says only: {error}"
    return f"it ended with {error!r}"


# --- files ---


class Broken(io.FileIO):
    """A file that calls `reached` before each read and write."""

    reached = staticmethod(lambda: None)

    def write(self, data: Any) -> int:
        self.reached()
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self.reached()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.reached()
        return super().readall()


class Reader(io.BufferedReader):
    """Without `readinto`: where that fails, PyTorch's zip reader goes on to `read` with the error pending,
    which of a file as above is by chance told as "read of closed file"."""

    @property
    def readinto(self) -> None:
        raise AttributeError("readinto")


@contextlib.contextmanager
def file_calls(reached: Callable[[], None], folder: str) -> Iterator[None]:
    """`reached` is called before each opening, reading, writing, flushing and naming of a file of a
    folder that Python or safetensors does."""
    import builtins

    import safetensors

    own = open
    before = {
        (builtins, "open"): own, (io, "open"): io.open, (safetensors, "safe_open"): safetensors.safe_open,
        (os, "fsync"): os.fsync, (os, "link"): os.link,
    }  # fmt: skip

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "b" not in mode or not str(path).startswith(folder):
            return own(path, mode, *args, **kwargs)
        reached()
        file = Broken(path, mode.replace("b", ""))
        file.reached = reached
        return Reader(file) if "r" in mode else io.BufferedWriter(file)

    def told(call: Callable) -> Callable:
        def instead(*args: Any, **kwargs: Any) -> Any:
            reached()
            return call(*args, **kwargs)

        return instead

    new = {(builtins, "open"): opened, (io, "open"): opened}
    new |= {key: told(call) for key, call in before.items() if key not in new}
    modules = [(pack("quantize.calibration"), "safe_open")]
    before |= {(module, name): getattr(module, name) for module, name in modules}
    new |= {(module, name): told(getattr(module, name)) for module, name in modules}
    import comfy.utils

    before[comfy.utils.safetensors, "safe_open"] = comfy.utils.safetensors.safe_open
    for (module, name), call in new.items():
        setattr(module, name, call)
    try:
        yield
    finally:
        for (module, name), call in before.items():
            setattr(module, name, call)


def disk_fails(point: int) -> None:
    number = (errno.EIO, errno.ENOSPC, errno.EROFS)[point % 3]
    raise OSError(number, os.strerror(number))


def says_file(error: BaseException | None) -> str | None:
    """Right is an error that names rule and remedy; or none, where the file was whole already."""
    if error is None:
        return None
    rule = any(word in str(error) for word in ("must", "needs"))
    if isinstance(error, OSError | ValueError) and rule and ": " in str(error):
        blamed = "damaged" in str(error) or "get it again" in str(error)
        return f"it blames the file: {error}" if blamed else None
    return f"it ended with {error!r}"


# --- all of them ---


def memory_rows(its: Subject, effort: Effort, say: Callable[[str], None]) -> list[Row]:
    rows = []
    for job in MEMORY:
        lines = count(its, job, allocations, line)
        every = of_each_line(lines)
        where = [every[i] for i in chosen(len(every), effort)]
        trial = Trial(its, job, allocations, out_of_memory, says_memory)
        rows.append(trial.rows(NAME, f"memory runs out: {job}", where, effort, RIGHT))
        say(
            f"{rows[-1].kind}: {rows[-1].tried} of {len(lines)} allocations, {len(set(lines))} lines"
        )
    return rows


def modelopt_rows(its: Subject, effort: Effort) -> list[Row]:
    rows = []
    for job in ("quantize", "auto-quantize", "export"):
        where = chosen(len(count(its, job, quantizer_calls)), effort)
        trial = Trial(its, job, quantizer_calls, modelopt_fails, says_modelopt)
        rows.append(trial.rows(NAME, f"ModelOpt fails: {job}", where, effort, RIGHT))
    return rows


def file_rows(its: Subject, effort: Effort) -> list[Row]:
    """Not the calls of a file's removal: where that fails, it cannot be cleaned up."""

    def calls(reached: Callable[[], None]) -> contextlib.AbstractContextManager:
        return file_calls(reached, str(its.folder.parent))

    rows = []
    for job in FILES:
        where = chosen(len(count(its, job, calls)), effort)
        trial = Trial(its, job, calls, disk_fails, says_file)
        rows.append(trial.rows(NAME, f"disk fails: {job}", where, effort, RIGHT))
    return rows


def run(effort: Effort, say: Callable[[str], None]) -> Iterator[Row]:
    from . import servers

    with subject() as its:
        yield from modelopt_rows(its, effort)
        yield from file_rows(its, effort)
        yield from disks.rows(its, effort)
        yield from memory_rows(its, effort, say)
    yield from servers.faults(effort)
