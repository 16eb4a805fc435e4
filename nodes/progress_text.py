"""A line on the node that runs, before it is done."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def show(hidden, text: str) -> None:
    """Shows `text` on the node whose `cls.hidden` this is (it must ask for its unique_id), and logs
    it. Outside of a server, where there is no such node, it is only logged."""
    log.info("ModelOpt: %s", text)
    if hidden is None or not hidden.unique_id:
        return
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, hidden.unique_id)
