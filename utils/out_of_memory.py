"""Memory that runs out: recognised on every device, and told in words that help."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch

# torch's own words on a CPU, a GPU, and of numpy
WORDS = ("out of memory", "can't allocate memory", "Unable to allocate")
FREE = "close other programs, or start ComfyUI with --lowvram or --cpu"
SMALLER = f"choose a smaller width, height or batch size, {FREE}"
RECORD_SMALLER = f"record a smaller width, height or batch size, {FREE}"


class OutOfMemory(torch.OutOfMemoryError):
    """Of the kind that ComfyUI answers by unloading all models; its text is for the user."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, that of the CPU too."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)
    )


def explained(doing: str, remedy: str) -> Callable[[Callable], Callable]:
    """Decorates a piece of work: where memory runs out in it, OutOfMemory says what to do.

    Its first argument may be a MODEL, whose size is then told.
    """

    def decorate(work: Callable) -> Callable:
        @functools.wraps(work)
        def instead(*args, **kwargs):
            try:
                return work(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, OutOfMemory) or not ran_out(error):
                    raise
                model = args[0] if args else kwargs.get("model")
                raise OutOfMemory(_text(doing, remedy, model)) from error

        return instead

    return decorate


def _text(doing: str, remedy: str, model: object) -> str:
    import comfy.model_management as management

    device = management.get_torch_device()
    size = "more memory than there is"
    if hasattr(model, "model_size"):
        call = management.minimum_inference_memory() / 1e9
        size = f"the UNet ({model.model_size() / 1e9:.1f} GB) and room for its calls ({call:.1f} GB or more)"
    free = management.get_free_memory(device) / 1e9
    return (
        f"{doing} needs {size}, {device} has {free:.1f} GB free and ran out: {remedy}; nothing was "
        "changed"
    )


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def not_swallowed() -> Iterator[None]:
    """Raises OutOfMemoryError where what runs inside ran out of memory and told the log alone.

    ComfyUI's LoRAs do: they log the error and return the weight without the patch, which would then
    be missing in a file for ever.
    """
    heard, root = _Heard(), logging.getLogger()
    root.addHandler(heard)
    try:
        yield
    finally:
        root.removeHandler(heard)
    lost = [text for text in heard.texts if any(word in text for word in WORDS)]
    if lost:
        raise torch.OutOfMemoryError(lost[0])
