"""Tables of metrics: for a pair, a batch, folders; and the authors' row on RoadScene."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import fusionkit as fk
from fusionkit.compare import compare
from fusionkit.metrics import (
    METRICS,
    average_gradient,
    entropy,
    scd,
    spatial_frequency,
    ssim,
    standard_deviation,
)

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
    return [torch.rand(count, channels, 20, 24, generator=generator) for _ in range(3)]


def test_a_batch_equals_its_pictures_one_by_one():
    batch = random_pictures(3)
    table = fk.evaluate(*batch)
    assert list(table.columns) == list(METRICS)
    for index in range(3):
        single = fk.evaluate(*(x[index] for x in batch))
        np.testing.assert_allclose(single.iloc[0], table.iloc[index], rtol=1e-12)


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
    with pytest.raises(ValueError, match="20×24, 20×24, 19×24"):
        fk.evaluate(a[0], b[0], fused[0, :, 1:])
    with pytest.raises(ValueError, match="range \\[0, 1\\]"):
        fk.evaluate(a * 255, b, fused)
    fk.save_image(fused, tmp_path / "fused" / "7.png")
    fk.save_image(a, tmp_path / "a" / "7.png")
    fk.save_image(b, tmp_path / "b" / "8.png")
    with pytest.raises(FileNotFoundError, match="'7'"):
        fk.evaluate(tmp_path / "a", tmp_path / "b", tmp_path / "fused")


def test_authors_weights_give_their_row_on_roadscene(shared):
    networks = {
        "authors": fk.create_model(
            "refusion", checkpoint=shared / "weights" / "refusion_ivif.safetensors"
        )
    }
    pairs = fk.load_dataset("roadscene", shared / "data", "test")
    assert len(pairs) == 50
    metrics = {name: metric for name, (_, metric) in AUTHORS_ROADSCENE.items()}
    means = compare(networks, pairs, metrics, progress=False).mean()
    for name, (printed, _) in AUTHORS_ROADSCENE.items():
        digits = len(printed.split(".")[1])
        assert f"{means[name]:.{digits}f}" == printed, name


def test_evaluate_reads_pil_pictures(tmp_path):
    picture = Image.fromarray(np.full((16, 16), 100, np.uint8))
    table = fk.evaluate(picture, picture, picture, metrics=["entropy", "standard_deviation"])
    assert table.iloc[0].tolist() == [0.0, 0.0]
