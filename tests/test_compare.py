"""Comparing networks on pairs."""

import torch
from torch import nn

import fusionkit as fk
from fusionkit.compare import compare


class Pick(nn.Module):
    """Returns its first source."""

    def forward(self, a, b):
        return a


class Mean(nn.Module):
    """Returns the average."""

    def forward(self, a, b):
        return (a + b) / 2


def test_each_network_is_measured_on_each_pair():
    generator = torch.Generator().manual_seed(0)
    pairs = [
        {"a": torch.rand(1, 16, 18, generator=generator),
         "b": torch.rand(3, 16, 18, generator=generator), "name": name}
        for name in ("first", "second")
    ]  # fmt: skip
    table = compare(
        {"pick": Pick(), "mean": Mean()}, pairs, ["ssim"], stretch=False, progress=False
    )
    assert list(table.index) == [
        ("pick", "first"), ("mean", "first"), ("pick", "second"), ("mean", "second"),
    ]  # fmt: skip
    expected = fk.evaluate(pairs[1]["a"], pairs[1]["b"], pairs[1]["a"], ["ssim"])
    assert table.loc[("pick", "second"), "ssim"] == expected["ssim"].iloc[0]
    assert (table["ssim"].unstack("network")["mean"] > 0).all()
