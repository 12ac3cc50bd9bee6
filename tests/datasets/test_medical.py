"""The synthetic head: bone in CT, soft tissue in MRI, uptake in PET and SPECT, all aligned."""

import numpy as np
import pytest

from fusionkit.datasets.medical import KINDS, TISSUES, _anatomy, scene

SIZE = (128, 128)


def tissue(seed, name):
    fractions, head = _anatomy(np.random.default_rng(seed), SIZE)
    return fractions[TISSUES.index(name)] > 0.9, head


@pytest.mark.parametrize("seed", range(3))
def test_bone_is_brightest_in_ct_and_dark_in_mri(seed):
    bone, _ = tissue(seed, "bone")
    pair = scene(np.random.default_rng(seed), SIZE, "ct")
    others = {name: tissue(seed, name)[0] for name in ("gray", "white", "fluid", "scalp")}
    for mask in others.values():
        assert pair["a"][bone].mean() > pair["a"][mask].mean() + 0.3
    assert pair["b"][bone].mean() < min(pair["b"][others[k]].mean() for k in ("gray", "white"))
    # CT hardly tells gray from white matter; MRI does.
    contrast = [abs(pair[k][others["gray"]].mean() - pair[k][others["white"]].mean()) for k in "ab"]
    assert contrast[1] > 1.5 * contrast[0]


@pytest.mark.parametrize("kind", ["pet", "spect"])
def test_uptake_is_in_the_brain_smooth_and_coloured(kind):
    pair = scene(np.random.default_rng(1), SIZE, kind)
    gray, head = tissue(1, "gray")
    bone, _ = tissue(1, "bone")
    light = pair["a"].mean(axis=-1)
    assert light[gray].mean() > 2 * light[bone].mean()
    assert light[head == 0].mean() < 0.06
    assert np.ptp(pair["a"], axis=-1).max() > 0.5
    assert np.abs(np.diff(light, axis=0)).mean() < np.abs(np.diff(pair["b"], axis=0)).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_head_for_every_kind_on_black(kind):
    pair = scene(np.random.default_rng(4), SIZE, kind)
    np.testing.assert_array_equal(pair["b"], scene(np.random.default_rng(4), SIZE, "ct")["b"])
    for corner in (np.s_[:8, :8], np.s_[-8:, -8:]):
        assert pair["a"][corner].max() < 0.05
        assert pair["b"][corner].max() < 0.05


def test_fractions_fill_the_head_and_nothing_else():
    fractions, head = _anatomy(np.random.default_rng(0), SIZE)
    np.testing.assert_allclose(fractions.sum(axis=0), head, atol=0.02)
    assert fractions.min() >= 0
