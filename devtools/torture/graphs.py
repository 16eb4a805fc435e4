"""Workflows that the campaigns queue on real servers, in API format."""

from __future__ import annotations

from typing import Any

SKIP = "input_blocks.*\noutput_blocks.*\nout.2\ntime_embed.*\n*.emb_layers.*"
SAMPLER = {"steps": 2, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
Graph = dict[str, dict[str, Any]]


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def recorded(seed: int = 1, size: int = 64) -> Graph:
    """The checkpoint and a recording of it: MODEL of node 1, CALIBRATION of node `record`."""
    return {
        "1": _node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "positive": _node("CLIPTextEncode", text="a fox", clip=["1", 1]),
        "negative": _node("CLIPTextEncode", text="", clip=["1", 1]),
        "latent": _node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "record": _node(
            "ModelOptRecordCalibration", model=["1", 0], seed=seed, positive=["positive", 0],
            negative=["negative", 0], latent_image=["latent", 0], max_records=2, **SAMPLER,
        ),
    }  # fmt: skip


def quantized(seed: int = 1, skip: str = SKIP) -> Graph:
    """And what is quantized with it: MODEL of node `quantize`."""
    return recorded(seed) | {
        "quantize": _node(
            "ModelOptQuantize", model=["1", 0], calibration=["record", 1], format="fp8",
            **{"format.algorithm": "max", "format.weights": "e4m3"}, layers="linear + conv",
            skip=skip,
        )
    }  # fmt: skip


def saved(seed: int = 1, prefix: str = "unet", skip: str = SKIP) -> Graph:
    """And saved, by node `save`."""
    save = _node("ModelOptSaveUNet", model=["quantize", 0], filename_prefix=prefix)
    return quantized(seed, skip) | {"save": save}


def recording_saved(seed: int = 1) -> Graph:
    save = _node("ModelOptSaveCalibration", calibration=["record", 1], filename_prefix="recording")
    return recorded(seed) | {"save": save}


def auto(seed: int = 1) -> Graph:
    """Auto Quantize, shown by node `show`."""
    allowed = ("int8", "fp8", "int4", "int8_weights", "mxfp8", "nvfp4", "w4a8")
    return recorded(seed) | {
        "auto": _node(
            "ModelOptAutoQuantize", model=["1", 0], calibration=["record", 1],
            target="bits", **{"target.bits": 10.0}, sixteen_bits=True, layers="linear only",
            skip=SKIP, **{name: name == "mxfp8" for name in allowed},
        ),
        "show": _node("PreviewAny", source=["auto", 1]),
    }  # fmt: skip


def compared(seed: int = 1) -> Graph:
    return quantized(seed) | {
        "compare": _node(
            "ModelOptCompare", reference=["1", 0], quantized=["quantize", 0],
            calibration=["record", 1],
        )
    }  # fmt: skip


def loaded(name: str, seed: int = 1) -> Graph:
    """A file loaded and sampled with."""
    graph = recorded(seed)
    del graph["record"]
    return graph | {
        "load": _node("ModelOptLoadUNet", unet_name=name),
        "sample": _node(
            "KSampler", model=["load", 0], seed=seed, positive=["positive", 0],
            negative=["negative", 0], latent_image=["latent", 0], **SAMPLER,
        ),
        "keep": _node("SaveLatent", samples=["sample", 0], filename_prefix=f"latents/{seed}"),
    }  # fmt: skip
