"""The contract of every format: ModelOpt's values exactly, zeros, odd shapes, source dtypes, bytes."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.formats import FORMATS, blocks, files, get
from comfyui_modelopt.formats.checkpoint import Layer, QuantizedCheckpoint
from comfyui_modelopt.quantize import modelopt, recipe
from comfyui_modelopt.utils import capability
from comfyui_modelopt.utils.memory import peak_of
from safetensors import safe_open
from safetensors.torch import load_file

from ..bits import LIMITS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# a block too small for INT4's 128, one row, rows that need padding, a ragged last block, convolutions
SHAPES = [(8, 32), (1, 64), (7, 96), (40, 320), (6, 32, 3, 3), (5, 64, 1, 1)]


@pytest.fixture(params=FORMATS)
def form(request):
    return FORMATS[request.param]


def weight_of(shape, dtype=torch.float32, zero=False):
    torch.manual_seed(0)
    weight = (
        torch.randn(shape)
        * torch.logspace(-3, 0, shape[0])[:, None].view(-1, *[1] * (len(shape) - 1))
    ).to(dtype)
    if zero:
        weight[-1] = 0
    return weight


def by_modelopt(name: str, weight: torch.Tensor, stored=None) -> torch.Tensor:
    """What ModelOpt itself makes of a weight [N, K], dequantized to float32; of int4 and w4a8 with
    the amax that are `stored`, where they are given."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.model_calib import max_calibrate
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    if name == "nvfp4":
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16)
        options = {"scale": scale, "double_scale": scale_2, "block_sizes": {-1: 16}}
        return packed.dequantize(torch.float32, **options)
    if name == "mxfp8":
        packed, scale = MXFP8QTensor.quantize(weight.clone())
        return packed.dequantize(torch.float32, scale=scale)
    e4m3 = {"num_bits": (4, 3), "axis": None}
    int4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
    config = {
        "int8": [{"num_bits": 8, "axis": 0}],
        "fp8": [e4m3],
        "int4": [int4],
        "w4a8": [int4, e4m3],
    }[name]
    quantizer = SequentialQuantizer(
        *(TensorQuantizer(QuantizerAttributeConfig(**one)) for one in config)
    )
    max_calibrate(quantizer, lambda module: module(weight))
    for one, key in zip(quantizer, ("weight_amax", "weight_amax_2"), strict=False):
        if stored is not None:
            one._amax = stored[key].float().reshape(one.amax.shape)
    return quantizer(weight.float())


def quantized(form, weight):
    plan = recipe.LayerPlan("linear" if weight.ndim == 2 else "conv2d", form.NAME, recipe.MAX)
    return form.quantize(weight, modelopt.weight_amax(blocks.flatten(weight), plan))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8_e5m2"])  # not ModelOpt's
def test_values_are_modelopts(name, shape, dtype, zero):
    form = FORMATS[name]
    weight = weight_of(shape, dtype, zero and shape[0] > 1)
    before = weight.clone()
    stored = quantized(form, weight)
    assert torch.equal(weight, before)
    restored = blocks.flatten(form.dequantize(stored, shape))
    theirs = by_modelopt(form.NAME, blocks.flatten(weight).contiguous())
    if form.NAME in ("int4", "w4a8") and dtype == torch.float32:
        amax = form.weight_amax(weight)
        exact = blocks.flatten(form.dequantize(form.quantize(weight, amax, exact=True), shape))
        assert torch.equal(exact, theirs)
        # else its block maxima are rounded to 16 bits: by at most half of float16's last place
        amax = (amax[0] if form.NAME == "w4a8" else amax).reshape(len(weight), -1)
        kept = stored["weight_amax"].float()
        assert bool(((kept - amax).abs() <= 2.0**-11 * amax).all())
        theirs = by_modelopt(form.NAME, blocks.flatten(weight).contiguous(), stored)
    places = 2 if form.NAME == "int8" else 0  # a product with a scale against a quotient
    last_place = torch.nextafter(theirs.abs(), torch.tensor(torch.inf)) - theirs.abs()
    assert bool(((restored - theirs).abs() <= places * last_place).all())


@pytest.mark.parametrize("name", ["int4", "w4a8"])
@pytest.mark.parametrize("shape", [(40, 320), (6, 48, 3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_block_maxima_are_rounded_before_the_weight(name, shape, dtype):
    """Such as mse and awq_full find, of 17 bits or more: what is stored is what ModelOpt makes of
    the weight with the stored maxima, to the last bit."""
    form, weight = FORMATS[name], weight_of(shape, dtype)
    first = form.weight_amax(weight) if name == "int4" else form.weight_amax(weight)[0]
    clipped = first * torch.linspace(0.51237, 1.0, first.numel()).reshape(first.shape)
    stored = form.quantize(weight, clipped if name == "int4" else (clipped, first.amax()))
    assert stored["weight_amax"].dtype.itemsize == 2
    assert not torch.equal(stored["weight_amax"].float(), clipped)
    restored = blocks.flatten(form.dequantize(stored, shape))
    theirs = by_modelopt(name, blocks.flatten(weight).contiguous(), stored)
    assert torch.equal(restored, theirs)
    exact = form.quantize(
        weight, clipped if name == "int4" else (clipped, first.amax()), exact=True
    )
    assert torch.equal(exact["weight_amax"], clipped)


@pytest.mark.parametrize("dtype", DTYPES)
def test_e5m2_rounds_as_torch_does(dtype):
    form, weight = FORMATS["fp8_e5m2"], weight_of((8, 32), dtype, zero=True)
    stored = quantized(form, weight)
    step = form.QMAX / weight.float().abs().max()
    assert torch.equal(
        stored["weight"].float(), (weight.float() * step).to(torch.float8_e5m2).float()
    )
    assert stored["weight"].float().abs().max() == form.QMAX


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_what_the_format_says(form, shape):
    stored = quantized(form, weight_of(shape))
    wanted = form.stored(shape)
    assert stored.keys() == wanted.keys() == {"weight", *form.SCALES}
    for name, (size, dtypes) in wanted.items():
        assert tuple(stored[name].shape) == size, name
        assert stored[name].dtype in dtypes, name
    assert tuple(form.dequantize(stored, shape).shape) == shape


@pytest.mark.parametrize("shape", [(40, 320), (6, 32, 3, 3)])
def test_through_a_file(form, shape, tmp_path):
    stored = quantized(form, weight_of(shape, torch.float16))
    kind = "linear" if len(shape) == 2 else "conv2d"
    static = form.needs_input_scale(kind)
    layer = Layer(
        form.NAME,
        kind,
        shape=shape if form.BLOCK is not None else None,
        input_amax=2.0 if static else None,
    )
    tensors = {f"a.b.{name}": tensor for name, tensor in stored.items()}
    if static:
        tensors["a.b.input_scale"] = form.input_scale(torch.tensor(2.0))
    path = tmp_path / "x.safetensors"
    files.write(QuantizedCheckpoint(tensors, {"a.b": layer}, {"recipe": {}}), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    again = files.parse(load_file(path), metadata, str(path))
    assert again.layers == {"a.b": layer}
    assert again.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        other = again.tensors[name]
        assert other.dtype == tensor.dtype, name
        assert torch.equal(other.float(), tensor.float()), name


def test_all_zero_weight(form):
    weight = torch.zeros(4, 32)
    stored = quantized(form, weight)
    assert torch.equal(form.dequantize(stored, (4, 32)), weight)
    for name in form.SCALES:
        assert bool(torch.isfinite(stored[name].float()).all()), name


def test_bits_of_a_weight(form):
    shape = (1280, 1280)
    stored = quantized(form, weight_of(shape, torch.float16))
    bits = 8 * sum(tensor.nbytes for tensor in stored.values()) / (1280 * 1280)
    assert form.BITS <= bits <= LIMITS[form.NAME]


def test_own_maxima_are_modelopts(form):
    """What requantizing a patched weight uses."""
    weight = weight_of((40, 320), torch.float16)
    mine = form.quantize(weight, form.weight_amax(weight))
    theirs = quantized(form, weight)
    assert all(torch.equal(mine[name].float(), theirs[name].float()) for name in mine)


def test_nvfp4_without_packing_gives_the_same():
    form = FORMATS["nvfp4"]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2).reshape(1, 16)
    for weight in (weight_of((40, 320), torch.float16).float(), torch.cat([ties, -ties]) * 448):
        stored = form.quantize(weight, form.weight_amax(weight))
        fake = form.fake_quantize(weight, form.weight_amax(weight))
        assert torch.equal(fake, form.dequantize(stored, tuple(weight.shape)))
    # ties go to the even code
    assert (fake[0, :8] / 448).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_stock_comfyui_reads_the_same(name):
    """comfy-kitchen's own layouts, which stock ComfyUI loads such a weight into."""
    from comfy.quant_ops import TensorCoreMXFP8Layout, TensorCoreNVFP4Layout

    shape, form = (40, 320), FORMATS[name]
    stored = quantized(form, weight_of(shape))
    common = {"orig_dtype": torch.float32, "orig_shape": shape}
    if name == "nvfp4":
        layout = TensorCoreNVFP4Layout
        params = layout.Params(
            scale=stored["weight_scale_2"], block_scale=stored["weight_scale"], **common
        )
    else:
        layout = TensorCoreMXFP8Layout
        scale = stored["weight_scale"].view(torch.float8_e8m0fnu)
        params = layout.Params(scale=scale, **common)
    theirs = layout.dequantize(stored["weight"], params)[: shape[0]]
    assert torch.equal(theirs, form.dequantize(stored, shape))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("nvfp4", (64, 250), "nvfp4 needs in_features divisible by 16, got 250"),
        ("mxfp8", (64, 48, 3, 3), "mxfp8 needs input channels divisible by 32, got 48"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(name, shape, message):
    assert FORMATS[name].why_not(shape) == message
    assert FORMATS[name].why_not((64, 64)) is None


def test_dead_and_live_activation_scales(form):
    if not hasattr(form, "input_scale"):
        assert not form.needs_input_scale("linear") and not form.needs_input_scale("conv2d")
        return
    assert form.input_scale(torch.tensor(0.0)).item() > 0
    assert form.input_scale(torch.tensor([2.0])).shape == ()
    top = form.QMAX * (448 if form.NAME == "nvfp4" else 1)
    assert form.input_scale(torch.tensor(2.0)).item() == pytest.approx(2.0 / top)


def test_tables_name_the_same_formats():
    assert set(recipe.ALGORITHMS) == set(FORMATS) == set(capability.NEEDS)
    for form in FORMATS.values():
        assert form.SECOND is None or form.SECOND in FORMATS


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match="int9"):
        get("int9")


def test_convolution_blocks_run_over_input_channels():
    weight = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    flat = blocks.flatten(weight)
    assert torch.equal(flat[0, :3], weight[0, :, 0, 0])
    assert torch.equal(blocks.unflatten(flat, weight.shape), weight)
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    assert torch.equal(blocks.unpack(blocks.pack(codes)), codes)


def test_int8_amax_comes_back_to_the_last_bit():
    form = FORMATS["int8"]
    torch.manual_seed(0)
    from_16_bits = torch.randn(5000).half().float().abs() + 2.0**-14
    assert form.amax_exceptions(from_16_bits.half().float() / form.QMAX, from_16_bits.half()) == {}
    anything = torch.rand(5000) + 0.01
    found = form.amax_of(anything / form.QMAX)
    exceptions = form.amax_exceptions(anything / form.QMAX, anything)
    for channel, value in exceptions.items():
        found[int(channel)] = value
    assert torch.equal(found, anything)
    assert len(exceptions) < 0.02 * len(anything)


def test_int8_amax_comes_back_from_one_bit_a_channel():
    """Every float32 of a binade: its scale has two amax at most, and the bit says which one it was."""
    form = FORMATS["int8"]
    for bits in torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).chunk(8):
        amax = bits.view(torch.float32)
        scale = amax / form.QMAX
        first, second = form.amax_of(scale), form._other(scale)
        assert torch.equal(torch.where(first == amax, first, second), amax)
    torch.manual_seed(0)
    for amax in (torch.rand(5001) + 0.01, torch.rand(7) * 1e5 + 3.97, torch.full((64,), 1.984375)):
        scale = (amax / form.QMAX).reshape(-1, 1)
        exceptions = form.amax_exceptions(scale, amax)
        text = form.exceptions_text(exceptions, scale)
        assert form.exceptions_of(text, scale) == exceptions
        assert len(text) == len(form.exceptions_text({}, scale.to("meta")))
    assert form.exceptions_text({"3": 7.0}, scale) is None  # of another scale
    for wrong in ("!", "AAAA", "//////////8="):
        with pytest.raises(ValueError):
            form.exceptions_of(wrong, torch.ones(64, 1))


def test_one_exception_among_many_channels_takes_little():
    form, device = FORMATS["int8"], torch.device("cpu")
    anything = torch.arange(1, 2, 0.001)
    second = next(iter(form.amax_exceptions(anything / form.QMAX, anything).values()))
    scale = torch.full((2**20, 1), second) / form.QMAX
    text = form.exceptions_text({"9": second}, scale)
    found, peak = peak_of(lambda: form.exceptions_of(text, scale), device)
    assert found == {"9": second} and peak < 5 * len(scale)
