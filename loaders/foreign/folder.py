"""A folder that diffusers or ModelOpt wrote: config.json and safetensors, in shards or not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ...utils import checksums
from ...utils.text import brief, read_json
from ...utils.unreadable import raise_unless_damage
from .. import reading

STATE = "modelopt_state.pth"
COMPONENTS = ("unet",)
CONFIG = "config.json"
AGAIN = "get the whole folder again"


def component(path: Path) -> Path:
    """The folder of the UNet: of a pipeline its subfolder, else the folder itself."""
    for name in COMPONENTS:
        if (path / name / CONFIG).is_file() and not (path / CONFIG).is_file():
            return path / name
    return path


def config(path: Path) -> dict:
    """config.json of a folder. Raises ValueError where it is missing or no object."""
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(
            f"an exported folder must hold {CONFIG}, {path} does not: name the folder that "
            "save_pretrained or export_hf_checkpoint wrote"
        )
    return _object(file)


def _object(file: Path) -> dict:
    """The object in a JSON file."""
    try:
        if not file.is_file():  # a pipe, or a link to a device, would be read without an end
            raise ValueError("no file")
        with file.open("rb") as opened:
            text = opened.read(checksums.LONGEST_HEADER + 1)
        if len(text) > checksums.LONGEST_HEADER:
            raise ValueError(f"more than {checksums.LONGEST_HEADER} bytes")
        found = read_json(text.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise_unless_damage(file, error)
        raise ValueError(f"{file} must be JSON, found {brief(str(error))}: {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a JSON object, found {type(found).__name__}: {AGAIN}")
    return found


def weight_files(path: Path) -> list[Path]:
    """The safetensors that make up the folder's weights. Raises ValueError where one is missing."""
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(
            f"an exported folder must hold one index, {path} holds {len(indexes)}: {AGAIN}"
        )
    if indexes:
        shards = [path / name for name in sorted(set(_shards(indexes[0]).values()))]
        missing = [shard for shard in shards if not os.path.isfile(shard)]  # also names too long
        if missing:
            raise ValueError(
                f"every shard of the index must be there, {brief(str(missing[0]))} is missing: {AGAIN}"
            )
        return shards
    found = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(found) != 1:
        raise ValueError(
            "an exported folder must hold one .safetensors file or an index of several, "
            f"{path} holds {len(found)}: {AGAIN}"
        )
    return found


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder, memory-mapped. Raises ValueError where something is missing."""
    merged: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        held = reading.tensors_of(file)[0]
        twice = sorted(merged.keys() & held.keys())
        if twice:
            raise ValueError(
                f"every tensor must be in one shard, {brief(twice[0])} in {file} is in another too: {AGAIN}"
            )
        merged |= held
    for index in path.glob("*.safetensors.index.json"):
        missing = sorted(_shards(index).keys() - merged.keys())
        if missing:
            raise ValueError(
                f"the shards must hold every tensor of the index, {path} lacks {len(missing)}, "
                f"the first {brief(missing[0])}: {AGAIN}"
            )
    return merged


def _shards(index: Path) -> dict[str, str]:
    """Tensor name -> file name, which must stay in the folder."""
    try:
        names = _object(index)["weight_map"]
        good = all(isinstance(n, str) and n.endswith(".safetensors") for n in names.values())
        good = good and all(Path(n).name == n for n in names.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"an index must hold a weight_map, {index} has {error!r}: {AGAIN}"
        ) from error
    if not good:
        raise ValueError(
            f"an index must name .safetensors files of its folder, {index} does not: {AGAIN}"
        )
    return names
