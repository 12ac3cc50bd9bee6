"""Pairs of pictures in two folders, and random training crops of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from fusionkit.color import luminance
from fusionkit.images import list_images, to_tensor

MAX_NAMED = 10  # an error names this many files and counts the rest


class PairFolder(Dataset):
    """The pairs of two folders, matched by the stems of their files.

    Args:
        a: folder of the first source.
        b: folder of the second source; it may be the same folder if `endings` differ.
        names: the stems to use, in this order; by default all, in alphabetical order. With
            `names`, other files of the folders need no partner.
        luminance: give one-channel Rec. 601 luminance in place of gray or RGB as stored.
        endings: what the stems of a and of b end in beyond the pair's name, such as ("-A", "-B")
            for "lytro-01-A.jpg" and "lytro-01-B.jpg"; files without it are passed over.

    Item: `{"a": (C, H, W), "b": (C, H, W), "name": stem}`, float32 in [0, 1], C = 1 or 3 as each
    file has it. `names` lists the stems and `paths` the pairs of files in the order of the items.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: a folder without pictures, files without a partner, `names` that are in
            neither or only one folder; on reading, a broken file or two sizes in one pair.
    """

    def __init__(
        self,
        a: str | os.PathLike,
        b: str | os.PathLike,
        names: Iterable[str] | None = None,
        luminance: bool = False,
        endings: tuple[str, str] = ("", ""),
    ):
        self.a, self.b = Path(a), Path(b)
        self.luminance = luminance
        found_a, found_b = (
            _by_pair_name(folder, ending)
            for folder, ending in zip((self.a, self.b), endings, strict=True)
        )
        if names is None:
            self.names = sorted(found_a.keys() & found_b.keys())
            _check_partners(self.a, found_a, self.b, found_b)
        else:
            self.names = list(names)
            _check_names(self.names, {self.a: found_a, self.b: found_b})
        self.paths = [(found_a[name], found_b[name]) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        path_a, path_b = self.paths[index]
        a, b = to_tensor(path_a), to_tensor(path_b)
        if a.shape[-2:] != b.shape[-2:]:
            raise ValueError(
                f"{path_a} is {_size(a)} but {path_b} is {_size(b)}; a pair must be registered "
                "and of one size"
            )
        if self.luminance:
            a, b = luminance(a), luminance(b)
        return {"a": a, "b": b, "name": self.names[index]}


def _by_pair_name(folder: Path, ending: str) -> dict[str, Path]:
    found = {
        stem.removesuffix(ending): path
        for stem, path in list_images(folder).items()
        if stem.endswith(ending)
    }
    if not found:
        raise ValueError(f"{folder}: holds no picture whose stem ends in {ending!r}")
    return found


def _check_partners(a: Path, found_a: dict, b: Path, found_b: dict) -> None:
    complaints = [
        f"{len(alone)} in {folder} without a partner in {other}: {_listed(alone)}"
        for folder, other, alone in (
            (a, b, [path.name for stem, path in found_a.items() if stem not in found_b]),
            (b, a, [path.name for stem, path in found_b.items() if stem not in found_a]),
        )
        if alone
    ]
    if complaints:
        raise ValueError("pairs are matched by stem; " + "; ".join(complaints))


def _check_names(names: list[str], folders: dict[Path, dict]) -> None:
    if not names:
        raise ValueError("names is empty; leave it out to use every pair")
    repeated = [name for name, count in _counts(names).items() if count > 1]
    if repeated:
        raise ValueError(f"names holds {_listed(repeated)} more than once")
    complaints = []
    for folder, found in folders.items():
        missing = [name for name in names if name not in found]
        if missing:
            complaints.append(f"{folder} lacks {len(missing)} of them: {_listed(missing)}")
    if complaints:
        raise ValueError(f"{len(names)} names were asked for; " + "; ".join(complaints))


def _counts(names: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-2]}×{image.shape[-1]}"


class RandomCrops(Dataset):
    """`count` square crops of a data set of pairs, repeatable item by item.

    Item k depends on (`seed`, k) alone: which pair, where the crop lies, how it is flipped and
    turned. A run resumed at item k, or spread over any number of workers or processes, therefore
    sees the same crops. Each pass over the pairs takes every pair once, in a new order.

    Args:
        dataset: a PairFolder, a ConcatDataset of several, or any map-style data set of dicts with
            "a", "b" and perhaps "target", each (1 or 3, H, W) in [0, 1] and of one size.
        size: the crop's side. Smaller pictures are enlarged by reflection first.
        count: how many crops; by default one pass over the pairs.
        seed: a non-negative integer.
        augment: flip and turn by multiples of 90°, all eight ways equally likely.
        cache_gb: decoded pairs are kept as float32 luminance (exact; 8 bytes a pixel of a pair, so
            RoadScene's 171 take about 0.2 GB) until they fill this much memory, in each worker
            process; the rest are decoded anew at each use.
        color: crops of RGB in place of luminance; gray pictures have three equal channels.

    Item: `{"a": (C, size, size), "b": (C, size, size)}`, C = 1, or 3 with `color`, and "target"
    where every source has one, so that the default collate works.

    Raises:
        ValueError: a size, count or seed out of range, or an empty data set; on reading, pictures
            of one item that differ in size.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int = 128,
        count: int | None = None,
        seed: int = 0,
        augment: bool = True,
        cache_gb: float = 2.0,
        color: bool = False,
    ):
        pairs = len(dataset)
        if pairs == 0:
            raise ValueError("the data set is empty; expected at least one pair")
        count = pairs if count is None else count
        if size < 1 or count < 1 or seed < 0:
            raise ValueError(
                f"size {size}, count {count}, seed {seed}; expected size and count of at least 1 "
                "and a seed of at least 0"
            )
        self.dataset, self.size, self.count = dataset, size, count
        self.seed, self.augment, self.color = seed, augment, color
        self.keys = ("a", "b", "target") if _all_have_target(dataset) else ("a", "b")
        self._order: tuple[int, np.ndarray] | None = None
        self._cache: dict[int, torch.Tensor] = {}
        self._cache_left = int(cache_gb * 2**30)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        if not 0 <= k < self.count:
            raise IndexError(f"crop {k} of {self.count}")
        planes = self._planes(self.pair_index(k))
        planes = _pad_to(planes, self.size)
        crop = self._cut(planes, *self._place(k, *planes.shape[-2:]))
        # A crop is a view into the cached picture until it is cloned.
        crops = crop.unflatten(0, (len(self.keys), -1))
        return {key: planes.clone() for key, planes in zip(self.keys, crops, strict=True)}

    def _place(self, k: int, height: int, width: int) -> tuple[int, int, bool, int]:
        """Crop k of a picture of this size: top, left, whether flipped, quarter turns."""
        rng = np.random.default_rng((self.seed, 1, k))
        top = int(rng.integers(height - self.size + 1))
        left = int(rng.integers(width - self.size + 1))
        if not self.augment:
            return top, left, False, 0
        return top, left, bool(rng.integers(2)), int(rng.integers(4))

    def _cut(
        self, planes: torch.Tensor, top: int, left: int, flipped: bool, turns: int
    ) -> torch.Tensor:
        """A view of (N, H, W): cut, then flipped from left to right, then turned."""
        crop = planes[:, top : top + self.size, left : left + self.size]
        return (crop.flip(-1) if flipped else crop).rot90(turns, (-2, -1))

    def pair_index(self, k: int) -> int:
        """Which item of the underlying data set crop k is cut from."""
        turn, position = divmod(k, len(self.dataset))
        if self._order is None or self._order[0] != turn:
            rng = np.random.default_rng((self.seed, 0, turn))
            self._order = turn, rng.permutation(len(self.dataset))
        return int(self._order[1][position])

    def _planes(self, index: int) -> torch.Tensor:
        """The luminance or RGB planes of an item, (len(keys) · C, H, W)."""
        if index in self._cache:
            return self._cache[index]
        item = self.dataset[index]
        named = item.get("name", f"item {index}")
        missing = [key for key in self.keys if key not in item]
        if missing:
            raise ValueError(f"{named} has no {', '.join(missing)}; expected {self.keys}")
        shapes = {key: _size(item[key]) for key in self.keys}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{named}: sizes differ: {shapes}")
        images = [item[key] for key in self.keys]
        planes = [x.expand(3, -1, -1) if self.color else luminance(x) for x in images]
        planes = torch.cat(planes)
        # Every pair is used once a pass, so evicting (LRU) would miss each time: keep what fits.
        if planes.nbytes <= self._cache_left:
            self._cache[index] = planes
            self._cache_left -= planes.nbytes
        return planes


def _all_have_target(dataset: Dataset) -> bool:
    """Whether the first item of every source has a target; a source's items are all alike."""
    if isinstance(dataset, ConcatDataset):
        return all(_all_have_target(part) for part in dataset.datasets if len(part))
    first: Mapping = dataset[0]
    return "target" in first


def _pad_to(planes: torch.Tensor, size: int) -> torch.Tensor:
    """Enlarge (N, H, W) by reflection on both sides until no side is shorter than `size`."""
    missing = [max(0, size - side) for side in planes.shape[-2:]]
    if not any(missing):
        return planes
    margins = [(0, 0)] + [(total // 2, total - total // 2) for total in missing]
    # NumPy reflects as often as it takes; torch refuses a margin wider than the picture.
    return torch.from_numpy(np.pad(planes.numpy(), margins, mode="reflect"))
