"""The C library's allocator, tuned for feature maps."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next tensor; whether it was told.

    By default every tensor above 32 MiB is fresh memory from the system, cleared page by page, and
    goes back when it is freed: on a CPU, half the time of a network with wide maps. Kept, it serves
    the next layer. The process stays as large as it once was. `fuse`, `fit` and `leaderboard` call
    this; it acts once in a process.

    Other C libraries are left alone, and so is glibc if the environment says so: by
    `FUSIONKIT_KEEP_MEMORY=0`, or by thresholds of its own (`MALLOC_MMAP_THRESHOLD_`,
    `GLIBC_TUNABLES`). Old versions of glibc refuse thresholds above 32 MiB, and stay as they are.
    """
    own = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if own or os.environ.get("FUSIONKIT_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # The arguments are C ints: a gibibyte, and as much as there is.
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
