"""Import and Export in a real server: ModelOpt's file in, a picture, a file for mto.restore out."""

from __future__ import annotations

import pytest
import torch
from comfyui_modelopt.devtools.server import ComfyServer, PromptRejected
from comfyui_modelopt.loaders import foreign
from safetensors.torch import load_file

from .. import diffusers_unets as unets
from .workflows import SAMPLING, Graph, conditioning, generate_workflow, load_checkpoint

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(comfyui, checkpoints, folders):
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq

    server = ComfyServer(comfyui, folders.mktemp("import"))
    place = server.models / "modelopt" / "checkpoints"
    place.mkdir(parents=True)
    (server.models / "checkpoints").mkdir()
    (server.models / "checkpoints" / "sd15.safetensors").symlink_to(
        checkpoints / "sd15.safetensors"
    )
    unet = unets.make("sd15")
    with torch.no_grad():
        mtq.quantize(unet, mtq.FP8_DEFAULT_CFG, lambda u: unets.run_diffusers(u, "sd15", 0))
    mto.save(unet, place / "mine.pt")
    mto.enable_huggingface_checkpointing()
    unet.save_pretrained(place / "pipe" / "unet")
    (place / "broken.pt").write_bytes((place / "mine.pt").read_bytes()[:5000])
    with server:
        yield server


def latent(server, name: str) -> torch.Tensor:
    (path,) = (server.output / "latents").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


def test_in_save_load_and_out_again(server):
    graph = Graph()
    loader, _, clip = load_checkpoint(graph, "sd15.safetensors", None)
    inputs = conditioning(graph, clip)
    for name in ("mine.pt", "pipe/unet"):
        made = graph.add("ModelOptImport", checkpoint_name=name)
        key = name.partition(".")[0].partition("/")[0]
        graph.add("ModelOptSaveUNet", model=[made, 0], filename_prefix=key)
        graph.add("ModelOptExport", model=[made, 0], filename_prefix=f"out/{key}")
        graph.add("PreviewAny", source=[made, 1])
        sampled = graph.add("KSampler", model=[made, 0], **SAMPLING, **inputs)
        graph.add("SaveLatent", samples=[sampled, 0], filename_prefix=f"latents/{key}")
        image = graph.add("VAEDecode", samples=[sampled, 0], vae=[loader, 2])
        graph.add("SaveImage", images=[image, 0], filename_prefix=f"images/{key}")
    result = server.run(graph.nodes, timeout=600)
    assert result.error is None, result.error
    assert torch.equal(latent(server, "mine"), latent(server, "pipe"))
    assert any(m["max"] > 100 for m in result.of_type("progress"))

    (saved,) = (server.models / "diffusion_models").glob("mine_*.safetensors")
    again = generate_workflow("sd15.safetensors", None, [("again", saved.name)], "ModelOptLoadUNet")
    result = server.run(again.nodes, timeout=600)
    assert result.error is None, result.error
    assert torch.equal(latent(server, "again"), latent(server, "mine"))

    (out,) = (server.models / "modelopt" / "checkpoints" / "out").glob("mine_*.pt")
    first = foreign.read(server.models / "modelopt" / "checkpoints" / "mine.pt")
    assert foreign.read(out).layers.keys() == first.layers.keys()


def test_a_broken_file_is_named_and_the_server_lives(server):
    graph = Graph()
    made = graph.add("ModelOptImport", checkpoint_name="broken.pt")
    graph.add("PreviewAny", source=[made, 1])
    result = server.run(graph.nodes, timeout=120)
    assert "broken.pt is not" in result.error["exception_message"]
    assert server.get("/system_stats")


@pytest.mark.parametrize("name", ["../mine.pt", "nothing.pt", "/etc/passwd", "pipe/../../../x"])
def test_names_stay_in_the_folder(server, name):
    graph = Graph()
    made = graph.add("ModelOptImport", checkpoint_name=name)
    graph.add("PreviewAny", source=[made, 1])
    with pytest.raises(PromptRejected, match="must lie in"):
        server.run(graph.nodes, timeout=120)
