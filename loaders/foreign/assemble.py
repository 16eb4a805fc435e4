"""What importers share: tensors under ComfyUI's names, the header, the checks of the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from ...formats.checkpoint import Input, Layer, QuantizedCheckpoint
from ...utils import out_of_memory
from ...utils.finite import JUDGED, all_finite


def unquantized(
    plain: Mapping[str, torch.Tensor], modules: Mapping[str, str], where: str
) -> dict[str, torch.Tensor]:
    """Tensors under ComfyUI's names. Raises ValueError for NaN, and dtypes that no weight has."""
    made = {}
    for key, tensor in plain.items():
        if tensor.dtype not in JUDGED:
            raise ValueError(
                f"weights must be in dtypes that ComfyUI computes with, {key} in {where} is in {tensor.dtype}: "
                "the file is damaged, get it again"
            )
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(
                f"weights must be finite, {key} in {where} holds NaN or infinity: the file is "
                "damaged, get it again"
            )
        module, _, leaf = key.rpartition(".")
        made[f"{modules[module]}.{leaf}"] = tensor
    return made


@contextlib.contextmanager
def damage_named(module: str, where: str) -> Iterator[None]:
    """Tensors of a shape or kind that no ModelOpt writes fail in the middle of the arithmetic."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError, AttributeError, KeyError) as error:
        if out_of_memory.ran_out(error):
            raise
        raise ValueError(
            f"the quantizers of a layer must fit its weight, those of {module} in {where} do not "
            f"({' '.join(str(error).split())[:200]}): the file is damaged, get it again"
        ) from error


def header(layers: Mapping[str, Layer], kind: str, algorithm: str, notes: list[str]) -> dict:
    formats = sorted({layer.format for layer in layers.values()})
    return {
        "recipe": {"format": " and ".join(formats), "algorithm": algorithm, "layers": "imported"},
        "imported": {"kind": kind, "notes": notes},
    }


def checked(
    tensors: dict[str, torch.Tensor],
    layers: dict[str, Layer],
    header: dict,
    inputs: dict[str, Input],
    version: object,
    where: str,
) -> QuantizedCheckpoint:
    if not layers:
        raise ValueError(
            f"at least one layer must have numerics of this pack's formats, {where} has none: "
            f"quantize it here instead. {' '.join(header['imported']['notes'])}"
        )
    header["versions"] = {"modelopt": str(version)} if version else {}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checkpoint = QuantizedCheckpoint(tensors, layers, header, inputs)
    checkpoint.validate(where)
    return checkpoint
