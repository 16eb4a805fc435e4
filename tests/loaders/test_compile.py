"""torch.compile on a quantized UNet: no graph breaks, blocks compiled once, the same numbers.

For a GPU, graphs are made by a subprocess on fake CUDA tensors (traced_unet.py): what Inductor gets,
our Triton launches in it, without running anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import comfy.ldm.modules.attention
import comfy.model_management
import pytest
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.kernels import backends
from comfyui_modelopt.loaders import compiling, fused
from comfyui_modelopt.loaders import unet as loader
from comfyui_modelopt.quantize.quality import sqnr_db
from comfyui_modelopt.quantize.recipe import Recipe

from .test_fused import blocks, calls, relative


@pytest.fixture
def pytorch_attention(monkeypatch):
    """ComfyUI's default on NVIDIA GPUs; its default on a CPU looks at free memory, in Python."""
    attention = comfy.ldm.modules.attention
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)


def load(made, **more):
    model = loader.load(made.checkpoint, arithmetic="integer", **more)
    comfy.model_management.load_models_gpu([model])
    return model


@pytest.mark.parametrize("recipe", ["int8", "fp8", "mxfp8", "w4a8"])
@pytest.mark.parametrize("fuse", [True, False])
def test_no_graph_breaks(quantized, pytorch_attention, recipe, fuse):
    algorithm = {"w4a8": "max", "mxfp8": "max"}.get(recipe)
    made = quantized(Recipe(recipe, algorithm) if algorithm else Recipe(recipe))
    unet = load(made, backend=backends.REFERENCE, fuse=fuse).model.diffusion_model
    args, kwargs = made.records[0].arguments("cpu", torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(unet)(*args, **kwargs)
    assert found.graph_count == 1, [b.reason for b in found.break_reasons]
    assert found.graph_break_count == 0


@pytest.mark.slow
@pytest.mark.parametrize(("form", "way"), [("int8", "whole"), ("fp8", "blocks")])
def test_graphs_for_a_gpu(form, way):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("traced_unet.py")
    done = subprocess.run(
        [sys.executable, script, form, way], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # a kernel that seemed to write its input would make torch.compile copy that input
    assert found["written"] == ["out"]
    first, *later = found["graphs"]
    if way == "whole":  # one graph; the first size was square, another one is not
        assert first == 1 and later == [2] * len(later)
        assert found["launches"] >= 2 * 53  # 53 launches of ours a call
    else:  # ResBlocks with 320 and with 640 channels, transformer blocks
        assert first == 3 and later[-1] == later[0] <= 2 * first


def test_compiled_blocks_give_the_same(quantized, pytorch_attention):
    """As the compiler sees them (aot_eager): graphs run operator by operator."""
    made = quantized(Recipe("int8"))
    model = load(made, backend=backends.REFERENCE)
    unet = model.model.diffusion_model

    def run(record):
        args, kwargs = record.arguments("cpu", torch.float32)
        with torch.no_grad():
            return unet(*args, **kwargs)

    wanted = [run(record) for record in made.records]
    torch._dynamo.reset()
    count = compiling.compile_blocks(model, backend="aot_eager")
    blocks = [m for m in unet.modules() if hasattr(type(m), "runner")]
    assert count == len(blocks) > 0 and all(block.runner is not None for block in blocks)
    for record, output in zip(made.records, wanted, strict=True):
        assert sqnr_db(output, run(record)) > 60
    attached = {"patches": {"middle_patch": [lambda x, options: x * 0.5]}}
    args, kwargs = made.records[0].arguments("cpu", torch.float32, attached)
    with torch.no_grad():
        patched = unet(*args, **kwargs)
    for block in blocks:
        block.runner = None
    args, kwargs = made.records[0].arguments("cpu", torch.float32, attached)
    with torch.no_grad():
        assert sqnr_db(unet(*args, **kwargs), patched) > 60
    assert sqnr_db(wanted[0], patched) < 30


@pytest.mark.slow
def test_the_load_nodes_option(quantized, pytorch_attention, tmp_path, caplog):
    """With Inductor, on this device; the time of the first call is told."""
    made = quantized(Recipe("int8"))
    path = str(tmp_path / "unet.safetensors")
    files.write(made.checkpoint, path)
    plain, model = loader.load_file(path), loader.load_file(path, compiled=True)
    assert model.cached_patcher_init == (loader.load_file, (path, True, False))
    comfy.model_management.load_models_gpu([plain, model])
    assert not any(
        isinstance(m, fused.FusedResBlock) for m in plain.model.diffusion_model.modules()
    )
    record, outputs = made.records[0], []
    torch._dynamo.reset()
    with caplog.at_level("INFO"):
        for one in (plain, model.clone(), model):
            one.pre_run()
            options = {"wrappers": one.wrappers}
            with torch.no_grad():
                x = record.x.float()
                outputs.append(
                    one.model.apply_model(
                        x,
                        torch.full((len(x),), 3.0),
                        c_crossattn=record.context.float(),
                        transformer_options=options,
                    )
                )
    told = [r.getMessage() for r in caplog.records if "first compiled UNet call" in r.getMessage()]
    assert len(told) == 1 and str(list(record.x.shape)) in told[0]
    assert torch.equal(outputs[1], outputs[2])
    # a last place that differs rounds on to whole steps, block after block: each by itself is near
    assert sqnr_db(outputs[0], outputs[1]) > 12
    for name, (args, kwargs, wanted) in calls(plain, record).items():
        with torch.no_grad():
            args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            kwargs = {k: v.clone() if torch.is_tensor(v) else v for k, v in kwargs.items()}
            found = blocks(model)[name](*args, **kwargs)
            assert relative(found, wanted.clone()) < 5e-3, name
