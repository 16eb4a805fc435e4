"""The facts of the device ComfyUI computes on, for utils/capability.py."""

from __future__ import annotations

import comfy.model_management
import comfy_kitchen
import torch

from ..kernels import check
from ..utils import capability
from ..utils.capability import GPU


def describe(device: torch.device, try_kernels: bool = True) -> GPU:
    """What this device and its software can do.

    try_kernels: run our Triton kernels once, which compiles them if this is the first time (seconds).
    """
    torch_version = _version(torch.__version__)
    if device.type != "cuda" or torch.version.hip:
        name = "AMD GPU" if torch.version.hip else {"cpu": "the CPU"}.get(device.type, device.type)
        return GPU(device.type, name, torch=torch_version)
    backends = comfy_kitchen.list_backends()
    return GPU(
        "cuda",
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        _version(torch.version.cuda),
        frozenset(n for n, b in backends.items() if b["available"] and not b["disabled"]),
        torch_version,
        _why_no_triton(device) if try_kernels else "",
    )


def _why_no_triton(device: torch.device) -> str:
    """Why our kernels do not run on this CUDA device, of the kinds that its capability has."""
    found = torch.cuda.get_device_capability(device)
    kinds = [kind for kind in check.KINDS if found >= capability.OURS[kind]]
    reasons = [check.why_not(device, kind) for kind in kinds]
    return next((reason for reason in reasons if reason), "")


def current(try_kernels: bool = True) -> GPU:
    """The device ComfyUI computes on."""
    return describe(comfy.model_management.get_torch_device(), try_kernels)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))
