"""Attention of fused blocks by PyTorch's backends in our order, and where it stays ComfyUI's."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules import attention
from comfyui_modelopt.kernels import tiles
from comfyui_modelopt.loaders import attending

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Module:
    heads, attn_precision = 4, None


def inputs(queries: int, keys: int, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(2, n, 160, generator=generator).to(DEVICE, dtype) for n in sizes]


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (100, 77), (1, 5)])
def test_it_is_comfyuis_attention(queries, keys):
    q, k, v = inputs(queries, keys)
    found = attending.split(q, k, v, Module.heads)
    wanted = attention.attention_pytorch(q.float(), k.float(), v.float(), Module.heads)
    assert found.shape == wanted.shape and found.dtype == q.dtype
    assert ((found.float() - wanted).norm() / wanted.norm()) < 2e-3


@pytest.fixture
def hopper(monkeypatch):
    """What the rule asks, as on an H200; tensors that say they are on a GPU."""
    monkeypatch.setattr(tiles, "chip", lambda device: tiles.Chip((9, 0), 132, 232448))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: attending.CUDNN)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def test_where_cudnn_is_asked_first(hopper, monkeypatch):
    q, *_ = inputs(256, 8)
    assert not attending.by_cudnn(q[:, :255], {})
    assert attending.by_cudnn(q, {})
    assert not attending.by_cudnn(q.float(), {})
    assert not attending.by_cudnn(q, {"optimized_attention_override": None})
    monkeypatch.setattr(tiles, "chip", lambda device: tiles.Chip((8, 9), 128, 100000))
    assert not attending.by_cudnn(q, {})


@pytest.mark.parametrize("other", ["attention_sub_quad", "attention_split"])
def test_another_attention_stays(hopper, monkeypatch, other):
    monkeypatch.setattr(attention, "optimized_attention", getattr(attention, other))
    assert not attending.by_cudnn(inputs(256, 8)[0], {})


def test_an_old_cudnn_is_not_asked(hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: attending.CUDNN - 1)
    assert not attending.by_cudnn(inputs(256, 8)[0], {})


def test_without_a_gpu_it_is_comfyuis(monkeypatch):
    called = []

    def theirs(q, k, v, heads, **options):
        called.append((heads, options))
        return q

    monkeypatch.setattr(attention, "optimized_attention", theirs)
    q, k, v = inputs(8, 8)
    assert attending.attend(q, k, v, Module(), {"block": 1}) is q
    assert called == [(4, {"attn_precision": None, "transformer_options": {"block": 1}})]
