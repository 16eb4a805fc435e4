"""Listens to the calls of a MODEL's diffusion model while it samples."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..records import Recorder

KEY = "modelopt_record"
OWN = ("context", "y", "control")


class Tap:
    """Gives `recorder` every call of the diffusion model, as its innermost wrapper sees it.

    Models that run no wrappers of their own (SD3's does not) are heard where ComfyUI calls them.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        # ComfyUI's multi-GPU sampling calls from several threads
        self.local = threading.local()

    def put_on(self, model: Any) -> None:
        """Adds the wrappers to a MODEL of our own."""
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._around)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self._innermost)

    def _around(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        self.local.heard = None
        module = executor.class_obj.diffusion_model
        handle = module.register_forward_pre_hook(self._called, with_kwargs=True)
        try:
            output = executor(*args, **kwargs)
        finally:
            handle.remove()
        if self.local.heard is not None:  # no wrapper of the diffusion model took it
            self._record(self.local.heard)
        return output

    def _called(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if len(args) != 2:  # not ComfyUI's own call: the innermost wrapper hears it
            return
        x, timesteps = args
        control = kwargs.get("control")
        if control is not None:  # the model takes entries out of it
            control = {name: list(tensors) for name, tensors in control.items()}
        self.local.heard = {"x": x, "timesteps": timesteps, **kwargs, "control": control}

    def _innermost(self, executor: Callable, *args: Any, **kwargs: Any) -> Any:
        self.local.heard = None
        self._record(_by_name(inspect.signature(executor.original).bind(*args, **kwargs)))
        return executor(*args, **kwargs)

    def _record(self, call: dict[str, Any]) -> None:
        options = call.pop("transformer_options", None) or {}
        first, second = list(call)[:2]  # named x and timesteps, timestep or t
        x, timesteps = call.pop(first), call.pop(second)
        if not isinstance(x, torch.Tensor):  # a list: LTX-Video's sound beside its frames
            raise ValueError(
                f"a recorded call must have one latent, got a {type(x).__name__} in {first}: this "
                "model cannot be recorded"
            )
        own = {name: call.pop(name, None) for name in OWN}
        conds = (*options.get("cond_or_uncond", ()), *options.get("uuids", ()))
        self.recorder.add((conds, x.shape), x, timesteps, **own, kwargs=call)


def _by_name(arguments: inspect.BoundArguments) -> dict[str, Any]:
    """A call's arguments by their names, in order."""
    kinds = arguments.signature.parameters
    found: dict[str, Any] = {}
    for name, value in arguments.arguments.items():
        if kinds[name].kind is inspect.Parameter.VAR_POSITIONAL:
            raise ValueError(
                f"a recorded call must name its arguments, got {len(value)} more by position: "
                "this model cannot be recorded"
            )
        entries = value if kinds[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        assert isinstance(entries, Mapping)
        found |= entries
    return found
