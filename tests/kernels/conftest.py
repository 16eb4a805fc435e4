"""Kernels are interpreted where there is no GPU (see tests/conftest.py)."""

import os

import pytest

from ..interpreter import correct_casts


@pytest.fixture(scope="session", autouse=True)
def casts_of_a_gpu():
    if os.environ.get("TRITON_INTERPRET") == "1":
        correct_casts()
