"""ModelOpt for ComfyUI: quantize SDXL and SD1.5 UNets with NVIDIA ModelOpt and run them quantized."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point of a V3 extension."""
    from .nodes import ModelOptExtension

    return ModelOptExtension()
