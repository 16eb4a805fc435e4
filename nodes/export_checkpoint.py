"""Export ModelOpt Checkpoint: a quantized MODEL -> a file that `mto.restore` takes."""

from __future__ import annotations

import functools
from pathlib import Path

from comfy_api.latest import io

from ..loaders import foreign
from ..loaders import unet as loader
from ..quantize import export
from ..utils.progress import progress
from . import folders
from .shown import shown

EXTENSION = ".pt"


class ExportCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptExport",
            display_name="Export ModelOpt Checkpoint",
            category="ModelOpt",
            description="Writes a quantized MODEL as a .pt for mto.restore of the diffusers UNet, "
            "so that NVIDIA's ONNX and TensorRT scripts take over. LoRAs on top are baked in.",
            search_aliases=["TensorRT", "ONNX", "mto.save", "diffusers"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL quantized or loaded by this pack."),
                io.String.Input(
                    "filename_prefix",
                    default="modelopt",
                    tooltip="Name of the file in models/modelopt/checkpoints, subfolders allowed. "
                    "A number is added; no file is overwritten.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="Where the file was written."),
                io.String.Output(display_name="report", tooltip="What the file does not hold."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        if filename_prefix is None:
            return True
        return folders.why_not(folders.CHECKPOINTS, filename_prefix, EXTENSION) or True

    @classmethod
    def execute(cls, model, filename_prefix: str) -> io.NodeOutput:
        checkpoint = loader.to_checkpoint(model)
        config, names = model.model.model_config.unet_config, foreign.of_model(model)

        @functools.cache
        def made():  # once, also where another process takes the name meanwhile
            return export.quantized_unet(
                checkpoint, config, names, progress(len(checkpoint.layers))
            )

        def write(path: Path) -> None:
            export.save(made()[0], path)

        path = folders.write_new(folders.CHECKPOINTS, filename_prefix, write, EXTENSION)
        report = "\n".join([f"Written to {path}", *made()[1]])
        return io.NodeOutput(path, report, ui=shown(report))
