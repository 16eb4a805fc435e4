"""Tile sizes for the matrix kernels: the candidate whose modelled time is least on this GPU.

On GPUs of a generation that was measured (`MEASURED`) the model is fitted to those times; on others it
is a count of waves over the multiprocessors, with a relative rate for each tile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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


# kernel -> (bm, bn, bk, warps, stages) -> microseconds a launch, a program and a step of the inner
# dimension in it, where a multiprocessor runs its programs one after another. Fitted by
# benchmarks/tiles.py to its times of SDXL's and SD1.5's layers on an H200. Two programs of at most 3
# stages share a multiprocessor: one stores its tile while the other multiplies.
HOPPER = {
    "matmul": {
        (64, 64, 128, 4, 4): (3.31, 0.71, 0.139),
        (64, 128, 128, 4, 4): (2.97, 1.34, 0.196),
        (128, 128, 128, 8, 3): (3.39, 2.12, 0.282),
        (128, 128, 64, 4, 4): (0.0, 0.0, 0.615),
        (64, 128, 64, 4, 4): (0.0, 0.0, 0.318),
    },
    "geglu int8": {
        (64, 128, 128, 4, 4): (2.84, 1.84, 0.229),
        (128, 128, 128, 8, 3): (0.79, 3.83, 0.528),
        (128, 256, 128, 8, 4): (0.60, 7.0, 0.854),
        (64, 128, 64, 4, 4): (0.0, 0.0, 0.415),
        (128, 128, 64, 4, 4): (0.0, 0.0, 0.824),
    },
    "geglu fp8": {
        (64, 128, 128, 4, 4): (2.99, 1.78, 0.205),
        (128, 128, 128, 8, 3): (2.89, 2.87, 0.329),
        (128, 256, 128, 8, 4): (0.36, 6.83, 0.634),
        (64, 128, 64, 4, 4): (0.0, 0.0, 0.378),
        (128, 128, 64, 8, 3): (0.0, 0.0, 0.745),
    },
    "conv2d": {
        (64, 64, 64, 4, 4): (5.30, 0.19, 0.126),
        (64, 64, 128, 4, 4): (4.53, 0.54, 0.213),
        (64, 128, 64, 4, 4): (6.43, 0.0, 0.188),
        (64, 128, 128, 4, 4): (5.46, 0.0, 0.351),
        (128, 128, 64, 4, 4): (1.31, 1.36, 0.321),
        (128, 128, 128, 8, 3): (8.05, 0.0, 0.573),
        (128, 256, 128, 8, 4): (1.52, 6.81, 1.042),
    },
}
# the first number of the compute capability -> what was measured there
MEASURED = {9: HOPPER}
# microseconds for a million partial sums, there; between what the fits of single tiles gave (0 to 3.5)
PARTIAL_US = 3.0
# the same of the kernels that TMA feeds (hopper.py), fitted by benchmarks/tma.py to its times
TMA = {
    "matmul": {
        (128, 128, 128, 4, 3): (2.09, 1.79, 0.314),
    },
    "conv2d int8": {
        (128, 128, 128, 4, 3): (6.67, 1.44, 0.371),
        (128, 128, 128, 8, 3): (6.72, 0.95, 0.387),
        (256, 128, 128, 8, 4): (2.55, 3.85, 0.792),
    },
    "conv2d fp8": {
        (128, 128, 128, 8, 3): (3.72, 0.61, 0.419),
        (256, 128, 128, 8, 4): (1.37, 1.83, 0.712),
    },
}
# GEGLU's, of one product of twice its columns, the fastest of every layer timed
TMA_GEGLU = Tiles(128, 64, 128, 4, 3)
TMA_SPLITS = (1, 2, 3, 4, 6, 9)
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


def kernel_name(integer: bool, taps: int, weights: int) -> str:
    """Of HOPPER's tables."""
    if weights > 1:
        return "geglu int8" if integer else "geglu fp8"
    return "matmul" if taps == 0 else "conv2d"


@functools.lru_cache(maxsize=4096)
def choose(
    m: int, n: int, inner: int, on: Chip, taps: int = 0, weights: int = 1, integer: bool = True,
    splits: bool = True,
) -> Tiles:  # fmt: skip
    """Tiles for [m, taps * inner] x [n, taps * inner].

    taps: of a convolution's kernel, each a sum over `inner` channels; 0: no convolution. weights:
    tiles of weights a program holds at once. integer: int8, else fp8. splits: whether programs may
    share a sum.
    """
    known = MEASURED.get(on.capability[0])
    allowed = SPLITS if splits else (1,)
    if known is None:
        return _modelled(m, n, inner, on, taps, weights, allowed)
    rates = known[kernel_name(integer, taps, weights)]
    return _fitted(m, n, inner, on, taps, weights, allowed, rates)


@functools.lru_cache(maxsize=4096)
def choose_tma(m: int, n: int, inner: int, on: Chip, kernel: str, taps: int = 0) -> Tiles:
    """Tiles for hopper.py's kernel ("matmul", "conv2d int8" or "conv2d fp8"), as `choose`."""
    return _fitted(m, n, inner, on, taps, 1, TMA_SPLITS if taps else (1,), TMA[kernel], 4)


def _shares(tiles: int, steps: int, on: Chip, splits: Sequence[int], most: int = 2) -> list[int]:
    """Programs that may share one sum, `most` for each multiprocessor."""
    allowed = (
        split for split in splits if steps >= LEAST_STEPS * split and tiles * split <= most * on.sms
    )
    return list(dict.fromkeys((1, *allowed)))


def _fitted(
    m, n, inner, on: Chip, taps: int, weights: int, splits: Sequence[int], rates, most: int = 2
) -> Tiles:
    best, least = None, float("inf")
    for (bm, bn, bk, warps, stages), (launch, program, step) in rates.items():
        # 64 was measured only where 128 does not divide the dimension
        if stages * (bm + bn) * bk > on.shared or (bk == 64 and inner % 128 == 0):
            continue
        tiles = -(-m // bm) * -(-n // (bn // weights))
        steps = max(taps, 1) * -(-inner // bk)
        for split in _shares(tiles, steps, on, splits, most):
            time = launch + -(-tiles * split // on.sms) * (program + -(-steps // split) * step)
            if split > 1:
                time += PARTIAL_US * split * m * n / 1e6
            if time < least:
                least, best = time, Tiles(bm, bn // weights, bk, warps, stages, split)
    return best or _modelled(m, n, inner, on, taps, weights, splits)


def _modelled(m, n, inner, on: Chip, taps: int, weights: int, splits: Sequence[int]) -> Tiles:
    wide = on.capability[0] in (9, 10)
    # 256 columns would leave a convolution too few registers for its pixels' addresses
    widest = 128 if taps else 256
    bk = 128 if inner % 128 == 0 or inner % 64 or inner < 64 else 64
    best, least = None, float("inf")
    for (bm, bn, warps), rate in (WIDE if wide else NARROW).items():
        stages = min(4 if wide else 3, on.shared // ((bm + bn) * bk))
        if stages < 2 or bn > widest:
            continue
        tiles = -(-m // bm) * -(-n // (bn // weights))
        steps = max(taps, 1) * -(-inner // bk)
        for split in _shares(tiles, steps, on, splits):
            work = -(-steps // split) * bk * bm * bn / rate + PROGRAM_COST
            time = -(-tiles * split // on.sms) * work
            if split > 1:
                time += PARTIAL_COST * split * m * n / on.sms
            if time < least:
                least, best = time, Tiles(bm, bn // weights, bk, warps, stages, split)
    assert best is not None, on  # 64 x 64 fits any chip that runs Triton
    return best
