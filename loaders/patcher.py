"""The ModelPatcher of a quantized UNet: where stock ComfyUI takes weights out of a MODEL, and where
it changes them while sampling."""

from __future__ import annotations

import comfy.lora
import comfy.utils
import torch
from comfy.hooks import EnumHookMode
from comfy.model_patcher import ModelPatcher
from comfy_kitchen.tensor import QuantizedTensor

from ..formats import files
from . import graphs, layouts


class QuantizedPatcher(ModelPatcher):
    """Keeps ComfyUI's Save and Merge nodes from taking packed weights for ordinary ones, and scheduled
    LoRAs (weight hooks) from writing into them: a hooked weight takes the place of the original,
    with the LoRA as a branch beside it, and the original comes back afterwards."""

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

    def _settle_backups(self) -> None:
        """Original weights kept outside of inference mode can be put back inside of it; see QuantizedOp."""
        if torch.is_inference_mode_enabled():
            for key, kept in self.backup.items():
                if isinstance(kept.weight, QuantizedTensor):
                    self.backup[key] = kept._replace(weight=layouts.rewrapped(kept.weight))

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        """Takes patches off the weights and brings them to a device."""
        if unpatch_weights:
            graphs.forget(self)
        self._settle_backups()
        return super().unpatch_model(device_to, unpatch_weights)

    def cleanup(self):
        """After sampling."""
        super().cleanup()
        graphs.settle(self)

    def partially_unload(self, *args, **kwargs):
        """The same for a part of them."""
        graphs.forget(self)
        self._settle_backups()
        return super().partially_unload(*args, **kwargs)

    def _quantized(self, key: str) -> bool:
        return isinstance(comfy.utils.get_attr(self.model, key), QuantizedTensor)

    def _put(self, key: str, weight: torch.Tensor) -> None:
        """`weight` in the place of the one at `key`, on its device; that one is kept."""
        device = comfy.utils.get_attr(self.model, key).device
        before = comfy.utils.set_attr_param(self.model, key, weight.to(device=device))
        self.hook_backup.setdefault(key, (before, before.device))

    def patch_hook_weight_to_device(
        self, hooks, combined_patches, key, original_weights, memory_counter
    ):
        """Applies the patches of a group of hooks to one weight."""
        if key not in combined_patches or not self._quantized(key):
            super().patch_hook_weight_to_device(
                hooks, combined_patches, key, original_weights, memory_counter
            )
            return
        base = comfy.utils.get_attr(self.model, key)
        dense = base.to(dtype=torch.float32).dequantize()
        dense = comfy.lora.calculate_weight(
            combined_patches[key], dense, key, original_weights=original_weights
        )
        module = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        seed = comfy.utils.string_to_seed(key)
        weight = module.set_weight(dense, seed=seed, return_weight=True)
        self._put(key, weight)
        if self.hook_mode == EnumHookMode.MaxSpeed:
            fits = memory_counter.use(weight)
            kept = weight if fits else weight.to(device=self.offload_device)
            self.cached_hook_patches.setdefault(hooks, {})[key] = (kept, weight.device)

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        """Applies what `patch_hook_weight_to_device` kept of an earlier step."""
        weight, _ = cached_weights[key]
        if isinstance(weight, QuantizedTensor):
            self._put(key, weight)
        else:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set=None):
        """Puts the original weights back, those of `whitelist_keys_set` only where it names some."""
        with self.use_ejected():
            for key in [key for key in self.hook_backup if self._quantized(key)]:
                if not whitelist_keys_set or key in whitelist_keys_set:
                    # to where the hooked weight is now: ComfyUI moves models while they are hooked
                    self._put(key, self.hook_backup[key][0])
                    del self.hook_backup[key]
            super().unpatch_hooks(whitelist_keys_set)
