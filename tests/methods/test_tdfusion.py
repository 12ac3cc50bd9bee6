"""TDFusion: the loss by hand, the meta-gradient by finite differences, who trains whom."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fusionkit.losses import (
    signed_sobel_loss,
    sobel,
    sobel_components,
    task_driven_fusion_loss,
    weighted_intensity_loss,
)
from fusionkit.methods import TDFusionMethod
from fusionkit.methods.bilevel import directional_derivative, statistics_kept
from fusionkit.methods.perception import TaskTraining, halves, perceive, swapped
from fusionkit.models import create_model
from fusionkit.models.loss_generator import LossGenerator, WeightedAverage
from fusionkit.models.refusion import ReFusion
from fusionkit.tasks.detection import SSDLite
from fusionkit.training import fit

from .perception_cases import (
    LabelledPairs,
    TinySegmentation,
    TwoLayers,
    boxed_batch,
    buffers,
    make_batch,
    vector,
)

SMALL = {"dim": 4, "heads": 2, "blocks": 1}
NETWORKS = {
    "refusion": lambda: ReFusion(**SMALL),
    "two layers": TwoLayers,
    "batch norm": lambda: TwoLayers(norm=True),
}
INNER = {"inner_lr": 0.5, "inner_task_lr": 0.3}


def make_method(network="two layers", dtype=torch.float64, seed=0, norm=False, **options):
    torch.manual_seed(seed)
    return TDFusionMethod(
        NETWORKS[network]().to(dtype),
        TinySegmentation(norm=norm).to(dtype),
        generator=LossGenerator(**SMALL).to(dtype),
        **{**INNER, **options},
    )


# The loss generator and the loss


def test_the_generator_is_of_the_released_size_and_sums_to_one():
    generator = LossGenerator()
    # Stems, two encoders of two blocks of 16, two blocks of 32, the head.
    stems, head = 2 * 9 * 16, 9 * 32 * 16 + 1 + 9 * 16 * 2
    blocks = {d: sum(p.numel() for p in ReFusion().decoder.parameters()) for d in (32,)}
    encoders = sum(p.numel() for p in ReFusion().encoder_a.parameters())
    count = sum(p.numel() for p in generator.parameters())
    assert count == stems + 2 * encoders + blocks[32] + head
    assert generator.head[1].weight.tolist() == [0.25]
    a, b = torch.rand(2, 3, 1, 7, 9)
    w = generator(a, b)
    assert w.shape == (3, 2, 7, 9)
    assert (w > 0).all()
    torch.testing.assert_close(w.sum(dim=1), torch.ones(3, 7, 9))
    average = WeightedAverage(generator)(a, b)
    torch.testing.assert_close(average, w[:, :1] * a + w[:, 1:] * b)


def test_intensity_loss_by_hand():
    a, b, fused = (torch.full((1, 1, 2, 2), x) for x in (0.2, 0.9, 0.5))
    w = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    paper = 0.75 * 0.3**2 + 0.25 * 0.4**2
    released = (0.75 * 0.3) ** 2 + (0.25 * 0.4) ** 2
    assert weighted_intensity_loss(a, b, fused, w).item() == pytest.approx(paper)
    assert weighted_intensity_loss(a, b, fused, w, "released").item() == pytest.approx(released)
    with pytest.raises(ValueError, match="unknown form 'squared'; expected one of paper"):
        weighted_intensity_loss(a, b, fused, w, "squared")


def test_sobel_loss_takes_the_stronger_gradient_with_its_sign():
    rising = torch.linspace(0, 0.5, 6).expand(1, 1, 6, 6)
    falling = 1 - 2 * rising
    inner = (..., slice(1, -1), slice(1, -1))
    slopes = sobel_components(rising, border="zeros")[inner]
    torch.testing.assert_close(slopes[:, 0], torch.full((1, 4, 4), 0.8))  # 8 · 0.1
    torch.testing.assert_close(slopes[:, 1], torch.zeros(1, 4, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(sobel(rising), sobel_components(rising).abs().sum(1, keepdim=True))
    of_a, of_b, of_f = (sobel_components(x, "zeros") for x in (rising, falling, rising))
    expected = 0.0
    for axis in (0, 1):
        stronger = torch.maximum(of_a[:, axis].abs(), of_b[:, axis].abs())
        took_b = of_b[:, axis].abs() > of_a[:, axis].abs()
        signed = torch.where(took_b, stronger * of_b[:, axis].sign(), of_a[:, axis])
        expected += (of_f[:, axis] - signed).abs().mean()
    found = signed_sobel_loss(rising, falling, rising)
    torch.testing.assert_close(found, expected)
    # The steeper source falls: its mirror image has the right magnitude and the wrong sign.
    assert signed_sobel_loss(rising, falling, falling) < 0.5 * signed_sobel_loss(
        rising, falling, 1 - falling
    )


def test_the_whole_loss_is_the_sum_of_both():
    a, b, fused = torch.rand(3, 2, 1, 6, 7)
    w = torch.rand(2, 2, 6, 7).softmax(1)
    intensity, edges = weighted_intensity_loss(a, b, fused, w), signed_sobel_loss(a, b, fused)
    found = task_driven_fusion_loss(a, b, fused, w, alpha=0.3)
    torch.testing.assert_close(found, intensity + 0.3 * edges)
    torch.testing.assert_close(task_driven_fusion_loss(a, b, fused, w, alpha=0), intensity)


# The meta-gradient


def outer_loss(method, train: dict, test: dict, create_graph: bool = False) -> torch.Tensor:
    """L_t after the inner updates, as a function of G's present weights (equations 4 to 6)."""
    if method.swap:
        train, test = swapped(train), swapped(test)
    a, b = train["a"], train["b"]
    theta_f = dict(method.fusion.named_parameters())
    theta_t = dict(method.task.named_parameters())
    fused = method.fusion(a, b)
    w = method.generator(a, b)
    loss_f = task_driven_fusion_loss(a, b, fused, w, method.alpha, method.intensity)
    loss_t = method.task(*perceive(fused.detach(), train, method.task_size))
    grads_f = torch.autograd.grad(loss_f, list(theta_f.values()), create_graph=create_graph)
    grads_t = torch.autograd.grad(loss_t, list(theta_t.values()))
    step = method.inner_lr, method.inner_task_lr
    stepped_f = {n: p - step[0] * g for (n, p), g in zip(theta_f.items(), grads_f, strict=True)}
    stepped_t = {n: p - step[1] * g for (n, p), g in zip(theta_t.items(), grads_t, strict=True)}
    sources = (test["a"], test["b"])
    if method.task_size:
        sources = [F.interpolate(x, method.task_size, mode="bilinear") for x in sources]
    fused = functional_call(method.fusion, stepped_f, tuple(sources))
    return functional_call(method.task, stepped_t, perceive(fused, test))


def slope(method, direction: torch.Tensor, batch: dict, h: float = 1e-5) -> float:
    start, values = vector(method.generator), []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * h * direction, method.generator.parameters())
        values.append(outer_loss(method, *halves(batch)).item())
    nn.utils.vector_to_parameters(start, method.generator.parameters())
    return (values[0] - values[1]) / (2 * h)


CASES = [
    ("two layers", {}),
    ("two layers", {"intensity": "released", "swap": False}),
    ("two layers", {"alpha": 0, "task_size": (6, 7)}),
    ("refusion", {"alpha": 0.3}),
    ("batch norm", {"norm": True}),
]


@pytest.mark.parametrize(("network", "options"), CASES)
def test_meta_gradient_equals_finite_differences(network, options):
    method, batch = make_method(network, **options), make_batch()
    gradients, losses = method.meta_gradients(*halves(batch))
    gradient = torch.cat([g.flatten() for g in gradients])
    assert losses["meta"] == pytest.approx(outer_loss(method, *halves(batch)).item(), rel=1e-10)
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(gradient.numel(), generator=generator, dtype=gradient.dtype)
    for direction in (gradient, other + other.norm() * gradient / gradient.norm()):
        direction = direction / direction.norm()
        expected = (gradient @ direction).item()
        assert abs(expected) > 1e-8
        assert slope(method, direction, batch) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("network", "options"), CASES)
def test_meta_gradient_equals_a_second_backward_pass(network, options):
    method, batch = make_method(network, **options), make_batch(5)
    gradients, _ = method.meta_gradients(*halves(batch))
    outer = outer_loss(method, *halves(batch), create_graph=True)
    expected = torch.autograd.grad(outer, list(method.generator.parameters()))
    scale = max(g.abs().max().item() for g in expected)
    assert scale > 1e-9
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * scale)


class Square(torch.autograd.Function):
    """x², without a rule for forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def test_directional_derivative_without_forward_mode():
    x, d = torch.randn(2, 5, dtype=torch.float64)
    y, e = torch.randn(2, 5, dtype=torch.float64)
    for square in (torch.square, Square.apply):
        value, found = directional_derivative(lambda x, y, f=square: f(x) * y, [x, y], [d, e])
        torch.testing.assert_close(value, x**2 * y)
        torch.testing.assert_close(found, 2 * x * d * y + x**2 * e)
        assert not found.requires_grad
    value, found = directional_derivative(lambda x, y: Square.apply(x), [x, y], [d, e])
    torch.testing.assert_close(found, 2 * x * d)


def test_a_network_without_forward_mode_has_the_same_meta_gradient(monkeypatch):
    method, batch = make_method(), make_batch()
    expected, _ = method.meta_gradients(*halves(batch))
    layer = method.fusion.layers[2]
    method.fusion.layers[2] = nn.Sequential()
    method.fusion.layers[2].forward = lambda x: layer(x) + Square.apply(x) - x * x
    found, _ = method.meta_gradients(*halves(batch))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)


def test_the_meta_gradient_leaves_nothing_behind():
    method, batch = make_method("batch norm", norm=True), make_batch()
    method.modules.train()
    before, kept = vector(method.modules), buffers(method.modules)
    method.meta_gradients(*halves(batch))
    assert torch.equal(vector(method.modules), before)
    for name, value in buffers(method.modules).items():
        assert torch.equal(value, kept[name]), name
    assert all(p.grad is None for p in method.modules.parameters())
    method.joint_step(batch)
    assert int(method.fusion.layers[1].num_batches_tracked) == 1


def test_statistics_are_kept_but_the_batch_decides():
    norm = nn.BatchNorm2d(2)
    x = torch.randn(3, 2, 4, 4) + 5
    with statistics_kept(norm):
        found = norm(x)
    assert torch.equal(norm.running_mean, torch.zeros(2))
    torch.testing.assert_close(found, norm(x))
    assert norm.running_mean.abs().max() > 0.1


# Who trains whom


def test_a_meta_step_moves_g_alone_and_a_joint_step_the_others():
    method, batch = make_method(meta_steps=1, fusion_steps=1), make_batch()
    start = {name: vector(m) for name, m in method.modules.items()}
    assert method.step(batch).keys() == {"fusion", "task", "meta"}
    assert torch.equal(vector(method.fusion), start["fusion"])
    assert torch.equal(vector(method.task), start["task"])
    assert not torch.equal(vector(method.generator), start["generator"])
    start["generator"] = vector(method.generator)
    assert method.step(batch).keys() == {"fusion", "task"}
    assert not torch.equal(vector(method.fusion), start["fusion"])
    assert not torch.equal(vector(method.task), start["task"])
    assert torch.equal(vector(method.generator), start["generator"])


@pytest.mark.parametrize("outer", ["adam", "normalised"])
def test_the_outer_update(outer):
    method, batch = make_method(outer=outer, generator_lr=1e-2), make_batch()
    gradient, _ = method.meta_gradients(*halves(batch))
    gradient = torch.cat([g.flatten() for g in gradient])
    before = vector(method.generator)
    method.step(batch)
    moved = vector(method.generator) - before
    if outer == "normalised":
        torch.testing.assert_close(moved, -1e-2 * gradient / gradient.abs().max())
    else:  # Adam's first step is the learning rate times the sign, but for its ε of 1e-8
        torch.testing.assert_close(moved, -1e-2 * gradient / (gradient.abs() + 1e-8))


@pytest.mark.parametrize("task_weight", [0.0, 0.7])
def test_a_joint_step_is_adams_on_both_losses(task_weight):
    method = make_method(meta_steps=0, lr=1e-3, task_lr=2e-3, task_weight=task_weight)
    batch = make_batch()
    fusion, task = copy.deepcopy(method.fusion), copy.deepcopy(method.task)
    both = swapped(batch)
    a, b = both["a"], both["b"]
    assert torch.equal(a[4:], batch["b"])
    assert torch.equal(b[4:], batch["a"])
    fused = fusion(a, b)
    loss_f = task_driven_fusion_loss(a, b, fused, method.generator(a, b).detach())
    loss_t = task(fused if task_weight else fused.detach(), both)
    total = loss_f + task_weight * loss_t
    grads = torch.autograd.grad(total, list(fusion.parameters()), retain_graph=True)
    by_task = torch.autograd.grad(loss_t, list(task.parameters()))
    for network, gradients, lr in ((fusion, grads, 1e-3), (task, by_task, 2e-3)):
        for p, g in zip(network.parameters(), gradients, strict=True):
            p.grad = g
        torch.optim.Adam(network.parameters(), lr=lr).step()
    losses = method.step(batch)
    assert losses == pytest.approx({"fusion": loss_f.item(), "task": loss_t.item()})
    torch.testing.assert_close(vector(method.fusion), vector(fusion), rtol=0, atol=1e-12)
    torch.testing.assert_close(vector(method.task), vector(task), rtol=0, atol=1e-12)


# The ablations of Table 3


def test_fixed_weights_are_one_half_without_meta_steps():
    method, batch = make_method(learned=False, meta_steps=1, fusion_steps=1), make_batch()
    assert (method.weights(batch["a"], batch["b"]) == 0.5).all()
    before = vector(method.generator)
    assert all("meta" not in method.step(batch) for _ in range(3))
    assert torch.equal(vector(method.generator), before)


def test_without_fusion_steps_a_meta_step_moves_all_three():
    method, batch = make_method(meta_steps=2, fusion_steps=0), make_batch()
    before = [vector(m) for m in method.modules.values()]
    assert "meta" in method.step(batch)
    for module, start in zip(method.modules.values(), before, strict=True):
        assert not torch.equal(vector(module), start)


def test_a_weighted_average_learns_from_the_task_alone():
    torch.manual_seed(0)
    fusion = WeightedAverage(LossGenerator(**SMALL)).double()
    options = {"learned": False, "fusion_weight": 0.0, "task_weight": 1.0, "swap": False}
    method = TDFusionMethod(fusion, TinySegmentation().double(), lr=1e-2, **options)
    batch = make_batch()
    loss = method.task(fusion(batch["a"], batch["b"]), batch)
    expected = torch.autograd.grad(loss, list(fusion.parameters()))
    before = vector(fusion)
    method.step(batch)
    signs = torch.cat([g.flatten() for g in expected]).sign()
    moved = (vector(fusion) - before).sign()
    assert (moved == -signs).float().mean() > 0.95


# The batch


def test_a_batch_is_split_into_even_and_odd_items(monkeypatch):
    method, batch, seen = make_method(), boxed_batch(boxes=True, items=5), []
    monkeypatch.setattr(method, "meta_step", lambda *halves: seen.append(halves) or {})
    method.step(batch)
    ((train, test),) = seen
    assert torch.equal(train["a"], batch["a"][[0, 2, 4]])
    assert torch.equal(test["b"], batch["b"][[1, 3]])
    assert train["name"] == ["p0", "p2", "p4"]
    assert test["boxes"] == [batch["boxes"][1], batch["boxes"][3]]


def test_one_pair_is_too_few_for_a_meta_step():
    with pytest.raises(ValueError, match="1 pair in a process's share of a batch; expected two"):
        make_method().step(make_batch(1))


def test_what_the_task_sees():
    batch = boxed_batch(boxes=True) | {"cbcr": torch.rand(4, 2, 64, 64)}
    fused = torch.rand(4, 1, 64, 64)
    picture, target = perceive(fused, batch, (32, 96))
    assert picture.shape == (4, 3, 32, 96)
    assert target["boxes"][0].tolist() == [[12, 5, 60, 25]]
    assert batch["boxes"][0].tolist() == [[8, 10, 40, 50]]
    del batch["cbcr"]
    picture, target = perceive(3 * fused - 1, batch)
    torch.testing.assert_close(picture, (3 * fused - 1).clamp(0, 1))
    assert target["boxes"] == batch["boxes"]


def test_crops():
    method, batch = make_method(crop_size=6, meta_steps=1, fusion_steps=1), make_batch()
    a, b = method._crop(batch["a"], 1 - batch["a"])
    assert a.shape == (4, 1, 6, 6)
    torch.testing.assert_close(a, 1 - b)
    for _ in range(2):
        assert all(x > 0 for x in method.step(batch).values())
    with pytest.raises(ValueError, match="crop_size is 16, but the pictures are 9×10"):
        make_method(crop_size=16).step(batch)


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("outer", ["adam", "normalised"])
def test_detection_with_and_without_any_box(boxes, outer):
    torch.manual_seed(0)
    method = TDFusionMethod(
        TwoLayers(),
        SSDLite(["car"], size=64, width=0.25),
        generator=LossGenerator(**SMALL),
        outer=outer,
        meta_steps=1,
        fusion_steps=1,
    )
    before = vector(method.generator)
    losses = [method.step(boxed_batch(boxes)) for _ in range(2)]
    assert (losses[0]["meta"] > 0) == boxes
    assert torch.isfinite(vector(method.modules)).all()
    assert torch.equal(vector(method.generator), before) == (not boxes)


# Schedule, options, training


def test_schedule_and_learning_rates():
    method = make_method(meta_steps=2, fusion_steps=1, decay_steps=2, task_lr=1e-2)
    found, rates = "", []
    for _ in range(5):
        found += "M" if "meta" in method.step(make_batch(2)) else "F"
        rates.append(method.optimizers["task"].param_groups[0]["lr"])
    assert found == "MMFMM"
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


def test_the_inner_step_size_follows_the_learning_rate_unless_given():
    batch = make_batch()
    with_default, given = (
        make_method(lr=0.25, inner_lr=lr, inner_task_lr=lr).meta_gradients(*halves(batch))[0]
        for lr in (None, 0.25)
    )
    for x, y in zip(with_default, given, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intensity": "square"}, "unknown intensity 'square'; expected one of paper, released"),
        ({"outer": "sgd"}, "unknown outer 'sgd'; expected one of adam, normalised"),
        ({"meta_steps": 0, "fusion_steps": 0}, "0 meta steps and 0 fusion steps"),
        ({"meta_steps": -1}, "-1 meta steps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_method(**options)


@pytest.mark.parametrize("outer", ["adam", "normalised"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, outer):
    def train(folder, steps):
        options = {"meta_steps": 2, "fusion_steps": 2, "decay_steps": 3, "crop_size": 8}
        method = make_method("batch norm", norm=True, outer=outer, **options)
        loader = DataLoader(LabelledPairs(), batch_size=4, shuffle=True)
        fit(method, loader, steps=steps, out_dir=tmp_path / folder, progress=False, device="cpu")
        return method

    straight = train("straight", 6)
    train("halted", 3)
    resumed = train("halted", 6)
    for (name, x), y in zip(
        straight.modules.state_dict().items(), resumed.modules.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("name", ["refusion", "caf", "efrufn"])
def test_networks_take_a_step_of_each_kind(name):
    torch.manual_seed(0)
    options = {"refusion": SMALL, "caf": {"dim": 4}, "efrufn": {"width": 8, "heads": 2}}[name]
    method = TDFusionMethod(
        create_model(name, **options),
        TinySegmentation(),
        generator=LossGenerator(**SMALL),
        meta_steps=1,
        fusion_steps=1,
        inner_lr=0.1,
    )
    batch = make_batch(size=(16, 16), dtype=torch.float32)
    before = {part: vector(m) for part, m in method.modules.items()}
    losses = [method.step(batch) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(list(x.values()))).all() for x in losses)
    for part, start in before.items():
        assert torch.isfinite(vector(method.modules[part])).all()
        assert not torch.equal(vector(method.modules[part]), start), part


def test_a_task_learns_on_a_finished_fusion_network():
    torch.manual_seed(0)
    task, fusion = TinySegmentation(norm=True).double(), TwoLayers(norm=True).double()
    method, batch = TaskTraining(task, fusion, lr=1e-2, task_size=(6, 6)), make_batch()
    before, kept = vector(fusion), buffers(fusion)
    losses = [method.step(batch)["task"] for _ in range(20)]
    assert losses[-1] < losses[0]
    assert torch.equal(vector(method.fusion), before)
    assert torch.equal(vector(fusion), before)
    assert all(torch.equal(v, kept[k]) for k, v in buffers(method.fusion).items())
    assert method.state_dict()["modules"].keys() == {f"task.{k}" for k in task.state_dict()}


def test_the_tasks_learning_rate_falls_to_zero_along_half_a_cosine():
    method = TaskTraining(TinySegmentation().double(), TwoLayers().double(), lr=0.4, anneal_steps=4)
    rates = []
    for _ in range(5):
        before = vector(method.task)
        method.step(make_batch())
        rates.append(method.optimizers["task"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5), 0])
    assert torch.equal(vector(method.task), before)  # past the end nothing moves
