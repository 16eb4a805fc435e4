"""Save Quantized UNet: write a quantized MODEL as one safetensors."""

from __future__ import annotations

from comfy_api.latest import io

from ..formats import files
from ..loaders import unet as loader
from ..utils.progress import progress
from . import folders
from .shown import shown


class SaveUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptSaveUNet",
            display_name="Save Quantized UNet (ModelOpt)",
            category="ModelOpt",
            description="Saves a quantized MODEL as one numbered .safetensors in "
            "models/diffusion_models. LoRAs put on top of it are baked in.",
            inputs=[
                io.Model.Input("model", tooltip="A MODEL quantized or loaded by this pack."),
                io.String.Input(
                    "filename_prefix",
                    default="quantized",
                    tooltip="Name of the file, subfolders and %year%, %month%, %day% allowed. A "
                    "number is added; no file is overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file was written.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """None: the text comes from another node and is not known yet."""
        if filename_prefix is None:
            return True
        return folders.why_not(folders.UNETS, filename_prefix) or True

    @classmethod
    def execute(cls, model, filename_prefix: str) -> io.NodeOutput:
        checkpoint = loader.to_checkpoint(model)
        path = folders.write_new(
            folders.UNETS,
            filename_prefix,
            lambda path: files.write(checkpoint, path, progress(checkpoint.nbytes())),
        )
        return io.NodeOutput(path, ui=shown(path))
