"""Save Calibration: write a recording to models/modelopt/calibration."""

from __future__ import annotations

from comfy_api.latest import io

from ..quantize import calibration as calibration_file
from ..utils.progress import progress
from . import folders
from .shown import shown
from .types import Calibration


class SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptSaveCalibration",
            display_name="Save Calibration (ModelOpt)",
            category="ModelOpt",
            description="Saves a recording as one numbered .safetensors in "
            "models/modelopt/calibration, so that it need not be sampled again.",
            inputs=[
                Calibration.Input("calibration", tooltip="The recording to save."),
                io.String.Input(
                    "filename_prefix",
                    default="calibration",
                    tooltip="Name of the file, subfolders and %year%, %month%, %day% allowed. A "
                    "number is added; no file is overwritten.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        """None: the text comes from another node and is not known yet."""
        if filename_prefix is None:
            return True
        return folders.why_not(folders.CALIBRATION, filename_prefix) or True

    @classmethod
    def execute(cls, calibration, filename_prefix: str) -> io.NodeOutput:
        path = folders.write_new(
            folders.CALIBRATION,
            filename_prefix,
            lambda path: calibration_file.save(calibration, path, progress),
        )
        return io.NodeOutput(ui=shown(path))
