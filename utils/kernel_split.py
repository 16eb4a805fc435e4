"""Where the time of a call goes: its kernels by kind, and how often it launches one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

import torch

# the first pattern that a kernel's (or operator's) name holds decides; lower case
KINDS = (
    ("attention", r"attention|flash|fmha|sdpa|softmax|sage"),
    ("convolution", r"conv|dgrad|fprop|wgrad|winograd|im2col|implicit"),
    ("quantize", r"quant|to_fp8|rowwise_amax"),
    ("gemm", r"gemm|cutlass|xmma|wgmma|matmul|addmm|\bmm\b|::mm|bmm|_int_mm|nvjet|linear|cublas"),
    ("norm", r"norm|welford|moments"),
    ("copy", r"memcpy|memset|copy|contiguous|nchwtonhwc|nhwctonchw|transpose|::cat|catarray|fill"),
    (
        "elementwise",
        r"elementwise|triton_poi|pointwise|vectorized|silu|gelu|::mul|::add|::div|::exp|upsample",
    ),
)
# what a host call of the CUDA runtime or driver that starts work is named
LAUNCHES = re.compile(r"^(cuda|cu)(LaunchKernel|LaunchKernelEx|GraphLaunch|LaunchCooperative)")


def kind_of(name: str) -> str:
    """The kind of a kernel or operator by its name, "other" where none fits."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), "other")


def by_kind(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(name, milliseconds) -> kind -> milliseconds, the longest first."""
    totals: dict[str, float] = {}
    for name, ms in entries:
        totals[kind_of(name)] = totals.get(kind_of(name), 0.0) + ms
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def longest(entries: Iterable[tuple[str, float]], count: int = 8) -> list[tuple[str, float]]:
    """The names with the most milliseconds, summed over their calls."""
    totals: Counter = Counter()
    for name, ms in entries:
        totals[name] += ms
    return totals.most_common(count)


def profile(call: Callable[[], object], device: torch.device) -> dict:
    """One call under torch.profiler.

    On a GPU: `kernels` (on the device), `launches` (by the host; a CUDA graph is one), `kernel_ms`
    and `split_ms` by kind. On a CPU there are no kernels: `split_ms` is operators' own time.
    `longest`: name and milliseconds of the kernels (operators) that take most, which proves what ran.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    if not on_gpu:
        own = [(e.key, e.self_cpu_time_total / 1e3) for e in profiler.key_averages()]
        own = [(name, ms) for name, ms in own if ms > 0]
        return {"split_ms": by_kind(own), "longest": longest(own)}
    on_device, launches = [], 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.name.startswith(("ProfilerStep", "## ", "Torch-Compiled")):
                on_device.append((event.name, event.time_range.elapsed_us() / 1e3))
        elif LAUNCHES.match(event.name):
            launches += 1
    return {
        "kernels": len(on_device),
        "launches": launches,
        "kernel_ms": sum(ms for _, ms in on_device),
        "split_ms": by_kind(on_device),
        "longest": longest(on_device),
    }
