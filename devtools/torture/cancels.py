"""The user cancels: at every point at which a job looks whether he has, and on a real server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .outcome import Effort, Row
from .points import Trial, chosen, count
from .subject import subject

NAME = "cancels"
RIGHT = "cancelled; nothing changed, nothing left"


@contextlib.contextmanager
def looks(reached: Callable[[], None]) -> Iterator[None]:
    """`reached` is called before each look whether the user has cancelled."""
    import comfy.model_management as management

    original = management.throw_exception_if_processing_interrupted

    def look() -> None:
        reached()
        original()

    management.throw_exception_if_processing_interrupted = look
    try:
        yield
    finally:
        management.throw_exception_if_processing_interrupted = original
        management.interrupt_current_processing(False)


def cancel(point: int) -> None:
    """As the page's button does."""
    import comfy.model_management as management

    management.interrupt_current_processing()


def judge(error: BaseException | None) -> str | None:
    import comfy.model_management as management

    if isinstance(error, management.InterruptProcessingException):
        return None
    return "it went on to its end" if error is None else f"it ended with {error!r}"


def run(effort: Effort, say: Callable[[str], None]) -> Iterator[Row]:
    from . import servers

    with subject() as its:
        for job in its.jobs:
            where = chosen(len(count(its, job, looks)), effort)
            if where:
                trial = Trial(its, job, looks, cancel, judge)
                yield trial.rows(NAME, job, where, effort, RIGHT)
    yield from servers.cancels(effort, say)
