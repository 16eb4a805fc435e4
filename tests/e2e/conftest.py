"""A real server with the synthetic checkpoint and LoRA in its models folder."""

from __future__ import annotations

import pytest
from comfyui_modelopt.devtools.server import ComfyServer


@pytest.fixture(scope="module")
def server(comfyui, checkpoints, tmp_path_factory):
    """One for all tests of a module."""
    made = ComfyServer(comfyui, tmp_path_factory.mktemp("server"))
    for folder, name in (("checkpoints", "sd15"), ("loras", "lora")):
        (made.models / folder).mkdir(parents=True)
        file = checkpoints / f"{name}.safetensors"
        (made.models / folder / file.name).symlink_to(file)
    with made:
        yield made
