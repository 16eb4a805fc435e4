"""The limit of an H200 for a UNet call of batch 2 (SDXL at 1024, SD1.5 at 512 pixels), modelled.

Ideal milliseconds at 790 (fp16), 1580 (8-bit) and 600 (attention) TFLOP/s and 4 TB/s.
"""

from __future__ import annotations

IDEAL_MS = {
    "fp16, eager": {"sdxl": 22.9, "sd15": 3.04},
    "fp16, compiled": {"sdxl": 21.3, "sd15": 2.80},
    "8-bit Linear, separate quantize passes": {"sdxl": 19.2, "sd15": 2.96},
    "8-bit Linear, fused": {"sdxl": 13.7, "sd15": 2.17},
    "8-bit Linear + conv, separate quantize passes": {"sdxl": 17.5, "sd15": 2.52},
    "8-bit Linear + conv, all fused": {"sdxl": 11.8, "sd15": 1.61},
}


def share(gpu: str | None, setting: dict, row: str | None, ms: float) -> float | None:
    """Ideal time over measured time; None where the table says nothing of the case."""
    if gpu is None or "H200" not in gpu or setting["size"] != "full" or row is None:
        return None
    return IDEAL_MS[row][setting["family"]] / ms
