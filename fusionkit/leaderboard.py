"""Many fusion methods on the same pairs, measured in one run: tables, intervals, ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pandas as pd
import torch
from torch import nn
from torch.utils.data import Dataset

from fusionkit.baselines import BASELINES
from fusionkit.fuse import fuse, load_network
from fusionkit.images import list_images, to_tensor
from fusionkit.metrics.catalogue import SMALLER_IS_BETTER
from fusionkit.metrics.evaluate import Metrics, choose, measure, summary
from fusionkit.metrics.remember import remembering
from fusionkit.models.registry import model_entry
from fusionkit.parallel import in_parallel

Method = nn.Module | Callable | str | os.PathLike


@dataclass(frozen=True)
class Leaderboard:
    """Results of `leaderboard`.

    Attributes:
        images: one row a method and picture (indexed by `method` and `image`), one column a
            metric.
        smaller_is_better: the metrics whose order is turned round in `ranks`.
    """

    images: pd.DataFrame
    smaller_is_better: frozenset[str]

    def means(self) -> pd.DataFrame:
        """One row a method, one column a metric: the papers' kind of table."""
        return self.images.groupby("method", sort=False).mean()

    def intervals(self, confidence: float = 0.95) -> pd.DataFrame:
        """Means with bootstrap intervals over the pictures, indexed by method and metric."""
        groups = self.images.groupby("method", sort=False)
        tables = {name: summary(table, confidence) for name, table in groups}
        return pd.concat(tables, names=["method"])

    def ranks(self) -> pd.DataFrame:
        """Each metric's order of the methods' means, 1 the best, and `mean_rank` over all metrics.

        Ties share their mean rank. Sorted by `mean_rank`: one opinion among many, since metrics
        that measure nearly the same thing vote several times.
        """
        signs = pd.Series({m: 1 if m in self.smaller_is_better else -1 for m in self.images})
        ranks = (self.means() * signs).rank()
        return ranks.assign(mean_rank=ranks.mean(axis=1)).sort_values("mean_rank", kind="stable")


def leaderboard(
    methods: Mapping[str, Method],
    pairs: Dataset | Sequence[dict],
    metrics: Metrics | None = None,
    *,
    task: str = "ivif",
    baselines: bool = True,
    stretch: Collection[str] = (),
    smaller_is_better: Collection[str] = SMALLER_IS_BETTER,
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Leaderboard:
    """Fuse every pair by every method and measure all results, gray, at 8 bits.

    Args:
        methods: what each line of the table stands for: a network or any other function
            `f(a, b) -> fused` on (1, 1, H, W); a name of `list_models()`, whose weights for `task`
            ship; or a folder of fused pictures made by anyone's code, matched by stem.
        pairs: items with "a", "b" and "name", such as `load_dataset(...)` gives.
        metrics: see `metrics.evaluate.choose`.
        task: whose weights to take for methods given by a model's name.
        baselines: put average, maximum, Laplacian pyramid and guided filter into the table too.
        stretch: names of methods given as networks whose results are spread over [0, 1] first, the
            recipe of ReFusion's release. Models given by name know it themselves.
        smaller_is_better: metrics whose order is the other way round; name your own there.
        device: where networks run; metrics are computed on the CPU.
        workers: pictures measured side by side; by default one a CPU.

    Raises:
        ValueError: no pair, or two of one name; an unknown metric or model; a method with a
            baseline's name; a picture of another size.
        FileNotFoundError: a folder lacks pictures; all that are missing are named.
    """
    if taken := set(methods) & set(BASELINES) if baselines else ():
        raise ValueError(f"{sorted(taken)} name baselines; give the methods other names")
    if unknown := set(stretch) - set(methods):
        raise ValueError(f"stretch names {sorted(unknown)}; expected among {list(methods)}")
    if not len(pairs):
        raise ValueError("no pair to measure")
    chosen = choose(metrics)
    # One network and picture at a time: `fuse` switches it to evaluation and back, and maps are
    # large.
    lock = Lock()
    names = [pairs[i]["name"] for i in range(len(pairs))]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several pairs are named {twice[0]!r}; expected a name for each")
    fusers = {
        name: _fuser(name, method, names, task, name in stretch, device, lock)
        for name, method in methods.items()
    }
    if baselines:
        for name, build in BASELINES.items():
            fusers[name] = _network_fuser(build(), False, lock)

    def rows(index: int) -> dict[tuple, dict[str, float]]:
        pair = pairs[index]
        a, b = (to_tensor(pair[key], f"{pair['name']} {key}") for key in "ab")
        with remembering(a, b):  # what metrics need of the sources serves all methods
            return {
                (name, pair["name"]): measure(
                    f"{name} {pair['name']}", a, b, fuser(a, b, pair["name"]), chosen
                )
                for name, fuser in fusers.items()
            }

    found = {}
    for result in in_parallel(rows, range(len(pairs)), workers, progress=progress, unit="pair"):
        found |= result
    order = sorted(found, key=lambda key: list(fusers).index(key[0]))
    index = pd.MultiIndex.from_tuples(order, names=["method", "image"])
    images = pd.DataFrame([found[key] for key in order], index=index, columns=list(chosen))
    return Leaderboard(images, frozenset(smaller_is_better))


def _fuser(name, method, names, task, stretch, device, lock) -> Callable:
    """`f(a, b, name) -> fused` for any kind of method."""
    is_path = isinstance(method, os.PathLike) or (isinstance(method, str) and os.sep in method)
    if is_path or (isinstance(method, str) and Path(method).is_dir()):
        found = list_images(method)
        if missing := [n for n in names if n not in found]:
            raise FileNotFoundError(
                f"{method}: no picture of {name} for {len(missing)} of {len(names)} pairs: "
                + ", ".join(missing[:10])
                + (" …" if len(missing) > 10 else "")
            )
        return lambda a, b, n: to_tensor(found[n])
    if isinstance(method, str):
        network = load_network(method, task, device=device)
        return _network_fuser(network, model_entry(method).stretch, lock)
    if isinstance(method, nn.Module):
        return _network_fuser(load_network(method, device=device), stretch, lock)
    return lambda a, b, n: method(a[None], b[None])[0].clamp(0, 1)


def _network_fuser(network: nn.Module, stretch: bool, lock: Lock) -> Callable:
    # Metrics take memory beside it: on a CPU a network that streams goes in small tiles, with the
    # same result.
    on_cpu = all(p.device.type == "cpu" for p in network.parameters())
    tile = getattr(network, "cpu_tile", None) if on_cpu and hasattr(network, "stream") else None

    def fused(a: torch.Tensor, b: torch.Tensor, name: str) -> torch.Tensor:
        with lock:
            return fuse(a, b, model=network, color="gray", stretch=stretch, tile=tile)

    return fused
