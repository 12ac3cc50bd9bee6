"""The field's MATLAB values, row by row, and pictures to measure. Not a test file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image


def solid_rows(names: Iterable[str]) -> list:
    """Parameters for a test: the rows marked `solid` of these metrics, or one that is skipped."""
    table = Path(os.environ.get("FUSIONKIT_SHARED", "")) / "metrics" / "reference.csv"
    if not table.is_file():
        skip = pytest.mark.skip("set FUSIONKIT_SHARED to the folder of reference data")
        return [pytest.param(None, marks=skip)]
    rows = pd.read_csv(table)
    rows = rows[(rows.solid == "yes") & rows.name.isin(set(names))]
    return [
        pytest.param(row, id=f"{row['name']}-{row.fused}-{row.implementation.split()[0]}")
        for _, row in rows.iterrows()
    ]


def pictures(row: pd.Series, shared: Path) -> list[torch.Tensor]:
    """a, b and fused of a row, (1, 1, H, W) float64 in [0, 1]."""
    folder = shared / "metrics" / "pictures"
    return [read(folder / row[key]) for key in ("image_a", "image_b", "fused")]


@cache
def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)) / 255)[None, None]


def triple(batch: int = 3, size=(40, 52)) -> list[torch.Tensor]:
    """a, b and fused: smooth random pictures of whole gray levels, float32."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3 * batch, 1, 8, 10, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    noisy = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return list((noisy.clamp(0, 1) * 255).round().div(255).unflatten(0, (3, batch)))


def related(batch: int = 3, size=(176, 180)) -> list[torch.Tensor]:
    """As `triple`, with a fused picture which is mostly the sources' mean."""
    a, b, noise = triple(batch, size)
    return [a, b, ((2 * a + 2 * b + noise) * 51).round() / 255]


def preserved(sigmoids) -> float:
    """What the edge metrics give a pixel whose gradient is the source's."""
    g = sigmoids.gamma_g / (1 + math.exp(-sigmoids.kappa_g * (1 - sigmoids.sigma_g)))
    angle = 1 + math.exp(-sigmoids.kappa_angle * (1 - sigmoids.sigma_angle))
    return g * sigmoids.gamma_angle / angle
