"""The one way through, for the nodes that quantize: core, loader, measurement, report."""

from __future__ import annotations

from ..formats import files
from ..loaders import info
from ..loaders import unet as loader
from ..quantize import engine
from ..utils.report import quantize_report
from .planning import Sizes


def quantize_and_load(model, recipe, calibration, planned: Sizes):
    """-> quantized MODEL, report text, figures (JSON-able). planned: `planning.sizes` of the same."""
    return loaded_and_told(engine.quantize_model(model, recipe, calibration), recipe, planned)


def loaded_and_told(made: engine.Quantized, recipe, planned: Sizes):
    """The same for what is quantized already."""
    quantized = loader.load(made.checkpoint)
    engine.measure(made, quantized)
    found = loader.loaded(quantized)
    found.header.update(made.checkpoint.header)
    bytes_after = made.checkpoint.nbytes()
    file_bytes = files.size(made.checkpoint)
    report = quantize_report(
        found.header,
        found.layers,
        loader.kernels(quantized).values(),
        made.bytes_before,
        bytes_after,
        made.seconds,
        made.checkpoint.opens_in_stock,
        made.notes,
    )
    report = f"{planned.kept(file_bytes, info.weight_bytes(quantized))}\n{report}"
    figures = {
        **recipe.describe(),
        **(made.figures or {}),
        "bytes_before": made.bytes_before,
        "bytes_after": bytes_after,
        "file_bytes": file_bytes,
        "planned_file_bytes": planned.file,
        "seconds": round(made.seconds, 2),
        "quantized_layers": len(found.layers),
    }
    return quantized, report, figures
