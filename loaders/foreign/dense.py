"""ModelOpt's own fake quantization of a weight, for layers whose numerics no format of ours has."""

from __future__ import annotations

import torch

from ...utils import packages


def fake_quantized(name: str, weight: torch.Tensor, quantizer) -> torch.Tensor:
    """The float32 weight that the restored ModelOpt layer multiplies with.

    quantizer: a `quantizers.Quantizer`. Raises ValueError where ModelOpt is missing or cannot.
    """
    if not quantizer.enabled:
        return weight.float()
    if (missing := packages.why_missing(packages.MODELOPT)) is not None:
        raise ValueError(
            f"{name} has numerics that only ModelOpt itself can compute, but {missing}"
        )
    from modelopt.torch.quantization.nn import TensorQuantizer

    value = weight.float()
    for index, state in enumerate(quantizer.states):
        prefix = f"{index}." if len(quantizer.states) > 1 else ""
        member = TensorQuantizer()
        member.set_from_modelopt_state(state)
        own = {
            key.removeprefix(prefix): tensor.to(torch.float32)
            for key, tensor in quantizer.tensors.items()
            if key.startswith(prefix) and key.removeprefix(prefix) == "_amax"
        }
        member.load_state_dict(own, strict=False)
        try:
            value = member(value)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"ModelOpt must be able to compute {name}'s weight here, it cannot ({error}): "
                "import the checkpoint on a machine with an NVIDIA GPU"
            ) from error
    return value.float()
