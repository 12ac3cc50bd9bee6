"""Streaming gives the whole picture's result, whatever the tiles."""

from __future__ import annotations

import pytest
import torch

from fusionkit.models import refusion
from fusionkit.models.refusion import ReFusion
from fusionkit.models.streaming import Walk

OPTIONS = {
    "full": {},
    "no interaction": {"interaction": False},
    "no gating": {"gating": False},
    "concatenation": {"interaction": False, "gating": False},
    "decision": {"decision": True},
}


def pair(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures whose halves differ, so that a tile's own statistics would mislead it."""
    a, b = torch.rand(2, 2, 1, height, width, generator=torch.Generator().manual_seed(0))
    a[..., width // 2 :] *= 0.1
    return a, b


@pytest.fixture
def network(request) -> ReFusion:
    torch.manual_seed(0)
    network = ReFusion(dim=8, heads=2, **getattr(request, "param", {})).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)  # so that attention matters
    return network


@pytest.mark.parametrize("network", OPTIONS.values(), ids=OPTIONS, indirect=True)
def test_every_form_of_the_network_streams(network):
    a, b = pair(45, 70)
    with torch.no_grad():
        expected = network(a, b)
    torch.testing.assert_close(network.stream(a, b, tile=16), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tile", "size"),
    [
        (8, (8, 8)),
        (1, (8, 8)),
        (2, (9, 12)),
        (8, (9, 61)),
        (13, (9, 61)),
        (13, (64, 33)),
        (32, (64, 33)),
        (100, (9, 61)),
    ],
)
def test_any_size_and_tile(network, tile, size):
    a, b = pair(*size)
    with torch.no_grad():
        expected = network(a, b)
    torch.testing.assert_close(network.stream(a, b, tile=tile), expected, rtol=0, atol=1e-5)


def test_tiles_of_no_pixel_are_refused(network):
    with pytest.raises(ValueError, match="tile 0; expected 1 pixel or more"):
        network.stream(*pair(8, 8), tile=0)


def test_tiles_alone_would_not_do(network):
    a, b = pair(40, 64)
    with torch.no_grad():
        expected = network(a, b)
        halves = [network(a[..., s], b[..., s]) for s in (slice(0, 32), slice(32, 64))]
    assert (torch.cat(halves, -1) - expected)[..., :24].abs().mean() > 1e-3


def test_half_precision_storage_is_close(network, monkeypatch):
    a, b = pair(45, 70)
    with torch.no_grad():
        expected = network(a, b)
    half = network.stream(a, b, tile=16, dtype=torch.float16)
    assert half.dtype == torch.float32
    assert 0 < (half - expected).abs().max() < 5e-3
    assert torch.equal(network.stream(a, b, tile=16), network.stream(a, b, 16, torch.float32))
    monkeypatch.setattr(refusion, "FULL_PRECISION_PIXELS", 1000)  # as of a picture beyond
    assert torch.equal(network.stream(a, b, tile=16), half)


def test_an_update_sees_the_picture_as_it_was():
    x = torch.rand(1, 2, 21, 17)
    kernel = torch.rand(2, 1, 5, 5)

    def blur(z):
        return torch.nn.functional.conv2d(z, kernel, padding=2, groups=2)

    features = x.clone()
    Walk(21, 17, 4).update(blur, features, halo=2)
    torch.testing.assert_close(features, blur(x))
