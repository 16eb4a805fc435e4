"""At the same time: two prompts queued in one server, two servers saving under one name in one folder."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..server import ComfyServer, Result
from . import graphs, servers
from .outcome import Effort, Row

NAME = "side_by_side"
ROUNDS = 5


def at_once(*calls: Callable[[], Result]) -> list[Result]:
    """What each call returns, all begun together."""
    results: list = [None] * len(calls)

    def keep(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=keep, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wrong(results: list[Result], server: ComfyServer, whole: bytes, before: set[str]) -> list[str]:
    """Two prompts saved under one prefix: both files whole, with names of their own."""
    errors = [r.error["exception_message"] for r in results if r.error]
    now = servers.unets(server)
    new = {name: data for name, data in now.items() if name not in before}
    found = [f"an error: {text}" for text in errors]
    if len(new) != 2:
        found.append(f"new files: {sorted(new)}")
    found += [f"{name} is not whole" for name, data in new.items() if data != whole]
    return found


def run(effort: Effort, say: Callable[[str], None]) -> list[Row]:
    queued = Row(NAME, "two prompts queued in one server")
    shared = Row(NAME, "two servers saving under one name")
    with servers.folder_with_checkpoint() as folder, servers.made(folder) as one:
        one.run(graphs.saved(1, "whole"), timeout=servers.TIMEOUT)
        (whole,) = servers.unets(one).values()

        def save(server: ComfyServer, prefix: str) -> Callable[[], Result]:
            return lambda: server.run(graphs.saved(1, prefix), timeout=servers.TIMEOUT)

        def trial(row: Row, prefix: str, *calls: Callable[[], Result]) -> None:
            before = set(servers.unets(one))
            found = wrong(at_once(*calls), one, whole, before)
            row.findings += [f"{prefix}: {text}" for text in found]
            if not found:
                row.outcomes["both files whole, each under its own name"] += 1
            say(f"{row.kind}: {row.tried}")

        rounds = effort.count(ROUNDS)
        for number in range(rounds):
            prefix = f"queued{number}"
            again = graphs.saved(1, prefix) | {"other": graphs.saved(1, prefix)["save"]}
            del again["save"]  # the same work under another node, so that nothing is left out
            trial(queued, prefix, save(one, prefix),
                  lambda graph=again: one.run(graph, timeout=servers.TIMEOUT))  # fmt: skip
        with servers.made(folder, "second", models=one.models) as two:
            two.run(graphs.saved(1, "warm"), timeout=servers.TIMEOUT)
            for number in range(rounds):
                # a folder that is not there yet, and both saving at once: all before is done
                prefix = f"shared{number}/unet"
                trial(shared, prefix, save(one, prefix), save(two, prefix))
    return [queued, shared]
