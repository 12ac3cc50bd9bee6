"""Triton twins run on the GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton's interpreter is off: TRITON_INTERPRET is not 1")
    return "cpu"


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """References convolve in float32 on a GPU as well, not in TF32, and so do the twins."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Metrics take pictures one after another: Triton's interpreter runs in one thread at a time.

    It patches `triton.language` for the length of a launch, under the feet of other threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
