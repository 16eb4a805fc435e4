"""A stranger's file: text in its header that would be HTML is text on the badge, in reports, in errors."""

from __future__ import annotations

import dataclasses
import os

import pytest
from comfyui_modelopt.formats import files
from comfyui_modelopt.quantize.recipe import Recipe

pytestmark = pytest.mark.e2e
EVIL = "<img src=x onerror='window.ran=1'><script>window.ran=1</script>"
RAN = "() => [window.ran ?? null, document.querySelectorAll(\"img[src='x']\").length]"


def evil(what: str) -> str:
    """Text that runs as HTML, and says where it stood."""
    return f"{what}{EVIL}"


def header() -> dict:
    """Every text that a header can hold."""
    return {
        "recipe": {
            "format": evil("form"),
            "algorithm": evil("algorithm"),
            "layers": evil("layers"),
            "alpha": evil("alpha"),
        },
        "source": {"name": evil("source"), "sha256": evil("digest")},
        "calibration": {
            "records": 1,
            "runs": 1,
            "source": evil("recorded"),
            "prompts": [evil("prompt")],
            "resolutions": [evil("size")],
        },
        "versions": {evil("pack"): evil("version")},
        "imported": {"kind": evil("kind"), "notes": [evil("note")]},
        "unet_config": {evil("width"): evil("channels")},
        evil("stranger"): evil("own"),
    }


@pytest.fixture(scope="module")
def server(server, quantized):
    """With such a file, and one whose layers have such a name."""
    folder = server.models / "diffusion_models"
    checkpoint = quantized(Recipe("fp8", "max")).checkpoint
    files.write(dataclasses.replace(checkpoint, header=header()), folder / "evil.safetensors")
    name, layer = next(iter(checkpoint.layers.items()))
    layers = {**checkpoint.layers, evil("layer"): layer}
    tensors = {
        **checkpoint.tensors,
        **{
            f"{evil('layer')}.{leaf}": checkpoint.tensors[f"{name}.{leaf}"]
            for leaf in ("weight", *layer.scales)
        },
    }
    strange = dataclasses.replace(checkpoint, layers=layers, tensors=tensors)
    files.write(strange, folder / "layer.safetensors")
    return server


def wait_shown(page, node: int, name: str, text: str) -> str:
    for _ in range(300):
        shown = page.shown(node, name)
        if text in shown:
            return shown
        page.settle(200)
    raise AssertionError(f"{text!r} is not in {shown!r}")


def test_a_header_is_shown_as_text(page, server):
    # else ComfyUI has all of it in its cache for the second renderer, and tells nothing
    os.utime(server.models / "diffusion_models" / "evil.safetensors")
    load = page.add_by_search("Load Quantized UNet (ModelOpt)")
    about = page.add_by_search("Quantized Model Info", at=(1000, 300))
    page.run("([a, b]) => { app.graph.getNodeById(a).connect(0, app.graph.getNodeById(b), 0); }",
             [load, about])  # fmt: skip
    page.set_widget(load, "unet_name", "evil.safetensors")
    chips = wait_shown(page, load, "modelopt_chips", evil("form"))
    assert evil("layers") in chips
    made_by = page.widgets(load)["made_by"]
    assert all(evil(what) in made_by for what in ("source", "form", "algorithm", "alpha", "layers"))
    page.page.get_by_test_id("queue-button").click()
    report = wait_shown(page, load, "modelopt_report", evil("algorithm"))
    for what in ("source", "digest", "size", "pack", "version", "kind", "note"):
        assert evil(what) in report, what
    told = wait_shown(page, about, "modelopt_report", evil("stranger"))
    assert all(evil(what) in told for what in ("prompt", "recorded", "own", "kind"))
    page.settle(800)
    assert page.run(RAN) == [None, 0]


def test_an_error_is_shown_as_text(page):
    load = page.add_by_search("Load Quantized UNet (ModelOpt)")
    shows = page.add_by_search("Preview as Text", at=(1000, 300))
    page.run("([a, b]) => { app.graph.getNodeById(a).connect(1, app.graph.getNodeById(b), 0); }",
             [load, shows])  # fmt: skip
    page.set_widget(load, "unet_name", "layer.safetensors")
    page.run(
        """() => {
          window.failed = null;
          app.api.addEventListener("execution_error", ({ detail }) =>
            (window.failed = detail.exception_message));
        }"""
    )
    page.page.get_by_test_id("queue-button").click()
    page.wait_for("() => window.failed !== null")
    assert evil("layer") in page.run("() => window.failed")
    page.settle(1500)
    assert page.run(RAN) == [None, 0]
    page.problems.clear()  # the page logs the error
