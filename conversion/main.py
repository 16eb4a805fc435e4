"""Takes the files one by one: skips, claims, converts, tells. Nothing of one file stops the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import claims, comfyui, identity
from .options import Order, UsageError, order, parser
from .reporter import CONVERTED, FAILED, LEFT, SKIPPED, TAKEN, Log, Reporter, Result

if TYPE_CHECKING:
    from ..quantize.calibration import Calibration

# seconds between two looks at what other processes are at
LOOK = 2.0


class Stopped(BaseException):
    """A signal to end. Not an Exception: nothing on the way may take it for an error of its own."""


class Signals:
    """Ends on SIGINT and SIGTERM, cleanly on the first one, at once on the second."""

    def __init__(self) -> None:
        self.status: int | None = None

    def check(self) -> None:
        """Raises again where a bare `except` on the way swallowed it."""
        if self.status is not None:
            raise Stopped

    def _come(self, number: int, _frame) -> None:
        if self.status is not None:
            os._exit(128 + number)
        self.status = 128 + number
        raise Stopped

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Only the main thread can; elsewhere its owner ends it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self._come) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status. argv: without the program's name."""
    args = parser().parse_intermixed_args(argv)  # flags may stand between files
    signals, log = Signals(), Log(sys.stderr)
    # libraries' chatter too
    with signals.caught(), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            ordered = order(args)
            reporter = Reporter(ordered.files, args.progress, args.summary, args.quiet)
            comfyui.load(args.comfyui, args.device)
            recordings = prepare(ordered, args)
        except UsageError as error:
            sys.stderr.write(f"convert.py: {error}\n")
            return 2
        except Stopped:
            return signals.status or 1
        try:
            with told_to(reporter, signals):
                run(ordered, recordings, reporter, signals)
            failed = any(x.status in (FAILED, LEFT) for x in reporter.results.values())
            status = 1 if failed else 0
        except Stopped:
            status = signals.status or 1
    found = reporter.finish(status)
    return status if not args.json or _printed(found) else status or 1


def _printed(found: dict) -> bool:
    """Whether the summary could be printed: a disk may be full, a reader gone."""
    try:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        sys.stdout.flush()
    except OSError as error:
        sys.stderr.write(f"convert.py: the summary could not be printed: {error}\n")
        with open(os.devnull, "w") as nowhere:  # what is left of it is not tried again at the end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return False
    return True


def prepare(ordered: Order, args: argparse.Namespace) -> Calibration | None:
    """What all files need: folders, ModelOpt, the recordings of --calibration. Raises UsageError for
    what no file could be made with."""
    from ..loaders import device
    from ..quantize import calibration, mixed, modelopt
    from ..utils import capability
    from . import models

    for one in mixed.used(ordered.recipe):
        found = capability.support(one.format, "linear", device.current(kinds=()))
        if found.level == capability.REFUSED:
            raise UsageError(f"{found.why}: choose another format")
    if ordered.prompts:
        models.check_sampler(ordered.sampling.sampler_name, ordered.sampling.scheduler)
    models.check_loras(ordered.loras)
    try:
        modelopt.require()
        recordings = calibration.load(ordered.recordings) if ordered.recordings else None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if why := models.short_of_memory(error):
            raise UsageError(why) from error
        if isinstance(error, MemoryError | RuntimeError):
            raise
        raise UsageError(str(error)) from error
    kept = {"--progress": args.progress, "--summary": args.summary}
    places = {"--out": ordered.out} | {flag: path.parent for flag, path in kept.items() if path}
    for flag, folder in places.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(
                f"{flag} needs a folder that can be written, got {error} in {folder}: correct its "
                "permissions or name another"
            ) from error
    return recordings


@contextlib.contextmanager
def told_to(reporter: Reporter, signals: Signals) -> Iterator[None]:
    """What the pack and ComfyUI say of their progress goes there."""
    from ..utils import progress
    from . import models

    def step(text: str) -> None:
        signals.check()
        reporter.step(text)

    def count(done: int, total: int) -> None:
        signals.check()
        reporter.count(done, total)

    with progress.listening(step), models.followed(count):
        yield


def run(
    ordered: Order, recordings: Calibration | None, reporter: Reporter, signals: Signals
) -> None:
    """Every file once; with `wait`, those that others are at again and again until they are there."""
    from . import models

    todo = list(ordered.files)
    while todo:
        taken = []
        for number, file in enumerate(todo):
            signals.check()
            reporter.begin(file)
            result = attempt(file, ordered, recordings)
            if result.status == TAKEN and ordered.wait:
                taken.append(file)
                continue
            reporter.end(file, result)
            if result.status in (CONVERTED, FAILED) and (why := models.lost_device()):
                for left in [*taken, *todo[number + 1 :]]:
                    reporter.end(left, Result(str(left), LEFT, str(ordered.output(left)), why))
                return
        if len(taken) == len(todo):
            time.sleep(LOOK)
        todo = taken


def attempt(file: Path, ordered: Order, recordings: Calibration | None) -> Result:
    """What became of it; raises nothing but Stopped."""
    from ..utils.whole_file import NameTaken
    from . import models, work

    output = ordered.output(file)
    started, loaded = time.monotonic(), False

    def result(status: str, **facts) -> Result:
        seconds = round(time.monotonic() - started, 2)
        return Result(str(file), status, str(output), seconds=seconds, **facts)

    def skipped(header: dict) -> Result:
        quality = header.get("quality") or {}
        return result(SKIPPED, bytes_after=output.stat().st_size, sqnr_db=quality.get("sqnr_db"))

    try:
        if owner := claims.holder(output, ordered.patience):
            return result(TAKEN, error=str(owner))
        made_of = identity.of(file, ordered)
        if (header := identity.there(output, made_of)) and not claims.litter(output):
            return skipped(header)
        claim = claims.take(output, ordered.patience)
        if isinstance(claim, claims.Owner):
            return result(TAKEN, error=str(claim))
        with claim:
            work.clear(output)
            if header := identity.there(output, made_of):
                return skipped(header)
            if output.is_symlink():
                raise ValueError(
                    f"the output's name must be free, {output} is a link to what is not there: remove it"
                )
            loaded = True
            try:
                figures = work.convert(file, output, made_of, ordered, recordings)
            except NameTaken:  # by a process that was taken for dead
                if header := identity.there(output, made_of):
                    return skipped(header)
                raise
            work.clear(output)
            return result(
                CONVERTED,
                bytes_before=figures["bytes_before"],
                bytes_after=figures["file_bytes"],
                sqnr_db=figures.get("sqnr_db"),
            )
    except Exception as error:
        text = told(error)  # the error itself would keep the tensors of its frames
    finally:
        if loaded:
            models.free()
    return result(FAILED, error=text)


def told(error: Exception) -> str:
    """An error in words; of one that no rule foresaw, the place goes to the log."""
    from . import models

    if why := models.short_of_memory(error):
        return why
    if isinstance(error, ValueError | OSError):
        return str(error)
    logging.getLogger(__name__).error("%s", "".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error}"
