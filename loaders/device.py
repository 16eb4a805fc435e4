"""The facts of the device ComfyUI computes on, for utils/capability.py."""

from __future__ import annotations

from collections.abc import Collection

import comfy.model_management
import comfy_kitchen
import torch

from ..kernels import check
from ..utils import capability
from ..utils.capability import GPU


def describe(device: torch.device, kinds: Collection[str] = check.KINDS) -> GPU:
    """What this device and its software can do.

    kinds: of our Triton kernels ("int8", "fp8"), to try: each runs once, which compiles it if this is
    the first time (seconds). Others are taken to work.
    """
    torch_version = _version(torch.__version__)
    if device.type != "cuda":
        name = {"cpu": "the CPU", "mps": "an Apple GPU"}.get(device.type, device.type)
        return GPU(device.type, name, torch=torch_version)
    if torch.version.hip:
        name = torch.cuda.get_device_name(device) or "an AMD GPU"
        return GPU(device.type, name, torch=torch_version)
    backends = comfy_kitchen.list_backends()
    found = torch.cuda.get_device_capability(device)
    tried = [kind for kind in kinds if found >= capability.OURS[kind]]
    reasons = {kind: check.why_not(device, kind) for kind in tried}
    return GPU(
        "cuda",
        torch.cuda.get_device_name(device),
        found,
        _version(torch.version.cuda),
        frozenset(n for n, b in backends.items() if b["available"] and not b["disabled"]),
        torch_version,
        {kind: reason for kind, reason in reasons.items() if reason},
    )


def current(kinds: Collection[str] = check.KINDS) -> GPU:
    """The device ComfyUI computes on."""
    return describe(comfy.model_management.get_torch_device(), kinds)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))
