"""Several networks on the same pairs, one table: means of metrics, as papers print them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pandas as pd
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fusionkit.fuse import fuse
from fusionkit.metrics import evaluate


def compare(
    networks: dict[str, nn.Module],
    pairs: Dataset,
    metrics: Iterable[str] | Mapping[str, Callable] | None = None,
    *,
    stretch: bool = True,
    device: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Fuse every pair with every network, in gray, and measure the results at 8 bits.

    Args:
        networks: by the name that the table shall show; `forward(a, b) -> fused`.
        pairs: items with "a", "b" and "name", such as a PairFolder.
        metrics: as `evaluate` takes them; by default all.
        stretch: to the picture's minimum and maximum, the recipe of ReFusion's release.

    Returns:
        One row a network and picture, indexed by both; `.groupby("network").mean()` is the
        paper's kind of table.
    """
    tables = []
    total = len(networks) * len(pairs)
    with tqdm(total=total, unit="picture", disable=not progress) as bar:
        for index in range(len(pairs)):
            pair = pairs[index]
            for name, network in networks.items():
                fused = fuse(
                    pair["a"],
                    pair["b"],
                    model=network,
                    color="gray",
                    stretch=stretch,
                    device=device,
                )
                row = evaluate(pair["a"], pair["b"], fused, metrics)
                tables.append(row.assign(network=name, image=pair["name"]))
                bar.update()
    return pd.concat(tables).set_index(["network", "image"])
