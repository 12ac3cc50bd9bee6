"""Detection: the loss and its gradients, scores by hand, pictures without boxes, refusals."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.func import functional_call

from fusionkit.datasets import LabelledCrops, collate_labelled
from fusionkit.datasets.embedded import STREET_CLASSES, EmbeddedPairs
from fusionkit.tasks.detection import SSDLite, resize_boxes
from fusionkit.tasks.yolo import YOLOv8

CLASSES = ("car", "person")
SMALL = {"size": 64, "width": 0.25}


@pytest.fixture
def task() -> SSDLite:
    torch.manual_seed(0)
    return SSDLite(CLASSES, **SMALL).eval()


def pictures(channels: int = 1, height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def boxed(**changes) -> dict:
    target = {
        "boxes": [torch.tensor([[4.0, 6, 30, 40], [20, 10, 64, 48]]), torch.zeros(0, 4)],
        "classes": [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)],
        "name": ["p0", "p1"],
    }
    return target | changes


def empty() -> dict:
    return boxed(boxes=[torch.zeros(0, 4)] * 2, classes=[torch.zeros(0, dtype=torch.int64)] * 2)


# The network and its loss


def test_sizes_of_the_networks():
    count = [sum(p.numel() for p in SSDLite(CLASSES, **o).parameters()) for o in ({}, SMALL)]
    assert count[0] == pytest.approx(2.2e6, rel=0.02)
    assert count[1] < 0.7e6


@pytest.mark.parametrize("size", [64, 96])
def test_the_picture_is_resized_to_the_size(size):
    task = SSDLite(CLASSES, size, 0.25).eval()
    seen = []
    task.network.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    task.loss(pictures(), boxed())
    assert seen == [(2, 3, size, size)]


def test_smallest_sets_the_default_boxes():
    scales = [
        SSDLite(CLASSES, **SMALL, smallest=s).network.anchor_generator.scales for s in (0.05, 0.2)
    ]
    assert scales[0][0] == pytest.approx(0.05)
    assert scales[1] == SSDLite(CLASSES).network.anchor_generator.scales


def test_the_slope_by_the_picture(task):
    fused = pictures().double().requires_grad_()
    task.double()
    slope = torch.autograd.grad(task.loss(fused, boxed()), fused)[0]
    direction = torch.randn(fused.shape, generator=torch.Generator().manual_seed(1)).double()
    step = 1e-6
    losses = [task.loss(fused.detach() + s * direction, boxed()) for s in (step, -step)]
    numeric = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-3, atol=1e-6)
    assert slope.abs().max() > 0


def test_functional_call_with_stepped_weights(task):
    fused, target = pictures().requires_grad_(), boxed()
    weights = dict(task.named_parameters())
    before = task(fused, target)
    gradients = torch.autograd.grad(before, list(weights.values()))
    stepped = {k: w - 1e-3 * g for (k, w), g in zip(weights.items(), gradients, strict=True)}
    after = functional_call(task, stepped, (fused, target))
    assert after < before
    torch.testing.assert_close(task(fused, target), before)
    slope = torch.autograd.grad(functional_call(task, stepped, (fused, target)), fused)[0]
    assert slope.abs().max() > 0


def test_luminance_is_repeated(task):
    gray = pictures()
    both = task.loss(gray, boxed()), task.loss(gray.repeat(1, 3, 1, 1), boxed())
    torch.testing.assert_close(*both)


def test_modes(task):
    before = {k: v.clone() for k, v in task.named_buffers()}
    evaluated = task.loss(pictures(), boxed())
    assert not any(part.training for part in task.modules())
    task.train().predict(pictures())
    assert all(torch.equal(v, before[k]) for k, v in task.named_buffers())
    assert all(part.training for part in task.modules())
    assert task.loss(pictures(), boxed()) != evaluated  # by the batch's own statistics
    assert not all(torch.equal(v, before[k]) for k, v in task.named_buffers())


def test_a_batch_without_any_box_has_no_loss(task):
    fused = pictures().requires_grad_()
    loss = task.loss(fused, empty())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, fused)[0].abs().max() == 0


def test_it_learns():
    torch.manual_seed(0)
    square = torch.zeros(4, 1, 64, 64)
    target = {"boxes": [], "classes": []}
    for i, (left, top) in enumerate(((4, 8), (30, 30), (6, 34), (32, 2))):
        square[i, :, top : top + 26, left : left + 26] = 1
        target["boxes"].append(torch.tensor([[left, top, left + 26.0, top + 26]]))
        target["classes"].append(torch.tensor([1]))
    task = SSDLite(CLASSES, **SMALL)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = task.loss(square, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    mistaken = target | {"classes": [torch.tensor([0])] * 4}
    assert task.loss(square, mistaken) > losses[-1] + 1


def test_street_scenes_go_in():
    pairs = EmbeddedPairs("ivif", 1, (64, 96))
    batch = collate_labelled([LabelledCrops(pairs, 64, 2)[k] for k in range(2)])
    task = SSDLite(STREET_CLASSES, **SMALL)
    assert task.loss(batch["b"], batch).isfinite()
    score = task.score([task.predict(batch["b"])], [batch])
    assert math.isnan(score["AP50:95/road"])


def test_boxes_of_a_resized_picture():
    boxes = [torch.tensor([[4.0, 6, 30, 40]]), torch.zeros(0, 4)]
    half, none = resize_boxes(boxes, (48, 64), (24, 128))
    assert half.tolist() == [[8, 3, 60, 20]]
    assert none.shape == (0, 4)


# Predictions and scores


def test_predictions(task):
    found = task.predict(pictures())
    assert len(found) == 2
    for one in found:
        count = len(one["scores"])
        assert one["boxes"].shape == (count, 4)
        assert one["classes"].shape == (count,)
        assert one["scores"].diff().max() <= 0
        assert ((one["classes"] >= 0) & (one["classes"] < 2)).all()
        assert (one["boxes"] <= torch.tensor([64, 48, 64, 48])).all()
        assert not one["boxes"].requires_grad


def found(boxes, classes, scores) -> dict:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "classes": torch.tensor(classes), "scores": torch.tensor(scores)}


def test_scores_by_hand(task):
    target = {
        "boxes": [torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 10]])],
        "classes": [torch.tensor([0]), torch.tensor([1])],
    }
    # The car is found with an IoU of 0.82, the person taken for a car, with more confidence.
    predictions = [found([[0, 0, 10, 8.2]], [0], [0.5]), found([[0, 0, 10, 10]], [0], [0.9])]
    scores = task.score([predictions], [target])
    assert scores["mAP50"] == scores["mAP75"] == pytest.approx(0.25)  # (1/2 + 0) / 2
    assert scores["mAP50:95"] == pytest.approx(0.7 * 0.25)  # found at 50, 55, …, 80
    assert scores["AP50:95/car"] == pytest.approx(0.35)
    assert scores["AP50:95/person"] == 0


def test_scores_are_over_all_batches(task):
    target = boxed()
    perfect = [
        {"boxes": b, "classes": c, "scores": torch.ones(len(c))}
        for b, c in zip(target["boxes"], target["classes"], strict=True)
    ]
    split = [{k: v[i : i + 1] for k, v in target.items()} for i in range(2)]
    assert task.score([perfect], [target])["mAP50:95"] == pytest.approx(1)
    assert task.score(([p] for p in perfect), iter(split))["mAP50:95"] == pytest.approx(1)


def test_no_boxes_have_no_precision(task):
    scores = task.score([[found([], [], [])] * 2], [empty()])
    assert all(math.isnan(value) for value in scores.values())


# Refusals


@pytest.mark.parametrize(
    ("box", "complaint"),
    [
        ([5.0, 6, 5, 9], r"p0: box \(5, 6, 5, 9\) has no area"),
        ([9.0, 6, 5, 9], "p0: .* has no area"),
        ([5.0, 6, float("nan"), 9], "p0: .* has no area"),
        ([5.0, 6, 65, 9], r"p0: box \(5, 6, 65, 9\) leaves 48×64"),
        ([-1.0, 6, 5, 9], "p0: .* leaves 48×64"),
        ([5.0, 6, 9, 60], "p0: .* leaves 48×64"),
    ],
)
def test_boxes_that_do_not_fit(task, box, complaint):
    target = boxed(boxes=[torch.tensor([[1.0, 1, 9, 9], box]), torch.zeros(0, 4)])
    with pytest.raises(ValueError, match=complaint):
        task.loss(pictures(), target)


def test_targets_that_do_not_fit(task):
    fused, none = pictures(), torch.zeros(0, dtype=torch.int64)
    for target, complaint in (
        ({"boxes": [], "name": []}, "'boxes' for 0 pictures, but 2 were fused"),
        ({"boxes": boxed()["boxes"]}, "the target has no 'classes', only boxes"),
        (boxed(classes=[torch.tensor([0]), none]), r"p0: boxes \(2, 4\) and classes \(1,\)"),
        (boxed(classes=[torch.tensor([0, 2]), none]), r"p0: classes \[2\]; expected .* 0 to 1"),
        (boxed(classes=[torch.tensor([-1, 0]), none]), r"p0: classes \[-1\]"),
        (boxed(classes=[torch.tensor([0.0, 1]), none]), r"p0: classes .*expected integers"),
    ):
        with pytest.raises(ValueError, match=complaint):
            task.loss(fused, target)
    unnamed = boxed(boxes=[torch.zeros(2, 5), torch.zeros(0, 4)])
    del unnamed["name"]
    with pytest.raises(ValueError, match="picture 0 of the batch: boxes"):
        task.loss(fused, unnamed)


def test_options():
    for options in ({"size": 32}, {"width": 0}, {"smallest": 1.0}):
        with pytest.raises(ValueError, match="expected at least 64"):
            SSDLite(CLASSES, **options)


# YOLOv8


def test_without_ultralytics_the_way_and_the_licence_are_told(monkeypatch):
    for name in ("ultralytics", "ultralytics.cfg", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"AGPL-3\.0.*fusionkit\[yolo\].*SSDLite"):
        YOLOv8(CLASSES)
    with pytest.raises(ValueError, match="variant 'huge'; expected one of n, s, m, l, x"):
        YOLOv8(CLASSES, "huge")


@pytest.fixture
def yolo(tmp_path, monkeypatch) -> YOLOv8:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    pytest.importorskip("ultralytics", reason="the extra `yolo` is not installed")
    torch.manual_seed(0)
    return YOLOv8(CLASSES).eval()


def test_yolo_loss_and_gradients(yolo):
    assert sum(p.numel() for p in yolo.parameters()) == pytest.approx(3.01e6, rel=0.01)
    fused = pictures().requires_grad_()
    loss = yolo.train()(fused, boxed())
    slope = torch.autograd.grad(loss, fused, retain_graph=True)[0]
    assert slope.abs().max() > 0
    weights = dict(yolo.named_parameters())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    stepped = {k: w - 1e-3 * g for (k, w), g in zip(weights.items(), gradients, strict=True)}
    assert functional_call(yolo, stepped, (fused, boxed())) < loss


def test_yolo_batch_without_boxes_has_a_loss(yolo):
    assert yolo.loss(pictures(), empty()) > 0


def test_yolo_loss_is_a_mean_over_pictures(yolo):
    one = boxed(boxes=boxed()["boxes"][:1] * 2, classes=boxed()["classes"][:1] * 2)
    fused = pictures()[:1].repeat(2, 1, 1, 1)
    half = {key: value[:1] for key, value in one.items()}
    torch.testing.assert_close(yolo.loss(fused, one), yolo.loss(fused[:1], half))


def test_yolo_predictions_of_an_odd_size(yolo):
    for one in yolo.predict(pictures(height=50, width=70)):
        assert one["boxes"].shape == (len(one["scores"]), 4)
        assert len(one["scores"]) <= 300
        assert (one["boxes"] <= torch.tensor([70, 50, 70, 50])).all()


def test_yolo_learns(yolo):
    square = torch.zeros(2, 1, 64, 64)
    square[0, :, 8:40, 8:40], square[1, :, 20:60, 24:60] = 1, 1
    target = {
        "boxes": [torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([[24.0, 20, 60, 60]])],
        "classes": [torch.tensor([1]), torch.tensor([0])],
    }
    optimizer = torch.optim.Adam(yolo.train().parameters(), 2e-3)
    first = yolo.loss(square, target).item()
    for _ in range(25):
        optimizer.zero_grad()
        loss = yolo.loss(square, target)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
