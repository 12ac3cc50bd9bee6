"""Joint histograms of two pictures, on which mutual information and its relatives stand.

Bytes moved for a float64 pixel, as the metrics have it (both pictures read): eager 128 (by
`traffic.bytes_moved`), compiled 32 (the indices in one operation, then a library call that counts
them), Triton 16. The counters, 256 KiB a pair, are left out. Not yet measured on a GPU, where
pixels that share a counter also wait for each other, in the library call as in the twin.
"""

from __future__ import annotations

import torch

from fusionkit.kernels._dispatch import compiled, twin, twin_takes

BLOCK = 1024
tl = None  # triton.language, once the twin has run


def joint_counts(x: torch.Tensor, y: torch.Tensor, bins: int = 256) -> torch.Tensor:
    """How often each pair of levels occurs: (B, H, W) twice -> (B, bins, bins) int64.

    Levels 0 to bins - 1, rounded, halves to even; x along the rows. No gradient.
    """
    if x.shape == y.shape and twin_takes(x, y, types=(torch.float32, torch.float64)):
        return joint_counts_twin(x, y, bins)
    return joint_counts_reference(x, y, bins)


def joint_counts_reference(x: torch.Tensor, y: torch.Tensor, bins: int = 256) -> torch.Tensor:
    """`joint_counts` in plain PyTorch."""
    pairs = x.round().long().flatten(1) * bins + y.round().long().flatten(1)
    return counts(pairs, bins * bins).unflatten(1, (bins, bins))


def counts(indices: torch.Tensor, bins: int) -> torch.Tensor:
    """How often each of 0 to bins - 1 occurs in each row: (B, n) int64 -> (B, bins) int64."""
    offsets = torch.arange(len(indices), device=indices.device)[:, None] * bins
    found = torch.bincount((indices + offsets).flatten(), minlength=len(indices) * bins)
    return found.view(len(indices), bins)


def joint_counts_twin(x: torch.Tensor, y: torch.Tensor, bins: int = 256) -> torch.Tensor:
    """`joint_counts` by Triton; what lies outside of the bins is left out."""
    compiled(globals())
    pixels = x[0].numel()
    found = torch.zeros(len(x), bins, bins, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _count[(len(x) * -(-pixels // BLOCK),)](
            *(x.detach().contiguous(), y.detach().contiguous(), found, pixels),
            BINS=bins,
            BLOCK=BLOCK,
        )
    return found.long()


@twin
def _level(at, known):
    # Above 2^52 doubles have no halves, so adding and taking away rounds; halves go to even.
    shifted = tl.load(at, mask=known, other=0).to(tl.float64) + 6755399441055744.0
    return (shifted - 6755399441055744.0).to(tl.int32)


@twin
def _count(x, y, found, pixels, BINS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(pixels, BLOCK)
    item = (program // blocks).to(tl.int64)
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    known = pixel < pixels
    row = _level(x + item * pixels + pixel, known)
    column = _level(y + item * pixels + pixel, known)
    known &= (row >= 0) & (row < BINS) & (column >= 0) & (column < BINS)
    tl.atomic_add(found + (item * BINS + row) * BINS + column, 1, mask=known, sem="relaxed")
