"""What opens a file as a user's graph does, and what of it is compared."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MOST = 2000  # characters of an error that somebody reads
NAMES = (
    *("../x.safetensors", "/etc/passwd", "..\\x.safetensors", "C:\\x.safetensors", "", ".", ".."),
    *("a/../../x.safetensors", "\0", "x\0.safetensors", "a" * 5000, "nul", "con", "~/x", "\ud800"),
    *("//server/share/x.safetensors", "%2e%2e/x.safetensors", "x.safetensors/", "\n", "linked"),
    *("<script>alert(1)</script>", "outside.safetensors", "pipe.safetensors", "folder.safetensors"),
)


def _tensors(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), _digest(tensor))
        for name, tensor in tensors.items()
    }


def _digest(tensor: torch.Tensor) -> bytes:
    """Of its bytes, which are not copied: what is counted is the pack's own memory."""
    if hasattr(tensor, "dequantize") and type(tensor) is not torch.Tensor:
        tensor = tensor.dequantize().detach()
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


def _checkpoint(checkpoint) -> tuple:
    header = {name: value for name, value in checkpoint.header.items() if name != "source"}
    return checkpoint.layers, checkpoint.inputs, header, _tensors(checkpoint.tensors)


def quantized(path: Path, rng: random.Random) -> Callable[[], Any]:
    """Load and Info, short of building a MODEL; the file's badge."""
    from comfyui_modelopt.loaders import badge, unet
    from comfyui_modelopt.utils.provenance import provenance
    from comfyui_modelopt.utils.report import model_report

    badge.of_file(str(path))
    found = unet.read(str(path))
    for full in (False, True):
        provenance(found.header, found.layers, full)
    model_report(found.header, found.layers, (), 1)
    return lambda: _checkpoint(found)


def whole(path: Path, rng: random.Random) -> Callable[[], Any]:
    """The node itself, and Info."""
    from comfyui_modelopt.loaders import info, unet
    from comfyui_modelopt.nodes.load_unet import LoadUNet

    model = LoadUNet.execute(path.name).args[0]
    if model.get_attachment(unet.ATTACHMENT) is None:
        return lambda: _tensors(model.model_state_dict())
    info.in_full(model)
    return lambda: _checkpoint(unet.to_checkpoint(model))


def calibration(path: Path, rng: random.Random) -> Callable[[], Any]:
    from comfyui_modelopt.quantize.calibration import load
    from comfyui_modelopt.utils.report import calibration_line

    found = load(path)
    calibration_line(found.summary())
    found.merge(found)

    def compared():
        runs = []
        for run in found.runs:
            held: list = []
            for record in run.records:
                plain = record.map(lambda tensor, held=held: held.append(_digest(tensor)) or tensor)
                held.append((dict(plain.plain), plain.index, plain.kind))
            runs.append((run.facts(), held))
        return found.signature, found.source, runs

    return compared


def foreign(path: Path, rng: random.Random) -> Callable[[], Any]:
    from comfyui_modelopt.loaders import foreign as importers
    from comfyui_modelopt.utils.provenance import provenance

    found = importers.read(path)
    provenance(found.header, found.layers, True)
    return lambda: _checkpoint(found)


def recipe(path: Path, rng: random.Random) -> Callable[[], Any]:
    """The node's check of what was pasted into it."""
    from comfyui_modelopt.nodes.auto_quantize import AutoQuantize
    from comfyui_modelopt.quantize import mixed

    text = path.read_bytes().decode("utf-8", "replace")
    refused = AutoQuantize.validate_inputs(target={"target": "recipe", "recipe": text})
    found = mixed.read(text, f"the recipe on the node ({path})")
    if refused is not True:
        raise AssertionError(f"refused by the node, read by the core: {refused}")
    return lambda: mixed.write(found)


def names(path: Path, rng: random.Random) -> Callable[[], Any]:
    """A name in a node's input that is no file of the folder: each way refuses it and says it."""
    from comfyui_modelopt.nodes import folders, routes
    from comfyui_modelopt.nodes.import_checkpoint import ImportCheckpoint
    from comfyui_modelopt.nodes.load_calibration import LoadCalibration
    from comfyui_modelopt.nodes.load_unet import LoadUNet
    from comfyui_modelopt.nodes.save_unet import SaveUNet
    from comfyui_modelopt.utils.text import brief_repr

    name = rng.choice(NAMES)
    leaves = {node: node.validate_inputs(**{key: name}) for node, key in (
        (LoadUNet, "unet_name"), (LoadCalibration, "calibration_name"),
        (ImportCheckpoint, "checkpoint_name"))}  # fmt: skip
    accepted = [node.__name__ for node, said in leaves.items() if said is True]
    if accepted:
        raise AssertionError(f"{name[:60]!r} is accepted by {', '.join(accepted)}")
    for node in (LoadUNet, LoadCalibration, ImportCheckpoint):
        node.fingerprint_inputs(name)
        try:
            node.execute(name)
        except ValueError as error:
            if brief_repr(name) not in str(error):
                raise AssertionError(f"not named: {error}") from error
        else:
            raise AssertionError(f"{name[:60]!r} is opened by {node.__name__}")
    said = SaveUNet.validate_inputs(filename_prefix=name)
    if said is True:
        made = folders.new_path(folders.UNETS, name).resolve()
        if not made.is_relative_to(Path(folders.root_of(folders.UNETS)).resolve()):
            raise AssertionError(f"{name[:60]!r} leaves the folder: {made}")
    try:
        routes.file_of(name)
    except ValueError:
        raise ValueError(f"{path}: every node refuses the name {name[:20]!r}") from None
    raise AssertionError(f"the page is told of {name[:60]!r}")
