"""ColorNet's method: equation 8, who is trained, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusionkit.color import chroma, luminance
from fusionkit.methods.color import ColorNetMethod
from fusionkit.models import create_model
from fusionkit.models.colornet import ColorNet


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.share * a + (1 - self.share) * b


def make_method(**options) -> ColorNetMethod:
    torch.manual_seed(0)
    return ColorNetMethod(ColorNet(width=8, blocks=1), fusion=Average(), **options)


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(3, 2, 3, 12, 14, generator=generator)
    return dict(zip(("a", "b", "target"), pictures, strict=True))


def test_the_loss_is_equation_8():
    method, batch = make_method(), make_batch()
    a, b, target = batch.values()
    fused = (luminance(a) + luminance(b)) / 2
    predicted = method.colornet(fused, chroma(a), chroma(b))
    expected = (predicted - chroma(target)).abs().mean().item()
    assert method.step(batch) == {"color": pytest.approx(expected)}


def test_the_fusion_network_is_frozen_and_not_saved():
    method = make_method(lr=1e-2)
    before = [p.clone() for p in method.colornet.parameters()]
    for _ in range(2):  # new blocks have no say before the last convolution has moved
        method.step(make_batch())
    assert method.fusion.share == 0.5
    assert not any("share" in name for name in method.state_dict()["modules"])
    for old, new in zip(before, method.colornet.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_the_loss_falls_and_the_rate_is_annealed():
    method, batch = make_method(lr=1e-2, anneal_steps=40), make_batch()
    # Colours that can be learned, and are not the mean from which ColorNet starts.
    batch["target"] = batch["a"]
    losses = [method.step(batch)["color"] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    assert method.optimizers["fusion"].param_groups[0]["lr"] < 1e-4


def test_pictures_without_colour_or_target_are_errors():
    method, batch = make_method(), make_batch()
    gray = {**batch, "b": batch["b"][:, :1]}
    with pytest.raises(ValueError, match=r"'b' is \(2, 1, 12, 14\); expected RGB"):
        method.step(gray)
    del batch["target"]
    with pytest.raises(ValueError, match="'target' is nothing; expected RGB"):
        method.step(batch)


def test_create_model_reads_a_runs_checkpoint(tmp_path):
    torch.manual_seed(0)
    method = ColorNetMethod(ColorNet(), fusion=Average())
    path = tmp_path / "checkpoint.pt"
    torch.save({"method": method.state_dict()}, path)
    loaded = create_model("colornet", checkpoint=path)
    for key, value in method.colornet.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
