"""Downloading pairs of plain files, checked by SHA-256, into fusionkit's layout."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import pooch
from tqdm.auto import tqdm


def download_split(
    folder: str | os.PathLike, split: str, urls: Mapping[str, str], hashes: Mapping[str, str]
) -> Path:
    """Fetch the files of one split into `folder/split/SOURCE/` and return `folder/split`.

    The files gather in a hidden folder beside it, which takes its place once every hash is right:
    an interrupted or refused download leaves nothing that could pass for the data set.

    Args:
        urls: the remote folder of each source, such as {"ir": "https://…", "vi": "https://…"}.
        hashes: SHA-256 by "SPLIT/SOURCE/FILE", as `read_hashes` gives them; those of other splits
            are passed over.

    Raises:
        FileExistsError: `folder/split` is there already.
        ValueError: no hash is known for the split, or a file's hash is wrong; the message names
            the file.
        OSError: the server cannot be reached, lacks a file, or the disk is full.
    """
    folder = Path(folder)
    target = folder / split
    if target.exists():
        raise FileExistsError(f"{target}: already there; remove it to download the split anew")
    wanted = [name for name in hashes if PurePosixPath(name).parts[0] == split]
    if not wanted:
        raise ValueError(f"no SHA-256 is known for split {split!r}, so nothing can be checked")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{split}.") as part, _quiet_pooch():
        store = pooch.create(
            part,
            base_url="",
            registry={name: f"sha256:{hashes[name]}" for name in wanted},
            urls={name: _url(urls, name) for name in wanted},
            retry_if_failed=2,
        )
        for name in tqdm(wanted, desc=f"{folder.name}/{split}", unit="file"):
            try:
                fetched = Path(store.fetch(name, downloader=pooch.HTTPDownloader(timeout=30)))
            except ValueError as error:  # pooch names the last part of the path only
                raise ValueError(f"{name} from {_url(urls, name)}: {error}") from error
            fetched.chmod(0o644)  # pooch leaves files that only their owner can read
        os.replace(Path(part) / split, target)
    return target


def _url(urls: Mapping[str, str], name: str) -> str:
    _, source, file = PurePosixPath(name).parts
    return f"{urls[source].rstrip('/')}/{quote(file)}"


def read_hashes(path: str | os.PathLike) -> dict[str, str]:
    """Lines "SPLIT/SOURCE/FILE SHA256" of a registry file, as a dict."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return dict(line.rsplit(maxsplit=1) for line in lines if line.strip())


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    # pooch reports each file; with hundreds of small ones that would drown the progress bar.
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
