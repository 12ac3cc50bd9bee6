"""What every metric of the catalogue has to hold, and the catalogue against the reference table."""

from __future__ import annotations

import math
import re
import sys
from functools import cache

import pandas as pd
import pytest
import torch

from fusionkit.metrics import COMMON, FAMILIES, METRICS, SMALLER_IS_BETTER, edges
from fusionkit.metrics._common import gray_levels

from .reference import preserved, related, triple

every_metric = pytest.mark.parametrize("name", METRICS)

OF_FUSED_ALONE = {
    "entropy",
    "standard_deviation",
    "spatial_frequency",
    "average_gradient",
    "edge_intensity",
}
ASYMMETRIC = {
    "qc": "a window whose share is out of 0 to 1 has the value 0 or 1, as in MEFB's code",
    "viff": "b is taken where both gains are equal",
}
NOT_TRANSPOSABLE = {
    **dict.fromkeys(
        ("fmi_pixel", "fmi_gradient", "fmi_edge", "fmi_dct", "fmi_wavelet"),
        "a window's places have an order",
    ),
    "qabf": "angles near π/2 and -π/2 count as opposite, those about 0 do not",
}
IN_SINGLE_PRECISION = {"fmi_pixel", "fmi_gradient", "fmi_edge", "fmi_dct", "fmi_wavelet", "qp"}
WITHOUT_REFERENCE_ROWS = {"ms_ssim"}  # held against piq in place of MATLAB's values
FOR_LOSSES = (
    "standard_deviation",
    "spatial_frequency",
    "average_gradient",
    "edge_intensity",
    "qabf",
    "nabf",
    "qg",
    "qm",
    "ssim",
    "ms_ssim",
    "mef_ssim",
    "mef_ms_ssim",
    "qs",
    "qw",
    "qe",
    "qc",
    "qy",
    "cc",
    "scd",
    "vif",
    "psnr",
    "rmse",
)


def shares(x: torch.Tensor) -> torch.Tensor:
    counts = (x * 255).round().long().flatten().bincount()
    return counts[counts > 0].double() / x.numel()


def bits(x: torch.Tensor) -> float:
    return -(shares(x) * shares(x).log2()).sum().item()


def qncie_of_identical_pictures(x: torch.Tensor) -> float:
    shared = bits(x) / 8
    eigenvalues = (1 + 2 * shared, 1 - shared, 1 - shared)
    return 1 + sum(e / 3 * math.log(e / 3, 256) for e in eigenvalues)


# A value, or what gives it from the picture.
OF_IDENTICAL_PICTURES = {
    "mutual_information": lambda x: 2 * bits(x),
    "nmi": 2,
    "qncie": qncie_of_identical_pictures,
    "cross_entropy": 0,
    "tsallis_entropy": lambda x: 2 * ((shares(x) ** 0.15).sum().item() - 1) / 0.85,
    "fmi_pixel": 1,
    "fmi_gradient": 1,
    "fmi_edge": 1,
    "fmi_dct": 1,
    "fmi_wavelet": 1,
    # An equal gradient of several gray levels saturates the first sigmoid of the code in use.
    "qabf": preserved(edges.XYDEAS) * (1 + math.exp(-7.5)),
    "nabf": 0,
    "qg": preserved(edges.LIU),
    "qp": 1,
    "qm": 3,
    "ssim": 1,
    "ms_ssim": 1,
    "mef_ssim": 1,
    "mef_ms_ssim": 1,
    "qs": 1,
    "qw": 1,
    "qe": 1,
    "qc": 1,
    "qy": 1,
    "cc": 1,
    "scd": math.nan,  # the differences are constant
    "vif": 2,
    "viff": 1,
    "qcb": 1,
    "qcv": 0,
    "psnr": math.inf,
    "rmse": 0,
}


@cache
def images(name: str) -> tuple[torch.Tensor, ...]:
    """Three triples, large enough for the metric's windows; odd sizes."""
    return tuple(related(3, (177, 179) if name == "ms_ssim" else (45, 51)))


@cache
def values(name: str) -> torch.Tensor:
    return METRICS[name](*images(name))


@every_metric
def test_a_batch_is_a_loop(name, monkeypatch):
    batch = values(name)
    assert batch.shape == (3,)
    assert batch.dtype == torch.float64
    assert batch.isfinite().all()
    assert len(set(batch.tolist())) == 3
    one_by_one = [METRICS[name](*(x[i : i + 1] for x in images(name))) for i in range(3)]
    torch.testing.assert_close(torch.cat(one_by_one), batch, rtol=1e-12, atol=0)
    # Other devices than a CPU take the batch at once.
    module = sys.modules[METRICS[name].__module__]
    monkeypatch.setattr(module, "by_picture", lambda f, *x: f(*gray_levels(*x)), raising=False)
    tolerance = 1e-6 if name in IN_SINGLE_PRECISION else 1e-9
    torch.testing.assert_close(METRICS[name](*images(name)), batch, rtol=tolerance, atol=0)


@every_metric
def test_float32_is_as_good_as_float64(name):
    exact = [(x.double() * 255).round() / 255 for x in images(name)]
    torch.testing.assert_close(values(name), METRICS[name](*exact), rtol=1e-5, atol=1e-12)


@every_metric
def test_sources_swap(name):
    # Pictures of nothing in common, in which the exceptions show.
    a, b, fused = images(name) if name not in ASYMMETRIC else triple(size=(48, 57))
    difference = METRICS[name](b, a, fused) / METRICS[name](a, b, fused) - 1
    assert (difference.abs().max() > 1e-4) == (name in ASYMMETRIC)
    assert name in ASYMMETRIC or difference.abs().max() < 1e-12


@every_metric
def test_transposed_pictures_have_the_same_value(name):
    difference = METRICS[name](*(x.mT for x in images(name))) / values(name) - 1
    assert (difference.abs().max() > 1e-6) == (name in NOT_TRANSPOSABLE)


@every_metric
def test_identical_pictures(name):
    x = images(name)[2]
    value = METRICS[name](x, x, x)
    if name in OF_FUSED_ALONE:
        torch.testing.assert_close(value, values(name), rtol=1e-12, atol=0)
        return
    known = OF_IDENTICAL_PICTURES[name]
    expected = [known(picture) if callable(known) else known for picture in x]
    # The patches' norms in MEF-SSIM are widened by 0.001; Q^AB/F's weak edges do not saturate.
    # Q_P takes the sources' maps where they have features, the fused picture's everywhere.
    tolerances = {"mef_ssim": 1e-6, "mef_ms_ssim": 1e-6, "qabf": 1e-3, "qp": 1e-2}
    tolerance = tolerances.get(name, 1e-9)
    assert value.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-12, nan_ok=True)


@every_metric
def test_constant_pictures_have_a_finite_value_or_none(name):
    a, b, fused = (
        torch.full_like(x[:1], y) for x, y in zip(images(name), (0.2, 0.6, 0.4), strict=True)
    )
    for triple_ in ((a, b, fused), (a, a, fused), (a, b, torch.zeros_like(a)), (a, a, a)):
        value = METRICS[name](*triple_)
        assert value.shape == (1,)
        if not (name == "psnr" and triple_[2] is a):  # no error at all
            assert not value.isinf()


@every_metric
@pytest.mark.parametrize("size", [(1, 60), (60, 1), (1, 1)])
def test_pictures_one_pixel_wide_have_a_value_or_are_refused(name, size):
    thin = triple(2, size)
    try:
        value = METRICS[name](*thin)
    except ValueError as error:
        assert f"{size[0]}×{size[1]}" in str(error)  # noqa: PT017
        return
    assert value.shape == (2,)


def refuses(name: str, message: str, place: int, broken: torch.Tensor) -> None:
    pictures = triple(2, (12, 13))
    pictures[place] = broken
    with pytest.raises(ValueError, match=message):
        METRICS[name](*pictures)


@every_metric
def test_values_outside_the_range_are_refused(name):
    for place in range(3):
        for bad in (math.nan, math.inf, -0.01, 1.5, 255.0):
            broken = triple(2, (12, 13))[place]
            broken[1, 0, 3, 4] = bad
            refuses(name, r"expected values in \[0, 1\], got", place, broken)


@every_metric
def test_other_shapes_are_refused(name):
    for place in range(3):
        broken = triple(2, (12, 13))[place]
        refuses(name, r"one shape.*\(2, 1, 12, 1[23]\) and", place, broken[..., 1:])
        message = r"gray pictures \(B, 1, H, W\), got shape "
        refuses(name, message + r"\(2, 3, 12, 13\)", place, broken.expand(-1, 3, -1, -1))
        refuses(name, message + r"\(1, 12, 13\)", place, broken[0])


@pytest.mark.parametrize("name", FOR_LOSSES)
def test_gradients_are_finite(name):
    a, b, fused = (x.clone() for x in images(name))
    fused[..., :20] = a[..., :20]
    fused[..., -15:] = 0.5  # copied and flat regions
    a[..., :20, -15:] = 0.5
    b[..., :20, -15:] = 0
    for x in (a, b, fused):
        x.requires_grad_()
    METRICS[name](a, b, fused).sum().backward()
    for x in (fused,) if name in OF_FUSED_ALONE else (a, b, fused):
        assert x.grad.isfinite().all()
        assert x.grad.abs().amax((-3, -2, -1)).min() > 0


@pytest.mark.parametrize("name", sorted(set(METRICS) - set(FOR_LOSSES)))
def test_other_metrics_have_no_gradient(name):
    a, b, fused = (x.clone().requires_grad_() for x in images(name))
    value = METRICS[name](a, b, fused).sum()
    if value.requires_grad:  # values are rounded first
        value.backward()
        assert not fused.grad.any()


# The catalogue


@every_metric
def test_every_metric_names_its_source(name):
    metric = METRICS[name]
    # The forms of FMI have one source, in their module's docstring.
    text = sys.modules[metric.__module__].__doc__ if name.startswith("fmi_") else metric.__doc__
    assert re.search(r"(19|20)\d\d", text if name.startswith("fmi_") else text.split("Source:")[1])
    assert "(B,)" in metric.__doc__


def test_catalogue():
    in_families = [metric.__name__ for family in FAMILIES.values() for metric in family]
    assert sorted(in_families) == sorted(METRICS)  # one family each
    assert set(COMMON) < set(METRICS)
    assert set(METRICS) > SMALLER_IS_BETTER
    assert set(METRICS) == {*OF_IDENTICAL_PICTURES, *OF_FUSED_ALONE}


@pytest.mark.parametrize("name", sorted(set(METRICS) - OF_FUSED_ALONE - {"scd"}))
def test_the_stated_direction_is_right(name):
    x = images(name)[2][:1]
    worse = METRICS[name](x, x, 0.5 * x + 0.5 * images(name)[2][1:2])
    best = METRICS[name](x, x, x)
    assert worse < best if name not in SMALLER_IS_BETTER else worse > best


def test_reference_table_and_catalogue_have_the_same_metrics(shared):
    rows = pd.read_csv(shared / "metrics" / "reference.csv")
    names = set(rows.name[rows.solid == "yes"])
    assert names == set(METRICS) - WITHOUT_REFERENCE_ROWS
