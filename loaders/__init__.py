"""From a quantized checkpoint to a ComfyUI MODEL. Never imports ModelOpt: loading works without it."""
