"""NVFP4 fake quantization for ModelOpt where its CUDA kernels cannot run.

ModelOpt's AWQ and SVDQuant need a weight quantizer that fake-quantizes. For NVFP4 it brings CUDA and
Triton kernels only; registered as a quantization backend, our own packer (the same values as its
NVFP4QTensor's, see tests/formats) does it anywhere.
"""

from __future__ import annotations

import torch

from ..formats import nvfp4

NAME = "comfyui_modelopt_nvfp4"
# the block scales are dynamic and the global scale is the whole weight's, as in ModelOpt's preset
NVFP4 = {
    "num_bits": (2, 1),
    "axis": None,
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
    "backend": NAME,
}


def fake_quantize(inputs: torch.Tensor, quantizer) -> torch.Tensor:
    """Weight [N, K] -> the same through NVFP4, in its own dtype."""
    amax = getattr(quantizer, "_amax", None)
    amax = nvfp4.weight_amax(inputs) if amax is None else amax
    return nvfp4.fake_quantize(inputs.float(), amax).to(inputs.dtype)


def register() -> None:
    """Makes the backend known to ModelOpt; doing it again does nothing."""
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    if not tensor_quantizer.is_registered_quant_backend(NAME):
        tensor_quantizer.register_quant_backend(NAME, fake_quantize)
