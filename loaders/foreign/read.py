"""Any checkpoint that ModelOpt or diffusers wrote of a UNet -> a QuantizedCheckpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...formats.checkpoint import QuantizedCheckpoint
from ...utils import out_of_memory, sha256
from ...utils.text import read_json
from ...utils.unreadable import raise_unless_damage
from .. import reading, unet
from . import architecture, folder, torch_file
from .restored import Restored
from .unified import Exported


@out_of_memory.explained("importing", out_of_memory.FREE)
def read(
    path: str | Path, started: Callable[[int], Callable[[], None]] = lambda total: lambda: None
) -> QuantizedCheckpoint:
    """A file of `mto.save`, or a folder of ModelOpt's or diffusers' -> a checkpoint.

    `started` is called once with the number of steps to come and answers what is called after
    each, which may raise. Nothing in the files is executed. Raises ValueError (rule, value, where,
    remedy) for anything that is not a quantized UNet.
    """
    path = Path(path)
    try:
        return _read(path, started)
    except OSError as error:  # of a look at a folder: the readers explain their own
        raise_unless_damage(path, error)
        raise


def _read(path: Path, started: Callable[[int], Callable[[], None]]) -> QuantizedCheckpoint:
    if path.is_dir():
        path = folder.component(path)
        make, sources = _of_folder(path), folder.weight_files(path)
        if (path / folder.STATE).is_file():
            sources = [*sources, path / folder.STATE]
    elif path.is_file():
        packed = path.suffix.lower() in (".safetensors", ".sft")
        make, sources = (_of_safetensors if packed else _of_file)(path), [path]
    else:
        raise ValueError(f"the checkpoint must exist, {path} does not: correct the name")
    step = started(make.steps + sum(sha256.pieces(source) for source in sources))
    checkpoint = make(step)
    if path.is_dir():
        architecture.check(folder.config(path), _found(checkpoint, path), str(path))
    digests = [sha256.of(source, step) for source in sources]
    digest = digests[0] if len(digests) == 1 else sha256.combined(digests)
    checkpoint.header["source"] = {"name": path.name, "sha256": digest}
    return checkpoint


def from_module(module: torch.nn.Module) -> QuantizedCheckpoint:
    """A UNet that ModelOpt quantized or restored in this process (`mtq.quantize`, `mto.restore`)
    -> a checkpoint. The module is not changed; for quantization-aware training."""
    import modelopt.torch.opt as mto

    where = f"the {type(module).__name__}"
    checkpoint = Restored(mto.modelopt_state(module), module.state_dict(), where)(lambda: None)
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        architecture.check(config, _found(checkpoint, where), where)
    return checkpoint


def _found(checkpoint: QuantizedCheckpoint, where: object) -> dict:
    """What ComfyUI reads off the weights."""
    return unet.architecture(checkpoint, str(where)).unet_config


def _of_file(path: Path) -> Restored:
    objects = torch_file.load(path)
    wanted = {"modelopt_state", "model_state_dict"}
    if not isinstance(objects, Mapping) or not wanted <= set(objects):
        raise ValueError(
            "a checkpoint of mto.save holds modelopt_state and model_state_dict, "
            f"{path} does not: save the quantized UNet with mto.save(unet, file)"
        )
    return Restored(objects["modelopt_state"], objects["model_state_dict"], str(path))


def _of_safetensors(path: Path) -> Exported:
    """A unified export outside its folder."""
    found, metadata = reading.tensors_of(path)
    if not any(key.endswith(".weight_scale") for key in found):
        raise ValueError(
            f"a .safetensors to import must be ModelOpt's unified export, {path} has no weight with "
            "a weight_scale: name the whole folder if it holds ModelOpt's quantizers, or the .pt of "
            "mto.save"
        )
    try:
        quantization = read_json(metadata.get("quantization_config", "null"))
    except ValueError as error:
        raise ValueError(
            f"quantization_config of the header must be JSON, {path} has {error}: get it again"
        ) from error
    if not isinstance(quantization, dict):
        raise ValueError(
            "a .safetensors alone must hold its quantization_config, which says how activations are "
            f"quantized, {path} does not: import the folder that holds its {folder.CONFIG}"
        )
    return Exported(quantization, found, str(path))


def _of_folder(path: Path) -> Restored | Exported:
    config = folder.config(path)
    found = folder.tensors(path)
    saved = any("_quantizer." in key for key in found)
    packed = any(key.endswith(".weight_scale") for key in found)
    saved = saved or ((path / folder.STATE).is_file() and not packed)
    if saved and not (path / folder.STATE).is_file():
        raise ValueError(
            f"a folder with ModelOpt's quantizers must hold {folder.STATE}, {path} does not: save "
            "it after mto.enable_huggingface_checkpointing()"
        )
    if saved:
        return Restored(torch_file.load(path / folder.STATE), found, str(path))
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "modelopt":
        raise ValueError(
            "a folder to import must hold a quantized UNet, with ModelOpt's quantization_config in "
            f"{folder.CONFIG} or its quantizers among the tensors, {path} has neither: load it "
            "with a stock loader, or quantize it here"
        )
    return Exported(quantization, found, str(path))
