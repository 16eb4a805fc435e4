"""Damaged, foreign, edited and newer files: each named by rule, value, place and remedy."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import safetensors
import torch
from comfyui_modelopt.formats import files
from comfyui_modelopt.formats.checkpoint import Layer, QuantizedCheckpoint
from comfyui_modelopt.utils import checksums
from comfyui_modelopt.utils.files import save_safetensors
from comfyui_modelopt.utils.memory import peak_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def small(kind="conv2d") -> QuantizedCheckpoint:
    shape = (4, 3, 3, 3) if kind == "conv2d" else (4, 3)
    tensors = {
        "a.weight": torch.ones(shape, dtype=torch.int8),
        "a.weight_scale": torch.ones(4, *([1] * (len(shape) - 1))),
        "a.bias": torch.zeros(4, dtype=torch.float16),
    }
    if kind == "conv2d":
        tensors["a.input_scale"] = torch.tensor(0.5)
    return QuantizedCheckpoint(tensors, {"a": Layer("int8", kind)}, {"recipe": {}})


def reread(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return files.parse(load_file(path), metadata, str(path))


def edited(tmp_path, change) -> str:
    """A good file after `change(tensors, modelopt header)`."""
    path = tmp_path / "good.safetensors"
    files.write(small(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, header = load_file(path), json.loads(metadata["modelopt"])
    change(tensors, header)
    metadata["modelopt"] = json.dumps(header)
    out = tmp_path / "edited.safetensors"
    save_file(tensors, out, metadata)
    return str(out)


def remove(key):
    return lambda tensors, header: tensors.pop(key)


def put(key, value):
    return lambda tensors, header: tensors.update({key: value})


def layer(**change):
    return lambda tensors, header: header["layers"]["a"].update(change)


P = "modelopt."
EDITS = {
    "weight gone": (remove(P + "a.weight"), "layer a must have a weight"),
    "scale gone": (remove(P + "a.weight_scale"), "must have a weight_scale"),
    "input scale gone": (remove(P + "a.input_scale"), "must have a input_scale"),
    "scale shape": (
        put(P + "a.weight_scale", torch.ones(4)),
        r"shape \(4, 1, 1, 1\), found \(4,\)",
    ),
    "scale zero": (put(P + "a.input_scale", torch.tensor(0.0)), "positive and finite"),
    "scale nan": (put(P + "a.weight_scale", torch.full((4, 1, 1, 1), torch.nan)), "positive"),
    "scale dtype": (put(P + "a.input_scale", torch.tensor(1.0).half()), "stored as torch.float32"),
    "weight dtype": (put(P + "a.weight", torch.ones(4, 3, 3, 3)), "stored as torch.int8"),
    "weight rank": (put(P + "a.weight", torch.ones(4, 3, dtype=torch.int8)), "4 for a conv2d"),
    "stray smoothing": (put(P + "a.pre_quant_scale", torch.ones(3)), "no pre_quant_scale"),
    "stray block maxima": (put(P + "a.weight_amax", torch.ones(3)), "no weight_amax"),
    "stray branch": (put(P + "a.svd_up", torch.ones(3)), "no svd_up"),
    "shape a word": (layer(shape="big"), "shape of a must be a list of sizes, found 'big'"),
    "shape of nothing": (layer(shape=[4, 0, 3, 3]), "list of sizes"),
    "rank a word": (layer(rank="x"), "rank of a must be a number from 0, found 'x'"),
    "branch of a convolution": (layer(rank=2), "smoothing and branches are for linear layers"),
    "packed without a shape": (layer(format="int4", amax_exceptions={}), "must state its shape"),
    "another shape": (
        layer(format="int4", shape=[4, 200, 3, 3], amax_exceptions={}),
        r"shape \(4, 900\)",
    ),
    "unknown activations": (layer(activations="per token"), "activations of a must be one of"),
    "smoothed convolution": (layer(smoothed=True), "smoothing and branches are for linear layers"),
    "exceptions beyond the channels": (layer(amax_exceptions={"9": 1.0}), "must be below 4"),
    "exceptions of a long number": (
        layer(amax_exceptions={"9" * 5000: 1.0}),
        "amax_exceptions of a must be positive numbers by channel",
    ),
    "exceptions of one channel twice": (
        layer(amax_exceptions={"0": 1.0, "00": 2.0}),
        "amax_exceptions of a must be positive numbers by channel",
    ),
    "exceptions in other digits": (
        layer(amax_exceptions={"\u0663": 1.0}),
        "amax_exceptions of a must be positive numbers by channel",
    ),
    "exceptions in other letters": (layer(amax_exceptions="?"), "one bit a channel in base64"),
    "exceptions of more channels": (
        layer(amax_exceptions="AAAA"),
        "amax_exceptions of a must be one bit a channel in base64, found '3 bytes for 4 channels'",
    ),
    "exception without a second amax": (layer(amax_exceptions="8A=="), "has no second amax"),
    "quality a word": (
        lambda t, h: h.update(quality={"sqnr_db": "x"}),
        "sqnr_db in quality of the header has the wrong form, found 'x'",
    ),
    "half a source": (lambda t, h: h.update(source={"name": "a"}), "sha256 in source"),
    "half a calibration": (
        lambda t, h: h.update(calibration={"records": 3}),
        "runs in calibration",
    ),
    "baked patches a word": (lambda t, h: h.update(baked_patches="x"), "baked_patches of the"),
    "amax a word": (layer(input_amax="x"), "input_amax of a must be a positive number, found 'x'"),
    "unknown format": (layer(format="int3"), "found 'int3'.*update"),
    "layer not a layer": (lambda t, h: h["layers"].update(a=7), "layer a must state"),
    "layers not a table": (lambda t, h: h.update(layers=3), "list the quantized layers"),
    "no layers": (lambda t, h: h.update(layers={}), "none"),
    "newer version": (lambda t, h: h.update(format_version=2), "has 2: update ComfyUI-ModelOpt"),
    "architecture a list": (lambda t, h: h.update(unet_config=[1]), "unet_config of the header"),
    "choices of a recipe no tables": (
        lambda t, h: h["recipe"].update(format="mixed", choices=[1]),
        "choices in recipe of the header",
    ),
    "assignment no lists": (
        lambda t, h: h["recipe"].update(format="mixed", assignment={"0": 1}),
        "assignment in recipe of the header",
    ),
    "assignment of no names": (
        lambda t, h: h["recipe"].update(format="mixed", assignment={"0": [{}]}),
        "assignment in recipe of the header",
    ),
    "resolutions no texts": (
        lambda t, h: h.update(calibration={"records": 1, "runs": 1, "resolutions": [1]}),
        "resolutions in calibration of the header",
    ),
    "a number of thousands of digits": (
        lambda t, h: h.update(quality={"sqnr_db": 10**4000}),
        "header must be JSON.*integer of 4001 digits",
    ),
    "a deep value": (
        lambda t, h: h.update(more=functools.reduce(lambda x, _: [x], range(99), 1)),
        "header must be JSON.*nested more than 64 deep",
    ),
    "a long value": (lambda t, h: h.update(format_version="9" * 10**5), "found '9.*…9*'"),
    "version a word": (lambda t, h: h.update(format_version="x"), "found 'x'"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_files_are_refused_by_name(tmp_path, name):
    change, message = EDITS[name]
    path = edited(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        reread(path)
    assert path in str(caught.value) and len(str(caught.value)) < 1000


def test_header_that_is_not_json(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path, {"modelopt": "{"})
    with pytest.raises(ValueError, match="must be JSON"):
        reread(path)


def test_a_header_tensor_of_any_size(tmp_path):
    path = tmp_path / "x.safetensors"
    long = torch.zeros(checksums.LONGEST_HEADER + 1, dtype=torch.uint8)
    save_file({files.HEADER_TENSOR: long, "a": torch.ones(1)}, path)
    for read in (reread, files.read_header):
        with pytest.raises(ValueError, match="must have at most 16777216 bytes, .* has 16777217"):
            read(path)


@pytest.mark.parametrize(("each", "good"), [(0, False), (300, True)])
def test_a_header_of_many_tensors(tmp_path, each, good):
    """Without bytes of their own they are a stranger's; a calibration may hold as many."""
    path = tmp_path / "x.safetensors"
    save_file({str(i): torch.ones(each) for i in range(files.MANY_OBJECTS + 1)}, path)
    if good:
        files.check_readable(path)
        return
    with pytest.raises(ValueError, match="x.safetensors is not .a header of 65538 objects in"):
        files.check_readable(path)


def test_foreign_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="Load Diffusion Model"):
        reread(path)


@pytest.mark.parametrize("size", [0, 4, 100, -7])
def test_truncated_file(tmp_path, size):
    path = tmp_path / "x.safetensors"
    files.write(small(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        files.check_readable(path)


def test_stock_files_have_bare_keys_and_others_a_prefix(tmp_path):
    for kind, prefix in (("linear", ""), ("conv2d", "modelopt.")):
        path = tmp_path / f"{kind}.safetensors"
        files.write(small(kind), path)
        assert f"{prefix}a.weight" in load_file(path)
        again = reread(path)
        assert again.layers == small(kind).layers
        assert again.tensors.keys() == small(kind).tensors.keys()


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        files.write(small(), path)
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="saving needs a folder"):
        save_safetensors({"a": torch.ones(1)}, tmp_path / "folder" / "x.safetensors", {})


@pytest.mark.skipif(os.name == "nt", reason="the limit on file sizes is POSIX")
def test_no_space_leaves_nothing_behind(tmp_path):
    """A real write that the system refuses half-way: a process that may write 1 MB at most."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import conftest, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "from comfyui_modelopt.utils.files import save_safetensors\n"
        "try: save_safetensors({'a': torch.ones(2**20)}, sys.argv[2], {})\n"
        "except OSError as error: sys.exit(0 if '4 MB of free space' in str(error) else 3)\n"
        "sys.exit(4)\n"
    )
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    target = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", code, tests, str(target)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert os.listdir(tmp_path) == []


def test_bytes_are_the_librarys(tmp_path):
    """What our writer writes differs from safetensors' own file in the metadata only."""
    torch.manual_seed(0)
    tensors = {
        f"{name}.{i}": torch.randn(shape).to(dtype)
        for name, dtype in (
            ("f64", torch.float64),
            ("f32", torch.float32),
            ("f16", torch.float16),
            ("bf16", torch.bfloat16),
            ("e4m3", torch.float8_e4m3fn),
            ("e5m2", torch.float8_e5m2),
            ("i8", torch.int8),
            ("u8", torch.uint8),
            ("i64", torch.int64),
            ("bool", torch.bool),
        )
        for i, shape in enumerate([(), (3, 5), (0, 4), (7,)])
    }
    tensors["strided"] = torch.randn(6, 4).t()
    save_safetensors(tensors, tmp_path / "ours.safetensors", {"b": "ä", "a": "1"})
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs.safetensors")
    ours, theirs = (
        load_file(tmp_path / "ours.safetensors"),
        load_file(tmp_path / "theirs.safetensors"),
    )
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert (
            ours[name]
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(theirs[name].contiguous().reshape(-1).view(torch.uint8))
        )
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop(checksums.ENTRY) and metadata == {"a": "1", "b": "ä"}


def test_a_file_cut_off_while_it_is_opened(tmp_path, monkeypatch):
    """Between the library's look at the file's length and torch's: what torch says then."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path)

    def cut(*args, **kwargs):
        raise RuntimeError(f"file <{path}> size <8> is smaller than the required mapping size <9>")

    monkeypatch.setattr(safetensors, "safe_open", cut)
    with pytest.raises(
        ValueError, match="must be a whole safetensors file, .*x.safetensors is not"
    ):
        files.metadata_of(path)


def test_cancelled_save_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("comfyui_modelopt.utils.files.PIECE", 100)
    sizes = []

    def cancel(size):
        sizes.append(size)
        if sum(sizes) >= 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_safetensors({"a": torch.ones(100)}, tmp_path / "x.safetensors", {}, cancel)
    assert sizes == [100, 100, 100]
    assert os.listdir(tmp_path) == []


def with_numbers(amax: float, quality: float, exceptions: dict, dtype: torch.dtype):
    found = small()
    found.tensors["a.bias"] = torch.zeros(4, dtype=dtype)
    found.tensors["a.weight_scale"] = torch.tensor([1.9921875] * 4).reshape(4, 1, 1, 1) / 127
    found.layers["a"] = Layer("int8", "conv2d", input_amax=amax, amax_exceptions=exceptions)
    found.header["quality"] = {"sqnr_db": quality, "worst_sqnr_db": -quality, "records": 3}
    return found


def test_size_follows_from_what_is_known_beforehand(tmp_path):
    """Numbers of any length, either 16-bit dtype, exceptions or none: the same bytes, as predicted
    from tensors without values; and safetensors' own reader and ComfyUI's read them."""
    from comfy.utils import load_torch_file
    from comfyui_modelopt.formats import int8

    scale = torch.tensor([1.9921875] * 4) / 127
    second = int8._other(scale)[2].item()
    assert int8.amax_exceptions(scale, torch.tensor([1.9921875] * 4)) == {}
    cases = [
        (2.0, 1.0, {}, torch.float16),
        (2.2250738585072014e-30, -12.345678901234567, {"2": second}, torch.bfloat16),
        (0.1 + 0.2, float("inf"), {}, torch.float16),
    ]
    predicted = with_numbers(1.0, 1.0, {}, torch.float16)
    predicted.tensors = {name: t.to("meta") for name, t in predicted.tensors.items()}
    sizes = {files.size(predicted)}
    for number, (amax, quality, exceptions, dtype) in enumerate(cases):
        made = with_numbers(amax, quality, exceptions, dtype)
        made.tensors["a.input_scale"] = int8.input_scale(torch.tensor(amax))
        path = tmp_path / f"{number}.safetensors"
        files.write(made, path)
        sizes |= {files.size(made), path.stat().st_size}
        again = reread(path)
        assert again.layers == made.layers
        assert again.header["quality"] == made.header["quality"]
        theirs, metadata = load_torch_file(str(path), return_metadata=True)
        assert files.parse(theirs, metadata, "").layers == made.layers
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0 and data[8 : 8 + length].rstrip(b" ").endswith(b"}}")
        assert data[7 + length] == 32
    assert len(sizes) == 1


def test_an_amax_that_is_not_of_its_scale_is_written_out(tmp_path):
    """As an import may have it: the file is then longer."""
    path = tmp_path / "x.safetensors"
    made = with_numbers(2.0, 1.0, {"1": 0.123}, torch.float16)
    made.tensors["a.input_scale"] = torch.tensor(2.0) / 127
    files.write(made, path)
    assert reread(path).layers == made.layers
    assert path.stat().st_size == files.size(made)


def test_scales_of_any_size_are_looked_at_in_pieces(monkeypatch):
    monkeypatch.setattr("comfyui_modelopt.formats.checkpoint.PIECE", 2**10)
    found, size = small("linear"), 2**20
    found.layers["a"] = Layer("int8", "linear", rank=size)
    found.tensors["a.svd_up"] = torch.ones(4, size, dtype=torch.float16)
    found.tensors["a.svd_down"] = torch.ones(size, 3, dtype=torch.float16)
    assert peak_of(lambda: found.validate("x"), torch.device("cpu"))[1] < 2**15
    found.tensors["a.svd_down"][-1, -1] = torch.inf
    with pytest.raises(
        ValueError, match="svd_down of a must be finite, found values from 1 to inf"
    ):
        found.validate("x")
