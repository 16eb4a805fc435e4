"""Import ModelOpt Checkpoint: what ModelOpt wrote elsewhere -> MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders import foreign, info
from ..loaders import unet as loader
from ..utils.progress import progress
from . import folders
from .shown import shown


class ImportCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptImport",
            display_name="Import ModelOpt Checkpoint",
            category="ModelOpt",
            description="Loads a UNet that NVIDIA ModelOpt quantized outside ComfyUI: a .pt of "
            "mto.save, or a folder of save_pretrained or export_hf_checkpoint. Save it with Save "
            "Quantized UNet to load it faster from then on.",
            search_aliases=["mto.restore", "import", "TensorRT", "diffusers", "unified checkpoint"],
            inputs=[
                io.Combo.Input(
                    "checkpoint_name",
                    options=folders.checkpoint_names(),
                    tooltip="A .pt file or an exported folder in models/modelopt/checkpoints. "
                    "Nothing in it is executed.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model."),
                io.String.Output(
                    display_name="info", tooltip="Formats, size, kernels, what was left out."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint_name: str) -> str:
        return folders.checkpoint_fingerprint(checkpoint_name)

    @classmethod
    def validate_inputs(cls, checkpoint_name: str | None = None) -> bool | str:
        if checkpoint_name is None:
            return True
        try:
            folders.find_checkpoint(checkpoint_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, checkpoint_name: str) -> io.NodeOutput:
        path = folders.find_checkpoint(checkpoint_name)
        model = loader.load(foreign.read(path, progress), where=path, takes=True)
        text = info.describe(model)
        return io.NodeOutput(model, text, ui=shown(text, model))
