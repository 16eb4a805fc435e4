"""GPU Capability: which formats run natively on this machine, and which one to pick."""

from __future__ import annotations

from comfy_api.latest import io

from ..loaders import device
from ..utils.report import capability_report
from .shown import shown


class GPUInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ModelOptGPUInfo",
            display_name="GPU Capability (ModelOpt)",
            category="ModelOpt",
            description="Shows for each format whether this machine computes it natively, emulates "
            "it or refuses it, with the reason, and which format to pick for which goal.",
            search_aliases=["gpu", "which format", "fp8 support", "nvfp4 support"],
            inputs=[],
            outputs=[io.String.Output(display_name="text", tooltip="The table, as text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        return repr(device.current())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        text = capability_report(device.current())
        return io.NodeOutput(text, ui=shown(text))
