"""Recorded UNet calls of several sampling runs, as one safetensors file and in memory.

A calibration is what ModelOpt is calibrated on and what quality is measured on: real latents,
timesteps and conditioning over whole trajectories, thinned evenly to a budget.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..formats import files
from ..utils import checksums, out_of_memory
from ..utils.files import save_safetensors
from ..utils.finite import JUDGED, all_finite
from ..utils.text import MOST_LISTS, MOST_VALUES, brief, brief_repr, read_json
from ..utils.unreadable import raise_unless_damage
from .records import OWN, Record, Run, digest, keep
from .thinning import shares

__all__ = ["FORMAT_VERSION", "Calibration", "Record", "Run", "load", "save"]

FORMAT_VERSION = 1
METADATA = "modelopt_calibration"
MOST_RECORDS = 2**14  # in one file, four of the largest that the nodes record; as many runs at most
_RANKS = {"x": (4,), "timesteps": (1,), "context": (3,), "y": (2,)}
# of models that are no UNet: videos have frames, and some models take a timestep for each
_OTHER_RANKS = {"x": (3, 4, 5), "timesteps": (1, 2, 3), "context": (2, 3, 4), "y": (1, 2, 3)}
_OF_TENSORS = ("x", "timesteps", "context", "y", "control", "kwargs", "plain")
_KINDS = {"int": int, "float": (int, float), "str": str, "str | None": (str, type(None))}
_WIDTHS = {"x": "in_channels", "context": "context_dim", "y": "adm_in_channels"}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Runs of one UNet architecture; immutable. `len()` is its number of records.

    signature: JSON-able facts of the UNet's architecture. source: name of the model recorded from.
    """

    runs: tuple[Run, ...] = ()
    signature: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
        object.__setattr__(self, "signature", json.loads(json.dumps(dict(self.signature))))

    def __len__(self) -> int:
        return sum(len(run.records) for run in self.runs)

    def __iter__(self) -> Iterator[Record]:
        """The records, run by run, each run in order."""
        for run in self.runs:
            yield from run.records

    def add_run(self, run: Run, max_records: int) -> Calibration:
        """With one more run, thinned to `max_records` in all: every run holds about as many."""
        number = self.runs[-1].number + 1 if self.runs else 0
        return self._thinned((*self.runs, replace(run, number=number)), max_records)

    def merge(self, other: Calibration, max_records: int | None = None) -> Calibration:
        """With the runs of `other` after its own. Raises ValueError for another architecture."""
        if other.runs:
            self.check_matches(other.signature)
        start = self.runs[-1].number + 1 if self.runs else 0
        added = [replace(run, number=start + i) for i, run in enumerate(other.runs)]
        runs = (*self.runs, *added)
        return self._thinned(runs, sum(len(r.records) for r in runs) or 1, max_records)

    def _thinned(self, runs: tuple[Run, ...], *budgets: int | None) -> Calibration:
        budget = min(b for b in budgets if b is not None)
        if budget < 1:
            raise ValueError(
                f"a calibration keeps at least 1 record, got {budget} in max_records: raise it"
            )
        runs = tuple(run for run in runs if run.records)
        given = shares(budget, [len(run.records) for run in runs], [run.number for run in runs])
        kept = [run.thinned(share) for run, share in zip(runs, given, strict=True) if share]
        return replace(self, runs=tuple(kept))

    def summary(self) -> dict[str, Any]:
        """What was recorded, JSON-able, without tensors: for file headers and reports."""

        def each(values: Iterator[Any]) -> list[Any]:
            return list(dict.fromkeys(values))

        return {
            "source": self.source,
            "runs": len(self.runs),
            "records": len(self),
            "calls": sum(run.calls for run in self.runs),
            "prompts": each(run.prompt for run in self.runs if run.prompt is not None),
            "steps": each(run.steps for run in self.runs),
            "cfg": each(run.cfg for run in self.runs),
            "samplers": each(f"{run.sampler}/{run.scheduler}" for run in self.runs),
            "resolutions": each(f"{run.width}x{run.height}" for run in self.runs),
        }

    def check_matches(self, signature: Mapping[str, Any]) -> None:
        """Raises ValueError where there is no record, or the architecture is another one."""
        if not len(self):
            raise ValueError(
                "a calibration must hold at least 1 UNet call, got 0 in this one: "
                "record it with denoise above 0"
            )
        other = json.loads(json.dumps(dict(signature)))
        for name in sorted(self.signature.keys() | other.keys()):
            seen, wanted = self.signature.get(name), other.get(name)
            if seen != wanted:
                raise ValueError(
                    "a calibration must come from a UNet of the same architecture, got "
                    f"{brief(name)} {brief(seen)} recorded from "
                    f"{brief(self.source) or 'an unnamed model'} where this model has "
                    f"{brief(wanted)}: record the calibration again with this model"
                )


# --- the file ---


@out_of_memory.explained("saving", out_of_memory.FREE)
def save(
    calibration: Calibration,
    path: str | os.PathLike[str],
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda size: None,
) -> Path:
    """Write one safetensors file. Identical tensors are written once.

    begin: bytes of all tensors -> the `step` of `save_safetensors`. Raises as `save_safetensors` does
    when `path` exists or cannot be written, and ValueError for no records or more than MOST_RECORDS.
    """
    path = Path(path)
    if not 0 < len(calibration) <= MOST_RECORDS:
        raise ValueError(
            f"a calibration file must hold 1 to {MOST_RECORDS} UNet calls, got {len(calibration)} for "
            f"{path}: record with denoise above 0, and with lower max_records where they are too many"
        )
    tensors: dict[str, torch.Tensor] = {}
    names: dict[bytes, str] = {}

    def name_of(tensor: torch.Tensor) -> str:
        name = names.setdefault(digest(tensor), f"{len(names):06}")
        if name not in tensors:
            whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
            tensors[name] = tensor if whole else tensor.clone().contiguous()
        return name

    header = {
        "format_version": FORMAT_VERSION,
        "signature": calibration.signature,
        "source": calibration.source,
        "runs": [
            run.facts() | {"records": [vars(record.map(name_of)) for record in run.records]}
            for run in calibration.runs
        ],
    }
    step = begin(sum(tensor.nbytes for tensor in tensors.values()))
    save_safetensors(tensors, path, {METADATA: json.dumps(header)}, step)
    return path


@out_of_memory.explained("loading", out_of_memory.FREE)
def load(
    path: str | os.PathLike[str],
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda size: None,
) -> Calibration:
    """Read a file of `save`.

    begin: bytes of the file -> the `step` of `checksums.check`.
    Raises ValueError for a file that is truncated, of something else, damaged, or newer than this.
    """
    path = Path(path)
    metadata, _ = files.metadata_of(path, "a calibration file", "copy it again or record it again")
    if METADATA not in metadata:
        raise ValueError(
            f"a calibration file must have a {METADATA} header, got none in {path}: "
            "choose a file that Save Calibration wrote"
        )
    header = _read_header(metadata[METADATA], path, path.stat().st_size)
    checksums.check(path, begin(path.stat().st_size))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: keep(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        # a RuntimeError is torch's, of a file cut off meanwhile
        raise_unless_damage(path, error)
        raise ValueError(
            f"a calibration file must be a whole safetensors file, got {error} in {path}: "
            "copy it again or record it again"
        ) from error
    try:
        _check_amounts(header["runs"], tensors)
        sound: set[int] = set()
        runs = [_read_run(run, tensors, header["signature"], sound) for run in header["runs"]]
        return Calibration(tuple(runs), header["signature"], str(header["source"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"a calibration file must be as it was saved, got {brief(str(found))} in {path}: "
            "copy it again or record it again"
        ) from error


def _read_header(text: str, path: Path, size: int) -> dict[str, Any]:
    """size: of the file in bytes; a long header is one of many records, which take more."""
    try:
        header = read_json(text, max(MOST_LISTS, size // 1024), max(MOST_VALUES, size // 1024))
        version = header["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the {METADATA} header must be JSON with a format_version, got {text[:40]!r} "
            f"({brief(str(error))}) in {path}: copy the file again or record it again"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"this pack reads calibration files of format version {FORMAT_VERSION}, got "
            f"{brief_repr(version)} in {path}: update the pack or record it again"
        )
    return header


def _check_amounts(runs: Sequence[Mapping], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for no records or too many, and for a dtype that no UNet call has."""
    records = sum(len(run["records"]) for run in runs)
    if not 0 < records <= MOST_RECORDS or len(runs) > MOST_RECORDS:
        raise ValueError(f"{records} UNet calls of {len(runs)} runs, not 1 to {MOST_RECORDS}")
    for name, tensor in tensors.items():
        if tensor.dtype not in JUDGED:
            raise ValueError(f"{brief(name)} of dtype {tensor.dtype}, which no UNet call has")


def _read_run(
    entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], signature, sound: set[int]
) -> Run:
    records = tuple(_read_record(record, tensors, signature, sound) for record in entry["records"])
    return Run(records, **_facts(entry, Run, "records"))


def _facts(entry: Mapping[str, Any], kind: type, *other: str) -> dict[str, Any]:
    """The plain values of a Run or a Record, each of the kind that the class says."""
    found = {}
    for item in fields(kind):
        if item.name in other:
            continue
        value = entry[item.name]
        if isinstance(value, bool) or not isinstance(value, _KINDS[item.type]):
            raise ValueError(f"{item.name} that is {brief_repr(value)}")
        found[item.name] = value
    return found


def _read_record(
    entry: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    signature: Mapping[str, Any],
    sound: set[int],
) -> Record:
    """sound: which tensors were looked through, by `id`; records share them, and each is so once."""
    _facts({"index": 0, "kind": 0} | dict(entry), Record, *_OF_TENSORS)
    record = Record(**entry).map(lambda name: tensors[name])
    if not isinstance(record.plain, Mapping):
        raise ValueError(f"plain values that are no table but {brief_repr(record.plain)}")
    if own := sorted(OWN & (record.kwargs.keys() | record.plain.keys())):
        raise ValueError(f"{', '.join(own)} among the values passed by other names")
    unet = "class" not in signature
    for name, ranks in (_RANKS if unet else _OTHER_RANKS).items():
        tensor = getattr(record, name)
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) not in ranks:
            wanted = " or ".join(map(str, ranks))
            raise ValueError(f"{name} with shape {shape} instead of {wanted} dimensions")
        if unet and 0 in shape:
            raise ValueError(f"{name} with shape {shape}, which holds no values")
        if shape[0] != len(record.x):
            raise ValueError(f"{name} with batch {shape[0]} beside x with batch {len(record.x)}")
        width = signature.get(_WIDTHS.get(name))
        if width is not None and shape[1 if name == "x" else -1] != width:
            raise ValueError(f"{name} with shape {shape} for {_WIDTHS[name]} {width}")
        if id(tensor) not in sound and not (tensor.is_floating_point() and all_finite(tensor)):
            raise ValueError(f"values in {name} that are not finite floating point numbers")
        sound.add(id(tensor))
    return record
