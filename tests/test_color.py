"""RGB and YCbCr, and the chroma of a fused picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fusionkit.color import chroma, fuse_chroma, luminance, to_rgb


def random_rgb(*shape: int) -> torch.Tensor:
    return torch.rand(*(shape or (3, 9, 13)), generator=torch.Generator().manual_seed(0))


def test_ycbcr_is_jpegs():
    levels = (random_rgb(3, 32, 32) * 255).round().to(torch.uint8)
    reference = Image.fromarray(levels.permute(1, 2, 0).numpy()).convert("YCbCr")
    reference = torch.from_numpy(np.array(reference)).permute(2, 0, 1) / 255
    image = levels / 255
    ours = torch.cat([luminance(image), chroma(image)])
    ours[1:] += 128 / 255 - 0.5  # 8-bit chroma is neutral at 128
    assert (ours - reference).abs().max() < 1.01 / 255


@pytest.mark.parametrize("shape", [(3, 9, 13), (2, 3, 8, 8)])
def test_rgb_round_trip(shape):
    image = random_rgb(*shape)
    torch.testing.assert_close(to_rgb(luminance(image), chroma(image)), image, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rgb", "y"), [((1, 0, 0), 0.299), ((0, 1, 0), 0.587), ((0, 0, 1), 0.114), ((1, 1, 1), 1.0)]
)
def test_luminance_of_pure_colours(rgb, y):
    image = torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1)
    assert luminance(image).item() == pytest.approx(y)
    assert luminance(image).max() <= 1


def test_chroma_of_pure_colours():
    blue, red = torch.eye(3)[[2, 0]].view(2, 3, 1, 1)
    assert chroma(blue).flatten().tolist() == pytest.approx([1.0, 0.5 - 0.114 / 1.402])
    assert chroma(red).flatten().tolist() == pytest.approx([0.5 - 0.299 / 1.772, 1.0])


def test_gray_is_its_own_luminance_and_neutral():
    gray = random_rgb(2, 1, 8, 8)
    assert luminance(gray) is gray
    assert chroma(gray).shape == (2, 2, 8, 8)
    assert (chroma(gray) == 0.5).all()
    torch.testing.assert_close(to_rgb(gray, chroma(gray)), gray.expand(2, 3, 8, 8))
    torch.testing.assert_close(chroma(gray.expand(2, 3, 8, 8)), chroma(gray))


@pytest.mark.parametrize("convert", [luminance, chroma])
def test_other_channel_counts_are_refused(convert):
    with pytest.raises(ValueError, match=r"1 \(gray\) or 3 \(RGB\).*\(2, 8, 8\)"):
        convert(torch.rand(2, 8, 8))


def test_rgb_is_clipped():
    rgb = to_rgb(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.ones(2, 2, 1, 1))
    assert rgb.min() == 0
    assert rgb.max() == 1


def test_gray_has_no_say_in_the_chroma():
    colour = chroma(random_rgb())
    gray = torch.full_like(colour, 0.5)
    torch.testing.assert_close(fuse_chroma(colour, gray), colour)
    torch.testing.assert_close(fuse_chroma(gray, colour), colour)
    assert (fuse_chroma(gray, gray) == 0.5).all()


def test_of_two_colours_the_stronger_prevails():
    a, b = (torch.tensor(x).view(2, 1, 1) for x in ([0.9, 0.4], [0.6, 0.8]))
    expected = [(0.4 * 0.9 + 0.1 * 0.6) / 0.5, (0.1 * 0.4 + 0.3 * 0.8) / 0.4]
    assert fuse_chroma(a, b).flatten().tolist() == pytest.approx(expected)
    torch.testing.assert_close(fuse_chroma(b, a), fuse_chroma(a, b))
    torch.testing.assert_close(fuse_chroma(a, a), a)


def test_fused_chroma_stays_between_the_sources():
    a, b = random_rgb(2, 2, 16, 16)
    b[:, :8] = 0.5 + (b[:, :8] - 0.5) * 1e-7  # all but neutral
    fused = fuse_chroma(a, b)
    assert (fused >= torch.minimum(a, b) - 1e-6).all()
    assert (fused <= torch.maximum(a, b) + 1e-6).all()
