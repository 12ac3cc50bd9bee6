"""Multi-focus and multi-exposure pairs: the blur, the clipping, the ground truth."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, laplace, uniform_filter

from fusionkit.datasets import photographs
from fusionkit.datasets.photographs import disparity, multi_exposure, multi_focus

SIZE = (160, 160)


def detail(image):
    return uniform_filter(np.abs(laplace(image.mean(axis=-1))), 9)


@pytest.mark.parametrize("index", range(4))
def test_each_source_is_sharp_in_its_own_part(index):
    pair = multi_focus(np.random.default_rng(index), SIZE)
    near, far, sharp = (detail(pair[key]) for key in ("a", "b", "target"))
    for source, other in ((near, far), (far, near)):
        blurred = (source < 0.7 * other) & (sharp > 0.01)  # where there is detail to lose
        assert blurred.mean() > 0.05
        assert (sharp[blurred] > source[blurred]).mean() > 0.98
    in_focus = [np.abs(pair[key] - pair["target"]).max(axis=-1) < 2.5 / 255 for key in ("a", "b")]
    for own in in_focus:
        assert 0.08 < own.mean() < 0.97
    assert (in_focus[0] | in_focus[1]).mean() > 0.75


def test_a_near_thing_out_of_focus_spreads_over_the_far_one_in_focus():
    light = np.zeros((64, 64, 3), np.float32)
    light[:, 32:] = 1.0
    depth = np.where(np.arange(64) >= 32, 1.0, 0.0) * np.ones((64, 1))
    layers = list(photographs._layers(light, depth, np.array((0.0, 0.5, 1.01))))
    far_focus = photographs._defocus(layers, 6.0, 0.0, plane=0.0)
    near_focus = photographs._defocus(layers, 6.0, 0.0, plane=1.0)
    assert 0.2 < far_focus[32, 29, 0] < 0.5
    assert far_focus[32, 10, 0] == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(near_focus[:, 32:], 1.0, atol=1e-5)


def test_disparity_puts_the_motorcycle_before_the_shelf():
    depth = disparity("motorcycle_left.png")
    assert np.isfinite(depth).all()
    assert depth.min() == 0
    assert depth.max() == 1
    assert depth[300, 400] > depth[60, 560] + 0.3


def test_disc_keeps_the_mean_and_has_its_radius():
    point = np.zeros((1, 41, 41), np.float32)
    point[0, 20, 20] = 1
    disc = photographs._disc_blur(point, 6.0)[0]
    assert disc.sum() == pytest.approx(1, abs=1e-4)
    assert disc[20, 25] == pytest.approx(disc[20, 20], rel=1e-3)
    assert abs(disc[20, 28]) < 1e-6


def test_exposures_bracket_the_target_and_clip():
    clipped = []
    for index in range(6):
        pair = multi_exposure(np.random.default_rng(index), SIZE)
        under, target, over = (pair[key].mean() for key in ("a", "target", "b"))
        assert under < target < over
        low = gaussian_filter(pair["target"], (4, 4, 0))
        assert (gaussian_filter(pair["b"], (4, 4, 0)) > low - 0.02).mean() > 0.9
        clipped.append((pair["b"] == 1).mean())
        assert (pair["a"] == 1).mean() < 0.02
    assert np.mean(clipped) > 0.08
