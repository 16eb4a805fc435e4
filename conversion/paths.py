"""Files that the command line of `convert.py` names: there, readable, and none in another's place."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.text import brief
from ..utils.unreadable import raise_unless_damage

if TYPE_CHECKING:
    from .options import Order

# file systems take 255 bytes, of which claims and recordings beside an output add up to 30
LONGEST_NAME = 255 - 30


class UsageError(Exception):
    """What is wrong with the command line: exit status 2."""


def found(given: Sequence[Path]) -> tuple[Path, ...]:
    """Absolute paths, each once. A pattern that the shell left is expanded (Windows' leaves them)."""
    found: dict[Path, None] = {}
    for path in given:
        matches = [path]
        if not path.exists() and glob.has_magic(str(path)):
            matches = [Path(name) for name in sorted(glob.glob(str(path)))]
        if not matches or not matches[0].exists():
            raise UsageError(f"a checkpoint must be a file, there is no {path}: correct the path")
        for match in matches:
            if match.is_dir():
                raise UsageError(
                    f"a checkpoint must be a file, {match} is a folder: name the files in it, such "
                    f"as {match / '*.safetensors'}"
                )
            if match.exists() and not match.is_file():
                raise UsageError(
                    f"a checkpoint must be a file, {match} is a pipe or a device: name a file"
                )
            if not _is_utf8(match):
                raise UsageError(
                    f"the path of a checkpoint must be UTF-8, for safetensors, {match} is not: rename it"
                )
            found[match.absolute()] = None
    return tuple(found)


def check_names(order: Order) -> None:
    """Names must differ also where a file system does not tell large letters from small ones."""
    names: dict[str, Path] = {}
    for file in order.files:
        name = order.output(file).name
        if (length := len(name if os.name == "nt" else os.fsencode(name))) > LONGEST_NAME:
            raise UsageError(
                f"an output's name must have at most {LONGEST_NAME} bytes, "
                f"{brief(name)} has {length}: shorten --suffix, or rename the checkpoint"
            )
        other = names.setdefault(name.casefold(), file)
        if other != file:
            raise UsageError(
                f"files for one folder must have different names, got {other} and {file}: rename "
                "one, or convert them into different folders"
            )


def check_kept(args: argparse.Namespace, order: Order) -> None:
    """That --progress and --summary write over no file of the command, nor each other's."""
    others = [*order.files, *map(order.output, order.files), *(one.path for one in order.loras)]
    others += filter(None, (args.calibration, args.prompts, args.recipe))
    for flag, path in (("--progress", args.progress), ("--summary", args.summary)):
        if path is None:
            continue
        if path.exists() and not path.is_file():
            raise UsageError(f"{flag} must name a file, {path} is none: name another")
        if (other := next((one for one in others if _same(one, path)), None)) is not None:
            raise UsageError(f"{flag} must name a file of its own, {path} is {other}: name another")
        others.append(path)


def _same(one: Path, other: Path) -> bool:
    """Whether they name one file; of files that are not there, by their names, however written."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        first, second = map(os.path.realpath, (one, other))
        return first.casefold() == second.casefold()


def _is_utf8(path: Path) -> bool:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def existing(path: Path, flag: str) -> Path:
    if not path.is_file():
        raise UsageError(f"{flag} must name a file, there is no file {path}: correct the path")
    return path


def text(path: Path, flag: str) -> str:
    try:
        return existing(path, flag).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise_unless_damage(path, error)
        raise
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{flag} must name a text file in UTF-8, {path} cannot be read ({error}): save it so"
        ) from error
