"""Which layers of a diffusion model stay in 16 bits, by the family of the model.

A family is known by the class of ComfyUI's that its models are built from. What stays are the
first and last layers, embedders and modulation: few weights, to which the output is sensitive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .layers import DEFAULT_SKIP, LINEAR_AND_CONV, LINEAR_ONLY
from .recipe import MAX, PERCENTILE, Recipe


@dataclass(frozen=True)
class Family:
    """name: as users know it. skip: patterns of layer names."""

    name: str
    skip: tuple[str, ...]


UNET = Family("UNet", DEFAULT_SKIP)
FLUX = Family(
    "FLUX",
    (
        "img_in",
        "txt_in",
        "time_in.*",
        "vector_in.*",
        "guidance_in.*",
        "*_mod.lin",
        "*modulation*.lin",
        "final_layer.*",
    ),
)
SD3 = Family(
    "SD3",
    (
        "x_embedder.*",
        "t_embedder.*",
        "y_embedder.*",
        "context_embedder",
        "*.adaLN_modulation.*",
        "final_layer.*",
    ),
)
QWEN_IMAGE = Family(
    "Qwen-Image",
    ("img_in", "txt_in", "time_text_embed.*", "*_mod.*", "norm_out.*", "proj_out"),
)
WAN = Family(
    "WAN",
    (
        "patch_embedding*",
        "text_embedding.*",
        "time_embedding.*",
        "time_projection.*",
        "img_emb*",
        "head.*",
        "head_global.*",
        # of its variants: speech, music, animation
        "casual_audio_encoder.*",
        "audio_proj.*",
        "*injector_adain_*",
        "music_projection*",
        "music_encoder.*",
        "face_encoder.*",
    ),
)
# class name -> family; models built from a subclass belong to it too
FAMILIES = {
    "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel": UNET,
    "comfy.ldm.flux.model.Flux": FLUX,
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": SD3,
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": QWEN_IMAGE,
    "comfy.ldm.wan.model.WanModel": WAN,
}


def family_of(model: torch.nn.Module) -> Family | None:
    """The family of a diffusion model, or None for one without a list."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def settle(model: torch.nn.Module, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as it applies to this model, and sentences for the report on what was changed.

    The UNet's default list, which the node shows, gives way to the family's own; what the user
    wrote beside it stays. A list without any of it is the user's alone. Raises ValueError where the
    family has no list, and the user gave none.
    """
    family = family_of(model)
    if family is UNET:
        return recipe, []
    notes = []
    own = tuple(pattern for pattern in recipe.skip if pattern not in DEFAULT_SKIP)
    if family is None and not own:
        linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        raise ValueError(
            "a family of models must have a list of layers that stay in 16 bits, "
            f"{type(model).__name__} has none: write its first and last layers, embedders and "
            f"modulation in skip, one pattern a line (it has {', '.join(_ends(linear))}), or add "
            "the family to quantize/families.py"
        )
    if family is None:
        recipe = replace(recipe, skip=own)
    elif own != recipe.skip:
        recipe = replace(recipe, skip=tuple(dict.fromkeys(family.skip + own)))
        kept = ", ".join(recipe.skip)
        notes.append(f"Layers kept in 16 bits, those of a {family.name} model: {kept}.")
    elif missing := [pattern for pattern in family.skip if pattern not in recipe.skip]:
        notes.append(
            f"The skip list is yours alone; usual for a {family.name} model are also "
            f"{', '.join(missing)}."
        )
    if PERCENTILE in (recipe.algorithm, recipe.convolutions):
        raise ValueError(
            f"{PERCENTILE} is for convolutions, which are quantized in UNets alone, this model is a "
            f"{family.name if family else type(model).__name__}: choose {MAX} instead"
        )
    if recipe.layers == LINEAR_AND_CONV:
        recipe = replace(recipe, layers=LINEAR_ONLY)
        notes.append("Convolutions are quantized in UNets alone: this model was done linear only.")
    return recipe, notes


def _ends(names: list[str]) -> list[str]:
    """The first and the last few."""
    return names if len(names) <= 6 else [*names[:3], "…", *names[-3:]]
