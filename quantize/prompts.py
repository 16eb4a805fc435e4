"""Prompts to calibrate on: the built-in list, and those found in a user's workflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BUILT_IN = (
    "portrait photo of an old fisherman with a grey beard, weathered skin, soft window light, 85mm",
    "two children laughing on a swing in a garden, golden hour, candid photograph",
    "a red fox standing in deep snow, looking at the camera, wildlife photography",
    "a tabby cat asleep on a stack of books beside a rainy window",
    "wide mountain landscape with a turquoise lake, pine forest, morning mist, high detail",
    "stormy sea under a lighthouse, crashing waves, dramatic clouds, oil painting",
    "a neon lit street in Tokyo at night after rain, reflections, cinematic",
    "macro photo of a dewdrop on a green leaf, shallow depth of field, bokeh",
    'a wooden shop sign that reads "OPEN", brick wall, daylight',
    "anime girl with silver hair and a blue school uniform under cherry blossoms, vibrant colors",
    "still life of lemons and a silver jug on a dark cloth, baroque painting, chiaroscuro",
    "futuristic city with flying cars above glass towers, concept art, sunset, highly detailed",
    "an astronaut riding a white horse on the moon, surreal, starry sky",
    "a bowl of ramen with egg and spring onions, top view, food photography",
    "minimalist flat vector logo of a mountain, two colors, white background",
    "black and white photograph of a jazz musician playing the saxophone in a smoky club",
)


# setting -> its smallest and its largest value
LIMITS: dict[str, tuple[float, float]] = {
    "width": (16, 16384),
    "height": (16, 16384),
    "steps": (1, 10000),
    "cfg": (0.0, 100.0),
    "seed": (0, 2**64 - 1),
    "max_records": (1, 4096),
}
SIZE_STEP = 8
# brackets in brackets of a prompt: ComfyUI reads each pair in a call of its own
DEEPEST = 100


@dataclass(frozen=True)
class Sampling:
    """How prompts are sampled to calibrate on: `quantize.bridge.sampling.record_prompts` has the same
    names. Raises ValueError for what ComfyUI could not sample."""

    negative: str = ""
    width: int = 1024
    height: int = 1024
    steps: int = 20
    cfg: float = 7.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    seed: int = 0
    max_records: int = 64

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}: correct it")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value % SIZE_STEP:
                raise ValueError(
                    f"{name} must be a multiple of {SIZE_STEP} pixels, got {value}: correct it"
                )


def split(text: str) -> list[str]:
    """One prompt a line; blank lines do not count."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def check(text: str, where: object) -> None:
    """Raises ValueError for a line of prompts, which are `where`, that ComfyUI could not read."""
    for number, line in enumerate(text.splitlines(), start=1):
        if (depth := _depth(line)) > DEEPEST:
            raise ValueError(
                f"a prompt must have brackets at most {DEEPEST} deep, line {number} of {where} has "
                f"them {depth} deep: take some out, or write a bracket that is text as \\("
            )


def _depth(line: str) -> int:
    """Of open brackets at once; escaped ones are text."""
    now = deepest = 0
    for letter in line.replace("\\)", " ").replace("\\(", " "):
        if letter == "(":
            now += 1
            deepest = max(deepest, now)
        elif letter == ")":
            now = max(now - 1, 0)
    return deepest


def find(workflow: Mapping[str, Any] | None, node_id: str | None, name: str) -> str | None:
    """The text that an input of a node was encoded from, in a workflow in ComfyUI's API form.

    Follows the conditioning inputs upwards, the first of several, to the first node with a written
    `text`. None where there is none, or where the text is itself computed.
    """
    seen: set[str] = set()
    while workflow and node_id is not None and node_id not in seen:
        seen.add(node_id)
        inputs = workflow.get(node_id, {}).get("inputs", {})
        if isinstance(inputs.get("text"), str):
            return inputs["text"]
        names = (name, "conditioning", "conditioning_1", "conditioning_to")
        links = [inputs[n] for n in names if isinstance(inputs.get(n), list)]
        node_id = str(links[0][0]) if links and links[0] else None
    return None
