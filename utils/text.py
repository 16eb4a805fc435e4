"""Text of strangers: JSON that cannot exhaust the stack, and values as an error shows them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

DEEPEST = 64
# a table takes 30 times its text in memory, a word 15 times
MOST_LISTS = 2 * 10**5
MOST_VALUES = 10**6
LONGEST = 200
ENTRIES = 20
DIGITS = 20  # of an integer of 64 bits


def read_json(text: str | bytes, lists: int = MOST_LISTS, values: int = MOST_VALUES) -> Any:
    """What the JSON says. Raises ValueError for anything else, for more lists and tables or more names
    and values than these, and for what is nested deeper than any file of ours or ModelOpt's: writing or
    showing it would exhaust the stack later."""
    if _count(text, "[{") > lists:
        raise ValueError(f"more than {lists} lists and tables")
    if _count(text, ",:") > values:
        raise ValueError(f"more than {values} names and values")
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


def _count(text: str | bytes, marks: str) -> int:
    """How often the marks are there, those in words included."""
    return sum(text.count(one if isinstance(text, str) else one.encode()) for one in marks)


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


def listed(entries: Iterable[object], longest: int = LONGEST, most: int = ENTRIES) -> list[str]:
    """The first entries, each in brief, and how many more there are."""
    found = list(entries)
    rest = [f"and {len(found) - most} more"] if len(found) > most else []
    return [*(brief(one, longest) for one in found[:most]), *rest]


def brief_repr(value: object) -> str:
    """The same, with quotation marks around text."""
    return brief(repr(value))
