"""One checkpoint -> one file: load, record, quantize, measure and save, as the nodes do it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..formats import files
from ..loaders import unet as loader
from ..nodes.planning import sizes
from ..nodes.quantize_and_load import quantize_and_load
from ..quantize import calibration as calibration_file
from ..quantize import engine
from ..quantize.bridge import sampling
from ..quantize.bridge.unet import unet_of
from ..quantize.calibration import Calibration
from ..utils.progress import detail, progress, tell
from ..utils.whole_file import NameTaken, remove_left
from . import identity, models
from .options import Order

log = logging.getLogger(__name__)


def convert(
    file: Path,
    output: Path,
    made_of: Mapping[str, Any],
    order: Order,
    recordings: Calibration | None,
) -> dict[str, Any]:
    """Writes `output`, which must not be there. Figures of it: bytes_before, file_bytes, sqnr_db where
    there are recorded calls.

    made_of: `identity.of` the file, which goes into its header. Raises as the nodes do.
    """
    with torch.inference_mode():  # as ComfyUI runs its nodes
        tell("Loading")
        kept = kept_recording(output, made_of)
        recordings = recordings or _read(kept)
        samples = bool(order.prompts) and recordings is None
        model, clip = models.load(file, with_clip=samples)
        model, clip = models.with_loras(model, clip, order.loras)
        if samples:
            engine.prepared(unet_of(model), order.recipe)  # its errors, before hours of sampling
            tell("Sampling the prompts")
            recordings = sampling.record_prompts(
                model, clip, order.prompts, **asdict(order.sampling)
            )
            with contextlib.suppress(NameTaken):  # the same, of a process that was taken for dead
                calibration_file.save(recordings, kept)
        clip = None
        tell("Quantizing")
        planned = sizes(model, order.recipe, recordings)
        quantized, _, figures = quantize_and_load(model, order.recipe, recordings, planned)
        checkpoint = loader.to_checkpoint(quantized)
        checkpoint.header[identity.HEADER] = {
            name: part for name, part in made_of.items() if name != "source"
        }
        detail("Saving")
        files.write(checkpoint, output, progress(checkpoint.nbytes()))
    return figures | {"file_bytes": output.stat().st_size}


def kept_recording(output: Path, made_of: Mapping[str, Any]) -> Path:
    """Where the recording of sampled prompts lies until the file is there, so that it need not be made
    again after an interruption."""
    return output.with_name(f".{output.name}.{identity.recording(made_of)}.calibration")


def clear(output: Path) -> None:
    """Removes what killed processes left: halves of files, as every saving does; recordings of a file
    that is there. For the one that has the claim."""
    remove_left(output.parent)
    if not output.exists():
        return
    left = re.compile(rf"[.]{re.escape(output.name)}[.][0-9a-f]{{16}}[.]calibration")
    found = [path for path in output.parent.iterdir() if left.fullmatch(path.name)]
    for path in found:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)


def _read(kept: Path) -> Calibration | None:
    if not kept.exists():
        return None
    try:
        found = calibration_file.load(kept)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # of the disk: what is there may be whole
            raise
        log.warning("ModelOpt: recording the prompts again: %s", error)
        kept.unlink(missing_ok=True)
        return None
    log.info("ModelOpt: continuing with the recording of an interrupted process, %s", kept)
    return found
