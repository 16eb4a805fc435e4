"""The process that measures one arm, or the layers: a crash, a hang or a lost GPU context ends it
alone. Speaks JSON, one message a line, on the pipe that was its standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import comfy.model_management as management
import torch
import torch._dynamo.utils

from ...quantize.quality import sqnr_db
from ...utils import kernel_split, timing
from ...utils.speed_report import in_one_line
from . import arms, layers, making, producers, shapes
from .settings import Setting

REFERENCE = "eager_output.pt"


def main(spec: dict) -> int:
    """spec: `setting`, `folder` and either `arm`, or `layers`, or `make` with `needs`."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print goes to standard error
    torch.manual_seed(0)
    setting, folder = Setting.of_dict(spec["setting"]), Path(spec["folder"])
    device = management.get_torch_device()

    def answer(work) -> None:
        try:
            with torch.no_grad():
                message = work()
        except arms.NotMeasured as reason:
            message = {"why_not": str(reason)}
        except Exception as error:  # reported in the table, whatever it is
            import traceback

            traceback.print_exc()
            message = {"error": in_one_line(error)}
        pipe.write(json.dumps(message) + "\n")

    with contextlib.suppress(BrokenPipeError):
        if "make" in spec:
            answer(lambda: _make(spec, setting, folder))
        elif "layers" in spec:
            for line in sys.stdin:
                asked = json.loads(line)
                answer(lambda asked=asked: _layer(asked, device, setting))
        else:
            _serve_arm(spec["arm"], setting, folder, device, answer)
    return 0


def _make(spec: dict, setting: Setting, folder: Path) -> dict:
    started = time.monotonic()
    if spec["needs"] is None:
        making.sixteen(setting, folder)
    else:
        making.quantized(setting, folder, tuple(spec["needs"]))
    return {"seconds": time.monotonic() - started}


def _layer(asked: dict, device: torch.device, setting: Setting) -> dict:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if asked["shape"]["kind"] in producers.NAMES:
        return {"rows": producers.measure(asked["shape"], device, dtype, setting.plan)}
    shape = shapes.of_dict(asked["shape"])
    try:
        return {"rows": layers.measure(shape, device, dtype, setting.plan, asked["failed"])}
    except layers.ContextLost as lost:
        return {"lost": lost.candidate, "error": lost.error}


def _serve_arm(name: str, setting: Setting, folder: Path, device: torch.device, answer) -> None:
    (arm,) = (arm for arm in arms.ARMS if arm.name == name)
    held: dict = {}

    def build() -> dict:
        reason = arm.why_not(device)
        if reason is not None:
            raise arms.NotMeasured(reason)
        built = held["built"] = arm.build(setting, folder)
        return first_calls(built, arm, setting, folder, device)

    answer(build)
    for line in sys.stdin:
        count = json.loads(line)["count"]
        answer(
            lambda count=count: {"samples": timing.time_calls(held["built"].call, count, device)}
        )


def first_calls(built: arms.Built, arm: arms.Arm, setting: Setting, folder: Path, device) -> dict:
    """Warm-up, memory, correctness, kernels, and the time of the arm by itself."""
    on_gpu = device.type == "cuda"
    started = time.perf_counter()
    output = built.call()
    timing.synchronize(device)
    found: dict = {**built.facts, "first_call_s": time.perf_counter() - started}
    counters = torch._dynamo.utils.counters
    found["graphs"] = counters["stats"]["unique_graphs"]
    found["graph_breaks"] = sum(counters["graph_break"].values())
    output = output.float().cpu()
    found["finite"] = bool(torch.isfinite(output).all())
    if arm.name == "eager":
        torch.save(output, folder / REFERENCE)
    elif (folder / REFERENCE).is_file() and found["finite"]:
        found["sqnr_db"] = sqnr_db(torch.load(folder / REFERENCE), output)
    if getattr(built.model.model, "model_lowvram", False):
        raise RuntimeError("the weights do not fit beside the other arms: ComfyUI streams them")
    found["weight_bytes"] = arms.weight_bytes(built)
    found["dtype"] = str(built.model.model.get_dtype_inference()).removeprefix("torch.")
    timing.time_calls(built.call, setting.plan.warm_up, device)
    if on_gpu:  # of this process alone: no other arm is in it
        torch.cuda.reset_peak_memory_stats(device)
        built.call()
        timing.synchronize(device)
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        found["free_bytes"] = torch.cuda.mem_get_info(device)[0]
    alone = timing.time_calls(built.call, setting.plan.repeats, device)
    found["alone"] = timing.summarize(alone).as_dict()
    return found | {"profile": kernel_split.profile(built.call, device)}
