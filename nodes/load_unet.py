"""Load Quantized UNet: a file of models/diffusion_models -> MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders import graphs, info, stock
from ..loaders import unet as loader
from ..utils.text import brief
from . import folders
from .shown import shown

LONGEST = 2000  # characters of how a file was made, as on its badge


def how_to_make(made_by: object) -> str:
    """What to do about a file that a workflow names and nobody has, "" where it is not known."""
    if not made_by or not isinstance(made_by, str):
        return ""
    return (
        f". The workflow's file was made by: {brief(made_by, LONGEST)}. Quantize that checkpoint the "
        "same way with Quantize UNet (ModelOpt) and save it, or get the file from the workflow's author"
    )


class LoadUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptLoadUNet",
            display_name="Load Quantized UNet (ModelOpt)",
            category="ModelOpt",
            description="Loads a UNet that Save Quantized UNet wrote, or a file quantized in stock "
            "ComfyUI's form. Use it in place of the MODEL "
            "of a checkpoint loader; CLIP and VAE still come from the checkpoint.",
            search_aliases=["int8", "fp8", "load diffusion model", "UNETLoader"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folders.names(folders.UNETS),
                    tooltip="A file of models/diffusion_models.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="torch.compile for the UNet's blocks. The first picture waits for the "
                    "compiler, minutes perhaps. Needs Triton and a C compiler. LoRAs and patches keep working; each "
                    "new kind of them compiles again.",
                ),
                io.String.Input(
                    "made_by",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="How the file was made. The page fills it in, for whoever opens the "
                    "workflow without the file; it changes nothing.",
                ),
                io.Boolean.Input(
                    "cuda_graphs",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Replay UNet calls that come again at one size from a CUDA graph, without the time that "
                    "Python takes: much faster where the GPU waits for it. Holds the VRAM of a UNet call while "
                    "sampling. Calls with patches or offloaded weights run as always. Needs an NVIDIA GPU and ComfyUI started "
                    "with --disable-cuda-malloc.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model."),
                io.String.Output(display_name="info", tooltip="Recipe, size, quality, kernels."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, unet_name: str, compile: bool = False, made_by: str = "", cuda_graphs: bool = True
    ) -> str:
        return f"{folders.fingerprint(folders.UNETS, unet_name)} {compile} {cuda_graphs}"

    @classmethod
    def validate_inputs(
        cls, unet_name: str | None = None, made_by: str | None = None
    ) -> bool | str:
        if unet_name is None:
            return True
        try:
            folders.find(folders.UNETS, unet_name)
        except ValueError as error:
            return f"{error}{how_to_make(made_by)}"
        return True

    @classmethod
    def execute(
        cls, unet_name: str, compile: bool = False, made_by: str = "", cuda_graphs: bool = True
    ) -> io.NodeOutput:
        path = folders.find(folders.UNETS, unet_name)
        if stock.is_stock(path):
            if compile:
                raise ValueError(
                    "compile is for files that this pack saved, "
                    f"{unet_name} is in stock form: put TorchCompileModel behind it"
                )
            model = stock.load(path)
            text = stock.describe(model, path)
        else:
            model = loader.load_file(path, compile, cuda_graphs)
            text = info.describe(model)
            if cuda_graphs:
                text += f"\n{graphs.describe(model)}"
        return io.NodeOutput(model, text, ui=shown(text, model))
