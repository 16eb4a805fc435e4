"""The ModelPatcher of a quantized UNet: where stock ComfyUI takes weights out of a MODEL."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ..formats import files


class QuantizedPatcher(ModelPatcher):
    """Keeps ComfyUI's Save and Merge nodes from taking packed weights for ordinary ones."""

    def state_dict_for_saving(
        self, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None
    ):
        """What ModelSave and CheckpointSave write: our loader opens it, LoRAs are baked in."""
        from .unet import to_checkpoint

        others = self.model.state_dict_for_saving(
            {}, clip_state_dict, vae_state_dict, clip_vision_state_dict
        )
        return others | files.for_others_to_save(to_checkpoint(self))

    def get_key_patches(self, filter_prefix=None):
        """Weights for merging into another MODEL; scales are part of a weight, none by itself."""
        everything = super().model_state_dict(filter_prefix)
        quantized = {key.removesuffix(".comfy_quant") for key in everything if "comfy_quant" in key}
        plain = {
            key: tensor
            for key, tensor in everything.items()
            if key.rpartition(".")[0] not in quantized
            or key.rpartition(".")[2] in ("weight", "bias")
        }
        self.model_state_dict = lambda filter_prefix=None: plain  # what the method below looks at
        try:
            return super().get_key_patches(filter_prefix)
        finally:
            del self.model_state_dict
