"""The nodes, one file each: a schema, and an `execute` that makes one call."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from ..utils import packages
from . import routes
from .auto_quantize import AutoQuantize
from .benchmark import Benchmark
from .calibration_prompts import CalibrationPrompts
from .compare import Compare
from .export_checkpoint import ExportCheckpoint
from .gpu_info import GPUInfo
from .import_checkpoint import ImportCheckpoint
from .load_calibration import LoadCalibration
from .load_unet import LoadUNet
from .model_info import ModelInfo
from .plan import Plan
from .quantize import Quantize
from .record_calibration import RecordCalibration
from .save_calibration import SaveCalibration
from .save_unet import SaveUNet

log = logging.getLogger(__name__)
NODES: list[type[io.ComfyNode]] = [
    RecordCalibration,
    CalibrationPrompts,
    SaveCalibration,
    LoadCalibration,
    Plan,
    Quantize,
    AutoQuantize,
    SaveUNet,
    LoadUNet,
    ImportCheckpoint,
    ExportCheckpoint,
    ModelInfo,
    Compare,
    Benchmark,
    GPUInfo,
]


class ModelOptExtension(ComfyExtension):
    async def on_load(self) -> None:
        routes.register()
        if (missing := packages.why_missing(packages.MODELOPT)) is not None:
            log.warning("ModelOpt for ComfyUI loads quantized files, but %s", missing)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
