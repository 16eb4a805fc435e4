"""`convert.py` killed on the way and run by two processes at once: the files of an undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import inprocess
from ..common import ROOT
from .outcome import Effort, Row

NAME = "Conversions"
# of the full campaign: checkpoints, and kills on the way
FILES, KILLS = 10, 3
# convolutions as well as Linear layers in the middle, calibrated: seconds a file
RECIPE = ["--format", "int8", "--algorithm", "max", "--skip", "input_blocks.[0-9].*", "--skip",
          "output_blocks.*", "--skip", "out.2", "--skip", "time_embed.*", "--skip", "*.emb_layers.*"]  # fmt: skip
# of a file, at which a process is killed
STEPS = ("Loading", "Calibrating", "Packing", "Saving")
LONGEST = 900.0  # seconds for a process, on a slow machine


def start(
    files: Sequence[Path], out: Path, *more: str | Path, script: Path = ROOT / "convert.py"
) -> subprocess.Popen:
    """`convert.py` in a process of its own, on the CPU."""
    command = [sys.executable, script, *files, "--out", out, "--device", "cpu", "--quiet", *more]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def now(process: subprocess.Popen, progress: Path) -> str:
    """What a process does to a file just now, "" for nothing."""
    if process.poll() is not None or not progress.exists():
        return ""
    facts = json.loads(progress.read_text(encoding="utf-8"))
    current = facts["current"] if facts["pid"] == process.pid else None
    return current["step"] if current else ""


def when_busy(pair: Sequence[tuple[subprocess.Popen, Path]], step: str = "") -> list[int]:
    """Waits until one of the processes is at a step of a file that begins so, and says which are.
    None of them: all have ended."""
    until = time.monotonic() + LONGEST
    while time.monotonic() < until and any(process.poll() is None for process, _ in pair):
        doing = [now(*one) for one in pair]
        if busy := [index for index, text in enumerate(doing) if text and text.startswith(step)]:
            return busy
        time.sleep(0.02)
    return []


def differences(files: Sequence[Path], out: Path, undisturbed: Path) -> Row:
    """Each file compared with that of the undisturbed run, and what else lies there."""
    row = Row(NAME, "files, against those of an undisturbed run")
    wanted = {path.name: path for path in undisturbed.iterdir()}
    found = {path.name: path for path in out.iterdir()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted:
            row.findings.append(f"{name} was left behind")
        elif name not in found:
            row.findings.append(f"{name} was not made")
        elif found[name].read_bytes() != wanted[name].read_bytes():
            row.findings.append(f"{name} has other bytes")
        else:
            row.outcomes["the same bytes"] += 1
    if len(wanted) != len(files):
        row.findings.append(f"the undisturbed run made {len(wanted)} files of {len(files)}")
    return row


def statuses(said: str) -> Counter[str]:
    """Of what `--json` printed: status -> how many files."""
    return Counter(row["status"] for row in json.loads(said)["files"])


def run(effort: Effort, say: Callable[[str], None]) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="conversions-") as folder:
        return _run(Path(folder), effort, say)


def _run(folder: Path, effort: Effort, say: Callable[[str], None]) -> list[Row]:
    count, kills = max(2, effort.count(FILES)), effort.count(KILLS)
    say(f"{count} checkpoints, {kills} kills")
    files, calibration = make(folder, count, effort.seed)
    options = [*RECIPE, "--calibration", calibration, "--json"]
    first = start(files, folder / "undisturbed", *options)
    said, complaints = first.communicate(timeout=LONGEST)
    ends = Row(NAME, "undisturbed run")
    _ended(ends, first, said, complaints, f"{count} files")
    out, draw = folder / "out", random.Random(effort.seed)
    killed = Row(NAME, "kills while two processes work in one folder")

    def another(number: int) -> tuple[subprocess.Popen, Path]:
        kept = folder / f"progress{number}.json"
        return start(files, out, *options, "--wait", "--progress", kept), kept

    pair = [another(0), another(1)]
    for number in range(kills):
        busy = when_busy(pair, draw.choice(STEPS))
        victim = draw.choice(busy) if busy else 0
        process, kept = pair[victim]
        time.sleep(draw.uniform(0, 0.2))
        step = now(process, kept)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            killed.findings.append(f"seed {effort.seed}: kill {number + 1} came too late")
            continue
        killed.outcomes["killed, and started again"] += 1
        say(f"killed at: {step or 'the end of a file'}")
        pair[victim] = another(number + 2)
    made = 0
    last = Row(NAME, "the two processes that were left")
    for process, _ in pair:
        said, complaints = process.communicate(timeout=LONGEST)
        if _ended(last, process, said, complaints, "all files there"):
            made += statuses(said)["converted"]
    if made > count:
        last.findings.append(f"{made} files were made by them where {count} were asked for")
    return [ends, killed, last, differences(files, out, folder / "undisturbed")]


def _ended(row: Row, process: subprocess.Popen, said: str, complaints: str, what: str) -> bool:
    if process.returncode == 0:
        row.outcomes[f"status 0, {what}"] += 1
        return True
    row.findings.append(f"status {process.returncode}: {(said + complaints)[-2000:]}")
    return False


def make(folder: Path, count: int, seed: int = 0) -> tuple[list[Path], Path]:
    """So many UNets of one architecture, and a recording for all."""
    inprocess.load()
    import comfy.sd
    from comfyui_modelopt.quantize import calibration as calibration_file

    from ..random_weights import write
    from ..synthetic import unet_specs

    specs = unet_specs("sd15", "tiny")
    files = [write(folder / f"unet{n}.safetensors", specs, seed + n) for n in range(count)]
    model = comfy.sd.load_diffusion_model(str(files[0]))
    path = folder / "recording.safetensors"
    calibration_file.save(recording(model), path)
    return files, path


def recording(model):
    """Two UNet calls of a tiny picture, with a prompt of noise: no text encoder is needed."""
    import torch
    from comfyui_modelopt.quantize.bridge import sampling

    generator = torch.Generator().manual_seed(0)
    words = [[torch.randn(1, 77, 768, generator=generator), {}]]
    _, made = sampling.record(
        model,
        seed=1,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="normal",
        positive=words,
        negative=words,
        latent_image={"samples": torch.zeros(1, 4, 8, 8)},
        denoise=1.0,
        max_records=2,
    )
    return made
