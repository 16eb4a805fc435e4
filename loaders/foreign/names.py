"""Names of a diffusers UNet -> ComfyUI's, through ComfyUI's own table."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import comfy.utils

from ...utils.text import brief

COMFYUI = "input_blocks.0.0.weight"
DIFFUSERS = "conv_in.weight"
# widths of SDXL's vector and its refiner's: pooled text of 1280, and 6 or 5 numbers of 256
TEXT_AND_SIZES = (2816, 2560)
# levels, ResBlocks of a UNet's first half; SDXL's has 6
MOST_BLOCKS = 100
LONGEST = 256
# parts of a name that are looked at: down_blocks.0.attentions.0.transformer_blocks.0.
DEEP = 6


def modules(keys: Collection[str], where: str) -> dict[str, str]:
    """Names of a UNet's weights and biases -> each of its modules' name in ComfyUI's UNet.

    Names that are ComfyUI's already stay. Raises ValueError for another architecture.
    """
    check(keys, where)
    own = {key.rpartition(".")[0] for key in keys}
    if COMFYUI in keys:
        return {name: name for name in own}
    if DIFFUSERS not in keys:
        raise ValueError(
            f"the checkpoint must be of a UNet, with {DIFFUSERS} or {COMFYUI}, {where} holds "
            f"{', '.join(map(brief, sorted(keys)[:3])) or 'nothing'}, …: import the UNet of an SD1.5 or SDXL "
            "pipeline"
        )
    table = {
        theirs.rpartition(".")[0]: ours.rpartition(".")[0]
        for theirs, ours in comfy.utils.unet_to_diffusers(_config(keys, where)).items()
    }
    unknown = sorted(own - table.keys())
    if unknown:
        raise ValueError(
            f"every module must be one that ComfyUI's UNet has, {where} has {len(unknown)} others, "
            f"the first {brief(unknown[0])}: this architecture cannot be imported"
        )
    return {name: table[name] for name in own}


def check(names: Collection[str], where: str) -> None:
    """Raises ValueError for a name that no module of Python has; errors repeat names."""
    strange = [one for one in names if len(one) > LONGEST or not one.isprintable()]
    if strange:
        raise ValueError(
            f"names must be printable and have at most {LONGEST} characters, {where} has "
            f"{brief(strange[0])}: the file is damaged, get it again"
        )


def of_model(model) -> dict[str, str]:
    """diffusers' names of the modules of a MODEL's UNet -> ComfyUI's."""
    own = dict(model.model.diffusion_model.named_modules())
    table = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    pairs = ((a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in table.items())
    # both of diffusers' names stand for ComfyUI's label_emb
    sizes = model.model.model_config.unet_config.get("adm_in_channels") in TEXT_AND_SIZES
    other = "class_embedding." if sizes else "add_embedding."
    return {a: b for a, b in pairs if b in own and not a.startswith(other)}


def _config(keys: Collection[str], where: str) -> dict[str, object]:
    """What ComfyUI's table depends on, counted from the names of a diffusers UNet."""
    parts = (key.split(".") for key in keys)
    starts = {
        ".".join(one[:end]) + "." for one in parts for end in range(1, min(len(one), DEEP + 1))
    }

    def too_many(found: int) -> ValueError:
        return ValueError(
            f"a UNet must have at most {MOST_BLOCKS} blocks and levels, {where} has {found}: this "
            "architecture cannot be imported"
        )

    def count(pattern: str) -> int:
        found = next(i for i in itertools.count() if pattern.format(i) not in starts)
        if found > MOST_BLOCKS:
            raise too_many(found)
        return found

    def depths(block: str, resnets: int) -> list[int]:
        return [count(f"{block}.attentions.{i}.transformer_blocks.{{}}.") for i in range(resnets)]

    levels = range(count("down_blocks.{}."))
    down = [count(f"down_blocks.{i}.resnets.{{}}.") for i in levels]
    if sum(down, len(levels)) > MOST_BLOCKS:
        raise too_many(sum(down, len(levels)))
    up = [d for i in levels for d in depths(f"up_blocks.{i}", down[-1 - i] + 1)]
    return {
        "num_res_blocks": down,
        "channel_mult": list(levels),  # only its length counts
        "transformer_depth": [d for i in levels for d in depths(f"down_blocks.{i}", down[i])],
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": count("mid_block.attentions.0.transformer_blocks.{}."),
    }
