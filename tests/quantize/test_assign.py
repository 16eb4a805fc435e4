"""The assignment is the best one: held against trying them all."""

from __future__ import annotations

import itertools
import random

import pytest
from comfyui_modelopt.quantize import assign
from comfyui_modelopt.quantize.assign import Option


def groups_of(seed: int, count: int = 6) -> list[list[Option]]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        size = rng.uniform(1e3, 1e6)
        found.append(
            [
                Option(size * share, size * rng.uniform(0.5, 2) * 4.0 ** (-8 * share))
                for share in (0.25, 0.5, 0.52, 1.0)[: rng.randint(1, 4)]
            ]
        )
        if rng.random() < 0.5:
            found[-1].append(Option(size, 0.0))
    return found


def all_of(groups) -> list[Option]:
    return [assign.total(groups, c) for c in itertools.product(*(range(len(g)) for g in groups))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_least_noise(seed, share):
    groups = groups_of(seed)
    tried = all_of(groups)
    smallest, largest = min(o.size for o in tried), max(o.size for o in tried)
    limit = smallest + share * (largest - smallest) + 1
    best = min(o.noise for o in tried if o.size <= limit)
    found = assign.total(groups, assign.least_noise(groups, limit))
    assert found.size <= limit * (1 + 1e-6)
    assert found.noise <= best * 1.001 + 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_least_size(seed, share):
    groups = groups_of(seed)
    tried = all_of(groups)
    limit = max(o.noise for o in tried) * share + min(o.noise for o in tried)
    best = min(o.size for o in tried if o.noise <= limit)
    found = assign.total(groups, assign.least_size(groups, limit))
    assert found.noise <= limit * (1 + 1e-6)
    assert found.size <= best * 1.001


def test_what_cannot_be_is_none():
    groups = groups_of(1)
    assert assign.least_noise(groups, 10.0) is None
    assert assign.least_size([[Option(1.0, 5.0)]], 1.0) is None


def test_no_noise_at_all():
    groups = [[Option(1.0, 5.0), Option(2.0, 0.0)]] * 3
    assert assign.least_size(groups, 0.0) == [1, 1, 1]


def test_the_limit_is_kept_to_the_byte():
    """Though the solver's own tolerance is a part in 10^6."""
    for seed in range(20):
        groups = groups_of(seed, count=40)
        smallest = sum(min(o.size for o in g) for g in groups)
        largest = sum(max(o.size for o in g) for g in groups)
        for share in (0.3, 0.62):
            limit = smallest + share * (largest - smallest)
            found = assign.total(groups, assign.least_noise(groups, limit))
            assert limit * 0.97 < found.size <= limit


def test_what_is_over_by_less_than_the_solver_sees():
    groups = [[Option(500_001_000.0, 10.0), Option(500_000_500.0 + 500.5, 1.0)]] + [
        [Option(250_000_000.0, 5.0), Option(250_000_400.0, 2.0), Option(500_000_000.0, 0.0)]
    ]
    limit = 1_000_000_900.0  # both of least noise are 100 bytes over it
    found = assign.total(groups, assign.least_noise(groups, limit))
    assert found.size <= limit and found.noise == 3.0


def spread_of(seed: int, decades: int, count: int = 6) -> list[list[Option]]:
    """Layers whose noise is far apart."""
    rng = random.Random(100 * seed + decades)
    found = []
    for _ in range(count):
        weights = 10 ** rng.uniform(4, 6)
        noise = 10 ** rng.uniform(-decades / 2, decades / 2)
        found.append(
            [
                Option(weights * bits / 8, noise * 4.0 ** (8 - bits) * rng.uniform(0.5, 2))
                for bits in (4, 4.5, 6, 8)
            ]
        )
        if rng.random() < 0.5:
            found[-1].append(Option(2 * weights, 0.0))
    return found


@pytest.mark.parametrize("decades", [2, 4, 6, 8, 10, 12])
def test_the_best_also_where_noise_is_far_apart(decades):
    """What is small beside the largest noise counts, once that one is taken away."""
    for seed in range(6):
        groups = spread_of(seed, decades)
        tried = all_of(groups)
        smallest, largest = min(o.size for o in tried), max(o.size for o in tried)
        for share in (0.03, 0.2, 0.5, 0.8):
            limit = smallest + share * (largest - smallest)
            best = min(o.noise for o in tried if o.size <= limit)
            found = assign.total(groups, assign.least_noise(groups, limit))
            assert found.size <= limit
            assert found.noise <= best * 1.001
        noises = sorted(option.noise for options in groups for option in options)
        for limit in (3 * noises[len(noises) * share // 10] for share in (3, 6, 9)):
            sizes = [o.size for o in tried if o.noise <= limit]
            chosen = assign.least_size(groups, limit)
            assert (chosen is None) == (not sizes)
            if chosen is not None:
                found = assign.total(groups, chosen)
                assert found.noise <= limit
                assert found.size <= min(sizes) * 1.001


def test_the_best_also_where_sizes_are_far_apart():
    for seed in range(10):
        rng = random.Random(seed)
        groups = []
        for _ in range(6):
            weights = 10 ** rng.uniform(2, 9)
            sizes = [weights * bits / 8 for bits in (4, 4.5, 6, 8)]
            groups.append([Option(size, 10 ** rng.uniform(-7, 7)) for size in sizes])
        tried = all_of(groups)
        smallest, largest = min(o.size for o in tried), max(o.size for o in tried)
        for share in (0.03, 0.2, 0.5, 0.8):
            limit = smallest + share * (largest - smallest)
            found = assign.total(groups, assign.least_noise(groups, limit))
            assert found.size <= limit
            assert found.noise <= min(o.noise for o in tried if o.size <= limit) * 1.001


@pytest.mark.parametrize("decades", [0, 6])
def test_as_many_layers_as_sdxl_has(decades):
    """Held against a bound of all choices, Lagrange's: of the best price that weighs noise by size."""
    groups = spread_of(1, decades, count=600)
    smallest = sum(min(o.size for o in g) for g in groups)
    largest = sum(max(o.size for o in g) for g in groups)
    for share in (0.05, 0.3):
        limit = smallest + share * (largest - smallest)
        found = assign.total(groups, assign.least_noise(groups, limit))

        def bound(price, limit=limit):
            return sum(min(o.noise + price * o.size for o in g) for g in groups) - price * limit

        best = max(bound(10 ** (power / 20)) for power in range(-300, 60))
        assert found.size <= limit
        assert best > 0 and found.noise <= best * 1.05
