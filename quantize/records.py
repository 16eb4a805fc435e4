"""Real UNet calls on the CPU: one (`Record`), those of one sampling run (`Run`), and a `Recorder`.

Thinning keeps the kinds of call apart (cond and uncond come one after the other when memory is
short): taking every second call would otherwise keep one of them only.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .thinning import phase_of, shares, spread

Control = dict[str, list[torch.Tensor | None]]
# arguments of a call that are not among its `kwargs` or `plain`
OWN = frozenset(["x", "timesteps", "context", "y", "control", "transformer_options"])
_shared: weakref.WeakValueDictionary[bytes, torch.Tensor] = weakref.WeakValueDictionary()


def digest(tensor: torch.Tensor) -> bytes:
    """Hash of a CPU tensor's dtype, shape and bytes: equal for identical tensors only."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    key = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=20)
    key.update(data.numpy())
    return key.digest()


def keep(tensor: torch.Tensor) -> torch.Tensor:
    """A detached, contiguous copy on the CPU, one object for all identical tensors in memory.

    ComfyUI samples in inference mode, whose tensors refuse in-place work later: a copy made
    outside of it is an ordinary tensor.
    """
    with torch.inference_mode(False), torch.no_grad():
        seen = tensor.detach().to("cpu").contiguous()
        key = digest(seen)
        kept = _shared.get(key)
        if kept is None:
            kept = _shared[key] = seen.clone()
        return kept


@dataclass(frozen=True, eq=False)
class Record:
    """The arguments of one UNet call, on the CPU, in the dtypes seen. Never write to them.

    x [B, C, H, W], of a video model [B, C, T, H, W]; timesteps [B]; context [B, T, D] or None;
    y [B, A] or None; control: ControlNet residuals by `input`, `middle`, `output`; kwargs: tensors
    and lists of tensors that were passed by other names; plain: JSON-able values likewise.
    index: which call of its run it was. kind: calls of one kind differ in time only.
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor | None = None
    y: torch.Tensor | None = None
    control: Control | None = None
    kwargs: Mapping[str, torch.Tensor | list[torch.Tensor]] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    kind: int = 0

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Record:
        """The same record with `change` applied to every tensor; lists and dicts are new ones."""

        def maybe(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else change(tensor)

        control = None
        if self.control is not None:
            control = {name: [maybe(t) for t in ts] for name, ts in self.control.items()}
        return replace(
            self,
            x=change(self.x),
            timesteps=change(self.timesteps),
            context=maybe(self.context),
            y=maybe(self.y),
            control=control,
            kwargs={
                name: [change(t) for t in value] if isinstance(value, list) else change(value)
                for name, value in self.kwargs.items()
            },
        )

    def arguments(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """`args, kwargs` of the call: `unet(*args, **kwargs)` replays it.

        The control lists and the transformer options are fresh at every call: UNetModel pops and
        writes to them. `dtype` casts every floating tensor but the timesteps, which ComfyUI keeps
        in float32.
        """

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            cast = dtype if tensor is not self.timesteps and tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=cast)

        there = self.map(moved)
        named = {
            "context": there.context,
            "control": there.control,
            "transformer_options": dict(transformer_options or {}),
        }
        if there.y is not None:  # not every model has one
            named["y"] = there.y
        return (there.x, there.timesteps), dict(there.plain) | dict(there.kwargs) | named


@dataclass(frozen=True, eq=False)
class Run:
    """Records of one sampling run, in order, and how it was sampled.

    calls: UNet calls seen, kept or not. width, height in pixels. number: which run of its
    calibration it was.
    """

    records: tuple[Record, ...]
    calls: int = 0
    prompt: str | None = None
    steps: int = 0
    cfg: float = 0.0
    sampler: str = ""
    scheduler: str = ""
    seed: int = 0
    denoise: float = 1.0
    width: int = 0
    height: int = 0
    number: int = 0

    def thinned(self, count: int) -> Run:
        """This run with at most `count` records, even over its trajectory."""
        return replace(self, records=thin(self.records, count, phase_of(self.number)))

    def facts(self) -> dict[str, Any]:
        """Everything but the records, JSON-able."""
        return {name: value for name, value in vars(self).items() if name != "records"}


def thin(records: Sequence[Record], count: int, phase: float = 0.5) -> tuple[Record, ...]:
    """At most `count` of a run's records, even over time within each kind of call."""
    if len(records) <= count:
        return tuple(records)
    kinds: dict[int, list[Record]] = {}
    for record in records:
        kinds.setdefault(record.kind % _kinds_within(count), []).append(record)
    given = shares(count, [len(group) for group in kinds.values()])
    chosen = [
        group[i]
        for group, share in zip(kinds.values(), given, strict=True)
        for i in spread([r.index for r in group], share, phase)
    ]
    return tuple(sorted(chosen, key=lambda record: record.index))


def _sorted_out(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Named arguments -> tensors and lists of them, and JSON-able values."""
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in kwargs.items():
        listed = isinstance(value, list | tuple)
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif listed and value and all(isinstance(entry, torch.Tensor) for entry in value):
            tensors[name] = list(value)
        else:
            plain[name] = _plain(value, name)
    return tensors, plain


def _plain(value: Any, where: str) -> Any:
    """A copy of a value that JSON gives back as it was (tuples as lists). Raises ValueError."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    found = type(value).__name__
    if isinstance(value, dict):
        found = "a dict whose keys are not all text"
    elif isinstance(value, torch.Tensor):
        found = "a tensor among other values"
    raise ValueError(
        f"a recorded call takes tensors, lists of tensors and plain values, got {found} in {where}: "
        "this model cannot be recorded in this graph"
    )


def _kinds_within(budget: int) -> int:
    """Kinds told apart: each must have room for its first and its last call."""
    return max(1, budget // 2)


class Recorder:
    """Takes UNet calls as they come; holds at most 2 * budget, even over all seen so far.

    Each kind of call keeps every `stride`-th of its calls and its last; when full, the stride
    doubles. May be called from several threads (ComfyUI's multi-GPU sampling).
    """

    def __init__(self, budget: int) -> None:
        if budget < 1:
            raise ValueError(
                f"a calibration keeps at least 1 record, got {budget} in max_records: raise it"
            )
        self.budget = budget
        self.calls = 0
        self._stride = 1
        self._kinds: dict[Hashable, int] = {}
        self._seen: dict[int, int] = {}
        self._kept: list[tuple[int, Record]] = []
        self._last: dict[int, Record] = {}
        self._lock = threading.Lock()

    def add(
        self,
        kind: Hashable,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Control | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy a call to the CPU. Of `kwargs`, tensors, lists of them, and JSON-able values; raises
        ValueError for another, without which the call could not be replayed."""
        with self._lock:
            number = self._kinds.setdefault(kind, len(self._kinds)) % _kinds_within(self.budget)
            position = self._seen.get(number, 0)
            self._seen[number] = position + 1
            index, self.calls = self.calls, self.calls + 1
            self._last.pop(number, None)
            keep_last = self.budget > 1
            while len(self._held()) >= 2 * self.budget and (
                keep_last or position % self._stride == 0
            ):
                self._stride *= 2
                self._kept = [entry for entry in self._kept if entry[0] % self._stride == 0]
            keep_it = position % self._stride == 0
            if not (keep_it or keep_last):
                return
            tensors, plain = _sorted_out(kwargs or {})
            call = Record(x, timesteps, context, y, control, tensors, plain, index, number)
            record = call.map(keep)
            if keep_it:
                self._kept.append((position, record))
            if keep_last:
                self._last[number] = record

    def _held(self) -> dict[int, Record]:
        held = [record for _, record in self._kept] + list(self._last.values())
        return {record.index: record for record in held}

    @property
    def records(self) -> tuple[Record, ...]:
        """At most `budget` records of what was seen, in order."""
        held = self._held()
        return thin([held[index] for index in sorted(held)], self.budget)
