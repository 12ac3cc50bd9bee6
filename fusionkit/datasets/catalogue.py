"""Public data sets by name: where they come from, what they look like on disk, loading them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusionkit.datasets.download import download_split, read_hashes
from fusionkit.datasets.entries import ENTRIES, DatasetInfo, Layout
from fusionkit.datasets.folders import PairFolder
from fusionkit.datasets.labelled import LabelledFolder, PackedFolder
from fusionkit.names import check_name, check_task

# The lists belong to the repository, not to the package: an installed wheel has none and knows
# only those splits that are folders.
SPLITS = Path(__file__).resolve().parents[2] / "data" / "splits"

_CATALOGUE = {info.name: info for info in ENTRIES}


def list_datasets(task: str | None = None) -> list[str]:
    """The names of all data sets, or of a task's ("ivif", "mfif", "meif", "mif").

    Raises:
        ValueError: no such task.
    """
    if task is not None:
        check_task(task)
    return [info.name for info in ENTRIES if task in (None, info.task)]


def dataset_info(name: str) -> DatasetInfo:
    """What the catalogue knows of a data set: task, source, terms, citation, layouts.

    Raises:
        ValueError: no such data set; the message lists the known and suggests the nearest.
    """
    return _CATALOGUE[check_name(name, _CATALOGUE, "data set")]


def load_dataset(
    name: str,
    root: str | os.PathLike | None = None,
    split: str = "test",
    download: bool = False,
    names: Iterable[str] | None = None,
    luminance: bool = False,
    labels: bool = False,
) -> PairFolder | LabelledFolder:
    """The pairs of a named data set, in fusionkit's layout NAME/SPLIT/SOURCE or as published.

    Args:
        name: one of `list_datasets()`.
        root: the folder that holds the data set's folder, or that folder itself. By default the
            first that holds it among $FUSIONKIT_DATA, $FUSIONKIT_SHARED/data and ./data.
        split: one of `dataset_info(name).splits`.
        download: fetch the split if it is not there and its publisher has plain files, into `root`
            (by default $FUSIONKIT_DATA, else ./data). Each file is checked by the SHA-256 of the
            copy that fusionkit was tested with.
        names: use only these pairs.
        luminance: give one-channel luminance.
        labels: items gain `labels` (H, W) int64, or `boxes` (N, 4) and `classes` (N,): see
            `LabelledFolder`. `dataset_info(name)` has the names of the classes, and which it is.

    Raises:
        ValueError: unknown name or split, `labels` of a set that has none, `names` outside the
            split, or what `PairFolder` finds wrong with the files; with `download`, no plain files
            or a wrong hash.
        FileNotFoundError: nothing found; the message says what was looked for and where to get it.
    """
    info = dataset_info(name)
    if split not in info.splits:
        raise ValueError(f"{name} has no split {split!r}; known: {', '.join(info.splits)}")
    if labels and not info.labels:
        having = ", ".join(known.name for known in ENTRIES if known.labels)
        raise ValueError(f"{name} has no labels; those with labels: {having}")
    options = {"names": names, "luminance": luminance}
    looked = []
    for folder, layout in _candidates(info, split, root):
        if labels and not layout.labels:
            continue
        pair = [folder / path.format(split=split) for path in (layout.a, layout.b)]
        marked = folder / layout.labels.format(split=split)
        if _holds(*pair, layout) and (marked.is_dir() or not labels):
            pairs = _open(info, split, layout, folder, pair, **options)
            return LabelledFolder(pairs, marked, info.labels, info.classes) if labels else pairs
        extra = f", labels in {marked}" if labels else ""
        looked.append(f"  {pair[0]} and {pair[1]}" + _files(layout) + extra)
    if not download:
        raise FileNotFoundError(_how_to_get(info, split, looked))
    where = Path(root) if root is not None else Path(os.environ.get("FUSIONKIT_DATA") or "data")
    target = _download(info, split, where / name)
    return PairFolder(*(target / source for source in info.sources), **options)


def split_names(name: str, split: str) -> list[str]:
    """The stems of a split's pairs, from data/splits/NAME_SPLIT.txt.

    Raises:
        ValueError: unknown data set.
        FileNotFoundError: there is no such list.
    """
    path = SPLITS / f"{dataset_info(name).name}_{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such list; the lists are part of the repository, not of an installed "
            "package, which can read only splits that are folders (NAME/SPLIT/SOURCE)"
        )
    return path.read_text(encoding="utf-8").splitlines()


def catalogue_table() -> str:
    """The catalogue as the Markdown table of data/README.md."""
    header = ("name", "data set", "task", "pairs", "splits", "source", "terms", "folders", "get it")
    rows = [header, ("---",) * len(header), *(_row(info) for info in ENTRIES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(info: DatasetInfo) -> tuple[str, ...]:
    layouts = "; ".join(_described(layout) for layout in info.layouts)
    get = "`download=True`, or by hand." if info.urls else "By hand."
    return (
        f"`{info.name}`",
        f"{info.title} ({info.citation})",
        info.task,
        f"{info.pairs:,}",
        ", ".join(info.splits),
        f"<{info.source}>",
        info.terms,
        layouts,
        f"{get} {info.note}".strip(),
    )


def _described(layout: Layout) -> str:
    text = f"`{layout.a}`, `{layout.b}`".replace("{split}", "SPLIT") + _files(layout)
    if layout.packed:
        text = f"`{layout.a}` (four channels, split by `{layout.split_list}`)".replace(
            "{split}", "SPLIT"
        )
    if layout.splits:
        text += f" for {', '.join(layout.splits)}"
    if layout.labels:
        text += f", labels in `{layout.labels.replace('{split}', 'SPLIT')}`"
    return text if layout.verified else f"{text} (as published, unverified)"


def _files(layout: Layout) -> str:
    return " (files *{}, *{})".format(*layout.endings) if any(layout.endings) else ""


def _default_roots() -> list[Path]:
    roots = [Path("data")]
    if shared := os.environ.get("FUSIONKIT_SHARED"):
        roots.insert(0, Path(shared) / "data")
    if own := os.environ.get("FUSIONKIT_DATA"):
        roots.insert(0, Path(own))
    return roots


def _candidates(
    info: DatasetInfo, split: str, root: str | os.PathLike | None
) -> Iterator[tuple[Path, Layout]]:
    roots = [Path(root)] if root is not None else _default_roots()
    folders = [base / own for base in roots for own in (info.name, *info.folders)]
    if root is not None:
        folders.append(Path(root))  # the data set's own folder, whatever its name
    for folder in folders:
        for layout in info.layouts:
            if not layout.splits or split in layout.splits:
                yield folder, layout


def _holds(a: Path, b: Path, layout: Layout) -> bool:
    if not (a.is_dir() and b.is_dir()):
        return False
    # Without sub folders, any folder would do: look for a file of the right name.
    return not any(layout.endings) or any(a.glob(f"*{layout.endings[0]}.*"))


def _open(
    info: DatasetInfo,
    split: str,
    layout: Layout,
    folder: Path,
    pair: list[Path],
    names: Iterable[str] | None,
    luminance: bool,
) -> PairFolder:
    if layout.listed or layout.split_list:
        listed = (
            _listed_stems(folder / layout.split_list.format(split=split))
            if layout.split_list
            else split_names(info.name, split)
        )
        names = listed if names is None else list(names)
        if strangers := sorted(set(names) - set(listed)):
            raise ValueError(f"not in {info.name}'s split {split!r}: {', '.join(strangers)}")
    if layout.packed:
        return PackedFolder(pair[0], names, luminance)
    return PairFolder(*pair, names=names, luminance=luminance, endings=layout.endings)


def _listed_stems(path: Path) -> list[str]:
    """The stems of a release's own list, one a line, with or without a suffix."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list, which tells the pairs of the split")
    lines = path.read_text(encoding="utf-8").split()
    # MFNet's list for training names flipped copies too; crops are flipped anyway.
    return [Path(line).stem for line in lines if not Path(line).stem.endswith("_flip")]


def _how_to_get(info: DatasetInfo, split: str, looked: list[str]) -> str:
    lines = [f"{info.title}, split {split!r}, is not there. Looked for", *dict.fromkeys(looked)]
    lines.append(f"Source: {info.source} (terms: {info.terms}). {info.note}".rstrip())
    if info.urls:
        lines.append(f"load_dataset({info.name!r}, split={split!r}, download=True) fetches it.")
    else:
        lines.append("It has to be fetched by hand; data/README.md describes the folders.")
    return "\n".join(lines)


def _download(info: DatasetInfo, split: str, folder: Path) -> Path:
    if info.urls is None:
        raise ValueError(
            f"{info.title} has no plain files to download; get it by hand from {info.source} "
            f"(terms: {info.terms})"
        )
    registry = SPLITS / f"{info.name}_sha256.txt"
    if not registry.is_file():
        raise FileNotFoundError(
            f"{registry}: no such file; the hashes are part of the repository, not of an installed "
            "package, and nothing is downloaded unchecked"
        )
    urls = dict(zip(info.sources, info.urls, strict=True))
    return download_split(folder, split, urls, read_hashes(registry))
