"""Load Calibration: read a recording from models/modelopt/calibration."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import calibration as calibration_file
from ..utils.progress import progress
from ..utils.report import calibration_line
from . import folders
from .shown import shown
from .types import Calibration


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptLoadCalibration",
            display_name="Load Calibration (ModelOpt)",
            category="ModelOpt",
            description="Loads a recording that Save Calibration wrote.",
            inputs=[
                io.Combo.Input(
                    "calibration_name",
                    options=folders.names(folders.CALIBRATION),
                    tooltip="A file of models/modelopt/calibration.",
                ),
            ],
            outputs=[
                Calibration.Output(
                    display_name="CALIBRATION", tooltip="The recording, for the Quantize node."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration_name: str) -> str:
        return folders.fingerprint(folders.CALIBRATION, calibration_name)

    @classmethod
    def validate_inputs(cls, calibration_name: str | None = None) -> bool | str:
        if calibration_name is None:
            return True
        try:
            folders.find(folders.CALIBRATION, calibration_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, calibration_name: str) -> io.NodeOutput:
        path = folders.find(folders.CALIBRATION, calibration_name)
        made = calibration_file.load(path, progress)
        return io.NodeOutput(made, ui=shown(calibration_line(made.summary())))
