"""Kernels are interpreted where there is no GPU (see tests/conftest.py)."""

import os

import pytest
import torch

from ..interpreter import correct_casts


@pytest.fixture(scope="session", autouse=True)
def casts_of_a_gpu():
    if os.environ.get("TRITON_INTERPRET") == "1":
        correct_casts()


@pytest.fixture
def on_device():
    """Tensors are made on the GPU, where there is one: Triton then compiles."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield
