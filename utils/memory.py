"""How much memory of a device a piece of work takes at its highest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

Result = TypeVar("Result")


# before a module's name, in the profiler's events
MARK = "modelopt memory: "
# devices whose tensors torch counts
COUNTED = ("cuda", "cpu")


def peak_of(function: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What `function` returns, and by how many bytes the device's tensors outgrew what was there
    before, as torch's own allocator counts them.

    None where torch does not count (neither CUDA nor the CPU). On the CPU, what a library allocates
    past torch's allocator is not in it.
    """
    result, peak, _ = watched(function, device, {})
    return result, peak


def watched(
    function: Callable[[], Result], device: torch.device, modules: Mapping[str, torch.nn.Module]
) -> tuple[Result, int | None, dict[str, int]]:
    """As `peak_of`, and the bytes that were there more than before when each module was called (at
    its highest, where it was called more than once)."""
    if device.type not in COUNTED:
        return function(), None, {}
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
    return result, torch.cuda.max_memory_allocated(device) - before, live


def _on_cpu(function, device: torch.device, modules):
    def note(name: str) -> None:
        with torch.profiler.record_function(MARK + name):
            pass

    activities = [torch.profiler.ProfilerActivity.CPU]
    whole = torch.profiler.profile(activities=activities, profile_memory=True)
    with whole as profiler, _hooked(modules, note):
        result = function()
    events = profiler.profiler.kineto_results.events()
    found = [(e.start_ns(), e.name(), e.nbytes()) for e in events if e.name() == "[memory]"]
    found += [(e.start_ns(), e.name(), 0) for e in events if e.name().startswith(MARK)]
    now = highest = 0
    live: dict[str, int] = {}
    for _, name, size in sorted(found, key=lambda event: event[0]):
        now += size
        highest = max(highest, now)
        if name.startswith(MARK):
            place = name.removeprefix(MARK)
            live[place] = max(live.get(place, 0), now)
    return result, highest, live


@contextlib.contextmanager
def _hooked(modules: Mapping[str, torch.nn.Module], note: Callable[[str], None]) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: note(name))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
