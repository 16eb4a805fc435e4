"""What is stored, dequantized, against ModelOpt's code on a GPU: its quantized tensors exactly, its CUDA
and Triton kernels exactly but for cases that are named here and nothing else."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.benchmarks import modelopt_cuda as theirs
from comfyui_modelopt.benchmarks import modelopt_weights as weights
from comfyui_modelopt.formats import FORMATS, blocks, nvfp4
from comfyui_modelopt.quantize import modelopt, recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [*weights.SMALL, (320, 320)]
KINDS = ("normal", "outliers", "mixed", "ties", "zero-row-block")  # whose last row is zeros
LAST_PLACES = 2.0**-21  # of a number: four of float32's, which an approximate division may be off
every_weight = pytest.mark.parametrize("dtype", weights.DTYPES, ids=["fp16", "bf16", "fp32"])


class Made:
    """A weight on the GPU: `flat` [N, K], its amax, what is stored, and `ours` [N, K] float32."""

    def __init__(self, name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype):
        weight = weights.weight_of(name, kind, shape, dtype).to(DEVICE)
        self.shape, self.form, self.flat = shape, FORMATS[name], blocks.flatten(weight).contiguous()
        layer = "linear" if len(shape) == 2 else "conv2d"
        self.amax = modelopt.weight_amax(self.flat, recipe.LayerPlan(layer, name, recipe.MAX))
        self.stored = self.form.quantize(weight, self.amax)
        self.ours = blocks.flatten(self.form.dequantize(self.stored, shape)).float()
        self.sources = [self.flat.float()] + ([self.flat] if dtype != torch.float32 else [])


def all_of(name: str, kind: str, dtype: torch.dtype) -> list[Made]:
    form = FORMATS[name]
    return [Made(name, kind, shape, dtype) for shape in SHAPES if form.why_not(shape) is None]


@pytest.fixture(scope="module")
def extensions():
    """ModelOpt's CUDA extensions, built at the first use."""
    from modelopt.torch.quantization import extensions as built

    for name in theirs.EXTENSIONS:
        if getattr(built, name)() is None:
            pytest.skip("ModelOpt's CUDA extensions cannot be built here")


@every_weight
@pytest.mark.parametrize("kind", [*KINDS, "boundary"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_quantized_tensors_are_modelopts(name, kind, dtype):
    for made in all_of(name, kind, dtype):
        for given in made.sources:
            wanted = theirs.qtensor(name, made.flat, made.amax, given.clone()).reshape(given.shape)
            if name == "nvfp4" and not made.flat.any():  # ModelOpt divides by a scale of zero
                wanted = torch.zeros_like(made.ours)
            assert torch.equal(made.ours, wanted), made.shape


@every_weight
@pytest.mark.parametrize("kind", KINDS)
def test_mxfp8_is_modelopts_fake_quantization(extensions, kind, dtype):
    """Without "boundary": of a largest magnitude next above 448 * 2**n the extension takes the exponent
    from the bits, MXFP8QTensor by a rounded logarithm."""
    for made in all_of("mxfp8", kind, dtype):
        for given in made.sources:
            wanted = theirs.fake("mxfp8", made.flat, None, given.clone())
            assert torch.equal(made.ours.to(wanted.dtype), wanted), made.shape


@every_weight
@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_is_modelopts_fake_quantization_but_at_ties(kind, dtype):
    """Its Triton kernel divides approximately, values by their scale and a block's amax into it."""
    from modelopt.torch.kernels.quantization import gemm

    if not hasattr(gemm, "fp4_fake_quant_block"):
        pytest.skip("ModelOpt's Triton kernel for NVFP4 needs compute capability 8.9")
    values = moved = 0
    bounds = torch.tensor(nvfp4.BOUNDS, device=DEVICE, dtype=torch.float64)
    for made in all_of("nvfp4", kind, dtype):
        steps, _, scale_2 = nvfp4._rounded(made.flat.float(), made.amax)
        steps = steps.reshape(made.flat.shape)
        away = (steps.double().abs().unsqueeze(-1) - bounds).abs() / bounds
        scales = theirs.block_amax("nvfp4", made.flat) / (6.0 * scale_2)
        below, above = (
            (scales * off).to(torch.float8_e4m3fn).float()
            for off in (1 - LAST_PLACES, 1 + LAST_PLACES)
        )
        at_a_tie = (away.amin(-1) <= LAST_PLACES) | (below != above)
        gone = theirs.lost("nvfp4", theirs.FAKE, made.flat)
        for given in made.sources:
            found = theirs.fake("nvfp4", made.flat, made.amax, given.clone())
            differing = made.ours.to(found.dtype) != found
            unexplained = (differing & ~at_a_tie & ~gone).nonzero()
            assert not len(unexplained), (made.shape, unexplained[:4])
            assert not found[gone & (below == above)].any()
            values += given.numel()
            moved += int((differing & ~gone).sum())
    assert moved <= (0.1 if kind == "ties" else 0.01) * values


@every_weight
@pytest.mark.parametrize("kind", [*KINDS, "boundary"])
def test_int8_integers_are_modelopts(extensions, kind, dtype):
    for made in all_of("int8", kind, dtype):
        found = theirs.fake("int8", made.flat, made.amax, made.flat.float())
        again = made.form.quantize(blocks.unflatten(found, made.shape), made.amax)
        assert torch.equal(made.stored["weight"], again["weight"]), made.shape
        # a product with a scale against a quotient
        assert (theirs.ordered(made.ours) - theirs.ordered(found)).abs().max() <= 2, made.shape


@every_weight
@pytest.mark.parametrize("kind", [*KINDS, "boundary"])
def test_fp8_is_modelopts_but_for_the_last_places_of_the_scale(extensions, kind, dtype):
    """Its extension divides 448 by the amax in one rounding, PyTorch's `448 / amax` has two."""
    values = moved = 0
    for made in all_of("fp8", kind, dtype):
        largest = made.amax.float().reshape(())
        step = torch.full_like(largest, 448.0) / torch.where(largest > 0, largest, 1.0)
        scale = torch.ones_like(step) / step
        found = theirs.fake("fp8", made.flat, made.amax, made.flat.float())
        rounded = (made.flat.float() * step).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(found, rounded.float() * scale), made.shape
        assert (theirs.ordered(scale) - theirs.ordered(made.stored["weight_scale"])).abs() <= 2
        codes = blocks.flatten(made.stored["weight"].float())
        differing = codes != rounded.float()
        middle = (codes + rounded.float())[differing].double() / 2
        quotient = made.flat[differing].double() * step.double()
        # next to one another, or what lies between them would be nearer than both
        assert ((quotient - middle).abs() <= LAST_PLACES * middle.abs()).all(), made.shape
        gap = (codes - rounded.float())[differing].abs()
        assert (gap <= (middle.abs() / 8).clamp(min=2.0**-9)).all(), made.shape
        values += codes.numel()
        moved += int(differing.sum())
    assert moved <= 0.05 * values
