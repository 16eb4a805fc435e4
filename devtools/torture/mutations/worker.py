"""The process that opens damaged files, one after the other, and says how each ended.

Reads `prepare KIND NUMBER SEED` and `open`, answers with a JSON line each: the first so that memory is
counted from then on, and time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from ... import inprocess
from ...common import say
from . import cases, opening

# truncates, overwrites or replaces a file after some milliseconds, in a process of its own
CHANGER = """
import os, sys, time
for line in sys.stdin:
    path, way, delay, place = line.rstrip("\\n").split("\\t")
    time.sleep(float(delay))
    if way == "cut":
        os.truncate(path, int(place))
    elif way == "write":
        with open(path, "r+b") as file:
            file.seek(int(place)); file.write(bytes(4096))
    elif way == "replace":
        os.replace(path + ".new", path)
    else:
        os.unlink(path)
    sys.stdout.write("done\\n"); sys.stdout.flush()
"""


def main() -> int:
    samples, place = Path(sys.argv[1]), Path(sys.argv[2])
    comfyui_in(place)
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    worker = Worker(samples, place)
    say(json.dumps({"ready": True}), file=answer)
    for line in sys.stdin:
        command, *given = line.rstrip("\n").split("\t")
        if command == "prepare":
            found = worker.prepare(given[0], int(given[1]), int(given[2]))
        else:
            found = worker.open()
        say(json.dumps(found), file=answer)
    worker.end()
    return 0


def comfyui_in(place: Path) -> None:
    """ComfyUI and the pack, their models folder at `place`."""
    inprocess.load()
    import folder_paths

    # some files need it: its import is not to be counted as their memory and time
    import modelopt.torch.quantization  # noqa: F401
    import torch

    torch.set_num_threads(1)
    models = place / "models"
    unets = models / "diffusion_models"
    unets.mkdir(parents=True, exist_ok=True)
    folder_paths.models_dir = str(models)
    extensions = folder_paths.folder_names_and_paths["diffusion_models"][1]
    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(unets)], extensions)
    for name in ("modelopt_calibration", "modelopt_checkpoints"):
        folder_paths.folder_names_and_paths.pop(name, None)
    from comfyui_modelopt.nodes import folders

    folders.register()
    (models / "outside.safetensors").write_bytes(b"x")
    with contextlib.suppress(FileExistsError, OSError, AttributeError):
        os.mkfifo(unets / "pipe.safetensors")
    (unets / "folder.safetensors").mkdir(exist_ok=True)


class Worker:
    def __init__(self, samples: Path, place: Path):
        self.samples, self.place = samples, place / "models" / "diffusion_models"
        self.undamaged: dict[tuple[str, str], object] = {}
        self.case: tuple[str, int, int] | None = None
        self.changer: subprocess.Popen | None = None

    def prepare(self, kind: str, number: int, seed: int) -> dict:
        self.clear()
        self.case = kind, number, seed
        one = cases.KINDS[kind]
        sample = cases.sample_of(kind, number, self.samples)
        opens = "whole" if one.opens == "changing" else one.opens
        if opens != "names" and (opens, sample.name) not in self.undamaged:
            self.folder = self.made()
            if sample.is_dir():
                shutil.copytree(sample, self.folder / sample.name)
            else:
                shutil.copy(sample, self.folder / sample.name)
            compared = getattr(opening, opens)(self.folder / sample.name, random.Random(0))
            self.undamaged[opens, sample.name] = compared()
            del compared
            self.clear()
            gc.collect()
            gc.freeze()  # what ComfyUI and torch hold is not looked through for every case
        self.folder = self.made()
        self.path, words = cases.damaged(kind, number, seed, self.samples, self.folder)
        gc.collect()
        size = sum(f.stat().st_size for f in _files(self.path))
        return {"words": words, "bytes": size}

    def made(self) -> Path:
        """An empty place: for the node, its folder itself."""
        assert self.case is not None
        if cases.KINDS[self.case[0]].opens in ("whole", "changing"):
            return self.place
        folder = self.place.parent.parent / "case"
        folder.mkdir()
        return folder

    def clear(self) -> None:
        folder = self.place.parent.parent / "case"
        if folder.exists():
            shutil.rmtree(folder)
        for file in self.place.iterdir():
            if file.name in ("pipe.safetensors", "folder.safetensors"):
                continue
            shutil.rmtree(file) if file.is_dir() else file.unlink()  # Save makes folders

    def open(self) -> dict:
        """-> {"outcome": words} or {"finding": words}."""
        assert self.case is not None
        kind, number, seed = self.case
        one = cases.KINDS[kind]
        rng = random.Random(f"{kind} {seed} {number} opening")
        opens = "whole" if one.opens == "changing" else one.opens
        if one.opens == "changing":
            words = self.change(rng)
        try:
            compared = getattr(opening, opens)(self.path, rng)
        except (ValueError, OSError) as error:
            found = self.judged(str(error), error)
        except BaseException as error:
            found = {"finding": f"{type(error).__name__}: {error}"[:300] + _where(error)}
        else:
            sample = cases.sample_of(kind, number, self.samples)
            same = opens != "names" and compared() == self.undamaged[opens, sample.name]
            found = {"outcome": cases.SAME if same else one.other}
            if found["outcome"] is None:
                found = {"finding": "opened without a word as another model"}
            del compared
        if one.opens == "changing":
            self.changer.stdout.readline()
            found["words"] = words
        if (self.folder / "canary").exists() or (self.folder / "canary2").exists():
            found = {"finding": "something in the file was executed"}
        return found

    def judged(self, text: str, error: Exception) -> dict:
        if str(self.path) not in text and not (self.path.name in text and self.path.is_dir()):
            return {"finding": f"does not name the file: {text[:300]}" + _where(error)}
        if len(text) > opening.MOST:
            return {"finding": f"an error of {len(text)} characters: {text[:200]}" + _where(error)}
        # the system's own text ends with the quoted path
        if text.startswith("[") or not re.search(r": .*\w", text.replace(str(self.path), "")):
            return {"finding": f"says no remedy: {text[:300]}" + _where(error)}
        return {"outcome": cases.ERROR}

    def change(self, rng: random.Random) -> str:
        """Lets the other process change the file meanwhile."""
        if self.changer is None:
            self.changer = subprocess.Popen(
                [sys.executable, "-c", CHANGER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        way = rng.choice(("cut", "write", "replace", "unlink"))
        if way == "replace":
            others = sorted(self.samples.glob("whole-*"))
            shutil.copy(rng.choice(others), f"{self.path}.new")
        size = self.path.stat().st_size
        delay, place = rng.random() * 0.3, rng.randrange(size - 4096)
        self.changer.stdin.write(f"{self.path}\t{way}\t{delay}\t{place}\n")
        return f"{way} at byte {place} after {1000 * delay:.0f} ms"

    def end(self) -> None:
        if self.changer is not None:
            self.changer.stdin.close()
            self.changer.wait()


def _files(path: Path) -> list[Path]:
    inside = path.iterdir() if path.is_dir() else [path]
    return [file for file in inside if file.is_file() and not file.is_symlink()]


def _where(error: BaseException) -> str:
    """The last place in the pack."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torture/" not in f.filename and "site-packages" not in f.filename]
    if not own:
        return ""
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})"


if __name__ == "__main__":
    sys.exit(main())
