"""Run as a script, without the interpreter: torch.compile's graph of every producer, as JSON.

Tensors are fake ones on a CUDA device. Where there is no GPU, torch and Triton are told of an H100
that never runs anything, so that they look into the kernels as they would there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.utils._triton

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)


class H100:
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


def producers(x, weight, scale, image, image_weight):
    from kernels.activations import quantize_rows
    from kernels.geglu import geglu_quantize
    from kernels.group_norm import group_norm_quantize
    from kernels.layer_norm import layer_norm_quantize

    return (
        quantize_rows(x, "int8", None, weight),
        geglu_quantize(x, "fp8", scale),
        layer_norm_quantize(x, weight, weight, 1e-5, "int8"),
        group_norm_quantize(image, 32, image_weight, image_weight, 1e-6, True, "int8", scale),
    )


def main() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not torch.cuda.is_available():
        import triton

        torch.utils._triton.has_triton = lambda *ignored: True
        triton.runtime.driver.set_active(H100())
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode(), torch.no_grad():
        compiled = torch.compile(
            producers, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True
        )
        half = {"device": "cuda", "dtype": torch.float16}
        weight, image_weight = torch.empty(640, **half), torch.empty(320, **half)
        scale = torch.empty((), device="cuda")
        for tokens, size in ((77, 32), (154, 48), (200, 64)):
            x = torch.empty(2, tokens, 640, **half)
            image = torch.empty(2, 320, size, size + 8, **half)
            image = image.to(memory_format=torch.channels_last)
            compiled(x, weight, scale, image, image_weight)
    written = [
        node.kwargs["tensors_to_clone"]
        for node in graphs[0].graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    json.dump({"graphs": len(graphs), "written": written}, sys.stdout)


if __name__ == "__main__":
    main()
