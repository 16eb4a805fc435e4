"""The ways to run a whole UNet: one row an arm. A new kernel or option is one row of `ARMS`."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import torch

from ...loaders import benchmark as node
from ...loaders import dispatch, unet_inputs
from ...loaders import graphs as replay
from ...loaders import unet as loader
from ...quantize.layers import LINEAR_AND_CONV, LINEAR_ONLY, select
from .settings import Setting

log = logging.getLogger(__name__)
CONV, LINEAR = LINEAR_AND_CONV, LINEAR_ONLY
SUFFIX = {LINEAR: "linear", CONV: "all"}
# torch.compile's modes on a GPU; elsewhere the default one, as there is nothing to tune or capture
NO_GRAPHS, GRAPHS, BOTH = "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"
# not compiled, calls replayed: the Load node's cuda_graphs
REPLAYED = "replayed"
COMPILED_16 = ("compiled", "compiled-graphs", "compiled-tuned-graphs")


class NotMeasured(Exception):
    """Why an arm is not measured here: no failure."""


@dataclass
class Built:
    """call: one UNet call; model: the MODEL, loaded; facts: what the result says of the arm."""

    call: Callable[[], torch.Tensor]
    model: Any
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """name: of the command line; title: of the table; build(setting, folder) -> Built.

    needs: the quantized file, (format, layers), None for the 16-bit one. limit: the row of
    performance.md's table of limits. why_not(device): the reason it is not measured there, or None.
    """

    name: str
    title: str
    build: Callable[[Setting, Path], Built]
    needs: tuple[str, str] | None = None
    limit: str | None = None
    why_not: Callable[[torch.device], str | None] = lambda device: None

    @property
    def sixteen_bits(self) -> bool:
        """Whether it is one of those that the others are compared with."""
        return self.name in ("eager", "channels-last", *COMPILED_16)


def file_of(folder: Path, needs: tuple[str, str] | None) -> Path:
    """The checkpoint of an arm."""
    name = "unet" if needs is None else f"unet_{needs[0]}_{SUFFIX[needs[1]]}"
    return folder / f"{name}.safetensors"


# --- calling a UNet ---


def call_of(model, setting: Setting, unet: Callable | None = None, graphs: bool = False):
    """One call of a MODEL's UNet (or of what stands for it) on the same inputs for every arm."""
    device = model.load_device
    management.load_models_gpu([model])
    inputs = unet_inputs.make(model, setting.pixels, setting.pixels, setting.batch // 2)
    args, kwargs = unet_inputs.direct(model, inputs.to(device))
    unet = model.model.diffusion_model if unet is None else unet

    def call() -> torch.Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        options = {"wrappers": model.wrappers} if model.wrappers else {}
        return unet(*args, transformer_options=options, **kwargs)

    return call


def compiled(model, setting: Setting, mode: str | None) -> Callable:
    """The same compiled for this one shape; `mode` None or REPLAYED: not at all."""
    if mode == REPLAYED:
        replay.use(model)
    if mode in (None, REPLAYED):
        return call_of(model, setting)
    on_gpu = model.load_device.type == "cuda"
    unet = torch.compile(model.model.diffusion_model, mode=mode if on_gpu else None, dynamic=False)
    return call_of(model, setting, unet, graphs=mode in (GRAPHS, BOTH))


def no_gpu(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "no CUDA device"


def no_fp8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no CUDA device"
    found = torch.cuda.get_device_capability(device)
    return None if found >= (8, 9) else f"FP8 needs compute capability 8.9, found {found}"


def missing(package: str, device: torch.device) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


# --- 16 bits ---


def _sixteen(mode: str | None, setting: Setting, folder: Path) -> Built:
    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)))
    return Built(compiled(model, setting, mode), model)


def _channels_last(setting: Setting, folder: Path) -> Built:
    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)))
    # what --force-channels-last does, which is read when a model is built
    model.model.diffusion_model.to(memory_format=torch.channels_last)
    return Built(call_of(model, setting), model)


# --- what ComfyUI and others have ---


def _comfyui_fp8_fast(setting: Setting, folder: Path) -> Built:
    options = {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True}  # as UNETLoader sets them
    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)), model_options=options)
    return Built(call_of(model, setting), model)


def _kitchen_int8(setting: Setting, folder: Path) -> Built:
    """A stock int8_tensorwise file in stock ComfyUI's loader."""
    from .candidates import kitchen_backend

    model = comfy.sd.load_diffusion_model(str(file_of(folder, ("int8", LINEAR))))
    call = call_of(model, setting)
    layers = [m for m in model.model.diffusion_model.modules() if getattr(m, "quant_format", None)]
    if not layers:
        raise RuntimeError("stock ComfyUI loaded no quantized layer from the int8_tensorwise file")
    weight = layers[0].weight
    dtype = model.model.get_dtype_inference()
    x = torch.zeros(64, weight.shape[1], device=model.load_device, dtype=dtype)
    ran = kitchen_backend(x, weight._qdata, weight._params.scale, None, dtype)
    if model.load_device.type == "cuda" and "eager" in ran:
        raise NotMeasured(
            f"{ran} would run, which is plain PyTorch: see the capability of comfy-kitchen"
        )
    return Built(call, model, {"ran": ran, "quantized_layers": len(layers)})


def _mtq_compress(setting: Setting, folder: Path) -> Built:
    """ModelOpt's own FP8 kernels on compressed weights, Linear layers as in `linear only`."""
    from ...quantize import modelopt
    from ...quantize.layers import DEFAULT_SKIP

    mtq = modelopt.require()
    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)))
    call, unet = call_of(model, setting), model.model.diffusion_model
    layers = select(unet, LINEAR, DEFAULT_SKIP)
    modelopt.register(unet, layers)
    entries: list[dict] = [modelopt.OFF]
    for name in layers:
        for which in ("weight", "input"):
            entries.append({"quantizer_name": f"{name}.{which}_quantizer", "cfg": modelopt.E4M3})
    mtq.quantize(unet, {"quant_cfg": entries, "algorithm": "max"}, lambda _: call())
    mtq.compress(unet)
    return Built(call, model, {"quantized_layers": len(layers)})


def _torchao(kind: str, setting: Setting, folder: Path) -> Built:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    from ...quantize.layers import DEFAULT_SKIP

    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)))
    management.load_models_gpu([model])
    unet = model.model.diffusion_model
    layers = select(unet, LINEAR, DEFAULT_SKIP)
    made = {
        "int8": Int8DynamicActivationInt8WeightConfig,
        "fp8": Float8DynamicActivationFloat8WeightConfig,
    }[kind]()
    quantize_(unet, made, filter_fn=lambda module, name: name in layers)
    return Built(compiled(model, setting, NO_GRAPHS), model, {"quantized_layers": len(layers)})


def _sdnq(setting: Setting, folder: Path) -> Built:
    from sdnq import sdnq_post_load_quant

    model = comfy.sd.load_diffusion_model(str(file_of(folder, None)))
    management.load_models_gpu([model])
    options = {"quant_conv": True, "use_quantized_matmul": True, "use_quantized_matmul_conv": True}
    unet = sdnq_post_load_quant(
        model.model.diffusion_model, weights_dtype="int8", add_skip_keys=False, **options
    )
    found = Counter(type(m).__name__ for m in unet.modules() if "SDNQ" in type(m).__name__)
    if not found:
        raise RuntimeError("SDNQ quantized no layer: it does not know ComfyUI's layer classes")
    return Built(call_of(model, setting, unet), model, {"ran": dict(found)})


# --- ours ---


def _ours(
    needs: tuple[str, str], mode: str | None, options: Mapping, setting: Setting, folder: Path
) -> Built:
    """What the Load node gives, options of `loaders.unet.load` included."""
    checkpoint = loader.read(str(file_of(folder, needs)))
    model = loader.load(checkpoint, **options)
    return Built(compiled(model, setting, mode), model, {"kernels": node.layer_lines(model)})


def ours(
    form: str,
    layers: str,
    mode: str | None = None,
    tag: str = "",
    why_not: Callable[[torch.device], str | None] = lambda device: None,
    **options,
) -> Arm:
    """An arm of this pack: format, layers, torch.compile's mode, options of `loaders.unet.load`.

    tag: what tells its name from the others' where options do.
    """
    names = {NO_GRAPHS: ["compiled"], GRAPHS: ["graphs"], REPLAYED: ["replayed"]}
    parts = [form, SUFFIX[layers], *names.get(mode, [])]
    ways = {None: "eager", NO_GRAPHS: "compiled", GRAPHS: "compiled, CUDA graphs"}
    ways[REPLAYED] = "CUDA graphs"
    fused = options.get("fuse", True) and options.get("arithmetic") != dispatch.LIBRARY
    limit = {
        (LINEAR, True): "8-bit Linear, fused",
        (LINEAR, False): "8-bit Linear, separate quantize passes",
        (CONV, True): "8-bit Linear + conv, all fused",
        (CONV, False): "8-bit Linear + conv, separate quantize passes",
    }[layers, fused]
    build = partial(_ours, (form, layers), mode, options)
    return Arm(
        "-".join([*parts, *([tag.replace(" ", "-")] if tag else [])]),
        f"ours {form}, {layers}, {ways[mode]}" + (f", {tag}" if tag else ""),
        build,
        (form, layers),
        limit,
        no_gpu if mode in (GRAPHS, REPLAYED) else why_not,
    )


def parts(form: str) -> tuple[Arm, ...]:
    """Each part switched on in turn; the arms without a tag have all. Without a GPU they are all
    the same. Libraries have no convolution."""
    why_not = no_fp8 if form == "fp8" else no_gpu
    every = {"arithmetic": dispatch.INTEGER}  # whatever the choice table says
    return (
        ours(form, LINEAR, None, "library", why_not, arithmetic=dispatch.LIBRARY),
        *(
            ours(form, layers, mode, "unfused", why_not, fuse=False, **every)
            for layers, mode in ((LINEAR, None), (CONV, None), (CONV, NO_GRAPHS))
        ),
        *(ours(form, layers, None, "all 8-bit", why_not, **every) for layers in (LINEAR, CONV)),
    )


ARMS = (
    Arm("eager", "fp16, eager", partial(_sixteen, None), limit="fp16, eager"),
    Arm("channels-last", "fp16, --force-channels-last", _channels_last, limit="fp16, eager"),
    Arm("compiled", "fp16, compiled", partial(_sixteen, NO_GRAPHS), limit="fp16, compiled"),
    Arm(
        "compiled-graphs",
        "fp16, compiled, CUDA graphs",
        partial(_sixteen, GRAPHS),
        limit="fp16, compiled",
        why_not=no_gpu,
    ),
    Arm(
        "compiled-tuned-graphs",
        "fp16, compiled, tuned, CUDA graphs",
        partial(_sixteen, BOTH),
        limit="fp16, compiled",
        why_not=no_gpu,
    ),
    Arm("comfyui-fp8-fast", "ComfyUI fp8_e4m3fn_fast", _comfyui_fp8_fast, why_not=no_fp8),
    Arm("comfy-kitchen-int8", "comfy-kitchen int8 Linear", _kitchen_int8, ("int8", LINEAR)),
    Arm("mtq-compress-fp8", "mtq.compress FP8 Linear", _mtq_compress),
    Arm(
        "torchao-int8",
        "torchao int8 dynamic, compiled",
        partial(_torchao, "int8"),
        why_not=partial(missing, "torchao"),
    ),
    Arm(
        "torchao-fp8",
        "torchao fp8 dynamic, compiled",
        partial(_torchao, "fp8"),
        why_not=lambda device: missing("torchao", device) or no_fp8(device),
    ),
    Arm("sdnq-int8", "SDNQ int8 matmul + conv", _sdnq, why_not=partial(missing, "sdnq")),
    *(
        ours(form, layers, mode)
        for form in ("int8", "fp8")
        for layers in (LINEAR, CONV)
        for mode in (None, REPLAYED, NO_GRAPHS, GRAPHS)
    ),
    *(arm for form in ("int8", "fp8") for arm in parts(form)),
)


def chosen(names: list[str] | None) -> tuple[Arm, ...]:
    """The arms of these names, in the order of ARMS, "eager" always among them; all for None.

    Raises ValueError for a name that is none.
    """
    if names is None:
        return ARMS
    known = [arm.name for arm in ARMS]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"an arm must be one of {', '.join(known)}, got {', '.join(wrong)}")
    return tuple(arm for arm in ARMS if arm.name in {*names, "eager"})


def weight_bytes(built: Built) -> int:
    """Bytes of the UNet's weights as held; of tensor classes of others, those of what they wrap."""

    def stored(tensor: torch.Tensor) -> int:
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.nbytes
        return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

    return sum(stored(t) for t in built.model.model.diffusion_model.state_dict().values())
