"""Any checkpoint that ModelOpt or diffusers wrote of a UNet -> a QuantizedCheckpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...formats.checkpoint import Input, Layer, QuantizedCheckpoint
from . import folder, names, torch_file, unified
from .quantizers import Quantizer, convert, input_of

ATTENTION = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "softmax_quantizer")
ATTENTION += ("bmm2_output_quantizer",)


def read(path: str | Path, step: Callable[[], None] = lambda: None) -> QuantizedCheckpoint:
    """A file of `mto.save`, or a folder of ModelOpt's or diffusers' -> a checkpoint.

    `step` is called after each layer. Nothing in the files is executed. Raises ValueError (rule,
    value, where, remedy) for anything that is not a quantized UNet.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(folder.component(path), step)
    if not path.is_file():
        raise ValueError(f"the checkpoint must exist, {path} does not: correct the name")
    objects = torch_file.load(path)
    if not isinstance(objects, Mapping) or not {"modelopt_state", "model_state_dict"} <= set(
        objects
    ):
        raise ValueError(
            "a checkpoint of mto.save holds modelopt_state and model_state_dict, "
            f"{path} does not: save the quantized UNet with mto.save(unet, file)"
        )
    return _restored(objects["modelopt_state"], objects["model_state_dict"], str(path), step)


def from_module(module: torch.nn.Module) -> QuantizedCheckpoint:
    """A UNet that ModelOpt quantized or restored in this process (`mtq.quantize`, `mto.restore`)
    -> a checkpoint. The module is not changed; for quantization-aware training."""
    import modelopt.torch.opt as mto

    state = mto.modelopt_state(module)
    return _restored(state, module.state_dict(), f"the {type(module).__name__}", lambda: None)


def _of_folder(path: Path, step: Callable[[], None]) -> QuantizedCheckpoint:
    config = folder.config(path)
    found = folder.tensors(path)
    saved = any("_quantizer." in key for key in found)
    if saved and not (path / folder.STATE).is_file():
        raise ValueError(
            f"a folder with ModelOpt's quantizers must hold {folder.STATE}, {path} does not: save "
            "it after mto.enable_huggingface_checkpointing()"
        )
    if saved:
        return _restored(torch_file.load(path / folder.STATE), found, str(path), step)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "modelopt":
        raise ValueError(
            "a folder to import must hold a quantized UNet, with ModelOpt's quantization_config in "
            f"{folder.CONFIG} or its quantizers among the tensors, {path} has neither: load it "
            "with a stock loader, or quantize it here"
        )
    return _exported(quantization, found, str(path), step)


def _exported(quantization: Mapping, tensors, where: str, step) -> QuantizedCheckpoint:
    plain, beside = unified.split(tensors)
    modules = names.modules(plain, where)
    made, layers = _unquantized(plain, modules), {}
    dynamic = _dynamic_activations(quantization)
    for module, extra in beside.items():
        key = f"{module}.weight"
        if key not in plain:
            raise ValueError(f"scales must belong to a weight, {module} in {where} has none")
        name = modules[module]
        stored, layers[name] = unified.layer(name, plain[key], extra, dynamic, where)
        made |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
        step()
    algorithm = str(quantization.get("quant_algo"))
    return _checkpoint(made, layers, "unified export", algorithm, [], quantization, where)


def _dynamic_activations(quantization: Mapping) -> bool:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping):
        return False
    inputs = [g.get("input_activations") for g in groups.values() if isinstance(g, Mapping)]
    return any(isinstance(one, Mapping) and bool(one.get("dynamic")) for one in inputs)


def _restored(saved, state, where: str, step: Callable[[], None]) -> QuantizedCheckpoint:
    """ModelOpt's saved state and the state dict, quantizers' tensors among it -> checkpoint."""
    states, packed, algorithm = _quantizer_states(saved, where)
    if not isinstance(state, Mapping) or not all(
        isinstance(t, torch.Tensor) for t in state.values()
    ):
        raise ValueError(f"model_state_dict must hold tensors only, {where} does not: get it again")
    plain, quantizers = {}, {name: Quantizer(one) for name, one in states.items()}
    for key, tensor in state.items():
        owner = _owner(key, quantizers)
        if owner is None:
            plain[key] = tensor
        else:
            quantizers[owner].tensors[key[len(owner) + 1 :]] = tensor
    modules = names.modules(plain, where)
    made, layers, notes = _unquantized(plain, modules), {}, {}
    norms = _norms(quantizers, modules, where)
    roundings = dict(norms)
    for module, name in modules.items():
        weights = quantizers.get(f"{module}.weight_quantizer")
        if weights is None or f"{module}.weight" not in plain:
            continue
        inputs = quantizers.get(f"{module}.input_quantizer", Quantizer())
        weight = plain[f"{module}.weight"]
        if module in packed:
            weight = _refuse_packed(module, where)
        stored, layer, reason = convert(name, weight, weights, inputs, where)
        made |= {f"{name}.{leaf}": tensor for leaf, tensor in stored.items()}
        if layer is not None:
            layers[name] = layer
        if reason is not None:
            rounding = input_of(inputs)
            rounded = "and inputs " if rounding is not None else ""
            why = f"with weights {rounded}rounded as ModelOpt does but in floating point: {reason}"
            notes.setdefault(why, []).append(name)
            if rounding is not None:
                roundings[name] = rounding
        step()
    sentences = [f"{len(found)} layers {why}: {', '.join(found)}." for why, found in notes.items()]
    sentences += _left_out(quantizers)
    if norms:
        sentences.append(
            f"As in ModelOpt's preset, the inputs of {len(norms)} LayerNorms are rounded."
        )
    made = _checkpoint(made, layers, "ModelOpt's state", algorithm, sentences, saved, where)
    made.inputs.update(roundings)
    return made


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


def _quantizer_states(saved, where: str) -> tuple[dict[str, list[dict]], set[str], str]:
    """Quantizer name -> its states; modules with packed weights; the algorithm's name."""
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
    if not all(isinstance(one, Mapping) for one in states.values()):
        raise wrong
    packed = {name for _, m in metadata for name in m.get("q_tensor_state", {})}
    algorithm = next((mode for mode, _ in reversed(modes) if mode.endswith("_calibrate")), "max")
    found: dict[str, list[dict]] = {}
    for name, state in states.items():
        if state.get("is_sequential_quantizer"):
            count = state.get("num_quantizers")
            members = [states.get(f"{name}.{i}") for i in range(count if type(count) is int else 0)]
            if not members or not all(isinstance(one, Mapping) for one in members):
                raise wrong
            found[name] = [dict(one) for one in members]
        elif name.rpartition(".")[2].endswith("_quantizer"):
            found[name] = [dict(state)]
    return found, packed, algorithm.removesuffix("_calibrate")


def _refuse_packed(module: str, where: str):
    raise ValueError(
        f"weights must be as mtq.quantize leaves them, {module} in {where} was packed by "
        "mtq.compress: save the UNet before mtq.compress, or export it with export_hf_checkpoint"
    )


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


def _unquantized(plain: Mapping[str, torch.Tensor], modules: Mapping[str, str]) -> dict:
    """Tensors under ComfyUI's names."""
    made = {}
    for key, tensor in plain.items():
        module, _, leaf = key.rpartition(".")
        made[f"{modules[module]}.{leaf}"] = tensor
    return made


def _checkpoint(
    tensors: dict[str, torch.Tensor],
    layers: dict[str, Layer],
    kind: str,
    algorithm: str,
    notes: list[str],
    saved: Mapping,
    where: str,
) -> QuantizedCheckpoint:
    if not layers:
        raise ValueError(
            f"at least one layer must have numerics of this pack's formats, {where} has none. "
            + " ".join(notes)
        )
    formats = sorted({layer.format for layer in layers.values()})
    version = saved.get("modelopt_version") or saved.get("producer", {}).get("version")
    header = {
        "recipe": {"format": " and ".join(formats), "algorithm": algorithm, "layers": "imported"},
        "imported": {"kind": kind, "notes": notes},
        "versions": {"modelopt": str(version)} if version else {},
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checkpoint = QuantizedCheckpoint(tensors, layers, header)
    checkpoint.validate(where)
    return checkpoint
