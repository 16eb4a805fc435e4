"""The only part of `quantize` that knows ComfyUI."""
