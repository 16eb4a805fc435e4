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


def wrong(
    results: list[Result], server: ComfyServer, whole: list[bytes], before: set[str]
) -> list[str]:
    """Two prompts saved under one prefix: both files whole, with names of their own."""
    errors = [r.error["exception_message"] for r in results if r.error]
    now = servers.unets(server)
    new = {name: data for name, data in now.items() if name not in before}
    found = [f"an error: {text}" for text in errors]
    if len(new) != 2:
        found.append(f"new files: {sorted(new)}")
    elif sorted(new.values()) != sorted(whole):
        found.append(f"not the two files: {', '.join(f'{n} {len(d)}' for n, d in new.items())}")
    return found


def run(effort: Effort, say: Callable[[str], None]) -> list[Row]:
    queued = Row(NAME, "two prompts queued in one server")
    shared = Row(NAME, "two servers saving under one name")
    with servers.folder_with_checkpoint() as folder, servers.made(folder) as one:
        whole = []
        for seed in (1, 2):
            one.run(graphs.saved(seed, f"whole{seed}"), timeout=servers.TIMEOUT)
            whole.append(servers.unets(one)[f"whole{seed}_00001_.safetensors"])

        def trial(row: Row, prefix: str, *on: ComfyServer) -> None:
            """The same work with two seeds, on one server or two."""
            calls = [
                lambda server=server, seed=seed: server.run(
                    graphs.saved(seed, prefix), timeout=servers.TIMEOUT
                )
                for seed, server in enumerate(on, start=1)
            ]
            before = set(servers.unets(one))
            found = wrong(at_once(*calls), one, whole, before)
            row.findings += [f"{prefix}: {text}" for text in found]
            if not found:
                row.outcomes["both files whole, each under its own name"] += 1
            say(f"{row.kind}: {row.tried}")

        rounds = effort.count(ROUNDS)
        for number in range(rounds):
            trial(queued, f"queued{number}", one, one)
        with servers.made(folder, "second", models=one.models) as two:
            for seed, server in enumerate((one, two), start=1):
                server.run(graphs.saved(seed, "warm"), timeout=servers.TIMEOUT)
            for number in range(rounds):
                # all work before the saving is done already; the folder is not there yet
                trial(shared, f"shared{number}/unet", one, two)
    return [queued, shared]
