"""The allocator is tuned once, in a process of its own, and not against the user's wish."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from fusionkit.allocator import keep_freed_memory
told = keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(16 << 20)
before = faults()
for _ in range(10):
    torch.ones(16 << 20)
print(told, faults() - before)
"""


def run(**environment: str) -> tuple[str, int]:
    """Whether glibc was told, and the page faults of ten tensors of 64 MiB."""
    kept = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    told, faults = found.stdout.split()
    return told, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_serves_the_next_tensor():
    told, faults = run()
    assert told == "True"
    fresh = run(FUSIONKIT_KEEP_MEMORY="0")[1]
    assert faults < fresh / 2  # none as a rule, but the system may take pages back


@pytest.mark.parametrize(
    "environment", [{"FUSIONKIT_KEEP_MEMORY": "0"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}]
)
def test_the_environment_has_the_last_word(environment):
    assert run(**environment)[0] == "False"
