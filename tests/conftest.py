"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pairs, authors' weights and reference values, or a skip without it."""
    folder = os.environ.get("FUSIONKIT_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set FUSIONKIT_SHARED to the folder of reference data to run this test")
    return Path(folder)
