"""The batches of a training run, and all its randomness, as functions of the seed.

The order of an epoch is drawn from generators that are seeded with (seed, epoch), a sample's
augmentation with (seed, step, place in the batch), and what the method draws with (seed, step,
process). So a run that was killed goes on as if nothing had happened, a sample looks the same
however many workers or processes read it, and a checkpoint needs no random states. accelerate's
own loader reads one batch ahead, past the step that a checkpoint speaks of, which is why
accelerate brings the devices and processes to `training.fit`, but not the batches.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

ORDER, SAMPLE, STEP = range(3)  # what a seed is for


def check_loader(loader: DataLoader, processes: int) -> None:
    """Raise a ValueError for a loader that `batches` cannot follow."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ValueError(
            "the loader has no batch sampler; expected a map-style dataset and a batch size, "
            "since a resume finds a sample by its number"
        )
    if len(loader) == 0:
        raise ValueError(
            f"the loader gives no batch: {len(loader.dataset)} samples, "
            f"batch size {loader.batch_size}, drop_last={loader.drop_last}"
        )
    if loader.batch_size is not None and loader.batch_size % processes:
        raise ValueError(f"batch size {loader.batch_size}, expected a multiple of {processes}")


class _SeededDataset(Dataset):
    """A dataset whose samples depend on their seed alone, not on what was read before them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, item: tuple[tuple[int, ...], int]):
        key, index = item
        seed_all(*key)
        return self.dataset[index]


def batches(
    loader: DataLoader, seed: int, start: int, steps: int, rank: int, processes: int
) -> Iterator[dict]:
    """This process's slices of the batches of steps start + 1 to `steps`; nothing else is read."""

    def schedule() -> Iterator[list[tuple[tuple[int, ...], int]]]:
        step = start
        epoch, skipped = divmod(start, len(loader))
        while step < steps:
            for batch in _epoch_order(loader, seed, epoch)[skipped : skipped + steps - step]:
                step += 1
                share = math.ceil(len(batch) / processes)
                places = [p % len(batch) for p in range(rank * share, (rank + 1) * share)]
                yield [((seed, SAMPLE, step, p), batch[p]) for p in places]
            epoch, skipped = epoch + 1, 0

    # One loader for the whole run, so that workers are started once and read across epochs.
    yield from DataLoader(
        _SeededDataset(loader.dataset),
        batch_sampler=schedule(),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def _epoch_order(loader: DataLoader, seed: int, epoch: int) -> list[list[int]]:
    """The sample numbers of every batch of an epoch, the same in all processes."""
    seed_all(seed, ORDER, epoch)
    generator = getattr(loader.sampler, "generator", None)
    if generator is not None:
        generator.manual_seed(torch.initial_seed())
    return list(loader.batch_sampler)


def parts_of(batch: dict, parts: int) -> list[tuple[dict, float]]:
    """A batch cut along its items into at most `parts` parts, each with its share of the items.

    Entries are tensors (B, ...), lists of B, or dictionaries of such, as in TC-MoA's batches.
    """
    items = _length(batch)
    count = min(parts, items)
    edges = [i * items // count for i in range(count + 1)]
    spans = [slice(*pair) for pair in itertools.pairwise(edges)]
    return [(_items(batch, span), (span.stop - span.start) / items) for span in spans]


def _length(batch: dict) -> int:
    first = next(iter(batch.values()))
    return _length(first) if isinstance(first, dict) else len(first)


def _items(batch: dict, span: slice) -> dict:
    return {k: _items(v, span) if isinstance(v, dict) else v[span] for k, v in batch.items()}


def seed_all(*key: int) -> None:
    """Seed torch (all devices), NumPy and Python from a key of non-negative integers."""
    # Three seeds, since torch and NumPy run the same algorithm: one would give them one stream.
    for_torch, for_numpy, for_python = np.random.SeedSequence(key).generate_state(3).tolist()
    torch.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002
    random.seed(for_python)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give the caller's generators back as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
