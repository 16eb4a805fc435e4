"""Types that flow between this pack's nodes only."""

from __future__ import annotations

from comfy_api.latest import io

Calibration = io.Custom("MODELOPT_CALIBRATION")
