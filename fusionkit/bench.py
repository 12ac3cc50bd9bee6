"""Speed measured and counted: times, a machine's ceilings, work and traffic, tables of them.

Times are medians of repeated calls after a warm-up. A machine's ceilings are what a copy and a
matrix product reach on it; work and traffic of a network over those ceilings is the least time it
can take (the roofline of Williams et al., Communications of the ACM, 2009).
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fusionkit
from fusionkit.images import write_atomically
from fusionkit.kernels._dispatch import references
from fusionkit.kernels.traffic import bytes_moved


class Timing(NamedTuple):
    """Seconds of a call: median and minimum of `calls`, and (maximum - minimum) / median."""

    median: float
    minimum: float
    spread: float
    calls: int


class Ceilings(NamedTuple):
    """What a machine reaches in float32: bytes/s of a copy, FLOP/s of two operations."""

    copy: float
    product: float
    convolution: float


class Counts(NamedTuple):
    """What a call does: FLOPs, those of them in matrix products, bytes it moves without caches."""

    flops: int
    products: int
    bytes: int


def timed(
    function: Callable[[], object],
    repeats: int = 5,
    *,
    device: str | torch.device = "cpu",
    limit: float = math.inf,
) -> Timing:
    """Time `function()`: one call to warm up, then `repeats` calls, fewer after `limit` seconds.

    If the first call alone took longer than the limit, it is what is measured.
    Raises:
        ValueError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    seconds = [seconds_of(function, device)]
    if seconds[0] <= limit:
        began, seconds = time.perf_counter(), []
        while len(seconds) < repeats and not (seconds and time.perf_counter() - began > limit):
            seconds.append(seconds_of(function, device))
    median = statistics.median(seconds)
    return Timing(median, min(seconds), (max(seconds) - min(seconds)) / median, len(seconds))


def seconds_of(function: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of one call of `function()`; on a GPU, between two events around all its work."""
    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    with torch.cuda.device(device):  # whose stream the events are of
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000


def machine(device: str | torch.device = "cpu") -> dict[str, object]:
    """The processor's name, its memory in GiB, torch's threads (CPU only) and torch's version."""
    if torch.device(device).type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {
            "name": card.name,
            "memory": round(card.total_memory / 2**30, 1),
            "torch": torch.__version__,
        }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": _processor(),
        "memory": round(memory / 2**30, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_slug(device: str | torch.device = "cpu") -> str:
    """The machine as a part of a file's name, such as "amd-epyc-2-threads" or "nvidia-h100"."""
    facts = machine(device)
    count = facts.get("threads")
    words = facts["name"] + (f" {count} thread{'s' * (count > 1)}" if count else "")
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def ceilings(device: str | torch.device = "cpu", scale: float = 1.0) -> Ceilings:
    """Measure a machine's ceilings, each the best of ten calls.

    The copy reads and writes 256 MiB, more than caches hold; the product is of two 2048×2048
    matrices; the convolution is 3×3, 64 to 64 channels, on 256×256 pixels, channels last, by
    torch's defaults (on a GPU it may take TF32 for float32). `scale` multiplies those sides, for a
    quick look.
    """
    side = max(16, round(2048 * scale))
    source = torch.rand(max(1, round(2**26 * scale**2)), device=device)
    target = torch.empty_like(source)
    x, y = torch.rand(2, side, side, device=device)
    pixels = max(16, round(256 * scale))
    maps = torch.rand(1, 64, pixels, pixels, device=device)
    weight = torch.rand(64, 64, 3, 3, device=device)
    maps, weight = (z.to(memory_format=torch.channels_last) for z in (maps, weight))

    def fastest(function: Callable[[], object]) -> float:
        return timed(function, 10, device=device).minimum

    with torch.inference_mode():
        return Ceilings(
            copy=2 * source.numel() * source.element_size() / fastest(lambda: target.copy_(source)),
            product=2 * side**3 / fastest(lambda: x @ y),
            convolution=2
            * 9
            * 64**2
            * pixels**2
            / fastest(lambda: F.conv2d(maps, weight, padding=1)),
        )


def counted(function: Callable[[], object]) -> Counts:
    """Count what `function()` does.

    FLOPs are those of convolutions and matrix products (attention's among them), a multiplication
    and an addition as two; all else is little beside them in FLOPs, if not in bytes. Where a Triton
    kernel would run, which no counter sees into, its reference does.
    """
    # Which torch's counter does not know.
    extra = {torch.ops.aten.mkldnn_convolution: _convolution_flops}
    if hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        extra[torch.ops.mkldnn._convolution_pointwise] = _convolution_flops
    with references(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
        moved = bytes_moved(function)
    flops = counter.get_flop_counts().get("Global", {})
    convolved = sum(n for op, n in flops.items() if "convolution" in str(op))
    return Counts(sum(flops.values()), sum(flops.values()) - convolved, moved)


def _convolution_flops(
    x: tuple[int, ...],
    *others: object,
    out_shape: tuple[int, ...],
    **__: object,
) -> int:
    # (weight, bias, ...), or where something is done to the result (factor, weight, bias, ...)
    weight = others[0] if others[1] is None or len(others[1]) < 4 else others[1]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def version(checkout: str | os.PathLike | None = None) -> str:
    """The commit of a checkout, by default this package's, "-dirty" if its files differ from it.

    Those in `figures/` may differ, where stored tables are put one by one. Without git or its data:
    this package's version, and "unknown" for another checkout.
    """
    known = fusionkit.__version__ if checkout is None else "unknown"
    checkout = Path(checkout or Path(fusionkit.__file__).parents[1])
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return known

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip()

    commit = git("describe", "--always", "--abbrev=7", "--exclude=*")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!figures")
    return commit + ("-dirty" if changed else "") if commit else known


def write_table(
    path: str | os.PathLike, name: str, table: pd.DataFrame, device: str | torch.device = "cpu"
) -> None:
    """Put a table into a JSON file of this machine's tables, atomically; the others there stay.

    Each table carries the version of the code that it was measured with: the present one, or that
    of a table which `read_tables` gave.

    Raises:
        ValueError: the file holds the tables of another machine, or is none of ours.
    """
    path, facts = Path(path), machine(device)
    content = _read(path) if path.exists() else {"machine": facts, "tables": {}}
    if content["machine"] != facts:
        raise ValueError(f"{path}: measured on {content['machine']}, expected {facts}")
    rows = json.loads(table.to_json(orient="records", double_precision=15))
    measured_with = table.attrs.get("version") or version()
    content["tables"][name] = {"version": measured_with, "rows": rows}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_tables(path: str | os.PathLike) -> dict[str, pd.DataFrame]:
    """The tables of a file that `write_table` wrote, by name.

    A table's `attrs` hold the `machine` and the `version` of the code.
    """
    content = _read(Path(path))
    tables = {}
    for name, entry in content["tables"].items():
        tables[name] = pd.DataFrame(entry["rows"])
        tables[name].attrs = {"machine": content["machine"], "version": entry["version"]}
    return tables


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        if content.keys() >= {"machine", "tables"}:
            return content
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path}: expected the JSON that fusionkit.bench.write_table writes")
