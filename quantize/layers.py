"""Which layers of a UNet are quantized: every Linear and convolution but the skipped ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate

import torch

from ..utils.text import brief, brief_repr

LINEAR_AND_CONV = "linear + conv"
LINEAR_ONLY = "linear only"
MODES = (LINEAR_AND_CONV, LINEAR_ONLY)
MOST_PATTERNS = 1000

# ModelOpt's own filter for diffusion UNets, in ComfyUI's names: first and last convolution,
# embedding projections and skip connections stay in 16 bits
DEFAULT_SKIP = (
    "input_blocks.0.0",
    "out.2",
    "time_embed.*",
    "label_emb.*",
    "*.emb_layers.*",
    "*.skip_connection",
)


def parse_patterns(text: str) -> list[str]:
    """Patterns of a multiline text, one a line; blank lines and lines from # on are left out."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def kind_of(module: torch.nn.Module) -> str | None:
    """ "linear", "conv2d" or None for a module that no format quantizes."""
    if isinstance(module, torch.nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return "conv2d" if plain and not isinstance(module.padding, str) else None
    if getattr(module, "in_features", None) is None or getattr(module, "weight", None) is None:
        return None
    return "linear" if module.weight.ndim == 2 else None


def select(
    unet: torch.nn.Module, mode: str, skip: Sequence[str], lists: Sequence[str] = DEFAULT_SKIP
) -> dict[str, str]:
    """Names of the layers to quantize -> "linear" or "conv2d", in the UNet's order.

    lists: patterns of `skip` that need not match a layer, as not every model of a family has all.
    Raises ValueError for a pattern of the user's that matches no layer (a spelling mistake would
    otherwise quantize a layer that was to be spared), for too many, and when nothing is left to
    quantize.
    """
    if mode not in MODES:
        raise ValueError(f"layers must be one of {', '.join(MODES)}, got {mode!r}")
    if len(skip) > MOST_PATTERNS:
        raise ValueError(
            f"a recipe must have at most {MOST_PATTERNS} skip patterns, found {len(skip)} in skip: "
            "let one pattern with * stand for many layers"
        )
    layers = {name: kind for name, m in unet.named_modules() if (kind := kind_of(m)) is not None}
    # compiled once each: fnmatch remembers a few hundred only
    matches = {pattern: re.compile(translate(pattern)).match for pattern in skip}
    for pattern, match in matches.items():
        if pattern not in lists and not any(map(match, layers)):
            raise ValueError(
                f"a skip pattern must match a layer, {brief_repr(pattern)} matches none of {len(layers)} "
                f"(such as {_examples(layers)}): correct it or remove the line"
            )
    chosen = {
        name: kind
        for name, kind in layers.items()
        if (kind == "linear" or mode == LINEAR_AND_CONV)
        and not any(match(name) for match in matches.values())
    }
    if not chosen:
        raise ValueError(
            f"at least one layer must be left to quantize, the skip patterns "
            f"{brief(', '.join(skip))} "
            f"with layers = {mode!r} leave none of {len(layers)}: remove a pattern"
        )
    return chosen


def _examples(layers: dict[str, str]) -> str:
    names = list(layers)
    return ", ".join(names[i] for i in sorted({len(names) // 4, len(names) // 2}) if names)
