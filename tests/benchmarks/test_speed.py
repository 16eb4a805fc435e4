"""`dev.py bench`: shapes, candidates, the choice table, workers that die, the page, a whole run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_modelopt.benchmarks.speed import (
    arms,
    layers,
    limits,
    machine,
    producers,
    report,
    run,
    shapes,
)
from comfyui_modelopt.benchmarks.speed.candidates import CANDIDATES, SIXTEEN, Candidate
from comfyui_modelopt.benchmarks.speed.problem import Problem
from comfyui_modelopt.benchmarks.speed.processes import Failed, Worker
from comfyui_modelopt.benchmarks.speed.settings import QUICK, Plan, Setting, setting
from comfyui_modelopt.benchmarks.speed.shapes import Conv, Linear
from comfyui_modelopt.devtools.common import ROOT
from comfyui_modelopt.formats.checkpoint import PER_TOKEN, STATIC

from ..cpu import INT_MM_EXACT

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_INT_MM = ("torch._int_mm", "comfy-kitchen int8_linear")
SMALL = [
    Linear(6, 32, 64),
    Linear(1, 48, 32),
    Conv(2, 8, 5, 7, 16, 3, 1, 1),
    Conv(1, 8, 6, 6, 16, 3, 2, 1),
    Conv(1, 16, 4, 4, 8, 1, 1, 0),
]


# --- the work of a UNet call ---


@pytest.mark.parametrize(
    ("family", "linear", "conv3", "conv1", "some"),
    [
        (
            "sdxl",
            8708,
            3112,
            134,
            {
                Linear(2048, 1280, 1280): 372,
                Linear(154, 1280, 2048): 120,
                Conv(2, 1280, 32, 32, 1280, 3, 1, 1): 10,
                Conv(2, 320, 128, 128, 320, 3, 2, 1): 1,
            },
        ),
        (
            "sd15",
            467,
            801,
            87,
            {
                Linear(8192, 2560, 320): 5,
                Linear(128, 1280, 1280): 6,
                Conv(2, 1280, 8, 8, 1280, 3, 1, 1): 11,
                Conv(2, 320, 64, 64, 320, 1, 1, 0): 10,
            },
        ),
    ],
)
def test_work_counted_on_comfyuis_unet(family, linear, conv3, conv1, some):
    one = setting(family, quick=False, gpu=True)
    found = shapes.count(family, one.size, one.pixels, one.pixels, one.batch)
    work = shapes.gflop(found)
    assert {kind: round(value) for kind, value in work.items()} == {
        "Linear": linear,
        "conv 3x3": conv3,
        "conv 1x1": conv1,
    }
    assert {shape: found[shape].layers for shape in some} == some
    edges = [s for s in found if s.kind == "conv2d" and 4 in (s.c, s.k)]
    assert len(edges) == 2 and all(found[shape].quantized == 0 for shape in edges)
    assert len({shape.key for shape in found}) == len(found)
    for shape in found:
        assert shapes.of_dict(json.loads(json.dumps(shapes.as_dict(shape)))) == shape


# --- candidates ---


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.key)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_candidate_gives_the_exact_result(shape, dtype):
    problem = Problem(shape, CPU, dtype)
    ran = []
    for candidate in CANDIDATES:
        if candidate.kind != shape.kind:
            continue
        if (reason := candidate.why_not(problem)) is not None:
            if candidate.name.startswith("Triton"):
                assert not INTERPRETED and reason.startswith("Triton kernels need an NVIDIA GPU")
            else:
                assert reason == "no CUDA device" and "fp8" in candidate.name
            continue
        found = layers.errors(candidate.prepare(problem)(), problem, candidate)
        ran.append(candidate.name)
        if not INT_MM_EXACT and candidate.name in ON_INT_MM:
            continue
        if candidate.gives == "int32":
            assert found == {"accumulators_exact": True}
        else:
            # comfy-kitchen divides by the scale in x's own dtype, and rounds some values elsewhere
            assert found["max_error"] < (5e-3 if dtype == torch.float16 else 1e-5), candidate.name
    ours = {"linear": 9, "conv2d": 5}[shape.kind] if INTERPRETED else 0
    assert len(ran) == {"linear": 7, "conv2d": 6}[shape.kind] + ours


@pytest.mark.parametrize("shape", [SMALL[0], SMALL[2]], ids=lambda shape: shape.key)
@pytest.mark.parametrize("activations", [STATIC, PER_TOKEN])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_the_exact_result_is_that_of_the_quantized_values(shape, form, activations):
    if shape.kind == "conv2d" and activations == PER_TOKEN:
        return
    problem = Problem(shape, CPU, torch.float32)
    exact, sixteen = problem.exact(form, activations), problem.exact(SIXTEEN, "")
    off = (exact - sixteen).square().mean().sqrt() / sixteen.square().mean().sqrt()
    assert 1e-3 < off < 0.1  # quantized, and to the right thing


@pytest.mark.parametrize("name", producers.NAMES)
def test_producers_give_what_their_references_give(name):
    size = [1, 64, 3, 5] if name == producers.GROUP_NORM else [3, 96]
    device = CPU if INTERPRETED else torch.device("cuda")
    rows = producers.measure({"kind": name, "x": size}, device, torch.float16, QUICK)
    assert [row["quantized"] for row in rows] == ["int8", "fp8"]
    for row in rows:
        wanted = {"fused", "unfused"} | ({"16 bits"} if name != producers.ROWS else set())
        assert set(row["ms"]) == wanted and row["error"] < 5e-3 and row["gb_s"] > 0


def test_producers_of_a_unet():
    one = setting("sdxl", quick=False, gpu=True)
    found = producers.of(shapes.count("sdxl", "full", one.pixels, one.pixels, one.batch))
    assert {"kind": "layer_norm", "x": [2048, 1280]} in found
    assert {"kind": "geglu", "x": [8192, 5120]} in found
    assert {"kind": "group_norm", "x": [2, 320, 128, 128]} in found
    assert {"kind": "quantize_rows", "x": [154, 2048]} in found
    assert {one["kind"] for one in found} == set(producers.NAMES)


def test_wrong_results_are_seen():
    problem = Problem(SMALL[0], CPU, torch.float32)
    good = problem.exact("int8", PER_TOKEN)
    row = Candidate("x", "linear", "int8", lambda p: None, PER_TOKEN)
    assert layers.errors(good, problem, row) == {"max_error": 0, "rms_error": 0}
    assert layers.errors(good * 1.02, problem, row)["rms_error"] == pytest.approx(0.02)
    assert layers.errors(good / 0, problem, row)["rms_error"] == float("inf")
    bare = Candidate("y", "linear", "int8", lambda p: None, PER_TOKEN, gives="int32")
    sums = problem.accumulators(PER_TOKEN)
    assert layers.errors(sums.int(), problem, bare) == {"accumulators_exact": True}
    sums[0, 0] += 1
    assert layers.errors(sums.int(), problem, bare) == {"accumulators_exact": False}


def test_one_that_fails_is_a_row_and_ends_nothing(monkeypatch):
    def fails(problem):
        raise RuntimeError("no such\nkernel")

    mine = Candidate("broken", "linear", "int8", fails, PER_TOKEN)
    monkeypatch.setattr(layers, "CANDIDATES", (mine, *CANDIDATES))
    rows = layers.measure(SMALL[0], CPU, torch.float32, QUICK)
    assert rows[0]["error"] == "RuntimeError: no such kernel"
    timed = [row for row in rows if "median_ms" in row]
    assert len(timed) == 7 + 9 * INTERPRETED and all(
        row["calls"] >= 3 and row["tflops"] > 0 for row in timed
    )
    (kitchen,) = (row for row in rows if row["candidate"].startswith("comfy-kitchen"))
    assert kitchen["ran"] == "comfy-kitchen's eager backend"


def test_one_that_loses_the_gpu_is_named_and_left_out_next_time(monkeypatch):
    def fails(problem):
        monkeypatch.setattr(layers, "_alive", lambda device: False)  # there is no GPU to lose here
        raise RuntimeError("an illegal memory access")

    mine = Candidate("wild", "linear", "int8", fails, PER_TOKEN)
    monkeypatch.setattr(layers, "CANDIDATES", (mine, *CANDIDATES))
    with pytest.raises(layers.ContextLost, match="wild lost the GPU: RuntimeError: an illegal"):
        layers.measure(SMALL[0], CPU, torch.float32, QUICK)
    rows = layers.measure(SMALL[0], CPU, torch.float32, QUICK, {"wild": "it was"})
    assert rows[0]["error"] == "it was" and "median_ms" in rows[1]


class Stub:
    """Stands for `Worker`: gives prepared answers, and keeps what it was asked."""

    answers: list = []
    asked: list = []

    def __init__(self, *_):
        pass

    def ask(self, message):
        Stub.asked.append((id(self), message["failed"]))

    def answer(self, limit):
        found = Stub.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        pass


def test_a_new_process_measures_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "Worker", Stub)
    lost, good = {"lost": "wild", "error": "it was"}, {"rows": [1]}
    Stub.answers, Stub.asked = [lost, good, Failed("too slow"), good, lost, lost], []
    with run.LayerWorker(setting("sd15", True, False), tmp_path) as worker:
        assert [worker.measure({}) for _ in range(4)] == [good, {"error": "too slow"}, good, lost]
    assert [failed for _, failed in Stub.asked][1] == {"wild": "it was"}


def test_a_slow_candidate_gets_fewer_calls(monkeypatch):
    slow = Candidate(
        "slow", "linear", SIXTEEN, lambda p: lambda: time.sleep(0.05) or p.exact(SIXTEEN, "")
    )
    monkeypatch.setattr(layers, "CANDIDATES", (slow, CANDIDATES[0]))
    plan = Plan(warm_up=50, rounds=2, repeats=50, seconds=0.2, limit=1)
    rows = layers.measure(SMALL[0], CPU, torch.float32, plan)
    assert rows[0]["calls"] < 10 and rows[1]["calls"] > 10


# --- the choice table ---


def made_row(candidate: str, form: str, ms: float, **more) -> dict:
    row = {"candidate": candidate, "format": form, "activations": "", "takes": "float"}
    row |= {"gives": "output", "median_ms": ms, "iqr_ms": 0.0, "rms_error": 1e-4}
    return row | {"max_error": 1e-3, "tflops": 1.0} | more


def made_layer(*rows: dict) -> dict:
    shape = SMALL[0]
    facts = {"key": shape.key, "shape": shapes.as_dict(shape), "layers": 3, "quantized": 2}
    return facts | {"rows": list(rows)}


def test_the_fastest_right_candidate_is_chosen():
    table = layers.choices(
        [
            made_layer(
                made_row("f", SIXTEEN, 1.0),
                made_row("channels", SIXTEEN, 2.0),
                made_row("fast", "int8", 0.5),
                made_row("slower", "int8", 0.7),
                made_row("wrong", "int8", 0.1, rms_error=0.5),
                made_row("sums", "int8", 0.1, gives="int32"),
                made_row("after a producer", "int8", 0.3, takes="quantized"),
                made_row("eight", "fp8", 1.5, activations=STATIC),
                made_row("tokens", "fp8", 0.9, activations=PER_TOKEN),
                {"candidate": "none", "format": "fp8", "takes": "float", "why_not": "no"},
            )
        ]
    )
    what = ("format", "activations", "takes")
    found = {tuple(c[w] for w in what): (c["fastest"], c["faster_than_16_bits"]) for c in table}
    assert found == {
        (SIXTEEN, "", "float"): ("f", None),
        ("int8", "", "float"): ("fast", True),
        ("int8", "", "quantized"): ("after a producer", True),
        ("fp8", STATIC, "float"): ("eight", False),  # a loss stays in the table
        ("fp8", PER_TOKEN, "float"): (
            "tokens",
            True,
        ),  # not what a layer with a static scale computes
    }
    assert all(c["key"] == "linear 6x32x64" and c["shape"]["kind"] == "linear" for c in table)
    assert table[1]["ms"] == 0.5 and table[1]["ms_16_bits"] == 1.0


def test_without_16_bits_nothing_is_called_faster():
    (choice,) = layers.choices([made_layer(made_row("x", "int8", 1.0))])
    assert choice["faster_than_16_bits"] is None


# --- arms and limits ---


def test_arms_have_names_and_limits_of_the_table():
    names = [arm.name for arm in arms.ARMS]
    assert len(set(names)) == len(names) and names[0] == "eager"
    assert all(arm.limit is None or arm.limit in limits.IDEAL_MS for arm in arms.ARMS)
    assert {"int8-linear", "fp8-all-compiled", "int8-all-graphs", "sdnq-int8"} <= set(names)
    assert [arm.name for arm in arms.chosen(["int8-all"])] == ["eager", "int8-all"]
    assert arms.chosen(None) == arms.ARMS
    with pytest.raises(ValueError, match="must be one of eager, .* got fast"):
        arms.chosen(["fast"])


def test_a_new_option_is_one_row():
    arm = arms.ours("int8", arms.CONV, arms.NO_GRAPHS, tag="fused", fused=True)
    assert (arm.name, arm.needs) == ("int8-all-compiled-fused", ("int8", "linear + conv"))
    assert arm.build.args[2] == {"fused": True}


def test_each_part_has_its_arm_and_its_limit():
    found = {arm.name: arm for arm in arms.ARMS if arm.name.startswith("int8-")}
    wanted = {
        "int8-linear-library": (
            "8-bit Linear, separate quantize passes",
            {"arithmetic": "library"},
        ),
        "int8-linear-unfused": (
            "8-bit Linear, separate quantize passes",
            {"fuse": False, "arithmetic": "integer"},
        ),
        "int8-all-compiled-unfused": (
            "8-bit Linear + conv, separate quantize passes",
            {"fuse": False, "arithmetic": "integer"},
        ),
        "int8-all-all-8-bit": ("8-bit Linear + conv, all fused", {"arithmetic": "integer"}),
        "int8-linear": ("8-bit Linear, fused", {}),
        "int8-all-graphs": ("8-bit Linear + conv, all fused", {}),
    }
    for name, (limit, options) in wanted.items():
        assert (found[name].limit, found[name].build.args[2]) == (limit, options)
    assert found["int8-all-unfused"].why_not(CPU) == "no CUDA device"
    assert found["int8-all"].why_not(CPU) is None


def test_the_limit_is_an_h200s_only():
    full = setting("sdxl", quick=False, gpu=True).as_dict()
    row = "8-bit Linear + conv, all fused"
    assert limits.share("NVIDIA H200", full, row, 23.6) == pytest.approx(0.5)
    assert limits.share("NVIDIA H100 80GB HBM3", full, row, 23.6) is None
    assert limits.share(None, full, row, 23.6) is None
    assert limits.share("NVIDIA H200", full | {"size": "tiny"}, row, 23.6) is None


def test_settings_survive_json():
    one = setting("sd15", quick=True, gpu=False)
    assert Setting.of_dict(json.loads(json.dumps(one.as_dict()))) == one


# --- workers ---

# answers each line with what its spec says, or does worse
CHILD = """
import json, sys, time
spec = json.loads(sys.argv[1])
for line in sys.stdin:
    if spec == "dies":
        print("the last words", file=sys.stderr)
        sys.exit(3)
    if spec == "hangs":
        time.sleep(100)
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""


def worker(what: str, folder) -> Worker:
    return Worker(what, folder, folder / "log.txt", (sys.executable, "-c", CHILD))


def test_a_worker_answers_until_it_is_closed(tmp_path):
    one = worker("answers", tmp_path)
    for number in range(3):
        one.ask({"n": number})
        assert one.answer(30) == {"heard": {"n": number}}
    one.close()
    assert one.process.poll() is not None


def test_a_worker_that_dies_says_so(tmp_path):
    one = worker("dies", tmp_path)
    one.ask({})
    with pytest.raises(Failed, match="ended with status 3: the last words"):
        one.answer(30)
    with pytest.raises(Failed, match="status 3"):
        for _ in range(1000):
            one.ask({})
    one.close()


def test_a_worker_that_hangs_is_ended(tmp_path):
    one = worker("hangs", tmp_path)
    one.ask({})
    with pytest.raises(Failed, match="its limit of 1 s"):
        one.answer(1)
    assert one.process.poll() is not None


# --- the page ---


def made_arm(title: str, ms: float, **more) -> dict:
    row = {"title": title, "limit": "fp16, eager", "median_ms": ms, "iqr_ms": 0.2, "finite": True}
    row |= {"weight_bytes": 10**9, "first_call_s": 1.0, "dtype": "float16", "over_eager": 20 / ms}
    return row | {"profile": {"kernels": 5, "launches": 4, "split_ms": {"gemm": 1.5}}} | more


def made_result(**arms_) -> dict:
    facts = machine.describe() | {"gpu": "NVIDIA H200", "capability": [9, 0], "cuda": "13.0"}
    family = {"setting": setting("sdxl", False, True).as_dict(), "gflop": {"Linear": 8708.4}}
    layer = made_layer(made_row("torch | F", SIXTEEN, 1.0), made_row("ours", "int8", 0.5))
    family |= {"layers": [layer], "choices": layers.choices([layer]), "arms": arms_}
    row = {"quantized": "int8", "activations": STATIC, "error": 1e-4, "gb_s": 3210.0}
    row |= {"ms": {"fused": 0.01, "unfused": 0.03, "16 bits": 0.012}}
    absent = {"quantized": "fp8", "activations": STATIC, "why_not": "no", "ms": {"unfused": 0.03}}
    family["producers"] = [
        {"kind": "geglu", "x": [2048, 10240], "rows": [row, absent]},
        {"kind": "layer_norm", "x": [8, 8], "error": "it hung"},
    ]
    return {"machine": facts, "quick": False, "families": {"sdxl": family}}


def cells(text: str, start: str) -> list[str]:
    """Of the first such row: the table of arms comes first."""
    line = next(x for x in text.splitlines() if x.startswith(f"| {start}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_page_has_wins_losses_failures_and_gaps():
    text = report.markdown(
        made_result(
            eager=made_arm("fp16, eager", 20.0),
            compiled=made_arm("fp16, compiled", 16.0),
            int8=made_arm("ours", 10.0, sqnr_db=21.0, peak_bytes=3 * 10**9),
            loss=made_arm("slow", 40.0),
            broken={"title": "broken", "error": "out of memory"},
            absent={"title": "torchao", "why_not": "torchao is not installed"},
        )
    )
    assert "NVIDIA H200 (compute capability 9.0)" in text and "comfy-kitchen" in text
    ours = cells(text, "ours")
    assert ours[1:8] == ["10.000 ± 0.100", "2.00", "1.60", "229%", "21.0 dB", "1.00 GB", "3.00 GB"]
    assert cells(text, "slow")[2:4] == ["0.50", "0.40"]
    assert cells(text, "broken")[1] == "failed: out of memory"
    assert cells(text, "torchao")[1] == "not measured: torchao is not installed"
    assert cells(text, "fp16, eager")[7] == "not measured"  # no peak: said, not left out
    assert "torch \\| F" in text
    geglu = ["geglu", "2048 x 10240", "int8, static", "0.0100", "3210", "0.0300", "0.0120", "3.00"]
    assert cells(text, "geglu")[:-1] == geglu
    assert "not measured: no" in text and cells(text, "layer_norm")[3] == "failed: it hung"
    lengths = {
        line.count("|") - line.count("\\|") for line in text.splitlines() if line[:2] == "| "
    }
    heads = [line for line in text.splitlines() if line.startswith("|---")]
    assert lengths == {line.count("|") for line in heads}
    assert "no speed claims" not in text


def test_an_interrupted_and_a_quick_run_say_so():
    result = made_result(eager={"title": "fp16, eager", "why_not": "the run ended before it"})
    text = report.markdown(result | {"quick": True, "interrupted": True})
    assert "no speed claims" in text and "interrupted" in text and "ended before it" in text


def test_slug():
    assert machine.slug({"gpu": "NVIDIA H200", "cpu": "x"}, False) == "nvidia-h200"
    assert machine.slug({"gpu": None, "cpu": "AMD EPYC (R)"}, True) == "cpu-amd-epyc-r_quick"


# --- all of it ---


def bench(out, *more: str, **named) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "dev.py"), "bench", "--in-venv", "--quick"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    done = bench(tmp_path, "--family", "sd15", "--arms", "compiled-graphs,torchao-int8,int8-linear")
    said, _ = done.communicate(timeout=900)
    assert done.returncode == 0, said
    (path,) = tmp_path.glob("speed_*.json")
    result, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert result["quick"] and path.stem.endswith("_quick") and "no speed claims" in text
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["gpu"] or "no GPU" in text
    family = result["families"]["sd15"]
    rows = family["arms"]
    assert list(rows) == ["eager", "compiled-graphs", "torchao-int8", "int8-linear"]
    for name in ("eager", "int8-linear"):
        row, plan = rows[name], family["setting"]["plan"]
        assert row["calls"] == plan["rounds"] * plan["repeats"], row
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["finite"] and row["profile"]["split_ms"]["gemm"] > 0
        assert {"eager", "int8-linear"} <= set(row["together_with"])
    assert rows["eager"]["over_eager"] == 1
    assert "Choice table" not in said and not list(tmp_path.glob("choices_*"))
    assert 15 < rows["int8-linear"]["sqnr_db"] < 40  # quantized, and still the same UNet
    assert rows["int8-linear"]["weight_bytes"] < rows["eager"]["weight_bytes"]
    assert sum("40 layers: int8 linear" in line for line in rows["int8-linear"]["kernels"]) == 1
    if not torch.cuda.is_available():
        assert rows["compiled-graphs"]["why_not"] == "no CUDA device"
        assert "not measured: no CUDA device" in text
    if "why_not" in rows["torchao-int8"]:
        assert cells(text, "torchao int8")[1] == "not measured: torchao is not installed"
    counts = shapes.count("sd15", "tiny", 64, 64, 2)
    assert [layer["key"] for layer in family["layers"]] == [shape.key for shape in counts]
    assert not any("error" in layer for layer in family["layers"])
    assert family["producers"] and not any("error" in one for one in family["producers"])
    keys = {(c["key"], c["format"]) for c in family["choices"]}
    assert keys >= {(shape.key, form) for shape in counts for form in (SIXTEEN, "int8", "fp8")}
    for layer in family["layers"]:
        for row in layer["rows"]:
            if INT_MM_EXACT or row["candidate"] not in ON_INT_MM:
                right = row.get("accumulators_exact") or row.get("rms_error", 1) < 1e-2
                no_gpu = ("no CUDA device", "Triton kernels need an NVIDIA GPU, the device is cpu")
                assert right or row["why_not"] in no_gpu, row


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    # a shell starts what runs in its background deaf to Ctrl-C, and a child would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = bench(tmp_path, "--family", "sd15", "--only", "layers")
    finally:
        signal.signal(signal.SIGINT, before)
    for line in running.stdout:
        if "layer 2/" in line:
            break
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=120)
    assert running.returncode == 130
    (path,) = tmp_path.glob("speed_*.json")
    result = json.loads(path.read_text())
    assert result["interrupted"]
    measured = [layer for layer in result["families"]["sd15"]["layers"] if layer["rows"]]
    assert len(measured) >= 2 and "interrupted" in path.with_suffix(".md").read_text()


def test_an_unknown_arm_is_refused(tmp_path):
    done = bench(tmp_path, "--arms", "warp")
    said, _ = done.communicate(timeout=120)
    assert done.returncode == 1
    assert "must be one of eager" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
