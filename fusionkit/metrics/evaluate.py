"""Tables of metrics for a pair, a batch, or folders of pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
from scipy import stats

from fusionkit.color import luminance
from fusionkit.images import ImageLike, list_images, to_tensor
from fusionkit.metrics.catalogue import COMMON, METRICS
from fusionkit.metrics.remember import remembered, remembering
from fusionkit.names import check_name
from fusionkit.parallel import in_parallel

# How many pixels metrics that run side by side may have to do with, all of them together. Most
# metrics take up to 120 bytes a pixel, `qp` 280.
PIXELS_AT_ONCE = 2**23
Metrics = str | Iterable[str | Callable] | Mapping[str, Callable]


def evaluate(
    a: ImageLike,
    b: ImageLike,
    fused: ImageLike,
    metrics: Metrics | None = None,
    *,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Measure fused pictures against their sources.

    Colour pictures are measured by their luminance, and everything is rounded to 8 bits first, so
    that a picture in memory and its PNG file give the same numbers.

    Args:
        a, b, fused: three pictures (whatever `images.to_tensor` takes), three batches
            (B, C, H, W), or three folders whose pictures are matched by stem. A folder of fused
            pictures says which pairs are measured.
        metrics: see `choose`; by default `COMMON`, "all" for every metric.
        device: where to compute.
        workers: pictures that are loaded and measured side by side, or metrics of a single picture;
            by default one a CPU, and fewer metrics of a large picture.
        progress: show a bar over the pictures.

    Returns:
        One row a picture (the stem, or its number in a batch), one column a metric.
        `.mean()` gives the row of a paper's table, `summary` its confidence intervals.

    Raises:
        ValueError: an unknown metric, pictures of different sizes, values outside [0, 1]; the
            message names the picture.
        FileNotFoundError: a source of a fused picture is missing.

    Warns:
        A metric has no value for a picture, as it is constant or too small: NaN in the table.
    """
    chosen = choose(metrics)
    triples = _triples(a, b, fused)
    at_once = workers if len(triples) == 1 and torch.device(device).type == "cpu" else 1

    def row(name: str | int) -> dict[str, float]:
        return measure(name, *triples[name](), chosen, device, at_once)

    rows = list(in_parallel(row, list(triples), workers, progress=progress))
    index = pd.Index(list(triples), name="image")
    return pd.DataFrame(rows, index=index, columns=list(chosen))


def choose(metrics: Metrics | None) -> dict[str, Callable]:
    """Column names and functions of a choice of metrics.

    A choice is None (`COMMON`), "all", names among `METRICS`, functions of your own
    `metric(a, b, fused) -> (B,)` on (B, 1, H, W) in [0, 1], or a dictionary from column names to
    functions. Names and functions may be mixed; a function's column is its `__name__`.

    Raises:
        ValueError: an unknown name.
    """
    if metrics is None:
        metrics = COMMON
    elif isinstance(metrics, str) and metrics == "all":
        metrics = METRICS
    elif isinstance(metrics, str):
        metrics = [metrics]
    if isinstance(metrics, Mapping):
        return dict(metrics)
    return {
        (m.__name__ if callable(m) else m): (
            m if callable(m) else METRICS[check_name(m, METRICS, "metric")]
        )
        for m in metrics
    }


@torch.no_grad()
def measure(
    name: str | int,
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    metrics: Mapping[str, Callable],
    device: str | torch.device = "cpu",
    workers: int | None = 1,
) -> dict[str, float]:
    """One picture's row: (C, H, W) each, gray at 8 bits; `name` is for warnings and errors.

    `workers` metrics at a time; None is one a CPU, fewer for pictures beyond `PIXELS_AT_ONCE`.
    """
    sizes = ["×".join(map(str, x.shape[-2:])) for x in (a, b, fused)]
    if len(set(sizes)) > 1:
        raise ValueError(f"{name}: a, b and fused differ in size: {', '.join(sizes)}")
    if workers is None:
        pixels = max(1, fused.shape[-2] * fused.shape[-1])
        workers = max(1, min(os.cpu_count() or 1, PIXELS_AT_ONCE // pixels))
    with remembering(a, b, fused):
        levels = [_gray(x, device) for x in (a, b, fused)]

        why = "its definition gives no value for these pictures, as where one is constant"

        def value(function: Callable) -> tuple[float, str]:
            try:
                return function(*levels).item(), why
            except ValueError as error:  # too small for its window; the other metrics still tell
                return float("nan"), str(error)

        values = list(in_parallel(value, list(metrics.values()), workers))
    for metric, (found, why) in zip(metrics, values, strict=True):
        if found != found:
            warnings.warn(f"{metric} of {name} is NaN: {why}", stacklevel=1)
    return {metric: found for metric, (found, _) in zip(metrics, values, strict=True)}


def summary(table: pd.DataFrame, confidence: float = 0.95, resamples: int = 2000) -> pd.DataFrame:
    """Means of a table's columns with bootstrap confidence intervals over its rows.

    Percentile intervals from `resamples` draws of as many pictures, with a fixed seed; NaN for a
    single picture. Pictures without a value (NaN) are left out, column by column.

    Returns:
        One row a metric: `mean`, `low`, `high`, and `pictures`, the number of values.
    """
    rows = {}
    for metric in table.columns:
        values = table[metric].dropna().to_numpy()
        low = high = float("nan")
        if len(values) > 1:
            interval = stats.bootstrap(
                (values,),
                lambda x, axis: x.mean(axis),
                confidence_level=confidence,
                n_resamples=resamples,
                method="percentile",
                rng=0,
            ).confidence_interval
            low, high = interval.low, interval.high
        mean = values.mean() if len(values) else float("nan")
        rows[metric] = {"mean": mean, "low": low, "high": high, "pictures": len(values)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric")


@remembered
def _gray(image: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """(1, 1, H, W): the luminance at 8 bits."""
    return _eight_bit(luminance(_eight_bit(image)))[None].to(device)


def _eight_bit(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round() / 255


def _triples(a, b, fused) -> dict[str | int, Callable[[], list[torch.Tensor]]]:
    """What loads a, b and fused of each picture, by its name."""
    roles = {"a": a, "b": b, "fused": fused}
    if isinstance(fused, str | os.PathLike) and Path(fused).is_dir():
        folders = [(folder, list_images(folder)) for folder in (a, b, fused)]
        stems = list(folders[-1][1])
        for stem in stems:
            for folder, found in folders:
                if stem not in found:
                    raise FileNotFoundError(f"{folder}: no picture {stem!r} for {fused}/{stem}")
        return {stem: lambda s=stem: [to_tensor(x[s]) for _, x in folders] for stem in stems}
    if all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (a, b, fused)):
        lengths = [len(x) for x in (a, b, fused)]
        if len(set(lengths)) > 1:
            raise ValueError(f"batches of {lengths} pictures; expected as many of each")
        return {
            i: lambda i=i: [to_tensor(x[i], f"picture {i} of {role}") for role, x in roles.items()]
            for i in range(len(a))
        }
    name = Path(fused).stem if isinstance(fused, str | os.PathLike) else 0
    return {
        name: lambda: [
            to_tensor(x, None if isinstance(x, str | os.PathLike) else role)
            for role, x in roles.items()
        ]
    }
