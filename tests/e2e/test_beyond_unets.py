"""A FLUX model in real servers: recorded, quantized with `max`, saved, reloaded in a
second server, and opened in a third without the pack."""

import pytest
import torch
from comfyui_modelopt.devtools import synthetic
from comfyui_modelopt.devtools.server import ComfyServer
from safetensors.torch import load_file

from .. import families
from .workflows import SAMPLING, SKIP, Graph, conditioning

pytestmark = pytest.mark.e2e
FORMATS = ("fp8", "nvfp4")


@pytest.fixture(scope="module")
def servers(comfyui, folders):
    folder = folders.mktemp("beyond")
    found = [
        ComfyServer(comfyui, folder / name, pack=name != "stock") for name in ("a", "b", "stock")
    ]
    synthetic.sd15(folder / "encoder.safetensors")
    families.write("flux", folder / "flux.safetensors")
    for server in found:
        for kind, name in (("checkpoints", "encoder"), ("diffusion_models", "flux")):
            (server.models / kind).mkdir(parents=True, exist_ok=True)
            (server.models / kind / f"{name}.safetensors").symlink_to(
                folder / f"{name}.safetensors"
            )
    return found


def begin() -> tuple[Graph, dict]:
    graph = Graph()
    encoder = graph.add("CheckpointLoaderSimple", ckpt_name="encoder.safetensors")
    return graph, conditioning(graph, [encoder, 1])


def quantize(server: ComfyServer) -> dict:
    graph, inputs = begin()
    unet = graph.add("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
    record = graph.add(
        "ModelOptRecordCalibration", model=[unet, 0], **SAMPLING, **inputs, max_records=8
    )
    for form in FORMATS:
        made = graph.add(
            "ModelOptQuantize",
            model=[unet, 0],
            calibration=[record, 1],
            **{"format": form, "format.algorithm": "max"},
            layers="linear + conv",
            skip=SKIP,
        )
        graph.add("ModelOptSaveUNet", model=[made, 0], filename_prefix=form)
        sampled = graph.add("KSampler", model=[made, 0], **SAMPLING, **inputs)
        graph.add("SaveLatent", samples=[sampled, 0], filename_prefix=f"latents/{form}")
    with server:
        return server.run(graph.nodes, timeout=600)


def generate(server: ComfyServer, files, node: str):
    graph, inputs = begin()
    for form, path in files.items():
        (server.models / "diffusion_models" / path.name).symlink_to(path)
        extra = {"weight_dtype": "default"} if node == "UNETLoader" else {}
        unet = graph.add(node, unet_name=path.name, **extra)
        sampled = graph.add("KSampler", model=[unet, 0], **SAMPLING, **inputs)
        graph.add("SaveLatent", samples=[sampled, 0], filename_prefix=f"latents/{form}")
    with server:
        return server.run(graph.nodes, timeout=600)


def latent(server: ComfyServer, form: str) -> torch.Tensor:
    (path,) = (server.output / "latents").glob(f"{form}_*.latent")
    return load_file(path)["latent_tensor"]


def test_flux_the_whole_way(servers):
    first, second, stock = servers
    made = quantize(first)
    assert made.error is None, made.error
    reports = [out["text"][0] for out in made.outputs.values() if "modelopt" in out]
    assert len(reports) == len(FORMATS)
    assert all("those of a FLUX model" in text and "linear only" in text for text in reports)
    folder = first.models / "diffusion_models"
    files = {form: next(folder.glob(f"{form}_0*.safetensors")) for form in FORMATS}
    for server, node in ((second, "ModelOptLoadUNet"), (stock, "UNETLoader")):
        done = generate(server, files, node)
        assert done.error is None, done.error
        for form in FORMATS:
            assert torch.equal(latent(server, form), latent(first, form))
    assert latent(first, "fp8").std() > 0.01
