"""Calibrating and packing never hold more than the model and one layer's temporaries."""

from __future__ import annotations

import gc

import pytest
import torch
from comfyui_modelopt.quantize import modelopt, pack
from comfyui_modelopt.quantize.recipe import ALGORITHMS, AWQ, AWQ_FULL, Recipe, plan
from comfyui_modelopt.utils.memory import watched

WIDTH, CHANNELS = 256, 64
MANY = 5
# bytes that stay of each layer's calibration, for an input channel (smoothing, largest activation)
# and of AWQ for a block of 128 weights: its amax, as searched and as smoothed
A_CHANNEL, A_BLOCK = 12, 12
# bytes for a block that ModelOpt keeps of every layer while it searches where to clip: the errors
# of 11 clippings, the amax, and the best of both
SEARCHED = 4 * (11 + 3)
PAIRS = [(form, algorithm) for form, known in ALGORITHMS.items() for algorithm in known]


class Net(torch.nn.Module):
    """`count` Linears and as many convolutions, each given what the one before it gave."""

    def __init__(self, count: int) -> None:
        super().__init__()
        options = {"bias": False, "dtype": torch.float16}
        self.linears = torch.nn.ModuleList(
            torch.nn.Linear(WIDTH, WIDTH, **options) for _ in range(count)
        )
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, **options) for _ in range(count)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        for one in self.linears:
            x = one(x).tanh()
        for one in self.convs:
            y = one(y).tanh()


def held(recipe: Recipe, count: int) -> dict[str, int]:
    """Bytes of all tensors: of the model, after its calibration, in the end, at the highest; and of
    what was made."""
    torch.manual_seed(0)
    x, y = torch.randn(16, WIDTH).half(), torch.randn(1, CHANNELS, 4, 4).half()
    marks = {name: torch.nn.Identity() for name in ("model", "calibrated", "packed")}

    def run() -> int:
        with torch.no_grad():
            net = Net(count)
            kinds = {f"linears.{i}": "linear" for i in range(count)}
            kinds |= {f"convs.{i}": "conv2d" for i in range(count)}
            plans, _ = plan(net, recipe, kinds)
            assert any(one.algorithm == recipe.algorithm for one in plans.values())
            marks["model"](0)
            modelopt.calibrate(net, plans, lambda unet: unet(x, y))
            marks["calibrated"](0)
            tensors, table = pack.pack(net, plans, lambda: None)
            assert table.keys() == plans.keys()
            marks["packed"](0)
            return sum(tensor.nbytes for tensor in tensors.values())

    gc.collect()
    gc.disable()  # what refers to itself in a cycle would be freed by chance
    try:
        made, found = watched(run, torch.device("cpu"), marks)
    finally:
        gc.enable()
    return {**found.live, "peak": found.peak, "made": made}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What ModelOpt makes once in a process is made."""
    held(Recipe("fp8", "mse"), 1)


@pytest.mark.parametrize(("form", "algorithm"), PAIRS)
def test_many_layers_take_no_more_than_one_beside_the_model(form, algorithm):
    recipe = Recipe(form, algorithm)
    one, many = held(recipe, 1), held(recipe, MANY)
    blocks = WIDTH * WIDTH // 128
    left = A_CHANNEL * (WIDTH + CHANNELS) + (A_BLOCK * blocks if algorithm in AWQ else 0)
    assert many["calibrated"] - many["model"] <= MANY * left
    assert many["packed"] <= many["made"] + MANY * A_CHANNEL * WIDTH
    assert many["made"] < many["model"]
    temporaries = one["peak"] - one["model"]
    searched = SEARCHED * blocks if algorithm == AWQ_FULL else 0
    more = (MANY - 1) * (left + searched)
    assert many["peak"] <= many["model"] + temporaries + more


def test_what_is_there_around_calls():
    """Bytes at the highest in each module, before it, and where none runs."""
    modules = {name: torch.nn.Linear(100, 25, bias=False) for name in ("one", "two", "not called")}

    def run() -> None:
        with torch.no_grad():
            x = torch.ones(1, 100)
            modules["one"](x)
            y = torch.ones(1, 200)
            modules["two"](y[:, :100])
            modules["one"](x)
            del y
            torch.ones(1, 500)

    _, found = watched(run, torch.device("cpu"), modules)
    assert found.live == {"one": 1200, "two": 1200}
    assert found.inside == {"one": 1300, "two": 1300}
    assert found.outside == found.peak == 2400
