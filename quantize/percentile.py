"""Percentile calibration over the sampling steps, for convolutions' activations.

As in the diffusers example of NVIDIA's Model Optimizer (its `PercentileCalibrator`, collection
"min-mean"): each step's largest activations are averaged over the prompts, and the smallest of the
first `percentile` of the steps becomes the clipping value. A step is known by its place in its run.
"""

from __future__ import annotations

import functools

# the place in its run, 0 to 1, of the UNet call that is being replayed
_place = 0.0


def set_place(place: float) -> None:
    """Says at which part of its sampling run the next UNet call is."""
    global _place
    _place = place


@functools.cache
def calibrator() -> type:
    """The calibrator class; made on first use, because it derives from ModelOpt's."""
    from modelopt.torch.quantization.calib.max import MaxCalibrator

    class PercentileCalibrator(MaxCalibrator):
        """percentile: share of the steps, from the first one on, that is looked at."""

        def __init__(self, num_bits=8, axis=None, unsigned=False, *, percentile: float = 1.0):
            super().__init__(num_bits, axis, unsigned)
            self._percentile = percentile
            self._steps: dict[float, list] = {}

        def collect(self, x) -> None:
            """x: activations of one UNet call."""
            self._calib_amax = None
            super().collect(x)
            self._steps.setdefault(_place, []).append(self._calib_amax)

        def compute_amax(self):
            """The clipping value, a scalar; None where nothing was collected."""
            if not self._steps:
                return None
            means = [
                sum(self._steps[place]) / len(self._steps[place]) for place in sorted(self._steps)
            ]
            first = means[: max(1, round(len(means) * self._percentile))]
            return min(first, key=float)

        def reset(self) -> None:
            """Forgets everything."""
            super().reset()
            self._steps = {}

    return PercentileCalibrator
