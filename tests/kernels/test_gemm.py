"""The matrix kernels against their references: Triton's interpreter here, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.kernels import gemm, tiles

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (M, N, K): of SDXL and SD1.5, with fewer rows and columns where there is no GPU
SHAPES = [
    (64, 128, 320),
    (40, 64, 640),
    (154, 96, 768),
    (33, 80, 1280),
    (16, 64, 2048),
    (20, 48, 2560),
    (16, 32, 5120),
    (2, 320, 1280),
    (1, 1, 64),
    (70, 90, 77),
    (130, 200, 36),
    (5, 3, 8),
]


def values(shape, kind: str, seed: int) -> torch.Tensor:
    """All of a kind's values, its largest among them."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "int8":
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8).to(DEVICE)
    normal = torch.randn(shape, generator=generator) * 60
    return normal.clamp_(-448, 448).to(torch.float8_e4m3fn).to(DEVICE)


def inputs(m: int, n: int, k: int, kind: str, per_row: bool, weights: int = 1):
    """a, the weights, a_scale, their scales, their biases."""
    generator = torch.Generator().manual_seed(m + n + k)

    def uniform(*shape):
        return (torch.rand(shape, generator=generator) * 0.01 + 1e-4).to(DEVICE)

    a_scale = uniform(m, 1) if per_row else uniform(1)[0]
    scales = [uniform(n, 1) if kind == "int8" else uniform(1)[0] for _ in range(weights)]
    biases = [torch.randn(n, generator=generator).to(DEVICE) for _ in range(weights)]
    b = [values((n, k), kind, seed) for seed in range(1, weights + 1)]
    return values((m, k), kind, 0), b, a_scale, scales, biases


def on_hopper(kind: str) -> bool:
    """Whether a `kind` ("int8", "fp8") is summed by Hopper's matrix units for fp8: about 14 bits a
    running sum, cut at every addition of 32 products."""
    gpu = torch.cuda.is_available()
    return kind == "fp8" and gpu and torch.cuda.get_device_capability() == (9, 0)


def error_of_sums(wanted: torch.Tensor, kind: str, k: int) -> torch.Tensor:
    """How far sums of k products may be from `wanted`, float32 of the same shape.

    On Hopper each of the k / 32 additions cuts at most the last of 14 bits, 2^-13 of the running sum
    and an eighth of fp16's eps: k / 256 eps together, 90 for the longest sum of SDXL's convolutions.
    Shorter ones get 32, because a running sum may be larger than where it ends.
    """
    factor = max(32, k / 256) if on_hopper(kind) else 2
    size = wanted.float().abs()
    return factor * torch.finfo(torch.float16).eps * size.clamp(min=size.mean())


def share_moved(kind: str) -> float:
    """How many of the values quantized on the way out may fall on the other side of a boundary: on
    Hopper 0.012 did with sums of 576 products."""
    return 0.03 if on_hopper(kind) else 0.01


def assert_same(found: torch.Tensor, wanted: torch.Tensor, kind: str, a, b) -> None:
    """int8: equal. fp8: within one rounding of the output's dtype, where sums cancel within that of
    the sum of magnitudes in float32. b: a weight, or several of one shape."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if kind == "int8":
        assert torch.equal(found, wanted)
        return
    found, wanted = found.float(), wanted.float()
    k = (b if torch.is_tensor(b) else b[0])[0].numel()
    wrong = (found - wanted).abs() > error_of_sums(wanted, kind, k)
    assert not wrong.any(), (found[wrong][:4], wanted[wrong][:4])


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_product(m, n, k, kind, per_row):
    a, (b,), a_scale, (scale,), (bias,) = inputs(m, n, k, kind, per_row)
    # the interpreter converts float8 by hand: minutes for what a GPU does at once
    for dtype in DTYPES if kind == "int8" or DEVICE.type == "cuda" else DTYPES[:1]:
        residual = torch.randn(m, n, device=DEVICE).to(dtype)
        for extra in ({}, {"bias": bias.to(dtype)}, {"bias": bias, "residual": residual}):
            found = gemm.scaled_mm(a, b, a_scale, scale, **extra, dtype=dtype)
            wanted = gemm.scaled_mm_reference(a, b, a_scale, scale, **extra, dtype=dtype)
            assert_same(found, wanted, kind, a, b)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_sums_are_exact(m, n, k):
    """With scales of 1 and an output in float32 the int32 sums themselves come out."""
    a, b = values((m, k), "int8", 3), values((n, k), "int8", 4)
    one = torch.ones((), device=DEVICE)
    found = gemm.scaled_mm(a, b, one, one, dtype=torch.float32)
    exact = (a.cpu().long() @ b.cpu().long().t()).float()
    assert torch.equal(found.cpu(), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [2, 4, 8])
def test_a_divided_sum(monkeypatch, kind, split):
    chosen = tiles.Tiles(64, 64, 64, 4, 3, split)
    monkeypatch.setattr(tiles, "choose", lambda *args, **kwargs: chosen)
    a, (b,), a_scale, (scale,), (bias,) = inputs(70, 90, 1280, kind, True)
    residual = torch.randn(70, 90, device=DEVICE).half()
    found = gemm.scaled_mm(a, b, a_scale, scale, bias, residual)
    wanted = gemm.scaled_mm_reference(a, b, a_scale, scale, bias, residual)
    assert_same(found, wanted, kind, a, b)


@pytest.mark.parametrize("weights", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_several_weights_in_one_launch(kind, weights, with_bias):
    a, b, a_scale, scales, biases = inputs(70, 100, 640, kind, kind == "int8", weights)
    biases = biases if with_bias else None
    found = gemm.grouped_scaled_mm(a, b, a_scale, scales, biases)
    wanted = gemm.grouped_scaled_mm_reference(a, b, a_scale, scales, biases)
    assert_same(found, wanted, kind, a, b)
    for i in range(weights):
        alone = gemm.scaled_mm(a, b[i], a_scale, scales[i], biases and biases[i])
        assert_same(found[i], alone, kind, a, b[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(64, 128, 320), (33, 160, 640), (7, 10, 77)])
def test_geglu_inside(m, n, k, kind, dtype):
    """GELU is computed with another erf than PyTorch's: within one rounding of the dtype. On Hopper the
    errors of both sums are added, and most values then round to another one."""
    a, (b,), a_scale, (scale,), (bias,) = inputs(m, 2 * n, k, kind, kind == "int8")
    found = gemm.scaled_mm_geglu(a, b, a_scale, scale, bias.to(dtype), dtype)
    wanted = gemm.scaled_mm_geglu_reference(a, b, a_scale, scale, bias.to(dtype), dtype)
    value, gate = gemm.scaled_mm_reference(a, b, a_scale, scale, bias, None, dtype).chunk(2, -1)
    size = (value * gate).float().abs().clamp(min=wanted.float().abs())
    step = max(torch.finfo(dtype).eps, 4e-7)
    allowed = 2 * step * size + 1e-6
    if on_hopper(kind):
        value_off, gate_off = error_of_sums(value, kind, k), error_of_sums(gate, kind, k)
        # GELU is nowhere steeper than 1.13
        allowed += value_off * torch.nn.functional.gelu(gate.float()).abs()
        allowed += 1.13 * (value.float().abs() + value_off) * gate_off
    assert ((found.float() - wanted.float()).abs() <= allowed).all()
    if dtype != torch.float32 and not on_hopper(kind):
        assert (found != wanted).float().mean() < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", KINDS)
def test_quantized_on_the_way_out(kind, out):
    a, (b,), a_scale, (scale,), (bias,) = inputs(70, 90, 320, kind, True)
    wide = gemm.scaled_mm_reference(a, b, a_scale, scale, bias)
    # a tenth of the values are clipped
    out_scale = wide.float().abs().flatten().quantile(0.9) / (127 if out == "int8" else 448)
    more = {"out_kind": KINDS[out], "out_scale": out_scale}
    found = gemm.scaled_mm(a, b, a_scale, scale, bias, **more)
    wanted = gemm.scaled_mm_reference(a, b, a_scale, scale, bias, **more)
    assert found.dtype == KINDS[out]
    moved = (found.float() != wanted.float()).float().mean()
    assert moved <= (0 if kind == "int8" else share_moved(kind))
    clipped = {"int8": (-128, 127), "fp8": (-448, 448)}[out]
    assert found.float().min() == clipped[0] and found.float().max() == clipped[1]
    gated = gemm.scaled_mm_geglu(a, b, a_scale, scale, bias, **more)
    wanted = gemm.scaled_mm_geglu_reference(a, b, a_scale, scale, bias, **more)
    assert gated.dtype == KINDS[out]
    assert (gated.float() != wanted.float()).float().mean() < share_moved(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_contiguous(kind):
    a, b, a_scale, scales, biases = inputs(48, 64, 320, kind, True, 2)
    residual = torch.randn(48, 64, device=DEVICE).half()
    scattered = [t.t().contiguous().t() for t in (a, *b)]
    rows = residual[:1].expand(48, 64)
    for given in (residual.t().contiguous().t(), rows):
        found = gemm.scaled_mm(scattered[0], scattered[1], a_scale, scales[0], biases[0], given)
        wanted = gemm.scaled_mm(a, b[0], a_scale, scales[0], biases[0], given.clone())
        assert torch.equal(found, wanted)
    found = gemm.grouped_scaled_mm(scattered[0], scattered[1:], a_scale, scales)
    assert torch.equal(found, gemm.grouped_scaled_mm(a, b, a_scale, scales))
    found = gemm.scaled_mm_geglu(scattered[0], scattered[1], a_scale, scales[0])
    assert torch.equal(found, gemm.scaled_mm_geglu(a, b[0], a_scale, scales[0]))


def test_zeros_and_extremes():
    one = torch.ones((), device=DEVICE)
    full = torch.full((16, 5120), -128, dtype=torch.int8, device=DEVICE)
    assert (gemm.scaled_mm(full, full, one, one, dtype=torch.float32) == 128 * 128 * 5120).all()
    assert not gemm.scaled_mm(torch.zeros_like(full), full, one, one).any()


def test_why_not(monkeypatch):
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert gemm.why_not("int8", gpu) is None
    assert "needs compute capability 8.9, found 8.6" in gemm.why_not("fp8", gpu)
    assert "NVIDIA" in gemm.why_not("int8", cpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton-windows" in gemm.why_not("int8", gpu)


@pytest.mark.parametrize(
    "sms,capability", [(132, (9, 0)), (128, (8, 9)), (28, (8, 6)), (148, (10, 0))]
)
def test_tiles_fit_the_chip(sms, capability):
    for shared in (99 * 1024, 227 * 1024):
        on = tiles.Chip(capability, sms, shared)
        for m, n, k in [(2048, 1280, 1280), (8192, 320, 320), (2, 1280, 1280), (154, 1280, 2048)]:
            for weights in (1, 2):
                found = tiles.choose(m, n, k, on, weights=weights, splits=weights == 1)
                held = found.stages * found.bk * (found.bm + found.bn * weights)
                assert held <= shared and found.bk <= max(k, 128)
                assert found.split == 1 or found.split * LEAST <= -(-k // found.bk)


LEAST = tiles.LEAST_STEPS
