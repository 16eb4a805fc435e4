"""Damage to an exported folder, made in a copy of it that shares its large files."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from . import lies, safetensors, texts

INDEX = "*.safetensors.index.json"


def linked(source: Path, target: Path) -> None:
    """A copy whose files are hard links; writing to one means replacing it."""
    target.mkdir()
    for file in source.iterdir():
        os.link(file, target / file.name)


def replace(file: Path, data: bytes | str) -> None:
    file.unlink()
    file.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def damage(rng: random.Random, folder: Path) -> str:
    """Damages the folder; says how."""
    kinds = ["json", "broken json", "file", "shard", "missing", "swapped", "link", "strange"]
    kind = rng.choice([*kinds, "json", "shard"])
    return globals()[f"_{kind.replace(' ', '_')}"](rng, folder)


def _texts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _json(rng: random.Random, folder: Path) -> str:
    file = rng.choice(_texts(folder))
    text, words = texts.changed_json(rng, file.read_text(encoding="utf-8"))
    replace(file, text)
    return f"{file.name}: {words}"


def _broken_json(rng: random.Random, folder: Path) -> str:
    file = rng.choice(_texts(folder))
    data, words = texts.broken_json(rng, file.read_text(encoding="utf-8"))
    replace(file, data)
    return f"{file.name}: {words}"


def _file(rng: random.Random, folder: Path) -> str:
    """Any file of it is replaced by rubbish."""
    file = rng.choice(sorted(folder.iterdir()))
    replace(file, rng.choice((b"", b"\0" * 100, rng.randbytes(1000), b"[]", b"PK\x03\x04")))
    return f"{file.name} is rubbish"


def _shard(rng: random.Random, folder: Path) -> str:
    file = rng.choice(_shards(folder))
    ways = (safetensors.truncated, safetensors.flipped_header, safetensors.flipped_length,
            safetensors.flipped_data, safetensors.tensors, lies.lying,
            safetensors.sealed_values)  # fmt: skip
    data, words = rng.choice(ways)(rng, file.read_bytes())
    replace(file, data)
    return f"{file.name}: {words}"


def _missing(rng: random.Random, folder: Path) -> str:
    file = rng.choice(sorted(folder.iterdir()))
    file.unlink()
    return f"{file.name} is missing"


def _swapped(rng: random.Random, folder: Path) -> str:
    files = sorted(folder.iterdir())
    first, second = rng.sample(files, 2)
    spare = folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    return f"{first.name} and {second.name} are swapped"


def _link(rng: random.Random, folder: Path) -> str:
    """A link to what must not be read, or a file that never ends."""
    file = rng.choice(sorted(folder.iterdir()))
    file.unlink()
    to = rng.choice(("/dev/zero", "/dev/random", "/proc/self/mem", str(folder), file.name, "pipe"))
    if to == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(to)
    return f"{file.name} is a {'pipe' if to == 'pipe' else f'link to {to}'}"


def _strange(rng: random.Random, folder: Path) -> str:
    """Shards that an index names outside of the folder, folders in place of files."""
    import json

    indexes = sorted(folder.glob(INDEX))
    if not indexes or rng.random() < 0.3:
        file = rng.choice(sorted(folder.iterdir()))
        file.unlink()
        file.mkdir()
        return f"{file.name} is a folder"
    index = json.loads(indexes[0].read_text(encoding="utf-8"))
    names = index["weight_map"]
    outside = folder.parent / "outside.safetensors"
    shutil.copy(_shards(folder)[0], outside)
    name = rng.choice(
        (
            "../outside.safetensors",
            str(outside),
            "x/../../outside.safetensors",
            "\0.safetensors",
            "..\\outside.safetensors",
            "~/x.safetensors",
            "/dev/zero",
            "a" * 5000 + ".safetensors",
            "http://x/y.safetensors",
            ".safetensors",
            "\ud800.safetensors",
        )  # fmt: skip
    )
    keys = list(names) if rng.random() < 0.5 else [rng.choice(list(names))]
    index["weight_map"] = names | dict.fromkeys(keys, name)
    replace(indexes[0], json.dumps(index))
    return f"the index names {name[:60]!r}"
