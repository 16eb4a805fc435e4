"""Each layer by itself: what the original's layers are given and give, and what others make of the same.

Samples of a few calls are kept, not whole activations: `LIMIT` bytes of all layers together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from .quality import Energy
from .records import keep

# UNet calls of which samples are kept, and positions (tokens, or pixels of a convolution) of each
CALLS = 4
POSITIONS = 64
# bytes of all samples together; fewer positions, then fewer calls, are kept to stay below
LIMIT = 512 * 2**20
# a convolution is sampled in windows of TILE x TILE output pixels
TILE = 4
WINDOW = TILE * TILE


@dataclass(frozen=True)
class Sample:
    """given, made: a layer's input and the original's output for it, on the CPU.

    crop: of a convolution run on `given`, the rows and columns that `made` holds; the others look
    over the window's edge. gradient: of a number with respect to `made`, in its shape, where it was
    taken. stands_for: how many numbers of the whole output one of `made` stands for.
    """

    given: torch.Tensor
    made: torch.Tensor
    crop: tuple[slice, slice] | None = None
    gradient: torch.Tensor | None = None
    stands_for: float = 1.0

    def compare(self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Energy:
        """The noise of `module` for the same input."""
        return Energy.of(self.made, self._of(module, device, dtype))

    def cost(self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> float:
        """The sum of squares of gradient times noise of `module`, over the whole layer's output."""
        noise = self.made.double() - self._of(module, device, dtype).double()
        return (noise * self.gradient.double()).square().sum().item() * self.stands_for

    def _of(self, module: torch.nn.Module, device: torch.device, dtype: torch.dtype):
        found = module(self.given.to(device=device, dtype=dtype))
        if self.crop is not None:
            found = found[:, :, self.crop[0], self.crop[1]]
        return found.cpu()


def kind(module: torch.nn.Module | None) -> str | None:
    """ "linear", "conv2d", or None for a module that is sampled as neither."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    if weight.ndim == 2 and hasattr(module, "in_features"):
        return "linear"
    if weight.ndim == 4 and hasattr(module, "stride") and not getattr(module, "transposed", False):
        return "conv2d"
    return None


def budget(
    modules: Mapping[str, torch.nn.Module], itemsize: int, calls: int = CALLS
) -> tuple[int, int]:
    """UNet calls, at most `calls`, and positions a call to sample, within LIMIT bytes: at least 1
    call of 1 window."""
    a_window = itemsize * sum(map(_values, modules.values()))
    windows = LIMIT // max(calls * a_window, 1)
    if windows >= 1:
        return calls, WINDOW * min(windows, POSITIONS // WINDOW)
    return max(1, min(calls, LIMIT // a_window)), WINDOW


def _values(module: torch.nn.Module) -> int:
    """Numbers in one window of a layer's samples."""
    rows, columns = module.weight.shape[:2]
    if kind(module) == "linear":
        return WINDOW * (rows + columns)
    halo = 1
    for size, stride, dilation in zip(
        module.kernel_size, module.stride, module.dilation, strict=True
    ):
        halo *= TILE * stride + dilation * (size - 1)
    return halo * columns + WINDOW * rows


class Listener:
    """Hooks on layers of the original, in place inside `with listening():` only.

    One call of each layer is taken after each `next_call()`. gradients: also takes the gradient
    of the layer's output, once `backward` has run, and only those calls are kept. number: of the
    first call, which says where it is sampled.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        positions: int,
        gradients: bool = False,
        number: int = 0,
    ) -> None:
        self.modules = dict(modules)
        self.positions = positions
        self.gradients = gradients
        self.samples: dict[str, list[Sample]] = {name: [] for name in modules}
        self._number = number - 1
        self._waiting: set[str] = set()

    def next_call(self) -> None:
        """The next UNet call is to be sampled."""
        self._number += 1
        self._waiting = set(self.modules)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_hook(self._hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._waiting = set()

    def _hook(self, name: str) -> Callable:
        def heard(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            if name not in self._waiting or not args:
                return
            self._waiting.discard(name)
            take = _rows if kind(module) == "linear" else _windows
            with torch.no_grad():
                places = take(module, args[0], output, self.positions, self._number)
                samples = [
                    Sample(keep(one.given), keep(one.of(output)), one.crop) for one in places
                ]
            if not self.gradients:
                self.samples[name] += samples
                return
            if not output.requires_grad:  # nothing that has a gradient reaches this layer
                return
            stands_for = output.numel() / sum(one.made.numel() for one in samples)
            parts = [one.of for one in places]  # not the places, which hold whole inputs

            def weigh(gradient: torch.Tensor) -> None:
                for part, sample in zip(parts, samples, strict=True):
                    there = part(gradient.detach()).float().cpu()
                    weighed = replace(sample, gradient=there, stands_for=stands_for)
                    self.samples[name].append(weighed)

            output.register_hook(weigh)

        return heard


@dataclass(frozen=True)
class _Place:
    """given: input of the layer at a place of a call. of(output): the output there. crop: as in
    `Sample`."""

    given: torch.Tensor
    of: Callable[[torch.Tensor], torch.Tensor]
    crop: tuple[slice, slice] | None = None


def _rows(module, x, output, positions: int, number: int) -> list[_Place]:
    """Tokens of [..., K], one from each of equal parts of the call."""
    given = x.reshape(-1, x.shape[-1])
    index = _scattered(len(given), positions, number).to(x.device)
    return [_Place(given[index], lambda made: made.reshape(-1, made.shape[-1])[index])]


def _scattered(count: int, wanted: int, number: int) -> torch.Tensor:
    """Indices into `count`: one at another place of each of `wanted` equal parts, so that tokens of
    one picture column alone do not come out. Deterministic; another choice for another number."""
    if count <= wanted:
        return torch.arange(count)
    parts = torch.arange(wanted, dtype=torch.float64)
    golden = (5**0.5 - 1) / 2
    within = ((parts + number * wanted) * golden).frac()
    return ((parts + within) * count / wanted).long()


def _windows(module, x, output, positions: int, number: int) -> list[_Place]:
    """Windows of TILE x TILE output pixels and what they are computed from; small maps whole."""
    batch, _, height, width = output.shape
    simple = isinstance(module.padding, tuple) and module.padding_mode == "zeros"
    if batch * height * width <= positions or not simple:
        return [_Place(x, lambda made: made)]
    found = []
    for i in range(max(1, positions // WINDOW)):
        place = number * max(1, positions // WINDOW) + i
        # the R2 sequence, which is even over a square
        across = [(0.5 + place * 0.7548776662466927) % 1, (0.5 + place * 0.5698402909980532) % 1]
        inner, outer, crop = zip(
            *(
                _span(int(share * max(size - TILE + 1, 1)), size, x.shape[2 + axis], module, axis)
                for axis, (share, size) in enumerate(zip(across, (height, width), strict=True))
            ),
            strict=True,
        )
        one = slice(place % batch, place % batch + 1)
        where = (one, slice(None), *outer)
        found.append(_Place(x[one, :, inner[0], inner[1]], itemgetter(where), crop))
    return found


def _span(start: int, size: int, length: int, module, axis: int) -> tuple[slice, slice, slice]:
    """For output pixels from `start` on along one axis: the input they need, they themselves, and
    where they are in the output of the convolution run on that input alone."""
    stride, padding = module.stride[axis], module.padding[axis]
    stop = min(start + TILE, size)
    first = start * stride - padding
    last = (stop - 1) * stride - padding + module.dilation[axis] * (module.kernel_size[axis] - 1)
    # a multiple of the stride: the convolution's steps on the window fall on those on the whole map
    begin = max(0, first) // stride * stride
    skipped = begin // stride
    inner = slice(begin, min(last + 1, length))
    return inner, slice(start, stop), slice(start - skipped, stop - skipped)
