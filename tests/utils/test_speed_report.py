"""The Benchmark node's words."""

from types import SimpleNamespace

from comfyui_modelopt.utils import speed_report
from comfyui_modelopt.utils.capability import GPU
from comfyui_modelopt.utils.speed_report import Row
from comfyui_modelopt.utils.timing import summarize

CPU = GPU("cpu", "the CPU")
CARD = GPU("cuda", "NVIDIA X", (9, 0), (13, 0), frozenset({"cuda", "eager"}))
OLD_TORCH = GPU("cuda", "NVIDIA X", (9, 0), (12, 8), frozenset({"eager"}))


def kernel(name: str, level: str):
    return SimpleNamespace(name=name, level=level, why="")


def row(label: str, *samples: float, **more) -> Row:
    return Row(label, summarize(samples), **more)


def test_a_row_in_words():
    said = speed_report.row_line(
        row("this", 10.0, 20.0, 30.0, first_seconds=2.0, weight_bytes=2 * 10**9, call_bytes=10**8)
    )
    assert said == (
        "this: 20.00 ms a UNet call (IQR 10.00), 50.00 it/s; weights 2.00 GB in memory, "
        "100.0 MB more during a call; first call 2.0 s"
    )
    assert "during a call" not in speed_report.row_line(row("this", 1.0))
    assert speed_report.row_line(Row("other", why_not="no compiler")) == (
        "other: not measured (no compiler)"
    )


def test_wins_losses_and_ties():
    own = row("this", 9.0, 10.0, 11.0, weight_bytes=5)
    win, loss = row("slow", 19.0, 20.0, 21.0, weight_bytes=10), row("fast", 4.0, 5.0, 6.0)
    tie = row("near", 9.0, 10.5, 12.0)
    lines = speed_report.ratio_lines([own, win, loss, tie, Row("none", why_not="x")])
    assert lines == [
        "this is 2.00 times as fast as slow; its weights take 0.50 of the memory",
        "this is 2.00 times slower than fast",
        "this is 1.05 times as fast as near, within the spread of the calls",
    ]


def test_limits_are_named():
    convs = [kernel("int8 conv2d: exact reference", "emulated")] * 3
    said = "\n".join(speed_report.limits([*convs, kernel("int8 linear: x", "native")], CARD))
    assert "3 convolutions run an exact reference" in said and "Linear" not in said
    assert "CUDA 12.8" in speed_report.limits(convs, OLD_TORCH)[0]
    assert "no NVIDIA GPU" in speed_report.limits(convs, CPU)[0]
    assert speed_report.limits([], OLD_TORCH) == speed_report.limits([], CARD)
    slow = [kernel("fp8 linear: dequantized", "dequantized")] * 2
    assert speed_report.limits(slow, CARD) == [
        "2 layers are dequantized to 16 or 32 bits at every call"
    ]
    waiting = speed_report.limits([], CARD, busy=0.5, launches=700, split_ms={"gemm": 3, "norm": 1})
    assert waiting[0].startswith("the GPU computes 50% of a call and waits for 700 launches")
    assert waiting[1] == "the GPU's time by kind of kernel: gemm 75%, norm 25%"
    assert "2 layers compute a LoRA" in speed_report.limits([], CARD, branches=2)[0]
    assert "main memory" in speed_report.limits([], CARD, streamed=True)[0]


def test_report_says_how_it_was_measured():
    rows = [row("this", 1.0), row("that", 2.0)]
    text = speed_report.benchmark_report(CARD, "SD15", rows, ["a"], ["b"], 5, 10, True)
    assert text.splitlines()[0] == "Machine: NVIDIA X, torch 2.11 built for CUDA 13.0"
    assert "Median of 5 x 10 calls of each, taking turns in shuffled order" in text
    assert text.endswith("Layers:\n- a\nWhat limits it:\n- b")
    alone = speed_report.benchmark_report(CPU, "x", rows, [], [], 5, 1, False)
    assert "one after the other, as memory is short" in alone
