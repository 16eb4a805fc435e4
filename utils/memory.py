"""How much memory of a device a piece of work takes at its highest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Result = TypeVar("Result")


# before a module's name, in the profiler's events: it is called, it has answered
MARK = "modelopt memory: "
LEFT = "modelopt memory after: "
# devices whose tensors torch counts
COUNTED = ("cuda", "cpu")


@dataclass(frozen=True)
class Watched:
    """By how many bytes a device's tensors outgrew what was there before, while something ran.

    peak: at the highest; None where torch does not count. live: when each module was called. On the
    CPU also inside: at the highest while each module ran; outside: while none of them did. Of a module
    that was called more than once, the most.
    """

    peak: int | None = None
    live: Mapping[str, int] = field(default_factory=dict)
    inside: Mapping[str, int] = field(default_factory=dict)
    outside: int | None = None


def peak_of(function: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What `function` returns, and by how many bytes the device's tensors outgrew what was there
    before, as torch's own allocator counts them.

    None where torch does not count (neither CUDA nor the CPU). On the CPU, what a library allocates
    past torch's allocator is not in it.
    """
    result, found = watched(function, device, {})
    return result, found.peak


def watched(
    function: Callable[[], Result], device: torch.device, modules: Mapping[str, torch.nn.Module]
) -> tuple[Result, Watched]:
    """As `peak_of`, and what was there around calls of the modules, none of which is in another."""
    if device.type not in COUNTED:
        return function(), Watched()
    run = _on_cuda if device.type == "cuda" else _on_cpu
    return run(function, device, modules)


def _on_cuda(function, device: torch.device, modules):
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    live: dict[str, int] = {}

    def note(name: str) -> None:
        live[name] = max(live.get(name, 0), torch.cuda.memory_allocated(device) - before)

    with _hooked(modules, note):
        result = function()
    torch.cuda.synchronize(device)
    return result, Watched(torch.cuda.max_memory_allocated(device) - before, live)


def _on_cpu(function, device: torch.device, modules):
    def note(name: str, mark: str = MARK) -> None:
        with torch.profiler.record_function(mark + name):
            pass

    activities = [torch.profiler.ProfilerActivity.CPU]
    whole = torch.profiler.profile(activities=activities, profile_memory=True)
    with whole as profiler, _hooked(modules, note, lambda name: note(name, LEFT)):
        result = function()
    events = profiler.profiler.kineto_results.events()
    found = [(e.start_ns(), e.name(), e.nbytes()) for e in events if e.name() == "[memory]"]
    found += [(e.start_ns(), e.name(), 0) for e in events if e.name().startswith((MARK, LEFT))]
    now = outside = 0
    live: dict[str, int] = {}
    inside: dict[str, int] = {}
    running = None
    for _, name, size in sorted(found, key=lambda event: event[0]):
        now += size
        if name.startswith(MARK):
            running = name.removeprefix(MARK)
            live[running] = max(live.get(running, 0), now)
        elif name.startswith(LEFT):
            running = None
        if running is None:
            outside = max(outside, now)
        else:
            inside[running] = max(inside.get(running, 0), now)
    return result, Watched(max(outside, *inside.values(), 0), live, inside, outside)


@contextlib.contextmanager
def _hooked(
    modules: Mapping[str, torch.nn.Module],
    note: Callable[[str], None],
    after: Callable[[str], None] | None = None,
) -> Iterator[None]:
    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: note(name)))
        if after is not None:
            hooks.append(module.register_forward_hook(lambda *_, name=name: after(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
