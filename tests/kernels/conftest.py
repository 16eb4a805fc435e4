"""Kernels are interpreted where there is no GPU (see tests/conftest.py)."""

import pytest
import torch


@pytest.fixture
def on_device():
    """Tensors are made on the GPU, where there is one: Triton then compiles."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
