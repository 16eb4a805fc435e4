"""Tile sizes for the matrix kernels: the candidate whose modelled time is least on this GPU.

The model is a count of waves over the multiprocessors, with a relative rate for each tile. It stands
in for measurements; `benchmarks/` is where a GPU's own are taken.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """bm x bn outputs a program, bk of the inner dimension a step; split: programs that share it."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: int = 1


@dataclass(frozen=True)
class Chip:
    """sms: multiprocessors; shared: bytes of shared memory a program may take."""

    capability: tuple[int, int]
    sms: int
    shared: int


# (bm, bn, warps) -> relative rate of a multiprocessor. WIDE: Hopper and data-centre Blackwell, whose
# matrix units read their operands from shared memory; NARROW: the others.
WIDE = {
    (128, 256, 8): 1.0,
    (128, 128, 8): 0.9,
    (128, 64, 4): 0.7,
    (64, 128, 4): 0.7,
    (64, 64, 4): 0.5,
}
NARROW = {(128, 128, 8): 1.0, (128, 64, 4): 0.85, (64, 128, 4): 0.85, (64, 64, 4): 0.65}
# what a program spends besides its products, in products: filling the pipeline, the epilogue
PROGRAM_COST = 128 * 256 * 256
# writing and reading one partial sum again, in products
PARTIAL_COST = 256
SPLITS = (1, 2, 4, 8)
UNKNOWN_SIZE = 2048
LEAST_STEPS = 4  # of the inner dimension a program, when it is split


@functools.cache
def chip(device: torch.device) -> Chip:
    """The facts of a CUDA device; of a device without any (Triton's interpreter) a small one."""
    if device.type != "cuda":
        return Chip((8, 0), 4, 100 * 1024)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Chip((found.major, found.minor), found.multi_processor_count, shared)


def example(size) -> int:
    """A size as a number. While torch.compile traces it may be a symbol, whose present value stands
    for the others: tiles fit any size, some better than others."""
    node = getattr(size, "node", None)
    if node is None:
        return size
    return int(node.hint) if node.hint is not None else UNKNOWN_SIZE


@functools.lru_cache(maxsize=4096)
def choose(
    m: int, n: int, inner: int, on: Chip, taps: int = 1, weights: int = 1, widest: int = 256,
    splits: bool = True,
) -> Tiles:  # fmt: skip
    """Tiles for [m, taps * inner] x [n, taps * inner].

    taps: of a convolution's kernel, each a sum over `inner` channels. weights: tiles of weights a
    program holds at once. widest: the largest bn. splits: whether programs may share a sum.
    """
    wide = on.capability[0] in (9, 10)
    bk = 128 if inner % 128 == 0 or inner % 64 or inner < 64 else 64
    best, least = None, float("inf")
    for (bm, bn, warps), rate in (WIDE if wide else NARROW).items():
        stages = min(4 if wide else 3, on.shared // ((bm + bn) * bk))
        if stages < 2 or bn > widest:
            continue
        tiles = -(-m // bm) * -(-n // (bn // weights))
        steps = taps * -(-inner // bk)
        for split in SPLITS if splits else (1,):
            if split > 1 and (steps < LEAST_STEPS * split or tiles * split > 2 * on.sms):
                continue
            work = -(-steps // split) * bk * bm * bn / rate + PROGRAM_COST
            time = -(-tiles * split // on.sms) * work
            if split > 1:
                time += PARTIAL_COST * split * m * n / on.sms
            if time < least:
                least, best = time, Tiles(bm, bn // weights, bk, warps, stages, split)
    assert best is not None, on  # 64 x 64 fits any chip that runs Triton
    return best
