"""What a MODEL's UNet call costs on this machine, beside the same weights in 16 bits."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management as management
import comfy.patcher_extension
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..utils import kernel_split, out_of_memory, speed_report, timing
from ..utils.progress import detail, progress
from ..utils.speed_report import Row
from . import dense, device, info, unet, unet_inputs

log = logging.getLogger(__name__)
WARM_UP, ROUNDS = 3, 5
# words of the rows
OWN, EAGER, COMPILED = "this MODEL", "16 bits, eager", "16 bits, compiled"


@dataclass
class Runner:
    """One UNet call of a MODEL as the sampler makes it, patches and wrappers included."""

    model: object
    inputs: unet_inputs.UNetInputs

    def load(self) -> None:
        """Onto the device, as before sampling; ComfyUI unloads others where it must."""
        self.model = self.model.clone()
        required = self.model.model.memory_required(list(self.inputs.x.shape))
        management.load_models_gpu([self.model], memory_required=required)
        self.model.pre_run()
        self.here = self.inputs.to(self.model.load_device)
        options = comfy.patcher_extension.copy_nested_dicts(self.model.model_options)
        self.wrapper = options.get("model_function_wrapper")
        self.options = options.setdefault("transformer_options", {})
        wrappers = self.options.setdefault("wrappers", {})
        comfy.patcher_extension.merge_nested_dicts(wrappers, self.model.wrappers, copy_dict1=False)

    def __call__(self) -> torch.Tensor:
        here, images = self.here, len(self.inputs.x) // 2
        options = dict(self.options, cond_or_uncond=[1, 0], sigmas=here.sigma[:1])
        options["uuids"] = [UNCOND, COND]
        conds = {**here.conds, "transformer_options": options}
        if self.wrapper is None:
            return self.model.model.apply_model(here.x, here.sigma, **conds)
        call = {"input": here.x, "timestep": here.sigma, "c": conds}
        call["cond_or_uncond"] = [1, 0]
        assert len(here.x) == 2 * images
        return self.wrapper(self.model.model.apply_model, call)

    def close(self) -> None:
        """What a sampler does afterwards; the weights stay where ComfyUI wants them."""
        self.model.cleanup()


UNCOND, COND = uuid.uuid4(), uuid.uuid4()


@out_of_memory.explained("benchmarking", out_of_memory.SMALLER)
def run(
    model,
    width: int,
    height: int,
    batch: int,
    repeats: int = 10,
    eager: bool = True,
    compiled: bool = False,
) -> str:
    """The report in words. width, height in pixels; batch in pictures (a UNet call takes twice as
    many, for guidance); repeats: timed calls in each of 5 rounds. The MODEL is not changed.

    eager, compiled: whether to compare with the same weights in 16 bits; of a MODEL that is not
    quantized, `compiled` compares with itself compiled. Raises ValueError for a MODEL that is no UNet of
    SD kind, and ComfyUI's InterruptProcessingException at the UNet call after a cancel.
    """
    inputs = unet_inputs.make(model, width, height, batch)
    quantized = dense.is_quantized(model)
    makers: dict[str, Callable] = {OWN: lambda: model}
    plain = None
    if quantized and (eager or compiled):
        plain = dense.twin(model)
    if quantized and eager:
        makers[EAGER] = lambda: plain
    if compiled:
        makers[COMPILED] = lambda: dense.compiled(plain if quantized else model)
    step = progress(len(makers) * (1 + WARM_UP + ROUNDS * repeats))
    together = _fit_together(model, plain, inputs)
    with torch.no_grad():
        rows, facts = _measure(makers, inputs, repeats, together, step)
    gpu = device.describe(model.load_device)
    kernels = list(unet.kernels(model).values())
    return speed_report.benchmark_report(
        gpu,
        f"{type(model.model.model_config).__name__}, {width} x {height} pixels, "
        f"{batch} picture(s): a UNet call of batch {2 * batch}, with classifier-free guidance",
        rows,
        layer_lines(model),
        speed_report.limits(kernels, gpu, **facts),
        ROUNDS,
        repeats,
        together,
    )


def _fit_together(model, plain, inputs: unet_inputs.UNetInputs) -> bool:
    """Whether both MODELs have room on the device at once; else one is unloaded for the other."""
    if plain is None:
        return True
    needed = model.model_size() + plain.model_size() + management.minimum_inference_memory()
    needed += model.model.memory_required(list(inputs.x.shape))
    management.free_memory(needed, model.load_device)
    return management.get_free_memory(model.load_device) >= needed


def _measure(makers, inputs, repeats: int, together: bool, step) -> tuple[list[Row], dict]:
    """Rows in the order of `makers`, and facts of the MODEL itself for `speed_report.limits`."""
    rows: dict[str, Row] = {}
    facts: dict = {}
    ready: dict[str, Runner] = {}
    samples: dict[str, list[float]] = {}
    where = None
    try:
        for label, make in makers.items():
            if not together:
                _put_away(ready)
            detail(label)
            runner = Runner(make(), inputs)
            try:
                runner.load()
                rows[label] = _first_call(label, runner, step)
            except RuntimeError as error:
                if label != COMPILED:  # torch.compile needs a C compiler or Triton, not everywhere
                    raise
                log.warning("ModelOpt: the compiled comparison failed", exc_info=True)
                rows[label] = Row(label, why_not=speed_report.in_one_line(error))
                continue
            ready[label] = runner
            where = runner.model.load_device
            if label == OWN:
                facts = _facts(runner, where)
            if not together:
                samples |= timing.take_turns({label: runner}, where, WARM_UP, ROUNDS, repeats, step)
        if together:
            detail(f"{ROUNDS} rounds of {repeats} calls, in turn: {', '.join(ready)}")
            samples = timing.take_turns(ready, where, WARM_UP, ROUNDS, repeats, step)
    finally:
        for runner in ready.values():
            runner.close()
    for label, found in samples.items():
        rows[label].timing = timing.summarize(found)
    return list(rows.values()), facts


def _put_away(ready: dict[str, Runner]) -> None:
    for runner in ready.values():
        management.unload_model_and_clones(runner.model)


def _first_call(label: str, runner: Runner, step) -> Row:
    """Warm-up seconds and memory of the first two calls."""
    where = runner.model.load_device
    timing.synchronize(where)
    started = time.perf_counter()
    runner()
    timing.synchronize(where)
    row = Row(label, first_seconds=time.perf_counter() - started)
    step()
    row.weight_bytes = info.weight_bytes(runner.model)
    row.held = _held(runner.model)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        runner()
        timing.synchronize(where)
        row.call_bytes = torch.cuda.max_memory_allocated(where) - before
    return row


def _held(model) -> str:
    """The dtype of most unquantized weights."""
    plain = (
        p for p in model.model.diffusion_model.parameters() if not isinstance(p, QuantizedTensor)
    )
    found = Counter()
    for parameter in plain:
        found[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return found.most_common(1)[0][0] if found else ""


def _facts(runner: Runner, where: torch.device) -> dict:
    """What else bears on the speed of the loaded MODEL."""
    model = runner.model
    parameters = list(model.model.diffusion_model.parameters())
    quantized = [p for p in parameters if isinstance(p, QuantizedTensor)]
    facts: dict = {
        "branches": sum(1 for p in quantized if getattr(p._params, "up", None) is not None),
        "streamed": bool(getattr(model.model, "model_lowvram", False)),
    }
    if where.type == "cuda":
        split = kernel_split.profile(runner, where)
        took = min(timing.time_calls(runner, 3, where))
        facts |= {"busy": split["kernel_ms"] / took, "split_ms": split["split_ms"]}
        facts["launches"] = split["launches"]
    return facts


def layer_lines(model) -> list[str]:
    """Which kernel runs how many layers of which kind, quantized or not."""
    chosen = unet.kernels(model)
    lines = Counter(speed_report.kernel_line(kernel) for kernel in chosen.values())
    for name, module in model.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if name in chosen or not isinstance(weight, torch.Tensor) or weight.ndim not in (2, 4):
            continue
        kind = {2: "Linear", 4: "convolution"}[weight.ndim]
        if isinstance(weight, QuantizedTensor):
            form = getattr(module, "quant_format", None) or "quantized"
            lines[f"{kind} in {form}, by stock ComfyUI"] += 1
        else:
            lines[f"{kind} with {str(weight.dtype).removeprefix('torch.')} weights"] += 1
    return [f"{count} layers: {line}" for line, count in lines.most_common()]
