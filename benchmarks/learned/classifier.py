"""A small conv net that reads shape and colour off a latent, trained on clean and noised drawings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from . import pictures

STEPS = 400
BATCH = 64
SIZES = (8, 8, 16)  # latent sizes it learns on, taken in turn
NOISE = 0.4  # the most noise added to a drawing, as a standard deviation of latents
RATE = 3e-3
HELD_OUT_SEED = 7_000_000


class Classifier(torch.nn.Module):
    """Latents [B, 4, H, W] -> logits of shapes [B, 4] and of colours [B, 6]."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        convs = (torch.nn.Conv2d(4 if i == 0 else width, width, 3, padding=1) for i in range(3))
        self.convs = torch.nn.ModuleList(convs)
        self.shape = torch.nn.Linear(2 * width, len(pictures.SHAPES))
        self.colour = torch.nn.Linear(2 * width, len(pictures.COLOURS))

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = latents
        for conv in self.convs:
            x = functional.gelu(conv(x))
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return self.shape(x), self.colour(x)


def train(seed: int = 0, steps: int = STEPS) -> Classifier:
    """A classifier trained for `steps` of 64 drawings of its own; the same by seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    with torch.enable_grad():
        for step in range(steps):
            labels = torch.randint(pictures.CLASSES, (BATCH,), generator=generator)
            drawn = pictures.latents(labels, SIZES[step % len(SIZES)], generator)
            amount = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
            noisy = drawn + amount * torch.randn(drawn.shape, generator=generator)
            shape, colour = model(noisy)
            loss = functional.cross_entropy(shape, labels // len(pictures.COLOURS))
            loss = loss + functional.cross_entropy(colour, labels % len(pictures.COLOURS))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def read(model: Classifier, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 4, H, W] in the model's own space -> labels [B]."""
    shape, colour = model(latents.float())
    return shape.argmax(1) * len(pictures.COLOURS) + colour.argmax(1)


def accuracy(model: Classifier, sizes: Sequence[int], count: int = 4800) -> dict[str, float]:
    """Latent size -> share of `count` drawings, none of them learnt on, that it reads right."""
    found = {}
    for size in sizes:
        generator = torch.Generator().manual_seed(HELD_OUT_SEED + size)
        labels = torch.arange(count) % pictures.CLASSES
        right = read(model, pictures.latents(labels, size, generator)) == labels
        found[str(size)] = right.double().mean().item()
    return found
