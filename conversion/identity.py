"""What a file is made of, and whether the one that is there is that file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..formats import files
from ..utils import sha256
from ..utils.text import brief
from .options import Order

# the entry of the file's header
HEADER = "conversion"
# what a thing is called does not make it another one
NAMES = ("name",)


def of(file: Path, order: Order) -> dict[str, Any]:
    """Everything that decides over the bytes, JSON-able: the source, the recipe as it was asked for,
    LoRAs, calibration. Reads the whole file. Raises OSError."""
    return json.loads(
        json.dumps(
            {
                "source": {"name": file.name, "sha256": sha256.of(file)},
                "recipe": order.recipe.describe(),
                "loras": [
                    {
                        "name": lora.path.name,
                        "sha256": sha256.of(lora.path),
                        "strength": lora.strength,
                    }
                    for lora in order.loras
                ],
                "calibration": _calibration(order),
            }
        )
    )


def _calibration(order: Order) -> dict[str, Any] | None:
    if order.recordings is not None:
        return {"name": order.recordings.name, "sha256": sha256.of(order.recordings)}
    if not order.prompts:
        return None
    text = "\n".join(order.prompts).encode()
    return {"prompts_sha256": hashlib.sha256(text).hexdigest()} | asdict(order.sampling)


def recording(identity: Mapping[str, Any]) -> str:
    """Names what prompts are sampled with; the same for all recipes of one model."""
    parts = {name: x for name, x in identity.items() if name != "recipe"}
    text = json.dumps(_nameless(parts), sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def there(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The header of the file that is there and is the one to make; None where there is no file.
    Raises ValueError for any other file, which is never overwritten."""
    if not output.exists():
        return None
    found = files.read_header(output)
    if found is None:
        _refuse(output, "was not quantized by this pack")
    header = found[0]
    made = header.get(HEADER)
    if not isinstance(made, dict):
        _refuse(output, "was not made by convert.py")
    source = header.get("source") or {}
    whole = made | {"source": {"sha256": source.get("sha256")}}
    difference = _difference(_nameless(dict(identity)), _nameless(whole))
    if difference:
        _refuse(output, difference)
    return header


def _nameless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nameless(x) for key, x in value.items() if key not in NAMES}
    return [_nameless(entry) for entry in value] if isinstance(value, list) else value


def _difference(wanted: Any, found: Any, where: str = "") -> str | None:
    """The first difference in words."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            inner = f"{where} {key}".strip()
            if difference := _difference(wanted.get(key), found.get(key), inner):
                return difference
        return None
    if wanted == found:
        return None
    where = brief(where)
    has = f"no {where}" if found is None else f"{where} {_short(found)}"
    return f"has {has} where {'none' if wanted is None else _short(wanted)} is asked for"


def _short(value: Any) -> str:
    return brief(json.dumps(value), 70)


def _refuse(output: Path, found: str) -> None:
    raise ValueError(
        f"a file is never overwritten, {output} is there and {found}: choose another --out or "
        "--suffix, or move that file away"
    )
