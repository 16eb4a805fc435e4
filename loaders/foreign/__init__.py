"""Checkpoints that others wrote -> a QuantizedCheckpoint. Nothing in a foreign file is executed."""

from __future__ import annotations

from .names import of_model
from .read import from_module, read

__all__ = ["from_module", "of_model", "read"]
