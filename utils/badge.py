"""What the page shows beside a format or a file: short words, and the reason behind each."""

from __future__ import annotations

from collections.abc import Iterable

from . import capability
from .capability import EMULATED, GPU, NATIVE, NEEDS, REFUSED

# what a chip's colour says
PLAIN, GOOD, WARNING, BAD = "plain", "good", "warning", "bad"
TONES = {NATIVE: GOOD, EMULATED: WARNING, REFUSED: BAD}
KINDS = {"linear": "Linear", "conv2d": "convolutions"}
MEMORY_ONLY = "memory only"


def chip(text: str, tone: str = PLAIN, why: str = "") -> dict[str, str]:
    """A word or two on a coloured ground; `why` is shown when the mouse rests on it."""
    return {"text": text, "tone": tone, "why": why}


def verdicts(layers: Iterable[tuple[str, str]], gpu: GPU) -> list[dict[str, str]]:
    """How this GPU runs these (format, "linear" or "conv2d"), as chips, one or two a format."""
    kinds: dict[str, list[str]] = {}
    for name, kind in layers:
        if kind not in kinds.setdefault(name, []):
            kinds[name].append(kind)
    found = []
    for name, asked in kinds.items():
        supports = {kind: capability.support(name, kind, gpu) for kind in asked}
        if len({support.level for support in supports.values()}) == 1:
            supports = {"": next(iter(supports.values()))}
        for kind, support in supports.items():
            what = f"{name} {KINDS[kind]}" if kind else name
            found.append(_verdict(what, name, support))
    return found


def _verdict(what: str, name: str, support: capability.Support) -> dict[str, str]:
    if support.level == NATIVE and NEEDS[name] is None:
        return chip(f"{what}: {MEMORY_ONLY}", PLAIN, support.why)
    return chip(f"{what}: {support.level}", TONES[support.level], support.why)
