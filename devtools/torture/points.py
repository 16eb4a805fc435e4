"""One fault at each of the points that a job passes, and what is wrong afterwards.

Where the system can (POSIX, no GPU in use), the job runs once: at every point a copy of the process
(fork) meets the fault, ends, is looked at and says what it found, and the job goes on. Elsewhere, for
jobs that write files, which a copy would share, and for those that pass points in a thread of their own,
of which a copy would be all there is, the job is begun anew for every point; so it is for points beside
which a thread of the job works, whose files the copy would have open and nobody to close them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import select
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

from .outcome import Effort, Row
from .subject import Subject, differences

# installs a fault: is given what to call at each point with nothing, and is undone on leaving
Install = Callable[[Callable[[], None]], contextlib.AbstractContextManager]
# what an error is to the user: None for right, else what is wrong with it
Judge = Callable[[BaseException | None], str | None]
WRITING = ("save", "save calibration", "export")
# of how many points each, one is followed by the whole look and by the same job to its end
CHECKED = 20
HANG_SECONDS = 300


def count(its: Subject, job: str, install: Install, note: Callable[[], Any] = int) -> list:
    """What `note` says at each point of an undisturbed job, without what is made the first time only."""
    its.run(job)
    noted: list = []
    with install(lambda: noted.append(note())):
        its.run(job)
    return noted


def chosen(total: int, effort: Effort) -> list[int]:
    """Points to try: all, or as many as the effort allows, evenly, first and last among them."""
    number = min(total, max(2, effort.count(total)))
    return sorted({round(i * (total - 1) / max(number - 1, 1)) for i in range(number)})


class Trial:
    """A job that meets a fault; it must have run once, as some things are made once. fault: raises, given the point's number. judge: see `Judge`."""

    def __init__(
        self, its: Subject, job: str, install: Install, fault: Callable[[int], None], judge: Judge
    ) -> None:
        self.its, self.job, self.install = its, job, install
        self.fault, self.judge = fault, judge
        here, places = threading.get_ident(), set()
        with one_thread(), install(lambda: places.add(threading.get_ident())):
            self.result = its.run(job)
        self.threads = bool(places - {here})
        self.before = its.state()

    def rows(self, name: str, kind: str, where: Collection[int], effort: Effort, right: str) -> Row:
        """The row of all points in `where`, as far as the time goes."""
        import torch

        row = Row(name, kind)
        whole = {point for i, point in enumerate(sorted(where, reverse=True)) if i % CHECKED == 0}
        can = hasattr(os, "fork") and not torch.cuda.is_available()
        every = self._anew if self.threads or self.job in WRITING or not can else self._forked
        with one_thread():
            for point, found in every(sorted(where), whole, effort):
                if found:
                    row.findings.append(f"point {point}: {'; '.join(found)}")
                else:
                    row.outcomes[right] += 1
        return row

    def _verdict(self, error: BaseException | None, whole: bool) -> list[str]:
        """What is wrong after the fault. whole: everything is looked at, and the job done again."""
        wrong = self.judge(error)
        found = [wrong] if wrong else []
        forget(error)
        after = self.its.state(whole)
        found += differences({key: self.before[key] for key in after}, after)
        if whole:
            if self.its.run(self.job) != self.result:
                found.append("the same job gives another result afterwards")
            found += differences(self.before, self.its.state())
        return found

    def _anew(self, where: list[int], whole: Collection[int], effort: Effort) -> Iterator:
        for point in where:
            if effort.over:
                return
            passed = 0

            def reached(point: int = point) -> None:
                nonlocal passed
                passed += 1
                if passed == point + 1:
                    self.fault(point)

            yield point, self._verdict(self._ended(reached), point in whole)

    def _ended(self, reached: Callable[[], None]) -> BaseException | None:
        try:
            with self.install(reached):
                self.its.run(self.job)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return error
        return None

    def _forked(self, where: list[int], whole: Collection[int], effort: Effort) -> Iterator:
        gc.collect()
        gc.freeze()  # what a collection would touch, a copy of the process would copy
        reports: list[tuple[int, list[str]]] = []
        passed, mine, answer = 0, -1, -1
        wanted, accompanied = set(where), []
        others = set(threading.enumerate())

        def reached() -> None:
            nonlocal passed, mine, answer
            point, passed = passed, passed + 1
            if mine >= 0 or point not in wanted or effort.over:
                return
            if set(threading.enumerate()) - others:
                accompanied.append(point)
                return
            read, write = os.pipe()
            pid = os.fork()
            if pid:
                os.close(write)
                reports.append((point, heard(pid, read)))
                return
            os.close(read)
            mine, answer = point, write
            self.fault(point)

        ended = self._ended(reached)
        if mine < 0 or mine in whole:
            gc.unfreeze()
        if mine >= 0:  # the copy
            try:
                found = self._verdict(ended, mine in whole)
            except BaseException as error:
                found = [f"looking at it ended with {type(error).__name__}: {error}"]
            os.write(answer, json.dumps(found)[:60000].encode())
            os._exit(0)
        if ended is not None:
            raise ended
        return itertools.chain(reports, self._anew(accompanied, whole, effort))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in the calling thread: a copy of the process has no other, and another number of
    threads sums in another order, which gives other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forget(error: BaseException | None) -> None:
    """Lets go of what the frames of an error, and of those behind it, hold: the job's tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def heard(pid: int, read: int, seconds: float | None = None) -> list[str]:
    """What the copy says, once it has ended. seconds: HANG_SECONDS where not given."""
    seconds = HANG_SECONDS if seconds is None else seconds
    with os.fdopen(read, "rb") as file:
        if not select.select([file], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return [f"it hung for {seconds:.0f} s"]
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        return [f"the process ended with status {os.waitstatus_to_exitcode(status)}"]
    return json.loads(text)
