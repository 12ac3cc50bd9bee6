"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton reads this when it is first imported, by whichever module is the first to need it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pairs, authors' weights and reference values, or a skip without it."""
    folder = os.environ.get("FUSIONKIT_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set FUSIONKIT_SHARED to the folder of reference data to run this test")
    return Path(folder)
