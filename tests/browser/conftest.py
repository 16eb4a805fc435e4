"""A real Chromium on the page of a real server with the example workflows' files in its folders."""

from __future__ import annotations

import os

import pytest
from comfyui_modelopt.devtools import browser as browsers
from comfyui_modelopt.devtools import gallery
from comfyui_modelopt.devtools.browser import CLASSIC, NODES_2, Browser
from comfyui_modelopt.devtools.server import ComfyServer
from comfyui_modelopt.formats import files
from comfyui_modelopt.quantize.recipe import Recipe

# each renderer in one of the themes
RENDERERS = [(CLASSIC, "dark"), (NODES_2, "light")]


@pytest.fixture(scope="module")
def server(comfyui, checkpoints, quantized, tmp_path_factory):
    """Files the examples name: those that a test runs are real, others empty."""
    made = ComfyServer(comfyui, tmp_path_factory.mktemp("page"))
    gallery.make_files(made)
    real = {
        "checkpoints/v1-5-pruned-emaonly.safetensors": checkpoints / "sd15.safetensors",
        "loras/my_lora.safetensors": checkpoints / "lora.safetensors",
    }
    for place, file in real.items():
        (made.models / place).unlink()
        (made.models / place).symlink_to(file)
    unet = made.models / "diffusion_models" / "sd15_fp8_00001_.safetensors"
    unet.unlink()
    files.write(quantized(Recipe("fp8", "max")).checkpoint, unet)
    with made:
        yield made


@pytest.fixture(scope="module")
def chromium():
    """One for a module: Playwright's event loop must not outlive it, others start their own."""
    path = browsers.find()
    if path is None:
        pytest.skip(os.environ.get(browsers.WHY_NOT) or "no browser: run this by dev.py test")
    with Browser(path) as started:
        yield started


@pytest.fixture(scope="module", params=RENDERERS, ids=lambda one: one[0])
def opened(request, chromium, server):
    renderer, theme = request.param
    with chromium.open(server, renderer=renderer, theme=theme) as page:
        yield page


@pytest.fixture
def page(opened):
    """One with an empty graph, on which nothing may go wrong unseen."""
    opened.clear()
    opened.problems.clear()
    yield opened
    assert opened.problems == []
