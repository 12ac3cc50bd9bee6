"""Tables of metrics: for a pair, a batch, folders; and the authors' row on RoadScene."""

import sys
import threading
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import fusionkit as fk
from fusionkit.leaderboard import leaderboard
from fusionkit.metrics import (
    COMMON,
    METRICS,
    average_gradient,
    entropy,
    scd,
    spatial_frequency,
    ssim,
    standard_deviation,
)
from fusionkit.metrics.evaluate import choose, summary

from .reference import related

# shared/metrics/README.md, "Measured rows": ReFusion, IVIF weights, with min-max stretch. That row
# divides SF's sums by the differences and AG's by the pixels, and adds SSIM over both sources.
AUTHORS_ROADSCENE = {
    "EN": ("7.300", entropy),
    "SD": ("47.69", standard_deviation),
    "SF": ("15.58", partial(spatial_frequency, divide_by="differences")),
    "AG": ("5.770", partial(average_gradient, divide_by="pixels")),
    "SCD": ("1.735", scd),
    "SSIM": ("1.392", partial(ssim, reduction="sum")),
}


def random_pictures(count: int, channels: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, channels, 44, 48, generator=generator) for _ in range(3)]


def test_a_batch_equals_its_pictures_one_by_one():
    batch = random_pictures(3)
    table = fk.evaluate(*batch)
    assert list(table.columns) == list(COMMON)
    for index in range(3):
        single = fk.evaluate(*(x[index] for x in batch))
        np.testing.assert_allclose(single.iloc[0], table.iloc[index], rtol=1e-12)


def test_metrics_of_a_large_picture_are_taken_one_by_one(monkeypatch):
    def meets(a, b, fused):
        """Whether two of these metrics run at a time."""
        try:
            both.wait(timeout=wait)
        except threading.BrokenBarrierError:
            return torch.zeros(1)
        return torch.ones(1)

    pictures = [x[0] for x in random_pictures(1)]
    metrics = {"one": meets, "two": meets}
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    both, wait = threading.Barrier(2), 60
    assert fk.evaluate(*pictures, metrics=metrics).to_numpy().tolist() == [[1, 1]]
    monkeypatch.setattr(
        sys.modules["fusionkit.metrics.evaluate"], "PIXELS_AT_ONCE", 2 * 44 * 48 - 1
    )
    both, wait = threading.Barrier(2), 0.2
    assert fk.evaluate(*pictures, metrics=metrics).to_numpy().tolist() == [[0, 0]]


def test_gray_pictures_equal_three_equal_channels():
    gray = related(1)  # wide enough for MS-SSIM
    colour = [x.expand(-1, 3, -1, -1) for x in gray]
    expected = fk.evaluate(*gray, metrics="all")
    assert np.isfinite(expected.to_numpy()).all()
    pd.testing.assert_frame_equal(fk.evaluate(*colour, metrics="all"), expected)


def test_folders_equal_pictures_in_memory(tmp_path):
    a, b, fused = random_pictures(2, channels=3)
    for role, pictures in (("a", a), ("b", b), ("fused", fused)):
        for index, picture in enumerate(pictures):
            fk.save_image(picture, tmp_path / role / f"{index}.png")
    fk.save_image(a[0], tmp_path / "a" / "not_fused.png")
    table = fk.evaluate(*(tmp_path / role for role in ("a", "b", "fused")), metrics=["ssim", "scd"])
    assert list(table.index) == ["0", "1"]
    expected = fk.evaluate(a, b, fused, metrics=["ssim", "scd"])
    np.testing.assert_allclose(table.to_numpy(), expected.to_numpy(), rtol=1e-12)


def test_what_is_wrong_is_named(tmp_path):
    a, b, fused = random_pictures(1)
    with pytest.raises(ValueError, match=r"'psnr2'.*entropy"):
        fk.evaluate(a, b, fused, metrics=["psnr2"])
    with pytest.raises(ValueError, match="44×48, 44×48, 43×48"):
        fk.evaluate(a[0], b[0], fused[0, :, 1:])
    with pytest.raises(ValueError, match=r"range \[0, 1\]"):
        fk.evaluate(a * 255, b, fused)
    fk.save_image(fused, tmp_path / "fused" / "7.png")
    fk.save_image(a, tmp_path / "a" / "7.png")
    fk.save_image(b, tmp_path / "b" / "8.png")
    with pytest.raises(FileNotFoundError, match="'7'"):
        fk.evaluate(tmp_path / "a", tmp_path / "b", tmp_path / "fused")


def test_authors_weights_give_their_row_on_roadscene(shared):
    weights = shared / "weights" / "refusion_ivif.safetensors"
    network = fk.create_model("refusion", checkpoint=weights)
    pairs = fk.load_dataset("roadscene", shared / "data", "test")
    assert len(pairs) == 50
    metrics = {name: metric for name, (_, metric) in AUTHORS_ROADSCENE.items()}
    board = leaderboard(
        {"authors": network}, pairs, metrics, baselines=False, stretch=["authors"], progress=False
    )
    means = board.means().loc["authors"]
    for name, (printed, _) in AUTHORS_ROADSCENE.items():
        digits = len(printed.split(".")[1])
        assert f"{means[name]:.{digits}f}" == printed, name


def test_evaluate_reads_pil_pictures(tmp_path):
    picture = Image.fromarray(np.full((16, 16), 100, np.uint8))
    table = fk.evaluate(picture, picture, picture, metrics=["entropy", "standard_deviation"])
    assert table.iloc[0].tolist() == [0.0, 0.0]


def test_a_choice_of_metrics():
    a, b, fused = random_pictures(1)

    def brightness(a, b, fused):
        return fused.mean((1, 2, 3))

    table = fk.evaluate(a, b, fused, ["entropy", brightness])
    assert list(table.columns) == ["entropy", "brightness"]
    expected = (fused * 255).round().mean().item() / 255
    assert table["brightness"].iloc[0] == pytest.approx(expected)
    assert list(fk.evaluate(a, b, fused, "ssim").columns) == ["ssim"]
    assert list(choose("all")) == list(METRICS)
    assert set(COMMON) < set(METRICS)


def test_a_metric_without_a_value_warns_and_names_metric_and_picture(tmp_path):
    flat = torch.full((1, 44, 48), 0.5)
    busy = random_pictures(1)[0][0]
    with pytest.warns(UserWarning, match=r"cc of 0 is NaN.*constant"):
        table = fk.evaluate(flat, busy, busy, ["entropy", "cc"])
    assert table["entropy"].notna().all()
    assert table["cc"].isna().all()


def test_a_metric_that_refuses_is_named_with_its_picture():
    small = random_pictures(1)
    with pytest.warns(UserWarning, match=r"ssim of 0 is NaN: .*11"):
        table = fk.evaluate(*(x[..., :8, :8] for x in small), metrics=["entropy", "ssim"])
    assert table["entropy"].notna().all()
    assert table["ssim"].isna().all()


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)])
def test_pictures_one_pixel_wide_are_refused(size):
    thin = [x[..., : size[0], : size[1]] for x in random_pictures(1)]
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels; expected at least 8×8"):
        fk.evaluate(*thin)


def test_nan_in_a_picture_is_refused():
    a, b, fused = random_pictures(1)
    for place in range(3):
        broken = [x.clone() for x in (a, b, fused)]
        broken[place][0, 0, 2, 3] = float("nan")
        role = ("a", "b", "fused")[place]
        with pytest.raises(ValueError, match=f"^picture 0 of {role}: .*NaN"):
            fk.evaluate(*broken)
        with pytest.raises(ValueError, match=f"^{role}: .*NaN"):
            fk.evaluate(*(x[0] for x in broken))


def test_summary_has_intervals_that_narrow_with_more_pictures():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, 400)
    table = pd.DataFrame({"x": values, "y": np.where(np.arange(400) < 4, values, np.nan)})
    rows = summary(table)
    assert rows.loc["x", "mean"] == pytest.approx(values.mean())
    # The normal approximation's interval, to a tenth of its width.
    half = 1.96 * values.std() / 20
    assert rows.loc["x", "low"] == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert rows.loc["x", "high"] == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert rows["pictures"].tolist() == [400, 4]
    assert rows.loc["y", "high"] - rows.loc["y", "low"] > 3 * half
    assert summary(table, 0.5).loc["x", "high"] < rows.loc["x", "high"]
    assert summary(table[:1]).loc["x", ["low", "high"]].isna().all()
    pd.testing.assert_frame_equal(rows, summary(table))
