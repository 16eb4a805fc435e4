"""The drawings: one shape in one colour, as 4-channel latents, and the context that asks for them.

A latent is a fixed linear map of red, green, blue and coverage, so `rgb` gives the picture back.
"""

from __future__ import annotations

import functools
import math

import torch

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.1, 0.2, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "magenta": (1.0, 0.1, 0.9),
    "cyan": (0.1, 0.9, 1.0),
}
CLASSES = len(SHAPES) * len(COLOURS)
EMPTY = -1  # the class of the context without a wish, for classifier-free guidance
TOKENS, WIDTH = 77, 768
PAPER = 0.25  # the background's brightest grey
NOISE = 0.02  # standard deviation of the drawings' noise, where white is 1
POSITION = 0.3  # standard deviation of what tells a token's place, where the words' is 1
SEED = 2024


def name(label: int) -> str:
    """Such as "red disc"; labels go shape by shape, colours within."""
    shape, colour = divmod(label, len(COLOURS))
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}"


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Pixels from a shape's edge, negative inside (y points down)."""
    if shape == "disc":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * r
    if shape == "triangle":
        side = x.abs() * math.sqrt(3) / 2 - y / 2
        return torch.maximum(side, y) - 0.6 * r
    arm = torch.maximum(x.abs() - r, y.abs() - 0.36 * r)
    return torch.minimum(arm, torch.maximum(y.abs() - r, x.abs() - 0.36 * r))


def draw(labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """labels [B] int64 -> red, green, blue, coverage [B, 4, size, size], about 0 to 1.

    Place, size, brightness, background and noise are drawn from the generator.
    """
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand((count, *(shape or (1, 1))), generator=generator)

    r = size * uniform(0.35, 0.45)
    middle = (size - 1) / 2
    room = size / 2 - r
    grid = torch.arange(size, dtype=torch.float32)
    x = grid.view(1, 1, -1) - middle - room * uniform(-1, 1)
    y = grid.view(1, -1, 1) - middle - room * uniform(-1, 1)
    coverage = torch.empty(count, size, size)
    for i, shape in enumerate(SHAPES):
        rows = (labels // len(COLOURS)) == i
        if rows.any():
            distance = _distance(shape, x[rows], y[rows], r[rows])
            coverage[rows] = (0.5 - distance).clamp(0, 1)
    inks = torch.tensor(list(COLOURS.values()))[labels % len(COLOURS)]
    inks = inks * uniform(0.8, 1.0, 1)
    paper = uniform(0, PAPER, 1).expand(-1, 3)
    colours = torch.lerp(paper[..., None, None], inks[..., None, None], coverage[:, None])
    picture = torch.cat([colours, coverage[:, None]], 1)
    return picture + NOISE * torch.randn(picture.shape, generator=generator)


@functools.cache
def _map() -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix [4, 4] and offset [4] that make latents of mean 0 and variance 1 a channel."""
    generator = torch.Generator().manual_seed(SEED)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    labels = torch.randint(CLASSES, (4096,), generator=generator)
    turned = torch.einsum("oc,bchw->bohw", turn, draw(labels, 8, generator))
    mean, deviation = turned.mean((0, 2, 3)), turned.std((0, 2, 3))
    return turn / deviation[:, None], mean / deviation


def latents(labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """labels [B] -> drawings [B, 4, size, size] in the model's own space, unit variance."""
    matrix, offset = _map()
    drawn = draw(labels, size, generator)
    return torch.einsum("oc,bchw->bohw", matrix, drawn) - offset.view(1, 4, 1, 1)


def rgb(latent: torch.Tensor) -> torch.Tensor:
    """Latents [B, 4, H, W] in the model's own space -> pictures [B, 3, H, W], 0 to 1."""
    matrix, offset = _map()
    inverse = torch.linalg.inv(matrix)
    return torch.einsum("co,bohw->bchw", inverse, latent + offset.view(1, 4, 1, 1))[:, :3].clamp(
        0, 1
    )


@functools.cache
def _words() -> tuple[torch.Tensor, ...]:
    """Start and empty token [768], shapes [4, 768], colours [6, 768], places [77, 768]."""
    generator = torch.Generator().manual_seed(SEED + 1)
    counts = (1, 1, len(SHAPES), len(COLOURS), TOKENS)
    start, empty, shapes, colours, places = (
        torch.randn(n, WIDTH, generator=generator) for n in counts
    )
    return start[0], empty[0], shapes, colours, POSITION * places


def context(labels: torch.Tensor) -> torch.Tensor:
    """labels [B], EMPTY among them -> contexts [B, 77, 768].

    A start token, then the shape's and the colour's by turns, as the tokens of a prompt and those
    after its end carry its meaning in CLIP; each with a little of its place.
    """
    start, empty, shapes, colours, places = _words()
    wish = labels >= 0
    asked = labels.clamp(min=0)
    shape = torch.where(wish[:, None], shapes[asked // len(COLOURS)], empty)
    colour = torch.where(wish[:, None], colours[asked % len(COLOURS)], empty)
    body = torch.stack([shape, colour], 1).repeat(1, (TOKENS - 1) // 2, 1)
    return torch.cat([start.expand(len(labels), 1, WIDTH), body], 1) + places
