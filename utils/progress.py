"""The progress bar of the node that runs, and the user's cancel."""

from __future__ import annotations

from collections.abc import Callable


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
