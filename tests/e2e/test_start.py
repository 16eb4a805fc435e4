"""Starting ComfyUI with the pack: cheap, clean, and possible without ModelOpt."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from comfyui_modelopt.devtools.server import ComfyServer, PromptRejected
from comfyui_modelopt.utils import packages

from .workflows import Graph, generate_workflow, quantize_inputs

pytestmark = pytest.mark.e2e

HEAVY = ("modelopt", "triton", "diffusers", "matplotlib")
NODES = {
    "ModelOptRecordCalibration",
    "ModelOptCalibrationPrompts",
    "ModelOptSaveCalibration",
    "ModelOptLoadCalibration",
    "ModelOptPlan",
    "ModelOptQuantize",
    "ModelOptAutoQuantize",
    "ModelOptSaveUNet",
    "ModelOptLoadUNet",
    "ModelOptImport",
    "ModelOptExport",
    "ModelOptModelInfo",
    "ModelOptCompare",
    "ModelOptBenchmark",
    "ModelOptGPUInfo",
}


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with ComfyServer(comfyui, tmp_path_factory.mktemp("start")) as made:
        yield made


def test_nodes_and_tooltips(server):
    info = server.object_info()
    assert set(info) >= NODES
    for name in NODES:
        node = info[name]
        assert node["description"], name
        assert node["category"] == "ModelOpt"
        assert all(node["output_tooltips"]), name
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        for key, spec in inputs.items():
            assert spec[1].get("tooltip"), f"{name}.{key}"


def test_help_pages_and_translations_are_served(server):
    """Where the page looks for them; it takes an answer of text/html for none."""
    info, opener = server.object_info(), build_opener(ProxyHandler({}))
    for name in NODES:
        pack = info[name]["python_module"].split(".")[1]
        for path in (f"{name}.md", f"{name}/zh.md"):
            with opener.open(f"{server.url}/extensions/{pack}/docs/{path}", timeout=60) as answer:
                assert "text/html" not in answer.headers["Content-Type"]
                assert answer.read().startswith(b"# "), path
    texts = server.get("/i18n")
    for language in ("en", "zh"):
        assert set(texts[language]["nodeDefs"]) >= NODES
        assert "ModelOpt" in texts[language]["nodeCategories"]


def test_the_import_is_reported(server):
    """In ComfyUI's own list of what each custom node's import took."""
    assert re.search(r"[\d.]+ seconds: .*comfyui-modelopt", server.log), server.log[-3000:]
    assert "IMPORT FAILED" not in server.log


def test_gpu_info_shows_this_machine(server):
    result = server.run({"1": {"class_type": "ModelOptGPUInfo", "inputs": {}}}, timeout=60)
    assert result.error is None
    (text,) = result.outputs["1"]["text"]
    assert text.startswith("This machine: ")
    for name in ("int8", "fp8", "mxfp8", "nvfp4", "int4", "w4a8"):
        assert f"\n{name} Linear: " in text
    assert "GeForce RTX 40" in text and "For the smallest file: " in text


def test_no_heavy_import_at_start(comfyui):
    """In a process that imports the pack's nodes as ComfyUI does."""
    tests = Path(__file__).resolve().parent.parent
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest\n"
        "import comfy.sd, nodes, comfy_api.latest\n"
        "before = set(sys.modules)\n"
        "import comfyui_modelopt.nodes\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        f"sys.exit(', '.join(new & set({HEAVY!r})) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tests)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


WITHOUT_MODELOPT = """
import importlib.machinery as machinery

class PathFinder(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("modelopt", "nvidia_modelopt"):
            return None
        return super().find_spec(name, path, target)

import sys
sys.meta_path[sys.meta_path.index(machinery.PathFinder)] = PathFinder
"""


@pytest.fixture(scope="module")
def without_modelopt(comfyui, checkpoints, quantized_file, tmp_path_factory):
    """A server whose Python finds no ModelOpt, with a checkpoint and a quantized file."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(WITHOUT_MODELOPT)
    server = ComfyServer(
        comfyui, tmp_path_factory.mktemp("without"), env={"PYTHONPATH": str(hidden)}
    )
    for folder, file in (
        ("checkpoints", checkpoints / "sd15.safetensors"),
        ("diffusion_models", quantized_file),
    ):
        (server.models / folder).mkdir(parents=True)
        (server.models / folder / file.name).symlink_to(file)
    with server:
        yield server


@pytest.fixture(scope="module")
def quantized_file(sd15, calibration, tmp_path_factory):
    from comfyui_modelopt.formats import files
    from comfyui_modelopt.quantize import engine
    from comfyui_modelopt.quantize.recipe import Recipe

    path = tmp_path_factory.mktemp("quantized") / "unet.safetensors"
    files.write(engine.quantize_model(sd15[0], Recipe("int8", "max"), calibration).checkpoint, path)
    return path


def test_loading_works_without_modelopt(without_modelopt, quantized_file):
    graph = generate_workflow(
        "sd15.safetensors", None, [("x", quantized_file.name)], "ModelOptLoadUNet"
    )
    result = without_modelopt.run(graph.nodes, timeout=600)
    assert result.error is None, result.error
    assert list((without_modelopt.output / "images").glob("x_*.png"))


def test_quantizing_says_what_to_install(without_modelopt):
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    made = graph.add(
        "ModelOptQuantize", model=[loader, 0], **quantize_inputs("int8", "linear only")
    )
    graph.add("PreviewAny", source=[made, 1])
    with pytest.raises(PromptRejected) as refused:  # before anything is recorded
        without_modelopt.run(graph.nodes, timeout=600)
    told = refused.value.explain()
    assert "quantizing needs the package nvidia-modelopt" in told
    assert f'-m pip install -r "{packages.REQUIREMENTS}"' in told
    assert "quantizing needs the package" in without_modelopt.log_file.read_text(encoding="utf-8")
