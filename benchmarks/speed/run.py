"""The benchmark's own process: starts workers, lets them take turns, writes after each arm."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...utils import timing
from . import arms, layers, machine, producers, report, shapes
from .processes import Failed, Worker
from .settings import Plan, Setting

# arms held at once on a CPU, whose memory is the machine's
MOST_ON_CPU = 4
# an arm may need this much more than the one before it, with what it takes while it compiles
ROOM = 2.0
# of a worker that failed, on the terminal
LOG_LINES = 12


class Run:
    """One run: results in `result`, written to `out` after every arm and every layer."""

    def __init__(self, out: Path, quick: bool, say: Callable[[str], None]):
        self.say, self.quick = say, quick
        facts = machine.describe()
        self.on_gpu = facts["gpu"] is not None
        self.result: dict = {"machine": facts, "quick": quick, "families": {}}
        self.path = out / f"speed_{machine.slug(facts, quick)}.json"

    def write(self) -> None:
        """JSON and Markdown, each replaced at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps(self.result, indent=1)),
            (self.path.with_suffix(".md"), report.markdown(self.result)),
        ):
            partial = path.with_name(f"{path.name}.part")
            partial.write_text(text.rstrip() + "\n", encoding="utf-8")
            partial.replace(path)

    def family(self, setting: Setting, only: str | None, chosen: Sequence[arms.Arm]) -> None:
        """Layers and arms of one family."""
        counts = shapes.count(
            setting.family, setting.size, setting.pixels, setting.pixels, setting.batch
        )
        entry = {
            "setting": setting.as_dict(),
            "gflop": shapes.gflop(counts),
            "layers": [],
            "choices": [],
            "producers": [],
            "arms": {},
        }
        self.result["families"][setting.family] = entry
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            if only != "layers":
                Arms(self, entry, setting, folder, chosen).measure()
            else:
                entry["arms_why_not"] = "--only layers"
            if only != "unet":
                self._layers(entry, setting, counts, folder)
            else:
                entry["layers_why_not"] = "--only unet"
        self.write()

    def _layers(self, entry: dict, setting: Setting, counts: dict, folder: Path) -> None:
        with LayerWorker(setting, folder) as worker:
            for number, (shape, count) in enumerate(counts.items(), start=1):
                facts = {"key": shape.key, "shape": shapes.as_dict(shape)}
                facts |= {"layers": count.layers, "quantized": count.quantized, "rows": []}
                facts |= worker.measure(facts["shape"])
                entry["layers"].append(facts)
                entry["choices"] = layers.choices(entry["layers"])
                self.say(f"{setting.family} layer {number}/{len(counts)}: {shape.key}")
                self.write()
            for asked in producers.of(counts):
                entry["producers"].append(asked | worker.measure(asked))
            self.say(f"{setting.family}: {len(entry['producers'])} producers")


class LayerWorker:
    """The process that measures layers, started anew after a failure."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting, self.folder = setting, folder
        self.worker: Worker | None = None

    def __enter__(self) -> LayerWorker:
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def _end(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None

    def measure(self, shape: dict) -> dict:
        """`rows`, or `error` for the whole shape; a candidate that loses the GPU fails alone."""
        failed: dict[str, str] = {}
        while True:
            try:
                message = self._ask({"shape": shape, "failed": failed})
            except Failed as error:
                message = {"error": str(error)}
            if "error" not in message:
                return message
            self._end()
            if "lost" not in message or message["lost"] in failed:
                return message
            failed[message["lost"]] = message["error"]

    def _ask(self, message: dict) -> dict:
        if self.worker is None:
            spec = {"setting": self.setting.as_dict(), "folder": str(self.folder), "layers": True}
            self.worker = Worker(spec, self.folder, self.folder / "layers.log")
        self.worker.ask(message)
        return self.worker.answer(self.setting.plan.limit)


class Arms:
    """The arms of one family: as many held at once as fit, always with "eager" among them."""

    def __init__(self, run: Run, entry: dict, setting: Setting, folder: Path, chosen):
        self.run, self.entry, self.setting, self.folder = run, entry, setting, folder
        self.chosen = chosen
        self.made: dict = {}
        self.held: dict[str, Worker] = {}

    @property
    def plan(self) -> Plan:
        return self.setting.plan

    def measure(self) -> None:
        """Fills `entry["arms"]`, in the order of the arms."""
        rows = self.entry["arms"]
        for arm in self.chosen:  # so that an interrupted run says what it did not come to
            rows[arm.name] = {"title": arm.title, "why_not": "the run ended before it"}
        try:
            for arm in self.chosen:
                row = rows[arm.name] = {"title": arm.title, "limit": arm.limit}
                row["sixteen_bits"] = arm.sixteen_bits
                row |= self._build(arm)
                self.run.write()
                self.run.say(f"{self.setting.family} {arm.name}: {report.in_short(row)}")
                if self._full(row):
                    self._take_turns()
                    self._close(keep="eager")
            self._take_turns()
        finally:
            self._close()

    def _build(self, arm: arms.Arm) -> dict:
        reason = arm.why_not(torch.device("cuda" if self.run.on_gpu else "cpu"))
        if reason is not None:
            return {"why_not": reason}
        try:
            for needs in dict.fromkeys([None, arm.needs]):
                self._make(needs)
            worker = self._start({"arm": arm.name}, arm.name)
            try:
                message = worker.answer(self.plan.limit)
            except BaseException:  # Ctrl-C and SIGTERM too: nothing of ours goes on running
                worker.close()
                raise
        except Failed as error:
            return {"error": str(error)}
        if "error" in message:
            self.run.say(worker.said(LOG_LINES))
        if "error" in message or "why_not" in message:
            worker.close()
        else:
            self.held[arm.name] = worker
        return message

    def _make(self, needs: tuple[str, str] | None) -> None:
        """Writes a checkpoint, once. Raises Failed, the same each time it is asked for."""
        if needs not in self.made:
            name = arms.file_of(self.folder, needs).stem
            worker = self._start({"make": True, "needs": needs}, f"make_{name}")
            try:
                self.made[needs] = worker.answer(self.plan.limit)
            except Failed as error:
                self.made[needs] = {"error": str(error)}
            finally:
                worker.close()
        if "error" in self.made[needs]:
            raise Failed(f"making its checkpoint failed: {self.made[needs]['error']}")

    def _start(self, what: dict, name: str) -> Worker:
        spec = {"setting": self.setting.as_dict(), "folder": str(self.folder), **what}
        return Worker(spec, self.folder, self.folder / f"{name}.log")

    def _full(self, row: dict) -> bool:
        """Whether another arm might not fit beside those that are held."""
        if not self.run.on_gpu:
            return len(self.held) >= MOST_ON_CPU
        free, peak = row.get("free_bytes"), row.get("reserved_bytes")
        return free is not None and free < ROOM * max(peak, self._largest())

    def _largest(self) -> int:
        rows = self.entry["arms"].values()
        return max((row.get("reserved_bytes", 0) for row in rows), default=0)

    def _take_turns(self) -> None:
        """Rounds of calls of all that are held, in shuffled order; medians into their rows."""
        rows = self.entry["arms"]
        waiting = [name for name in self.held if "median_ms" not in rows[name]]
        if not waiting:
            return
        samples: dict[str, list[float]] = {name: [] for name in self.held}
        shuffler = random.Random(len(rows))
        for number in range(self.plan.rounds):
            order = shuffler.sample(list(self.held), len(self.held))
            for name in order:
                try:
                    # the clock and the caches of a GPU that another process used: not counted
                    self._call(name, min(self.plan.warm_up, 3))
                    samples[name] += self._call(name, self.plan.repeats)
                except Failed as error:
                    rows[name] |= {"error": f"in round {number + 1}: {error}"}
                    self.held.pop(name).close()
        turns = {name: timing.summarize(found) for name, found in samples.items() if found}
        eager = turns.get("eager")
        for name in waiting:
            if name in turns and "error" not in rows[name]:
                rows[name] |= turns[name].as_dict()
                rows[name]["together_with"] = sorted(turns)
                if eager is not None:
                    rows[name]["over_eager"] = eager.median / turns[name].median
        self.run.write()

    def _call(self, name: str, count: int) -> list[float]:
        self.held[name].ask({"count": count})
        message = self.held[name].answer(self.plan.limit)
        if "error" in message:
            raise Failed(message["error"])
        return message["samples"]

    def _close(self, keep: str | None = None) -> None:
        for name in [name for name in self.held if name != keep]:
            self.held.pop(name).close()
            shutil.rmtree(self.folder / "cache" / name, ignore_errors=True)
