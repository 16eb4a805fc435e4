"""The quantized checkpoint as one safetensors file.

A file that stock ComfyUI computes rightly has its keys bare. In any other file they stand under
the prefix `modelopt.`, so that stock "Load Diffusion Model" refuses it ("could not detect model
type") instead of running it to noise.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..utils import checksums, out_of_memory
from ..utils.files import DTYPES, header_text, save_safetensors, whole_header
from ..utils.text import brief, brief_repr, read_json
from ..utils.unreadable import raise_unless_damage
from . import FORMATS, int8
from .checkpoint import CHANNEL, FORMAT_VERSION, INPUTS, REMEDY, Input, Layer, QuantizedCheckpoint

PREFIX = "modelopt."
STOCK_PREFIX = "model.diffusion_model."
HEADER_TENSOR = "modelopt_header"
HEADER = "modelopt"
HEADER_TYPES = {
    "recipe": dict,
    "source": (dict, type(None)),
    "calibration": (dict, type(None)),
    "quality": (dict, type(None)),
    "versions": (dict, type(None)),
    "baked_patches": (int, type(None)),
    "imported": (dict, type(None)),
    "unet_config": (dict, type(None)),
}
# what the reports read of them
INNER_TYPES = {
    "source": {"name": str, "sha256": str},
    "calibration": {"records": int, "runs": int},
    "imported": {"kind": str, "notes": list},
    "quality": {"sqnr_db": (int, float), "worst_sqnr_db": (int, float), "records": int},
}
# likewise, where they are there: (kind of it, kind of what it holds)
LISTS = {
    ("recipe", "choices"): (list, dict),
    ("recipe", "assignment"): (dict, list),
    ("recipe", "goal"): (dict, object),
    ("calibration", "resolutions"): (list, str),
}
COMFY_HEADER = "_quantization_metadata"
# tensors and layers in a header, itself and what else is in it
MANY_OBJECTS = 2**16
# as many characters as Python's longest floating-point number: -2.2250738585072014e-308
WIDEST_FLOAT = 10**23
# weights in 16 bits are float16, or bfloat16 where their values need it
WIDEST_DTYPES = DTYPES | {torch.float16: DTYPES[torch.bfloat16]}


def comfy_config(layer: Layer) -> dict:
    """What ComfyUI's markers say of a layer."""
    config: dict = {"format": layer.comfy_format}
    if layer.weight_only:
        config["full_precision_matrix_mult"] = True
    return config


def comfy_quant(layer: Layer) -> torch.Tensor:
    """The `comfy_quant` marker of a layer: its JSON as a uint8 tensor, as ComfyUI stores it."""
    text = json.dumps(comfy_config(layer)).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def marked(checkpoint: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors with the `comfy_quant` marker of every quantized layer."""
    markers = {f"{name}.comfy_quant": comfy_quant(x) for name, x in checkpoint.layers.items()}
    return checkpoint.tensors | markers


@out_of_memory.explained("saving", out_of_memory.FREE)
def write(
    checkpoint: QuantizedCheckpoint,
    path: Path | str,
    step: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the file whole or not at all. `step` and errors as in `save_safetensors`.

    Its header is padded so that the file's size follows from `size` alone.
    """
    tensors = _named(checkpoint)
    save_safetensors(tensors, path, _metadata(checkpoint), step, _reserved(checkpoint, tensors))


def size(checkpoint: QuantizedCheckpoint) -> int:
    """Bytes of the file that `write` makes.

    They do not depend on a tensor's values (which may be on the meta device), on whether it is
    float16 or bfloat16, on floating-point numbers in the header, nor on which channels of an int8
    layer are among `amax_exceptions` (unless an amax there is not of its scale).
    """
    tensors = _named(checkpoint)
    text = header_text(tensors, _metadata(checkpoint))
    header = max(len(text), _reserved(checkpoint, tensors))
    return whole_header(header) + sum(tensor.nbytes for tensor in tensors.values())


def _named(checkpoint: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    """The tensors by their names in the file."""
    prefix = "" if checkpoint.opens_in_stock else PREFIX
    return {prefix + name: tensor for name, tensor in marked(checkpoint).items()}


def _metadata(checkpoint: QuantizedCheckpoint, widest: bool = False) -> dict[str, str]:
    """The header's entries; `widest`: with every floating-point number as long as one can be."""
    prefix = "" if checkpoint.opens_in_stock else PREFIX
    names = {prefix + name: comfy_config(x) for name, x in checkpoint.layers.items()}
    described = _described(checkpoint)
    return {
        COMFY_HEADER: json.dumps({"format_version": "1.0", "layers": names}, sort_keys=True),
        HEADER: json.dumps(_widest(described) if widest else described, sort_keys=True),
    }


def _reserved(checkpoint: QuantizedCheckpoint, tensors: dict[str, torch.Tensor]) -> int:
    """Characters of the header's text where everything that is not known beforehand is longest."""
    return len(header_text(tensors, _metadata(checkpoint, widest=True), WIDEST_DTYPES))


def _widest(value):
    if isinstance(value, float):
        return WIDEST_FLOAT
    if isinstance(value, dict):
        return {key: _widest(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_widest(entry) for entry in value]
    return value


def _described(checkpoint: QuantizedCheckpoint) -> dict:
    """The whole header, JSON-able."""
    inputs = {name: dataclasses.asdict(x) for name, x in checkpoint.inputs.items()}
    stock = ["comfyui"] if checkpoint.opens_in_stock else []
    header = {key: value for key, value in checkpoint.header.items() if key != "opens_in_stock"}
    return {
        **header,
        "format_version": FORMAT_VERSION,
        "layers": {name: _entry(name, x, checkpoint) for name, x in checkpoint.layers.items()},
        **({"inputs": inputs} if inputs else {}),
        "opens_in": [*stock, "comfyui-modelopt"],
    }


def _entry(name: str, layer: Layer, checkpoint: QuantizedCheckpoint) -> dict:
    """What the header says of a layer; of an int8 one always as many characters."""
    entry = dataclasses.asdict(layer)
    if layer.format == int8.NAME:
        text = int8.exceptions_text(
            layer.amax_exceptions, checkpoint.tensors[f"{name}.weight_scale"]
        )
        entry["amax_exceptions"] = layer.amax_exceptions if text is None else text
    return entry


def for_others_to_save(checkpoint: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    """Tensors for ComfyUI's own Save nodes, which write no header of ours: it is one of them.

    Their names are those of a checkpoint's UNet where stock ComfyUI computes it rightly, and else
    such that it does not recognise one.
    """
    prefix = STOCK_PREFIX if checkpoint.opens_in_stock else PREFIX
    text = json.dumps(_described(checkpoint), sort_keys=True).encode()
    header = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {prefix + name: t for name, t in (marked(checkpoint) | {HEADER_TENSOR: header}).items()}


def _is_text(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.ndim == 1


def _unpacked(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, where: str
) -> tuple[dict[str, torch.Tensor], str | None]:
    """The UNet's tensors of a file without their prefix, and its header's text if there is one."""
    text = (metadata or {}).get(HEADER)
    place = next((key for key in tensors if key.rpartition(".")[2] == HEADER_TENSOR), None)
    if text is None and place is not None and _is_text(tensors[place]):
        if (length := tensors[place].numel()) > checksums.LONGEST_HEADER:
            raise ValueError(
                f"the header must have at most {checksums.LONGEST_HEADER} bytes, {HEADER_TENSOR} in {where} "
                f"has {length}: {REMEDY}"
            )
        text = tensors[place].numpy().tobytes().decode("utf-8", "replace")
    prefix = PREFIX if any(key.startswith(PREFIX) for key in tensors) else ""
    if place is not None:
        prefix = place.removesuffix(HEADER_TENSOR)
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    own.pop(HEADER_TENSOR, None)
    return {key: t for key, t in own.items() if not key.endswith(".comfy_quant")}, text


def check_readable(path: Path | str) -> None:
    """Raises ValueError if the file is not a whole safetensors file."""
    metadata_of(path)


def metadata_of(
    path: Path | str,
    what: str = "a quantized checkpoint",
    remedy: str = "it is damaged or incomplete, get it again",
) -> tuple[dict[str, str], list[str]]:
    """Metadata and tensors' names of a whole safetensors file; raises ValueError for any other, and
    for metadata that are not as they were saved. what, remedy: for the error."""
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > checksums.LONGEST_HEADER:
                raise SafetensorError(f"a header of {length} bytes")
            objects = file.read(length).count(b"{")
            size = os.fstat(file.fileno()).st_size
        # each takes a kilobyte of the readers' memory
        if objects > max(MANY_OBJECTS, size // 1024):
            raise SafetensorError(f"a header of {objects} objects in {size} bytes")
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError, RuntimeError) as error:
        # a RuntimeError is torch's, of a file cut off meanwhile
        raise_unless_damage(path, error)
        raise ValueError(
            f"{what} must be a whole safetensors file, {path} is not ({brief(str(error))}): {remedy}"
        ) from error
    checksums.check_metadata(metadata, path)
    return metadata, names


def read_header(path: Path | str) -> tuple[dict, dict[str, Layer]] | None:
    """Header and layers of a file of ours, without its tensors and what follows from them; None for
    a safetensors file that has no header of ours. Raises ValueError in house form."""
    from safetensors import SafetensorError, safe_open

    metadata, names = metadata_of(path)
    places = [key for key in names if key.rpartition(".")[2] == HEADER_TENSOR]
    tensors = {}
    if HEADER not in metadata and places:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {places[0]: file.get_tensor(places[0])}
        except (SafetensorError, OSError, RuntimeError) as error:
            if out_of_memory.ran_out(error):
                raise
            raise ValueError(
                f"a file must stay as it is while it is read, {path} did not ({brief(str(error))}): "
                "read it again"
            ) from error
    _, text = _unpacked(tensors, metadata, str(path))
    if text is None:
        return None
    header = _header(text, str(path))
    return header, _layers(header, {}, str(path))


def parse(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, where: str
) -> QuantizedCheckpoint:
    """Tensors and header of a file -> a validated checkpoint. Raises ValueError in house form."""
    tensors, text = _unpacked(tensors, metadata, where)
    header = _header(text, where)
    layers = _layers(header, tensors, where)
    inputs = header.pop("inputs", {})
    if not isinstance(inputs, dict):
        raise ValueError(f"inputs of the header must be a table, {where} has none: {REMEDY}")
    checkpoint = QuantizedCheckpoint(
        tensors,
        layers,
        header,
        {name: _input(name, entry, where) for name, entry in inputs.items()},
    )
    checkpoint.validate(where)
    return checkpoint


def _header(text: str | None, where: str) -> dict:
    if text is None:
        raise ValueError(
            f"a file for this loader must have been saved by this pack, {where} was not: "
            'open it with "Load Diffusion Model" or a checkpoint loader'
        )
    try:
        header = read_json(text)
    except ValueError as error:
        raise ValueError(f"the header must be JSON, {where} has {error}: {REMEDY}") from error
    if not isinstance(header, dict):
        raise ValueError(
            f"the header must be a table, found {brief_repr(header)} in {where}: {REMEDY}"
        )
    for name, kinds in HEADER_TYPES.items():
        if not isinstance(header.get(name), kinds):
            _fail_form(name, header.get(name), where)
    for name, inner in INNER_TYPES.items():
        part = header.get(name)
        for key, kinds in inner.items() if part else ():
            if not isinstance(part.get(key), kinds):
                _fail_form(f"{key} in {name}", part.get(key), where)
    for (name, key), (kind, inside) in LISTS.items():
        part = (header.get(name) or {}).get(key)
        held = part.values() if isinstance(part, dict) else part
        if part is not None and not (
            isinstance(part, kind) and all(isinstance(one, inside) for one in held)
        ):
            _fail_form(f"{key} in {name}", part, where)
    for names in (header["recipe"].get("assignment") or {}).values():
        if not all(isinstance(name, str) for name in names):
            _fail_form("assignment in recipe", names, where)
    version = header.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"format_version must be a number from 1, found {brief_repr(version)} in {where}: {REMEDY}"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this version of the pack reads files up to format_version {FORMAT_VERSION}, "
            f"{where} has {brief_repr(version)}: update ComfyUI-ModelOpt"
        )
    return header


def _layers(header: dict, tensors: dict[str, torch.Tensor], where: str) -> dict[str, Layer]:
    """Takes the layers out of the header."""
    layers = header.pop("layers", None)
    if not isinstance(layers, dict):
        raise ValueError(f"the header must list the quantized layers, {where} does not: {REMEDY}")
    return {
        name: _layer(name, entry, tensors.get(f"{name}.weight_scale"), where)
        for name, entry in layers.items()
    }


def _layer(name: str, entry, scale: torch.Tensor | None, where: str) -> Layer:
    fields = {"format": str, "kind": str, "smoothed": bool}
    if not isinstance(entry, dict) or any(
        not isinstance(entry.get(key), kind) for key, kind in fields.items()
    ):
        raise ValueError(
            f"layer {brief(name)} must state {', '.join(fields)}, found {brief_repr(entry)} in "
            f"{where}: {REMEDY}"
        )
    if entry["format"] not in FORMATS:
        raise ValueError(
            f"layer {brief(name)} must have a format of {', '.join(FORMATS)}, "
            f"found {brief_repr(entry['format'])} in {where}: update ComfyUI-ModelOpt"
        )
    shape, rank = entry.get("shape"), entry.get("rank", 0)
    if shape is not None and not (
        isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    ):
        _fail_entry("shape", "a list of sizes", name, shape, where)
    if type(rank) is not int or rank < 0:
        _fail_entry("rank", "a number from 0", name, rank, where)
    activations = entry.get("activations", "")
    if not isinstance(activations, str):
        _fail_entry("activations", "a word", name, activations, where)
    amax, exceptions = entry.get("input_amax"), entry.get("amax_exceptions", {})
    if amax is not None and not _positive(amax):
        _fail_entry("input_amax", "a positive number", name, amax, where)
    if isinstance(exceptions, str) and entry["format"] == int8.NAME:
        exceptions = _exceptions(name, exceptions, scale, where)
    if not isinstance(exceptions, dict) or not all(
        CHANNEL.fullmatch(key) and _positive(value) for key, value in exceptions.items()
    ):
        _fail_entry("amax_exceptions", "positive numbers by channel", name, exceptions, where)
    return Layer(
        **{key: entry[key] for key in fields},
        shape=None if shape is None else tuple(shape),
        rank=rank,
        activations=activations,
        input_amax=amax,
        amax_exceptions=exceptions,
    )


def _exceptions(name: str, text: str, scale: torch.Tensor | None, where: str) -> dict[str, float]:
    if scale is None or scale.dtype != torch.float32 or not scale.ndim:
        return {}  # what `validate` refuses
    try:
        return int8.exceptions_of(text, scale)
    except ValueError as error:
        _fail_entry("amax_exceptions", "one bit a channel in base64", name, str(error), where)


def _input(name: str, entry, where: str) -> Input:
    entry = entry if isinstance(entry, dict) else {}
    form, amax = entry.get("format"), entry.get("amax")
    if form not in INPUTS:
        _fail_entry("the format of the input", f"one of {', '.join(INPUTS)}", name, form, where)
    if amax is not None and not _positive(amax):
        _fail_entry("the amax of the input", "a positive number or none", name, amax, where)
    return Input(form, amax)


def _positive(value) -> bool:
    """Whether JSON's value is a number that float32 holds, above 0."""
    return type(value) in (int, float) and 0 < value < 3.4e38


def _fail_form(what: str, found, where: str) -> None:
    raise ValueError(
        f"{what} of the header has the wrong form, found {brief_repr(found)} in {where}: {REMEDY}"
    )


def _fail_entry(key: str, rule: str, name: str, found, where: str) -> None:
    raise ValueError(
        f"{key} of {brief(name)} must be {rule}, found {brief_repr(found)} in {where}: {REMEDY}"
    )
