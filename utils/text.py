"""Text of strangers: JSON that cannot exhaust the stack, and values as an error shows them."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 64
MOST_LISTS = 10**6  # an empty one takes 20 times its text in memory
LONGEST = 200
DIGITS = 20  # of an integer of 64 bits


def read_json(text: str | bytes) -> Any:
    """What the JSON says. Raises ValueError for anything else, and for what is nested deeper than any
    file of ours or ModelOpt's: writing or showing it would exhaust the stack later."""
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) > MOST_LISTS:
        raise ValueError(f"more than {MOST_LISTS} lists and tables")
    try:
        found = json.loads(text, parse_int=_integer)
    except RecursionError:
        found = None
        deep = True
    else:
        deep = _deeper(found, DEEPEST)
    if deep:
        raise ValueError(f"values nested more than {DEEPEST} deep")
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        held = [one for one in level if isinstance(one, dict | list) and one]
        level = [x for one in held for x in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


def brief(value: object, most: int = LONGEST) -> str:
    """A name or a value in one line of an error: its middle is left out where it is long."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def brief_repr(value: object) -> str:
    """The same, with quotation marks around text."""
    return brief(repr(value))
