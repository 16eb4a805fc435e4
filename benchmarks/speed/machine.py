"""What the figures were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform

import comfy_kitchen
import torch

from ...kernels import choices
from ...quantize.engine import versions
from ..file_size import cpu_name

PACKAGES = ("comfy-kitchen", "triton", "torchao", "sdnq")


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict:
    """Machine, versions and date; comfy-kitchen's backends, and which ComfyUI has enabled."""
    on_gpu = torch.cuda.is_available()
    facts = {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **versions(),
        **{name: version(name) for name in PACKAGES},
    }
    backends = comfy_kitchen.list_backends()
    facts["comfy-kitchen backends"] = {
        name: "enabled" if found["available"] and not found["disabled"] else
        found["unavailable_reason"] or "disabled"
        for name, found in backends.items()
    }  # fmt: skip
    return facts


def slug(facts: dict, quick: bool) -> str:
    """For a file's name: nvidia-h200, cpu-amd-epyc_quick."""
    name = facts["gpu"] or f"cpu {facts['cpu']}"
    return choices.slug(name) + ("_quick" if quick else "")
