"""Layers of a UNet that have one input: what smooths or quantizes it once serves all of them."""

from __future__ import annotations

from collections.abc import Iterable

# end of the attention's name -> its projections of one input
PROJECTIONS = {".attn1": ("to_q", "to_k", "to_v"), ".attn2": ("to_k", "to_v")}


def with_its_input(name: str) -> tuple[str, ...]:
    """Names of all layers of the UNet that have the input of the layer `name`, it among them: the
    self-attention's q, k and v, the cross-attention's k and v; any other layer is alone."""
    attention, _, leaf = name.rpartition(".")
    for end, leaves in PROJECTIONS.items():
        if attention.endswith(end) and leaf in leaves:
            return tuple(f"{attention}.{one}" for one in leaves)
    return (name,)


def sharing(names: Iterable[str]) -> list[list[str]]:
    """The layers in groups that have one input, most of them alone, in the order of `names`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(with_its_input(name)[0], []).append(name)
    return list(groups.values())
