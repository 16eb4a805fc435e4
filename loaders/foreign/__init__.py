"""Checkpoints that others wrote -> a QuantizedCheckpoint. Nothing in a foreign file is executed."""

from __future__ import annotations

from .read import from_module, read

__all__ = ["from_module", "read"]
