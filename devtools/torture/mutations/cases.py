"""Kinds of case of the campaign `damage`: what is damaged, how, and what opens it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import folders, lies, safetensors, texts, torch_files

ERROR = "error that names the file"
SAME = "equal to the undamaged one"
VALID = "opened: a whole file by its own checksums, of another model"
UNSEEN = "opened as another: a change that a file without checksums cannot show"
CHANGING = "opened as what was there before or after"
KILLED = "ended by the system: cut off in place under its memory map, as any model file of ComfyUI"


@dataclass(frozen=True)
class Kind:
    """samples: pattern of the files to damage. opens: a function of `opening`. damage: (rng, bytes)
    -> (bytes, words). count: cases of the full campaign. other: the outcome where what was opened is
    another than the undamaged one; None: that is a finding. sealed: False takes the sample without
    its checksums."""

    samples: str
    opens: str
    damage: Callable
    count: int
    other: str | None = None
    sealed: bool = True


def _among(*ways: Callable) -> Callable:
    return lambda rng, data: rng.choice(ways)(rng, data)


def _text(way: Callable) -> Callable:
    """A way to damage JSON, for a file of it."""

    def damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
        made, words = way(rng, data.decode())
        return (made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")), words

    return damage


def _folder(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    raise AssertionError("damaged in its place, by `folders.damage`")


def _canary(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    raise AssertionError("made by `torch_files.hostile` for a canary")


_CUT = _among(safetensors.truncated, safetensors.extended, safetensors.cut_out)
_FLIP = _among(safetensors.flipped_header, safetensors.flipped_length)
_DATA = _among(safetensors.flipped_data, safetensors.overwritten)
_ANY = _among(_CUT, _FLIP, _DATA, lies.lying, safetensors.tensors)
_SEALED = _among(safetensors.sealed_texts, safetensors.sealed_values, safetensors.sealed_tensors)
_JSON = _among(_text(texts.changed_json), _text(texts.broken_json))

# those of large files come last, where a short campaign leaves off
KINDS = {
    "quantized file, cut off or out": Kind("quantized-*", "quantized", _CUT, 900),
    "quantized file, bits flipped in the header": Kind("quantized-*", "quantized", _FLIP, 900),
    "quantized file, bits flipped in the data": Kind("quantized-*", "quantized", _DATA, 900),
    "quantized file, lying header": Kind("quantized-*", "quantized", lies.lying, 900),
    "quantized file, other tensors": Kind("quantized-*", "quantized", safetensors.tensors, 700),
    "quantized file, hostile texts, checksums right": Kind(
        "quantized-*", "quantized", safetensors.sealed_texts, 900, VALID
    ),
    "quantized file, hostile values, checksums right": Kind(
        "quantized-*", "quantized", safetensors.sealed_values, 500, VALID
    ),
    "quantized file, hostile tensors, checksums right": Kind(
        "quantized-*", "quantized", safetensors.sealed_tensors, 500, VALID
    ),
    "quantized file of before checksums": Kind(
        "quantized-*", "quantized", _ANY, 400, UNSEEN, sealed=False
    ),
    "calibration, any damage": Kind("calibration*", "calibration", _ANY, 700),
    "calibration, hostile, checksums right": Kind(
        "calibration*", "calibration", _SEALED, 700, VALID
    ),
    ".pt of ModelOpt, any damage": Kind(
        "saved-*",
        "foreign",
        _among(torch_files.truncated, torch_files.flipped, torch_files.cut_out,
               torch_files.overwritten),
        500,
    ),
    ".pt of ModelOpt, other members": Kind("saved-*", "foreign", torch_files.parts, 300, VALID),
    ".pt of ModelOpt, bombs": Kind("saved-*", "foreign", torch_files.bombs, 60),
    ".pt of ModelOpt, hostile pickles": Kind("saved-*", "foreign", _canary, 250),
    ".pt of ModelOpt, hostile values": Kind("saved-*", "foreign", torch_files.edited, 500, VALID),
    "recipe of Auto Quantize": Kind("recipe*", "recipe", _JSON, 600, VALID),
    "names in a workflow": Kind("recipe*", "names", _text(texts.changed_json), 300),
    "whole UNet, any damage": Kind("whole-*", "whole", _ANY, 500),
    "whole UNet, hostile, checksums right": Kind("whole-*", "whole", _SEALED, 300, VALID),
    "whole UNet that changes while it is read": Kind("whole-*", "changing", _ANY, 150, CHANGING),
    "whole UNet in stock's form, any damage": Kind("stock-*", "whole", _ANY, 250, UNSEEN),
    "exported folder": Kind("folder-*", "foreign", _folder, 400, UNSEEN),
}  # fmt: skip


def damaged(kind: str, number: int, seed: int, samples: Path, place: Path) -> tuple[Path, str]:
    """Makes case `number` at `place`, an empty folder -> the damaged file or folder, and how."""
    one = KINDS[kind]
    rng = random.Random(f"{kind} {seed} {number}")
    chosen = sorted(samples.glob(one.samples))
    sample = chosen[number % len(chosen)]
    target = place / sample.name
    if sample.is_dir():
        folders.linked(sample, target)
        return target, f"{sample.name}: {folders.damage(rng, target)}"
    data = sample.read_bytes()
    if one.damage is _canary:
        made, words = torch_files.hostile(rng, data, place / "canary")
    elif one.opens in ("changing", "names"):
        made, words = data, ""
    else:
        made, words = one.damage(rng, data if one.sealed else safetensors.unsealed(data))
    target.write_bytes(made)
    return target, f"{sample.name}: {words}"


def sample_of(kind: str, number: int, samples: Path) -> Path:
    chosen = sorted(samples.glob(KINDS[kind].samples))
    return chosen[number % len(chosen)]
