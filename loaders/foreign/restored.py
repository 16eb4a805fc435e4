"""ModelOpt's saved state (`mto.save`, `save_pretrained`, or a module's own) -> a QuantizedCheckpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...formats.checkpoint import INPUTS, Input, QuantizedCheckpoint
from ...utils.finite import JUDGED
from ...utils.text import brief
from . import names
from .assemble import checked, damage_named, header, unquantized
from .quantizers import BEYOND, Quantizer, convert, input_of

# how much more tensors may hold than their bytes in the file
TIED = 2
ATTENTION = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "softmax_quantizer")
ATTENTION += ("bmm2_output_quantizer",)


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
                f"model_state_dict must hold whole tensors only, {where} does not: get it again"
            )
        names.check([*self.states, *state], where)
        _check_aliases(state, where)
        self.plain: dict[str, torch.Tensor] = {}
        self.quantizers = {name: Quantizer(one) for name, one in self.states.items()}
        for key, tensor in state.items():
            owner = _owner(key, self.quantizers)
            if owner is None:
                self.plain[key] = tensor
            else:
                self.quantizers[owner].tensors[key[len(owner) + 1 :]] = tensor
        for name, quantizer in self.quantizers.items():
            _check_belongs(name, self.states[name], quantizer, where)
        self.modules = names.modules(self.plain, where)
        self.steps = len(self.modules)

    def __call__(self, step: Callable[[], None]) -> QuantizedCheckpoint:
        made, layers, notes = unquantized(self.plain, self.modules, self.where), {}, {}
        norms = _norms(self.quantizers, self.modules, self.where)
        inputs = dict(norms)
        for module, name in self.modules.items():
            step()
            weights = self.quantizers.get(f"{module}.weight_quantizer")
            if weights is None or f"{module}.weight" not in self.plain:
                continue
            given = self.quantizers.get(f"{module}.input_quantizer", Quantizer())
            weight = self.plain[f"{module}.weight"]
            with damage_named(module, self.where):
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
        described = header(layers, "ModelOpt's saved state", self.algorithm, sentences)
        return checked(made, layers, described, inputs, self.version, self.where)


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
                f"the input of a norm must be rounded to {', '.join(INPUTS)}, {module} in "
                f"{where} has {' then '.join(one.numerics())}: disable its input_quantizer with "
                "mtq.disable_quantizer and save again"
            )
    return found


def _check_belongs(name: str, states: list[dict], quantizer: Quantizer, where: str) -> None:
    """That a quantizer's tensors are those its state was saved with: state and weights of two
    checkpoints may lie in one folder. A sequence of quantizers is checked by its numerics alone,
    an amax that is gone is named where it is needed."""
    if len(states) != 1 or not quantizer.enabled:
        return
    described = states[0].get("_pytorch_state_metadata")
    buffers = described.get("buffers") if isinstance(described, Mapping) else None
    for leaf in ("_amax", "_pre_quant_scale"):
        if not isinstance(buffers, Mapping) or not isinstance(buffers.get(leaf), Mapping):
            continue
        wanted = _shape(buffers[leaf].get("shape", ()))
        tensor = quantizer.tensors.get(leaf)
        if tensor is None and leaf == "_amax":
            continue
        found = None if tensor is None else tuple(tensor.shape)
        if found != wanted:
            raise ValueError(
                f"{leaf} of {name} must have the shape that ModelOpt's state says, {brief(wanted)}, found "
                f"{'none' if found is None else found} in {where}: state and weights are of two "
                "checkpoints, get the whole folder again"
            )


def _shape(said: object) -> object:
    """As tensors have theirs; what is none, as it is."""
    return tuple(said) if isinstance(said, list | tuple) else said


def _check_aliases(state: Mapping[str, torch.Tensor], where: str) -> None:
    """Tensors that share their bytes are made apart; weights may be tied, not all be the same ones."""
    held = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in state.values()
    }
    made, there = sum(one.nbytes for one in state.values()), sum(held.values())
    if made > TIED * there + 2**20:
        raise ValueError(
            f"model_state_dict must hold whole tensors only, those of {where} share {there} bytes and are "
            f"{made} apart: get it again"
        )


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
    """Whether every value of it lies in the file: one value may be said to fill gigabytes."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    if tensor.is_nested or tensor.dtype not in JUDGED or tensor.is_neg():
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


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
