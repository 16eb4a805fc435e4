"""Any checkpoint that ModelOpt or diffusers wrote of a UNet -> a QuantizedCheckpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import comfy.utils
import torch

from ...formats import files
from ...formats.checkpoint import Input, Layer, QuantizedCheckpoint
from ...utils import sha256
from . import folder, names, torch_file, unified
from .quantizers import BEYOND, Quantizer, convert, input_of

ATTENTION = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "softmax_quantizer")
ATTENTION += ("bmm2_output_quantizer",)


def read(
    path: str | Path, started: Callable[[int], Callable[[], None]] = lambda total: lambda: None
) -> QuantizedCheckpoint:
    """A file of `mto.save`, or a folder of ModelOpt's or diffusers' -> a checkpoint.

    `started` is called once with the number of steps to come and answers what is called after
    each, which may raise. Nothing in the files is executed. Raises ValueError (rule, value, where,
    remedy) for anything that is not a quantized UNet.
    """
    path = Path(path)
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
    digests = [sha256.of(source, step) for source in sources]
    digest = digests[0] if len(digests) == 1 else sha256.combined(digests)
    checkpoint.header["source"] = {"name": path.name, "sha256": digest}
    return checkpoint


def from_module(module: torch.nn.Module) -> QuantizedCheckpoint:
    """A UNet that ModelOpt quantized or restored in this process (`mtq.quantize`, `mto.restore`)
    -> a checkpoint. The module is not changed; for quantization-aware training."""
    import modelopt.torch.opt as mto

    where = f"the {type(module).__name__}"
    return Restored(mto.modelopt_state(module), module.state_dict(), where)(lambda: None)


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
    files.check_readable(path)
    found, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    if not any(key.endswith(".weight_scale") for key in found):
        raise ValueError(
            f"a .safetensors to import must be ModelOpt's unified export, {path} has no weight with "
            "a weight_scale: name the whole folder if it holds ModelOpt's quantizers, or the .pt of "
            "mto.save"
        )
    try:
        quantization = json.loads((metadata or {}).get("quantization_config", "null"))
    except (ValueError, RecursionError) as error:
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


class Exported:
    """ModelOpt's unified export, checked: `steps` layers to convert, then a call converts them."""

    def __init__(self, quantization: Mapping, tensors: Mapping[str, torch.Tensor], where: str):
        self.quantization, self.where = quantization, where
        self.plain, self.beside = unified.split(tensors)
        self.modules = names.modules(self.plain, where)
        alone = [module for module in self.beside if f"{module}.weight" not in self.plain]
        if alone:
            raise ValueError(
                f"scales must belong to a weight, {alone[0]} in {where} has none: {unified.DAMAGED}"
            )
        self.steps = len(self.beside)

    def __call__(self, step: Callable[[], None]) -> QuantizedCheckpoint:
        made, layers = _unquantized(self.plain, self.modules, self.where), {}
        inputs = _activations(self.quantization)
        dynamic = bool(inputs) and all(one.get("dynamic") is True for one in inputs)
        for module, extra in self.beside.items():
            name, weight = self.modules[module], self.plain[f"{module}.weight"]
            with _damage_named(module, self.where):
                stored, layers[name] = unified.layer(
                    name, weight, extra, dynamic, bool(inputs), self.where
                )
            made |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
            step()
        algorithm = str(self.quantization.get("quant_algo"))
        header = _header(layers, "ModelOpt's unified export", algorithm, [])
        return _checked(made, layers, header, {}, _version(self.quantization), self.where)


def _activations(quantization: Mapping) -> list[Mapping]:
    """What the config's groups say of activations, those that quantize them."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping):
        return []
    inputs = [g.get("input_activations") for g in groups.values() if isinstance(g, Mapping)]
    return [one for one in inputs if isinstance(one, Mapping)]


@contextlib.contextmanager
def _damage_named(module: str, where: str) -> Iterator[None]:
    """Tensors of a shape or kind that no ModelOpt writes fail in the middle of the arithmetic."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"the quantizers of a layer must fit its weight, those of {module} in {where} do not "
            f"({' '.join(str(error).split())[:200]}): the file is damaged, get it again"
        ) from error


class Restored:
    """ModelOpt's saved state and the state dict, quantizers' tensors among it, checked: `steps`
    modules to look at, then a call converts them."""

    def __init__(self, saved, state, where: str):
        self.where = where
        self.states, self.algorithm = _quantizer_states(saved, where)
        self.version = saved.get("modelopt_version")
        if not isinstance(state, Mapping) or not all(
            isinstance(key, str) and _is_dense(t) for key, t in state.items()
        ):
            raise ValueError(
                f"model_state_dict must hold tensors only, {where} does not: get it again"
            )
        self.plain: dict[str, torch.Tensor] = {}
        self.quantizers = {name: Quantizer(one) for name, one in self.states.items()}
        for key, tensor in state.items():
            owner = _owner(key, self.quantizers)
            if owner is None:
                self.plain[key] = tensor
            else:
                self.quantizers[owner].tensors[key[len(owner) + 1 :]] = tensor
        self.modules = names.modules(self.plain, where)
        self.steps = len(self.modules)

    def __call__(self, step: Callable[[], None]) -> QuantizedCheckpoint:
        made, layers, notes = _unquantized(self.plain, self.modules, self.where), {}, {}
        norms = _norms(self.quantizers, self.modules, self.where)
        inputs = dict(norms)
        for module, name in self.modules.items():
            step()
            weights = self.quantizers.get(f"{module}.weight_quantizer")
            if weights is None or f"{module}.weight" not in self.plain:
                continue
            given = self.quantizers.get(f"{module}.input_quantizer", Quantizer())
            weight = self.plain[f"{module}.weight"]
            with _damage_named(module, self.where):
                stored, layer, reason = convert(name, weight, weights, given, self.where)
            made |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
            if layer is not None:
                layers[name] = layer
            if reason is not None:
                rounding = input_of(given)
                what = "weights and inputs" if rounding is not None else "weights"
                why = f"with {what} rounded as ModelOpt does but in floating point"
                if rounding is None and given.enabled:
                    why += ", inputs not rounded"
                why += f": {reason}"
                notes.setdefault(why, []).append(name)
                if rounding is not None:
                    inputs[name] = rounding
        sentences = [
            f"{len(found)} layers {why}: {', '.join(found)}." for why, found in notes.items()
        ]
        if norms:
            sentences.append(
                f"As in ModelOpt's preset, the inputs of {len(norms)} LayerNorms are rounded."
            )
        sentences += _left_out(self.quantizers)
        header = _header(layers, "ModelOpt's saved state", self.algorithm, sentences)
        return _checked(made, layers, header, inputs, self.version, self.where)


def _norms(
    quantizers: Mapping[str, Quantizer], modules: Mapping[str, str], where: str
) -> dict[str, Input]:
    """LayerNorms whose input ModelOpt rounds: a module with an input quantizer and no other."""
    found = {}
    for module, name in modules.items():
        one = quantizers.get(f"{module}.input_quantizer")
        if one is None or not one.enabled or f"{module}.weight_quantizer" in quantizers:
            continue
        found[name] = input_of(one)
        if found[name] is None:
            raise ValueError(
                f"the input of a norm must be rounded to int8 or fp8 with one amax, {module} in "
                f"{where} has {' then '.join(one.numerics())}: disable its input_quantizer with "
                "mtq.disable_quantizer and save again"
            )
    return found


def _owner(key: str, quantizers: Mapping[str, Quantizer]) -> str | None:
    """The quantizer that a tensor of the state dict belongs to."""
    parts = key.split(".")
    for end, part in enumerate(parts, start=1):
        if part.endswith("_quantizer"):
            owner = ".".join(parts[:end])
            return owner if owner in quantizers else None
    return None


def _quantizer_states(saved, where: str) -> tuple[dict[str, list[dict]], str]:
    """Quantizer name -> its states; the algorithm's name."""
    wrong = ValueError(
        f"ModelOpt's state must be a list of modes with the quantizers' state, {where} has another "
        "form: the file is damaged, or of a ModelOpt that this pack does not know"
    )
    try:
        modes = [(str(mode), dict(content)) for mode, content in saved["modelopt_state_dict"]]
        metadata = [(mode, dict(content["metadata"])) for mode, content in modes]
    except (KeyError, TypeError, ValueError) as error:
        raise wrong from error
    states = next(
        (m["quantizer_state"] for _, m in reversed(metadata) if "quantizer_state" in m), None
    )
    if not metadata or not isinstance(states, Mapping):
        raise ValueError(
            f"the checkpoint must be quantized, {where} was saved without quantizers: quantize it "
            "with mtq.quantize first, or here"
        )
    if not all(isinstance(n, str) and _is_state(one) for n, one in states.items()):
        raise wrong
    algorithm = next((mode for mode, _ in reversed(modes) if mode.endswith("_calibrate")), "max")
    found: dict[str, list[dict]] = {}
    for name, state in states.items():
        if state.get("is_sequential_quantizer"):
            count = state.get("num_quantizers")
            if type(count) is not int or not 0 < count <= len(states):
                raise wrong
            members = [states.get(f"{name}.{i}") for i in range(count)]
            if not all(isinstance(one, Mapping) for one in members):
                raise wrong
            found[name] = [dict(one) for one in members]
        elif name.rpartition(".")[2].endswith("_quantizer"):
            found[name] = [dict(state)]
    return found, algorithm.removesuffix("_calibrate")


def _is_dense(tensor) -> bool:
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return plain and not tensor.is_meta


def _is_state(state) -> bool:
    """Whether what decides a quantizer's numerics is plain data."""
    if not isinstance(state, Mapping):
        return False
    scalar = (int, float, str, bool, type(None))
    for key in ("_num_bits", "_axis", "_disabled", "_dynamic", *BEYOND):
        value = state.get(key)
        if isinstance(value, (tuple, list)):
            value = list(value)
        elif not isinstance(value, Mapping) or key in ("_num_bits", "_axis"):
            value = [value]
        if not isinstance(value, Mapping) and not all(isinstance(x, scalar) for x in value):
            return False
    return isinstance(state.get("_block_sizes"), (Mapping, type(None)))


def _left_out(quantizers: Mapping[str, Quantizer]) -> list[str]:
    """What else the checkpoint quantizes and ComfyUI's UNet does not."""
    attention = {
        name.rpartition(".")[0]
        for name, one in quantizers.items()
        if one.enabled and name.endswith(ATTENTION)
    }
    outputs = [
        n for n, one in quantizers.items() if one.enabled and n.endswith(".output_quantizer")
    ]
    sentences = []
    if attention:
        sentences.append(
            f"Left out: the quantization of attention's own products, in {len(attention)} layers."
        )
    if outputs:
        sentences.append(f"Left out: the quantization of outputs, in {len(outputs)} layers.")
    return sentences


def _unquantized(
    plain: Mapping[str, torch.Tensor], modules: Mapping[str, str], where: str
) -> dict[str, torch.Tensor]:
    """Tensors under ComfyUI's names. Raises ValueError for NaN."""
    made = {}
    for key, tensor in plain.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(
                f"weights must be finite, {key} in {where} holds NaN or infinity: the file is "
                "damaged, get it again"
            )
        module, _, leaf = key.rpartition(".")
        made[f"{modules[module]}.{leaf}"] = tensor
    return made


def _version(quantization: Mapping) -> object:
    producer = quantization.get("producer")
    return producer.get("version") if isinstance(producer, Mapping) else None


def _header(layers: Mapping[str, Layer], kind: str, algorithm: str, notes: list[str]) -> dict:
    formats = sorted({layer.format for layer in layers.values()})
    return {
        "recipe": {"format": " and ".join(formats), "algorithm": algorithm, "layers": "imported"},
        "imported": {"kind": kind, "notes": notes},
    }


def _checked(
    tensors: dict[str, torch.Tensor],
    layers: dict[str, Layer],
    header: dict,
    inputs: dict[str, Input],
    version: object,
    where: str,
) -> QuantizedCheckpoint:
    if not layers:
        raise ValueError(
            f"at least one layer must have numerics of this pack's formats, {where} has none: "
            f"quantize it here instead. {' '.join(header['imported']['notes'])}"
        )
    header["versions"] = {"modelopt": str(version)} if version else {}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checkpoint = QuantizedCheckpoint(tensors, layers, header, inputs)
    checkpoint.validate(where)
    return checkpoint
