"""API-format workflows of the end-to-end tests, built node by node."""

from __future__ import annotations

import threading
from typing import Any

from comfyui_modelopt.devtools.server import ComfyServer, Result

SKIP = "input_blocks.0.0\nout.2\ntime_embed.*\nlabel_emb.*\n*.emb_layers.*\n*.skip_connection"


class Graph:
    """Collects nodes; `add` gives the id, `out(id, i)` a link to its i-th output."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        key = str(len(self.nodes) + 1)
        self.nodes[key] = {"class_type": class_type, "inputs": inputs}
        return key

    @staticmethod
    def out(key: str, index: int = 0) -> list:
        return [key, index]


SAMPLING = {"seed": 7, "steps": 4, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal"}


def load_checkpoint(graph: Graph, checkpoint: str, lora: str | None) -> tuple[str, list, list]:
    """The loader's id and links to MODEL and CLIP, with a LoRA on both where one is named."""
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    if lora is None:
        return loader, [loader, 0], [loader, 1]
    with_lora = graph.add(
        "LoraLoader",
        model=[loader, 0],
        clip=[loader, 1],
        lora_name=lora,
        strength_model=0.8,
        strength_clip=0.8,
    )
    return loader, [with_lora, 0], [with_lora, 1]


def conditioning(graph: Graph, clip: list, size: int = 64) -> dict[str, Any]:
    """positive, negative, latent_image and denoise inputs of a sampler."""
    positive = graph.add("CLIPTextEncode", text="a red fox in the snow", clip=clip)
    negative = graph.add("CLIPTextEncode", text="blurry", clip=clip)
    latent = graph.add("EmptyLatentImage", width=size, height=size, batch_size=1)
    return {
        "positive": [positive, 0],
        "negative": [negative, 0],
        "latent_image": [latent, 0],
        "denoise": 1.0,
    }


def recorded(graph: Graph, max_records: int = 8) -> dict[str, list]:
    """The synthetic checkpoint and a recording of it: inputs model and calibration."""
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    inputs = conditioning(graph, [loader, 1])
    record = graph.add(
        "ModelOptRecordCalibration",
        model=[loader, 0],
        **SAMPLING,
        **inputs,
        max_records=max_records,
    )
    return {"model": [loader, 0], "calibration": [record, 1]}


def quantize_inputs(format_name: str, layers: str, algorithm: str = "max", **more: Any) -> dict:
    inputs = {
        "format": format_name,
        "format.algorithm": algorithm,
        "layers": layers,
        "skip": SKIP,
    }
    for option in ("alpha", "percentile", "rank"):
        if option in more:
            inputs[f"format.algorithm.{option}"] = more.pop(option)
    if "weights" in more:
        inputs["format.weights"] = more.pop("weights")
    return inputs | more


def quantize_workflow(checkpoint: str, lora: str, variants: list[tuple[str, dict]]) -> Graph:
    """CheckpointLoaderSimple → LoRA → CLIPTextEncode → Record → Quantize → Save, for each variant.

    Latents out of KSampler, Record and of each quantized MODEL are saved as `latents/<name>`.
    """
    graph = Graph()
    _, model, clip = load_checkpoint(graph, checkpoint, lora)
    inputs = conditioning(graph, clip)
    sampled = graph.add("KSampler", model=model, **SAMPLING, **inputs)
    graph.add("SaveLatent", samples=[sampled, 0], filename_prefix="latents/ksampler")
    record = graph.add(
        "ModelOptRecordCalibration",
        model=model,
        **SAMPLING,
        **inputs,
        max_records=8,
    )
    graph.add("SaveLatent", samples=[record, 0], filename_prefix="latents/record")
    for name, options in variants:
        quantize = graph.add("ModelOptQuantize", model=model, calibration=[record, 1], **options)
        graph.add("ModelOptSaveUNet", model=[quantize, 0], filename_prefix=name)
        again = graph.add("KSampler", model=[quantize, 0], **SAMPLING, **inputs)
        graph.add("SaveLatent", samples=[again, 0], filename_prefix=f"latents/{name}")
    return graph


def generate_workflow(
    checkpoint: str, lora: str | None, unets: list[tuple[str, str]], loader_node: str
) -> Graph:
    """Load → KSampler → SaveLatent, VAEDecode → SaveImage for each (name, file)."""
    graph = Graph()
    loader, _, clip = load_checkpoint(graph, checkpoint, lora)
    inputs = conditioning(graph, clip)
    for name, file in unets:
        extra = {"weight_dtype": "default"} if loader_node == "UNETLoader" else {}
        unet = graph.add(loader_node, unet_name=file, **extra)
        sampled = graph.add("KSampler", model=[unet, 0], **SAMPLING, **inputs)
        graph.add("SaveLatent", samples=[sampled, 0], filename_prefix=f"latents/{name}")
        image = graph.add("VAEDecode", samples=[sampled, 0], vae=[loader, 2])
        graph.add("SaveImage", images=[image, 0], filename_prefix=f"images/{name}")
    return graph


def cancelled_at(server: ComfyServer, nodes: dict, node: str, timeout: float = 600) -> Result:
    """Runs a workflow, the user cancelling at the first progress of a node."""
    stopped = threading.Event()

    def on_message(event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event["type"] == "progress" and data.get("node") == node and not stopped.is_set():
            stopped.set()
            server.interrupt()

    result = server.run(nodes, timeout=timeout, on_message=on_message)
    assert stopped.is_set(), "the node showed no progress"
    return result
