"""What the weights of a UNet do not show: held against the configuration that came with them.

ComfyUI reads a UNet's architecture off its weights, and takes the number of attention heads and the
kind of activation from the family; a UNet that was built otherwise would run, to another picture.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...utils.text import brief

UNET = "UNet2DConditionModel"
# what ComfyUI reads off the weights of every UNet
KNOWN = {"model_channels", "channel_mult", "in_channels", "out_channels", "context_dim"}
# diffusers' name -> what every UNet of ComfyUI's is built with
FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}


def check(config: Mapping, found: Mapping[str, object], where: str) -> None:
    """config: diffusers', found: what ComfyUI reads off the weights. Names that `config` lacks are
    not compared. Raises ValueError (rule, value, where, remedy) for the first that differs."""
    kind = config.get("_class_name", UNET)
    if kind != UNET:
        _fail("the model must be a", UNET, kind, where)
    if not found.keys() >= KNOWN:
        _fail("the model must be a", UNET, "another architecture", where)
    widths = [int(found["model_channels"]) * m for m in found["channel_mult"]]
    wanted = {
        "in_channels": found["in_channels"],
        "out_channels": found["out_channels"],
        "block_out_channels": widths,
        "cross_attention_dim": found["context_dim"],
        **FIXED,
    }
    for name, value in wanted.items():
        given = config.get(name)
        given = list(given) if isinstance(given, (list, tuple)) else given
        if given is not None and given != value:
            _fail(f"{name} must be", value, given, where)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    if heads is None:
        return
    given = list(heads) if isinstance(heads, (list, tuple)) else [heads] * len(widths)
    own = [_heads(width, found) for width in widths]
    kinds = config.get("down_block_types")
    kinds = kinds if isinstance(kinds, (list, tuple)) else []
    with_attention = [i for i, kind in enumerate(kinds[: len(widths)]) if "CrossAttn" in str(kind)]
    if len(given) != len(widths) or any(given[i] != own[i] for i in with_attention):
        _fail("the attention heads of a level must be", own, given, where)


def _heads(width: int, found: Mapping[str, object]) -> int:
    size = found.get("num_head_channels", -1)
    return width // size if size > 0 else found["num_heads"]


def _fail(rule: str, wanted: object, given: object, where: str) -> None:
    raise ValueError(
        f"{rule} {wanted} in ComfyUI's UNet with these weights, the configuration says {brief(given)} in "
        f"{where}: get weights and configuration of the same UNet; another architecture cannot be "
        "imported"
    )
