"""Tables of metrics for a pair, a batch, or folders of pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from fusionkit.color import luminance
from fusionkit.images import ImageLike, list_images, to_tensor
from fusionkit.metrics.features import average_gradient, spatial_frequency, standard_deviation
from fusionkit.metrics.information import entropy
from fusionkit.metrics.structure import scd, ssim
from fusionkit.names import check_name

METRICS = {
    metric.__name__: metric
    for metric in (entropy, standard_deviation, spatial_frequency, average_gradient, scd, ssim)
}


def evaluate(
    a: ImageLike,
    b: ImageLike,
    fused: ImageLike,
    metrics: Iterable[str] | Mapping[str, Callable] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Measure fused pictures against their sources.

    Colour pictures are measured by their luminance, and everything is rounded to 8 bits first, so
    that a picture in memory and its PNG file give the same numbers.

    Args:
        a, b, fused: three pictures (whatever `images.to_tensor` takes), three batches
            (B, C, H, W), or three folders whose pictures are matched by stem. A folder of fused
            pictures says which pairs are measured.
        metrics: names among `METRICS`, by default all; or a dictionary from column names to
            functions `metric(a, b, fused) -> (B,)` on (B, 1, H, W), your own among them.
        progress: show a bar over the pictures of a folder.

    Returns:
        One row a picture (the stem, or its number in a batch), one column a metric.
        `.mean()` gives the row of a paper's table.

    Raises:
        ValueError: an unknown metric, pictures of different sizes, values outside [0, 1].
        FileNotFoundError: a source of a fused picture is missing.
    """
    chosen = METRICS if metrics is None else metrics
    if not isinstance(chosen, Mapping):
        chosen = {name: METRICS[check_name(name, METRICS, "metric")] for name in chosen}
    rows = {}
    for index, triple in _triples(a, b, fused, progress):
        sizes = {tuple(x.shape[-2:]) for x in triple}
        if len(sizes) > 1:
            listed = ", ".join("×".join(map(str, x.shape[-2:])) for x in triple)
            raise ValueError(f"{index}: a, b and fused differ in size: {listed}")
        levels = [_eight_bit(luminance(_eight_bit(x)))[None] for x in triple]
        rows[index] = {name: metric(*levels).item() for name, metric in chosen.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(chosen)).rename_axis("image")


def _eight_bit(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round() / 255


def _triples(a, b, fused, progress: bool) -> Iterator[tuple[str | int, list[torch.Tensor]]]:
    if isinstance(fused, str | os.PathLike) and Path(fused).is_dir():
        folders = {Path(folder): list_images(folder) for folder in (a, b, fused)}
        for stem in tqdm(list(folders[Path(fused)]), unit="picture", disable=not progress):
            for folder, found in folders.items():
                if stem not in found:
                    raise FileNotFoundError(f"{folder}: no picture {stem!r} for {fused}/{stem}")
            yield stem, [to_tensor(found[stem]) for found in folders.values()]
    elif all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (a, b, fused)):
        lengths = [len(x) for x in (a, b, fused)]
        if len(set(lengths)) > 1:
            raise ValueError(f"batches of {lengths} pictures; expected as many of each")
        for index, triple in enumerate(zip(a, b, fused, strict=True)):
            yield index, [to_tensor(x, f"picture {index}") for x in triple]
    else:
        name = Path(fused).stem if isinstance(fused, str | os.PathLike) else 0
        yield name, [to_tensor(x) for x in (a, b, fused)]
