"""CUDA graphs for a loaded quantized UNet: a call that comes again with the same sizes is replayed,
which costs the time of its kernels and next to nothing of Python's.

The first call at each size runs as always, the second is captured, later ones are replayed. A call runs
as always too where Python would have a say in it (patches, hooks, other packs' wrappers) or its weights
do not lie ready on the GPU. What was captured is dropped when a weight or a layer is another one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from .ops import untouched

log = logging.getLogger(__name__)
KEY = "modelopt_graphs"
# sizes that one MODEL keeps: each holds the memory of a UNet call
KEPT = 4
# calls after which a size may give way to another
RECENT = 32
# of a GPU's memory: with less of it free, nothing is kept from one picture to the next
PLENTY = 1 / 3
# the place of `transformer_options` among the arguments of a UNet
OPTIONS = 5
# of `transformer_options`: what ComfyUI's UNet does not read, or reads nothing from that changes a call
HARMLESS = {
    "block",
    "block_index",
    "callbacks",
    "cond_or_uncond",
    "multigpu_thread_device",
    "original_shape",
    "patches",
    "patches_replace",
    "prefetch_dynamic_vbars",
    "sample_sigmas",
    "sigmas",
    "transformer_index",
    "activations_shape",
    "uuids",
    "wrappers",
}
# functions of ComfyUI and PyTorch that a captured call has run; other packs put theirs in their place
STOCK = (
    (openaimodel.UNetModel, "_forward"),
    (openaimodel.ResBlock, "_forward"),
    (openaimodel.Upsample, "forward"),
    (openaimodel.Downsample, "forward"),
    (openaimodel.TimestepEmbedSequential, "forward"),
    (openaimodel, "forward_timestep_embed"),
    (openaimodel, "apply_control"),
    (openaimodel, "timestep_embedding"),
    (attention.SpatialTransformer, "forward"),
    (attention.BasicTransformerBlock, "forward"),
    (attention.CrossAttention, "forward"),
    (attention.FeedForward, "forward"),
    (attention.GEGLU, "forward"),
    (torch.nn.GroupNorm, "forward"),
    (torch.nn.Conv2d, "_conv_forward"),
)
# where they and the classes of a UNet's layers come from
HOMES = tuple(str(Path(module.__file__).parent) for module in (comfy.ops, torch))
PACKAGES = ("torch.", "comfy.", __package__.rpartition(".")[0] + ".")


def use(model) -> None:
    """Lets a MODEL's UNet calls be captured and replayed; its clones share what was captured."""
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    found = Graphs(model.model.diffusion_model)
    model.model.modelopt_graphs = found
    model.add_wrapper_with_key(kind, KEY, found)


def describe(model) -> str:
    """A line of the Load node's text."""
    reason = unfit(model.load_device)
    if reason is not None:
        return f"CUDA graphs: {reason}. UNet calls run as always"
    return "CUDA graphs: a UNet call that comes again at the same size is replayed"


def unfit(device: torch.device) -> str | None:
    """Why there are no graphs on a device, or None."""
    if device.type != "cuda":
        return f"they need an NVIDIA GPU, the device is {device.type}"
    backend = torch.cuda.get_allocator_backend()
    if backend != "native":
        # it has no pools of memory for graphs; whether it ever gives theirs back was not tried
        return (
            f"they need PyTorch's own allocator, ComfyUI has chosen {backend}: start ComfyUI with "
            "--disable-cuda-malloc"
        )
    return None


def forget(model) -> None:
    """Gives back what was captured, before the weights go elsewhere."""
    found = getattr(model.model, "modelopt_graphs", None)
    if found is not None:
        found.forget()


def settle(model) -> None:
    """After a picture: gives the memory back where little is free, which ComfyUI takes for free memory
    and other models may need. The next picture captures at its first call."""
    found = getattr(model.model, "modelopt_graphs", None)
    if found is not None and found.kept and free_share(model.load_device) < PLENTY:
        found.drop()
        comfy.model_management.soft_empty_cache()


def free_share(device: torch.device) -> float:
    """Of a GPU's memory, by its driver."""
    free, total = torch.cuda.mem_get_info(device)
    return free / total


def captured(call: Callable[[], Tensor], pool) -> tuple[Callable[[], None], Tensor]:
    """Records one call; what replays it, and where its result then lies."""
    graph = torch.cuda.CUDAGraph()
    # other threads of ComfyUI may use the GPU meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = call()
    return graph.replay, out


def new_pool():
    return torch.cuda.graph_pool_handle()


class State:
    """The layers and weights of a UNet as they were: whether they still are is asked at each call, of
    thousands of them."""

    def __init__(self, unet: torch.nn.Module, device: torch.device):
        modules = list(unet.modules())
        self.children = [
            (module._modules, name, child)
            for module in modules
            for name, child in module._modules.items()
        ]
        self.weights = [
            (held, name, tensor)
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]
        found = [tensor for _, _, tensor in self.weights if tensor is not None]
        self.packed = [(t, t._qdata) for t in found if isinstance(t, QuantizedTensor)]
        plain = [t._qdata if isinstance(t, QuantizedTensor) else t for t in found]
        self.places = [(t, t.data_ptr()) for t in plain]
        self.below = [module for module in modules if module is not unet]
        self.convs = [(m, _geometry(m)) for m in modules if isinstance(m, torch.nn.Conv2d)]
        self.foreign = next(
            (type(m) for m in modules if not type(m).__module__.startswith(PACKAGES)), None
        )
        self.offloaded = next((t.device for t in plain if t.device != device), None)

    def still(self) -> bool:
        """Whether every layer and every weight is the same one, at the same place."""
        for parent, name, child in self.children:
            if parent.get(name) is not child:
                return False
        for held, name, tensor in self.weights:
            if held.get(name) is not tensor:
                return False
        for tensor, values in self.packed:
            if tensor._qdata is not values:
                return False
        if any(_geometry(conv) != before for conv, before in self.convs):
            return False
        return all(tensor.data_ptr() == place for tensor, place in self.places)

    def why_not(self) -> str | None:
        """The reason no call of these layers can be captured, or None."""
        if self.offloaded is not None:
            return f"weights are brought to the GPU at each call, some are on {self.offloaded}"
        if self.foreign is not None:
            return f"a layer is another pack's, a {self.foreign.__module__}.{self.foreign.__name__}"
        for module in self.below:
            own = module.__dict__
            replaced = "_forward" in own or "_conv_forward" in own
            odd = "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]
            if replaced or (odd and not untouched(module)):
                return f"a {type(module).__name__} has a hook or a forward that is not its own"
            if own.get("weight_function") or own.get("bias_function"):
                return f"the weight of a {type(module).__name__} is patched at each call"
        return None


def _geometry(conv: torch.nn.Conv2d) -> tuple:
    """What packs for seamless pictures change in place."""
    return conv.padding_mode, conv.padding, conv.stride


@dataclass
class Captured:
    """inputs: where a replay reads from; out: where its result lies; used: the number of the call."""

    inputs: Sequence[Tensor]
    replay: Callable[[], None]
    out: Tensor
    used: int = 0


@dataclass
class Graphs:
    """The wrapper of a UNet's calls (ComfyUI's DIFFUSION_MODEL)."""

    unet: torch.nn.Module
    kept: OrderedDict = field(default_factory=OrderedDict)
    seen: set = field(default_factory=set)
    told: set = field(default_factory=set)
    calls: int = 0
    stopped: str | None = None
    state: State | None = None
    pool: object = None

    def __deepcopy__(self, memo):
        """Clones of a MODEL share its weights, and this."""
        return self

    def __call__(self, executor, *args, **kwargs):
        if torch.compiler.is_compiling() or executor.class_obj is not self.unet:
            return executor(*args, **kwargs)  # a MODEL that was made from this one may call another
        options = args[OPTIONS] if len(args) > OPTIONS else {}
        given = (args[:OPTIONS], kwargs)
        self.calls += 1
        reason = self.stopped or self._why_not(executor, args[0], options)
        if reason is None:
            reason = self._state_why_not(args[0].device)
        if reason is None:
            reason = next(_hindrances(given, args[0].device), None)
        if reason is not None:
            return self._as_always(reason, executor, args, kwargs)
        # what is made in inference mode cannot be written to outside of it
        key = (_described(given), attention.optimized_attention, torch.is_inference_mode_enabled())
        found = self.kept.get(key)
        if found is None and key not in self.seen:
            self.seen.add(key)
            return self._ordinary(executor, args, kwargs)  # compiles kernels, chooses algorithms
        if found is None:
            reason = self._no_room()
            if reason is None:
                found, reason = self._capture(executor, given, options)
            if found is None:
                return self._as_always(reason, executor, args, kwargs)
            self._keep(key, found)
        self.kept.move_to_end(key)
        found.used = self.calls
        comfy.ops.run_every_op()  # a cancel is seen here
        for mine, tensor in zip(found.inputs, _tensors(given), strict=True):
            mine.copy_(tensor)
        found.replay()
        return found.out.clone()

    def drop(self) -> None:
        """Lets go of what was captured, and with it of the memory it holds."""
        self.kept.clear()
        self.pool = None

    def forget(self) -> None:
        """The same, and warms up anew before the next capture."""
        self.drop()
        self.seen.clear()
        self.state = None

    def _why_not(self, executor, x: Tensor, options: Mapping) -> str | None:
        """The reason this call is not one that may be replayed, or None."""
        reason = unfit(x.device)
        if reason is not None:
            return reason
        if getattr(executor.original, "__func__", None) is not openaimodel.UNetModel._forward:
            return "another pack has replaced the UNet's _forward"
        if executor.idx + 1 < len(executor.wrappers):
            return "another wrapper is around the UNet"
        for name in ("patches", "patches_replace"):
            if any(options.get(name, {}).values()):
                return f"the MODEL has {name}: {', '.join(map(str, options[name]))}"
        strange = sorted(str(name) for name in options if name not in HARMLESS)
        if strange:
            return f"transformer_options has {', '.join(strange)}"
        for owner, name in STOCK:
            code = getattr(getattr(owner, name), "__code__", None)
            if code is None or not code.co_filename.startswith(HOMES):
                return f"another pack has replaced {owner.__name__}.{name}"
        return None

    def _state_why_not(self, device: torch.device) -> str | None:
        if self.state is None or not self.state.still():
            self.forget()
            self.state = State(self.unet, device)
        return self.state.why_not()

    def _no_room(self) -> str | None:
        """Why another size is not captured, or None: of more sizes in turn each would push out the next."""
        if len(self.kept) < KEPT:
            return None
        oldest = next(iter(self.kept.values()))
        if self.calls - oldest.used > RECENT:
            return None
        return f"more than {KEPT} sizes take turns"

    def _capture(self, executor, given, options: Mapping) -> tuple[Captured | None, str | None]:
        """The captured call, or None and why."""
        if self.pool is None:
            self.pool = new_pool()
        try:
            args, kwargs = held = _copied(given)
            inputs = list(_tensors(held))  # before the call takes ControlNet's out of their lists
            # a copy: what blocks keep in it for each other must not outlive the capture
            call = (*args, dict(options)) if len(args) == OPTIONS else args
            replay, out = captured(lambda: executor(*call, **kwargs), self.pool)
            return Captured(inputs, replay, out), None
        except torch.OutOfMemoryError:
            self.forget()
            comfy.model_management.soft_empty_cache()
            return None, "memory ran out while one was captured"
        except (
            RuntimeError
        ) as error:  # an operation that no graph can hold: others of its kind follow
            self.pool = None
            self.stopped = f"capturing one failed ({' '.join(str(error).split())[:300]})"
            return None, self.stopped
        except BaseException:  # a cancel; a pool that a capture left half-way is not used again
            self.pool = None
            raise

    def _keep(self, key, found: Captured) -> None:
        self.kept[key] = found
        if len(self.kept) > KEPT:
            oldest, _ = self.kept.popitem(last=False)
            self.seen.discard(oldest)
        size = list(found.inputs[0].shape)
        log.info("ModelOpt: UNet calls at %s are replayed from a CUDA graph from now on", size)

    def _as_always(self, reason: str | None, executor, args, kwargs):
        if reason not in self.told:
            self.told.add(reason)
            log.info("ModelOpt: UNet calls run without a CUDA graph: %s", reason)
        return self._ordinary(executor, args, kwargs)

    def _ordinary(self, executor, args, kwargs):
        """The call itself; once more without graphs where their memory is what it lacks."""
        if not self.kept:
            return executor(*args, **kwargs)
        # the same tensors: the call takes ControlNet's out of their lists
        again, named = _copied((args[:OPTIONS], kwargs), lambda tensor: tensor)
        try:
            return executor(*args, **kwargs)
        except torch.OutOfMemoryError:
            log.info(
                "ModelOpt: memory ran out, CUDA graphs give theirs back and the call is made again"
            )
            self.drop()
            comfy.model_management.soft_empty_cache()
        return executor(*again, *args[OPTIONS:], **named)


def _tensors(value) -> Iterator[Tensor]:
    """All tensors of an argument: ControlNet's are in lists of a dict."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _hindrances(value, device: torch.device) -> Iterator[str]:
    """What of an argument no graph can take anew."""
    if isinstance(value, Tensor):
        if value.device != device:
            yield f"one of the call's tensors is on {value.device}"
        if value.requires_grad:
            yield "a gradient is asked for"
    elif isinstance(value, dict):
        for part in value.values():
            yield from _hindrances(part, device)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _hindrances(part, device)
    elif not isinstance(value, (str, int, float, type(None))):
        yield f"one of the call's arguments is a {type(value).__name__}"


def _copied(value, copy: Callable[[Tensor], Tensor] = Tensor.clone):
    """The same argument with dicts, lists and (by `copy`) tensors of its own."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, dict):
        return {name: _copied(part, copy) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(part, copy) for part in value])
    return value


def _described(value) -> Hashable:
    """What a call's kernels depend on, of one of its arguments."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if isinstance(value, dict):
        return tuple((name, _described(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_described(part) for part in value)
    return value
