"""Thinning is even, fair, and keeps both ends."""

import pytest
from comfyui_modelopt.quantize.thinning import phase_of, shares, spread


@pytest.mark.parametrize(
    ("positions", "count", "chosen"),
    [
        (range(9), 3, [0, 4, 8]),
        (range(9), 2, [0, 8]),
        (range(9), 1, [4]),
        (range(9), 0, []),
        (range(3), 7, [0, 1, 2]),
        ([0, 1, 2, 3, 100], 3, [0, 3, 4]),  # the one nearest to 50
        ([0, 90, 95, 100], 3, [0, 1, 3]),
        ([], 4, []),
    ],
)
def test_spread_takes_what_lies_nearest_to_an_even_spacing(positions, count, chosen):
    assert spread(positions, count) == chosen


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 57])
def test_spread_of_consecutive_positions_has_gaps_that_differ_by_one_at_most(total):
    for count in range(3, total):
        chosen = spread(range(total), count)
        assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == total - 1
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_a_single_one_lies_at_its_phase():
    assert [spread(range(11), 1, phase)[0] for phase in (0, 0.5, 1)] == [0, 5, 10]


@pytest.mark.parametrize(
    ("budget", "sizes", "given"),
    [
        (6, [10, 10, 10], [2, 2, 2]),
        (7, [10, 10, 10], [2, 3, 2]),
        (8, [10, 10, 10], [3, 2, 3]),
        (9, [1, 10, 10], [1, 4, 4]),  # what the small one leaves goes to the others
        (100, [1, 2, 3], [1, 2, 3]),
        (2, [5, 5, 5, 5, 5], [1, 0, 0, 0, 1]),
        (1, [5, 5, 5], [0, 1, 0]),
        (5, [], []),
    ],
)
def test_shares_are_equal_where_there_is_enough(budget, sizes, given):
    assert shares(budget, sizes) == given


def test_shares_never_give_more_than_the_budget_or_than_a_group_has():
    for budget in range(1, 40):
        sizes = [1 + (7 * i) % 11 for i in range(budget % 9 + 1)]
        given = shares(budget, sizes)
        assert sum(given) == min(budget, sum(sizes))
        assert all(g <= s for g, s in zip(given, sizes, strict=True))


def test_phases_stay_even_however_far_one_counts():
    for count in (3, 7, 15, 31):
        phases = sorted(phase_of(i) for i in range(count))
        assert phases == [(i + 1) / (count + 1) for i in range(count)]
