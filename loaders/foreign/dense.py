"""ModelOpt's own fake quantization of a weight, for layers whose numerics no format of ours has."""

from __future__ import annotations

import torch

from ...utils import out_of_memory, packages
from ...utils.text import brief

LONGEST_BLOCK = 1024


def fake_quantized(name: str, weight: torch.Tensor, quantizer, where: str) -> torch.Tensor:
    """The float32 weight that the restored ModelOpt layer multiplies with.

    quantizer: a `quantizers.Quantizer`. Raises ValueError where ModelOpt is missing or cannot.
    """
    if not quantizer.enabled:
        return weight.float()
    if (missing := packages.why_missing(packages.MODELOPT)) is not None:
        raise ValueError(
            f"{name} in {where} has numerics that only ModelOpt itself can compute, but {missing}"
        )
    from modelopt.torch.quantization.nn import TensorQuantizer

    value = weight.float()
    for index, state in enumerate(quantizer.states):
        prefix = f"{index}." if len(quantizer.states) > 1 else ""
        own = {
            key.removeprefix(prefix): tensor.to(torch.float32)
            for key, tensor in quantizer.tensors.items()
            if key.startswith(prefix) and key.removeprefix(prefix) == "_amax"
        }
        _check_blocks(state.get("_block_sizes"), weight, name, where)
        if "_amax" in own and not state.get("_block_sizes"):
            _check_shape(own["_amax"], weight, name, where)
        try:
            member = TensorQuantizer()
            member.set_from_modelopt_state(state)
            member.load_state_dict(own, strict=False)
            value = member(value)
        except Exception as error:  # states and scales are the file's: any kind of error
            if out_of_memory.ran_out(error):
                raise
            raise ValueError(
                f"ModelOpt must be able to compute {name}'s weight here, it cannot "
                f"({brief(str(error))}) in {where}: import the checkpoint on a machine with an NVIDIA "
                "GPU; where that cannot either, the file is damaged, get it again"
            ) from error
    return value.float()


def _check_blocks(sizes: object, weight: torch.Tensor, name: str, where: str) -> None:
    """ModelOpt fills a weight up to whole blocks, however long they are said to be."""
    said = sizes.values() if isinstance(sizes, dict) else ()
    found, most = [one for one in said if isinstance(one, int)], max(LONGEST_BLOCK, *weight.shape)
    if max(found, default=0) > most:
        raise ValueError(
            f"a block of a weight must have at most {most} values, {brief(name)} in {where} has "
            f"{brief(max(found))}: the file is damaged, get it again"
        )


def _check_shape(amax: torch.Tensor, weight: torch.Tensor, name: str, where: str) -> None:
    """A weight whose shape was changed is else stretched by its scales, to any size."""
    try:
        fits = torch.broadcast_shapes(amax.shape, weight.shape) == weight.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"a weight's amax must broadcast to its shape {list(weight.shape)}, got "
            f"{list(amax.shape)} of {brief(name)} in {where}: the file is damaged, get it again"
        )
