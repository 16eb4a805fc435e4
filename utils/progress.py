"""The progress bar of the node that runs, a line of text on it, and the user's cancel."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
# the page takes such a line for HTML: a prompt must not bring pictures and links into it
BRACKETS = str.maketrans("<>", "‹›")
# called with every line, where no page shows it
_listener: Callable[[str], None] | None = None
# what was told last, and by which node of which prompt
_headline: tuple[tuple[str, str] | None, str] = (None, "")


def progress(total: int) -> Callable[[int], None]:
    """A function to call after each piece of work with its size (1 by default); `total` in all.

    It moves the bar of the node that runs and raises ComfyUI's InterruptProcessingException if the
    user has cancelled.
    """
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(max(total, 1))

    def step(size: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(size)

    return step


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """`listener` is called with each line that `tell` and `detail` say."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def tell(text: str) -> None:
    """Says on the node that runs what is being done, and in the log. Outside of a server, where no
    node runs, in the log only."""
    global _headline
    log.info("ModelOpt: %s", text)
    _headline = (_running(), text)
    _show(text)


def detail(text: str) -> None:
    """The same for a part of what was told last, which stays above it."""
    log.debug("ModelOpt: %s", text)
    above, headline = _headline
    _show(f"{headline}\n{text}" if above == _running() and headline else text)


def _running() -> tuple[str, str] | None:
    """Prompt and node that run."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else (context.prompt_id, context.node_id)


def _show(text: str) -> None:
    if _listener is not None:
        _listener(text)
    from server import PromptServer

    running, server = _running(), getattr(PromptServer, "instance", None)
    if running is not None and server is not None:
        text = text.translate(BRACKETS)
        server.send_progress_text(text, running[1], server.client_id)
