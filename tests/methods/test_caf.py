"""CAF: its loss terms by hand, the gradient of β by finite differences, who learns when."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import vgg11, vgg16

from fusionkit.losses import sobel, ssim
from fusionkit.methods import CAFSearch, WeightedLossTraining
from fusionkit.methods.caf_terms import (
    HANDCRAFTED,
    TERMS,
    VGGFeatures,
    fixed_terms,
    fixed_weights,
    perceptual_distance,
    saliency,
    saliency_weights,
    searched_terms,
)
from fusionkit.methods.perception import halves, perceive
from fusionkit.models import create_model
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


class TinyFeatures(nn.Module):
    """A smooth stand-in for a VGG: two maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)

    def forward(self, picture: torch.Tensor) -> list[torch.Tensor]:
        first = self.first(picture).tanh()
        return [first, self.second(first).tanh()]


def make_search(dtype=torch.float64, seed=0, norm=False, network=None, **options) -> CAFSearch:
    torch.manual_seed(seed)
    fusion = (network or TwoLayers(norm=norm)).to(dtype)
    task = TinySegmentation(norm=norm).to(dtype)
    features = TinyFeatures().to(dtype)
    return CAFSearch(fusion, task, features=features, **{"inner_lr": 0.5, **options})


# The terms


def pictures(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.rand(3, *(shape or (2, 1, 12, 14)), generator=generator))


def test_saliency_by_hand():
    # Levels 0 (3 of 4 pixels) and 255: distances to all others are 255/4 and 3·255/4.
    image = torch.tensor([[0.0, 0.0], [0.0, 1.0]])[None, None]
    assert saliency(image).tolist() == [[[[0, 0], [0, 1]]]]
    # 0, 0, 0.4, 1 (levels 0, 0, 102, 255): 357, 357, 357, 663 over 4 before the stretch.
    image = torch.tensor([[0.0, 0.0], [0.4, 1.0]])[None, None]
    torch.testing.assert_close(saliency(image), torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
    assert (saliency(torch.full((2, 1, 5, 5), 0.3)) == 0).all()
    a, b, _ = pictures()
    for picture in (a, b):
        levels = (picture[1] * 255).round().flatten()
        contrast = (levels[:, None] - levels).abs().mean(dim=1)
        expected = (contrast - contrast.min()) / (contrast.max() - contrast.min())
        torch.testing.assert_close(saliency(picture)[1].flatten(), expected)
    salient_a, salient_b = saliency_weights(a, b)
    torch.testing.assert_close(salient_a, 0.5 + 0.5 * (saliency(a) - saliency(b)))
    torch.testing.assert_close(salient_b, 0.5 + 0.5 * (saliency(b) - saliency(a)))


def test_terms_by_hand():
    a, b, fused = pictures()
    features = TinyFeatures()
    terms = searched_terms(a, b, fused, features)
    assert tuple(terms) == TERMS
    m_a, m_b = saliency_weights(a, b)
    top, edges = torch.maximum(a, b), sobel(fused)

    def l1(x, y):
        return (x - y).abs().mean()

    def mse(x, y):
        return ((x - y) ** 2).mean()

    def perceptual(x):
        return 0.1 * sum(l1(p, q) for p, q in zip(features(fused), features(x), strict=True))

    expected = [
        l1(m_b * fused, m_b * b),
        l1(m_a * fused, m_a * a),
        l1(fused, b),
        l1(fused, a),
        l1(fused, top),
        mse(fused, b),
        mse(fused, a),
        mse(fused, top),
        (1 - ssim(fused, a, window=5)) / 2,
        (1 - ssim(fused, b, window=5)) / 2,
        l1(edges, sobel(a)),
        l1(edges, sobel(b)),
        l1(edges, torch.maximum(sobel(a), sobel(b))),
        perceptual(a),
        perceptual(b),
    ]
    for (name, found), value in zip(terms.items(), expected, strict=True):
        assert found.item() == pytest.approx(value.item(), rel=1e-5), name
    both = 0.5 * (mse(m_b * fused, m_b * b) + mse(m_a * fused, m_a * a))
    assert fixed_terms(a, b, fused).item() == pytest.approx(both.item(), rel=1e-5)


def test_terms_of_a_source_vanish_where_the_fused_picture_is_that_source():
    a, b, _ = pictures()
    for fused, source in ((a, "infrared"), (b, "visible")):
        terms = searched_terms(a, b, fused, TinyFeatures())
        for name, value in terms.items():
            assert (value.item() < 1e-6) == name.endswith(source), name
    top = searched_terms(a, b, torch.maximum(a, b))
    assert top["l1_maximum"] == top["mse_maximum"] == 0


def test_ssim_in_a_window_of_five_by_hand():
    x, y, _ = pictures(1, 1, 5, 5)
    position = torch.arange(5.0) - 2
    weights = torch.exp(-(position**2) / 4.5)
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = ((weights * (z - m) ** 2).sum() for z, m in ((x, mean_x), (y, mean_y)))
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    expected = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    assert ssim(x, y, window=5).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("detached", [False, True])
def test_the_gradient_of_the_perceptual_terms(detached):
    a, b, fused = pictures()
    fused.requires_grad_()
    terms = searched_terms(a, b, fused, TinyFeatures(), detached)
    total = terms["perceptual_infrared"] + terms["perceptual_visible"]
    assert total > 0.01
    (gradient,) = torch.autograd.grad(total, fused, allow_unused=True)
    if detached:
        assert gradient is None
    else:
        assert (gradient != 0).float().mean() > 0.9


def test_vgg_features_are_the_activations_after_the_papers_convolutions():
    torch.manual_seed(0)
    vgg = vgg11(weights=None)
    features = VGGFeatures(vgg, (1, 3))
    picture = torch.rand(2, 1, 16, 24)
    first, third = features(picture)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (picture.expand(-1, 3, -1, -1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    conv = [layer for layer in vgg.features if isinstance(layer, nn.Conv2d)]
    expected = conv[0](x).relu()
    torch.testing.assert_close(first, expected)
    pooled = F.max_pool2d(conv[1](F.max_pool2d(expected, 2)).relu(), 2)
    torch.testing.assert_close(third, conv[2](pooled).relu())
    assert not any(p.requires_grad for p in features.parameters())
    assert not features.train().training
    with torch.device("meta"):
        for whole in (vgg16(weights=None), timm.create_model("vgg16")):
            assert VGGFeatures(whole).taps == [1, 6, 11, 20, 29]
    with pytest.raises(ValueError, match=r"convolutions \(9,\); expected some of 1 to 8"):
        VGGFeatures(vgg, (9,))
    assert perceptual_distance([first, third], [first + 1, third]).item() == pytest.approx(1)


def test_fixed_sets_of_weights():
    average = fixed_weights("average")
    assert average == dict.fromkeys(TERMS, 1 / 15)
    drawn = fixed_weights("random", seed=1)
    assert sum(drawn.values()) == pytest.approx(1)
    assert len(set(drawn.values())) == 15
    assert drawn == fixed_weights("random", seed=1) != fixed_weights("random", seed=2)
    by_hand = fixed_weights("handcrafted")
    assert tuple(by_hand) == TERMS
    assert sum(by_hand.values()) == pytest.approx(1)
    assert {name for name, weight in by_hand.items() if weight} == set(HANDCRAFTED)
    with pytest.raises(ValueError, match="unknown kind of weights 'mean'"):
        fixed_weights("mean")


# The gradient of β


def validation_loss(search: CAFSearch, logits, train, validation, create_graph=False):
    """L_val after the virtual step, as a function of β's logits (equation 2)."""
    a, b = train["a"], train["b"]
    theta = dict(search.fusion.named_parameters())
    fused = search.fusion(a, b)
    terms = torch.stack(list(searched_terms(a, b, fused, search.features).values()))
    loss = (logits.softmax(0) * terms).sum() + fixed_terms(a, b, fused)
    gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)
    stepped = {}
    for (name, p), g in zip(theta.items(), gradients, strict=True):
        g = g + search.weight_decay * p
        buffer = search.optimizers["fusion"].state[p].get("momentum_buffer")
        g = g if buffer is None else g + search.momentum * buffer
        stepped[name] = p - search.inner_lr * g
    fused = functional_call(search.fusion, stepped, (validation["a"], validation["b"]))
    return search.task(*perceive(fused, validation))


def prepared(size=(9, 10), **options) -> tuple[CAFSearch, dict, dict]:
    """A search some steps in, with β away from uniform."""
    search = make_search(**options)
    batch = make_batch(size=size)
    for _ in range(2):
        search.step(batch)
    with torch.no_grad():
        search.weights.logits.copy_(torch.linspace(-1, 1, 15))
    return search, *halves(batch)


CASES = [{}, {"momentum": 0.9, "weight_decay": 1e-2}, {"norm": True}]


@pytest.mark.parametrize("options", CASES)
def test_the_exact_gradient_of_the_weights(options):
    search, train, validation = prepared(product="exact", **options)
    gradient, loss = search.weights_gradient(train, validation)
    logits = search.weights.logits.detach().clone().requires_grad_()
    outer = validation_loss(search, logits, train, validation, create_graph=True)
    assert loss == pytest.approx(outer.item(), rel=1e-10)
    (expected,) = torch.autograd.grad(outer, logits)
    assert expected.abs().max() > 1e-7
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)
    h, largest = 1e-3, gradient.abs().max().item()
    for i in range(len(gradient)):
        step = h * torch.eye(len(gradient), dtype=torch.float64)[i]
        values = [
            validation_loss(search, logits.detach() + s * step, train, validation).item()
            for s in (1, -1)
        ]
        numeric = (values[0] - values[1]) / (2 * h)
        assert numeric == pytest.approx(gradient[i].item(), rel=1e-4, abs=1e-5 * largest)


@pytest.mark.parametrize("options", CASES)
def test_the_finite_difference_product_with_delta_from_radius_0_01(options):
    """δ = 0.01 / ‖∇_ω' L_val‖; what is left comes from pixels that cross a kink of an L1 term."""
    search, train, validation = prepared(size=(64, 64), **options)
    assert search.radius == 0.01
    rough, loss = search.weights_gradient(train, validation)
    search.product = "exact"
    exact, same = search.weights_gradient(train, validation)
    assert loss == same
    assert (rough - exact).norm() < 1e-2 * exact.norm()
    assert not torch.equal(rough, exact)


def test_slopes_of_smooth_terms_have_no_such_error():
    search, train, _ = prepared()
    theta = {n: p.detach() for n, p in search.fusion.named_parameters()}
    v = [torch.randn_like(t) for t in theta.values()]
    rough, exact = search._difference_slopes(theta, v, train), search._exact_slopes(theta, v, train)
    smooth = [i for i, name in enumerate(TERMS) if name.startswith(("mse", "ssim"))]
    assert exact[smooth].abs().min() > 1e-4
    torch.testing.assert_close(rough[smooth], exact[smooth], rtol=1e-3, atol=0)


def test_delta_is_the_radius_over_the_norm():
    search, train, _ = prepared()
    seen = []
    terms = search.terms
    search.terms = lambda batch, fused: seen.append(fused.detach()) or terms(batch, fused)
    theta = {n: p.detach() for n, p in search.fusion.named_parameters()}
    v = [torch.randn_like(t) for t in theta.values()]
    slopes = search._difference_slopes(theta, v, train)
    norm = torch.cat([x.flatten() for x in v]).norm()
    for sign, fused in zip((1, -1), seen, strict=True):
        moved = {n: t + sign * 0.01 / norm * x for (n, t), x in zip(theta.items(), v, strict=True)}
        expected = functional_call(search.fusion, moved, (train["a"], train["b"]))
        torch.testing.assert_close(fused, expected)
    difference = torch.stack(terms(train, seen[0])) - torch.stack(terms(train, seen[1]))
    torch.testing.assert_close(slopes, difference / (2 * 0.01 / norm))


def test_the_slip_gives_a_gradient_to_weights_that_move_nothing():
    """Detached perceptual terms: the finite difference sees them, the step does not."""
    search, train, _ = prepared(detached=True)
    theta = {n: p.detach() for n, p in search.fusion.named_parameters()}
    v = [torch.randn_like(t) for t in theta.values()]
    perceptual = slice(13, 15)
    assert (search._exact_slopes(theta, v, train)[perceptual] == 0).all()
    assert (search._exact_slopes(theta, v, train)[:13] != 0).all()
    assert (search._difference_slopes(theta, v, train)[perceptual].abs() > 1e-6).all()


def test_the_gradient_leaves_nothing_behind():
    search, train, validation = prepared(norm=True)
    before, kept = vector(search.modules), buffers(search.modules)
    for product in ("exact", "finite_difference"):
        search.product = product
        search.weights_gradient(train, validation)
    assert torch.equal(vector(search.modules), before)
    assert all(torch.equal(v, kept[k]) for k, v in buffers(search.modules).items())
    assert all(p.grad is None for p in search.modules.parameters())


# The search


def test_the_search_starts_uniform_and_follows_algorithm_1():
    search, batch = make_search(lr=1e-3, task_lr=2e-3), make_batch()
    assert search.loss_weights() == pytest.approx(dict.fromkeys(TERMS, 1 / 15))
    train, validation = halves(batch)
    fusion, task = copy.deepcopy(search.fusion), copy.deepcopy(search.task)
    fused = fusion(train["a"], train["b"])
    loss_t = task(fused.detach(), train)
    terms = searched_terms(train["a"], train["b"], fused, search.features)
    loss_f = sum(terms.values()) / 15 + fixed_terms(train["a"], train["b"], fused)
    for network, loss, lr in ((task, loss_t, 2e-3), (fusion, loss_f, 1e-3)):
        adam = torch.optim.Adam(network.parameters(), lr=lr)
        loss.backward()
        adam.step()
    losses = search.step(batch)
    assert losses["task"] == pytest.approx(loss_t.item())
    assert losses["fusion"] == pytest.approx(loss_f.item())
    torch.testing.assert_close(vector(search.fusion), vector(fusion), rtol=0, atol=1e-12)
    torch.testing.assert_close(vector(search.task), vector(task), rtol=0, atol=1e-12)
    # β's gradient is that at the new weights of both; it moves by 0.05, Adam's first step.
    moved = search.weights.logits.detach() - 0.0125
    with torch.no_grad():
        search.weights.logits.fill_(0.0125)
    gradient, validation_after = search.weights_gradient(train, validation)
    assert losses["validation"] == pytest.approx(validation_after)
    torch.testing.assert_close(moved, -0.05 * gradient / (gradient.abs() + 1e-8))


def test_running_statistics_follow_one_pass_a_step():
    search, batch = make_search(norm=True), make_batch()
    for _ in range(3):
        search.step(batch)
    assert int(search.fusion.layers[1].num_batches_tracked) == 3
    assert int(search.task.network[1].num_batches_tracked) == 3


def test_the_warm_up_and_the_decay_of_the_learning_rate():
    search, batch = make_search(warmup_steps=2, decay=0.5), make_batch()
    rates = []
    for step in range(4):
        losses = search.step(batch)
        assert ("validation" in losses) == (step >= 2)
        rates.append(search.optimizers["weights"].param_groups[0]["lr"])
        if step < 2:
            assert search.loss_weights() == pytest.approx(dict.fromkeys(TERMS, 1 / 15))
    assert rates == pytest.approx([0.05, 0.05, 0.05, 0.025])
    assert make_search().decay == 0.998


def test_a_useful_term_wins():
    """The task wants the infrared picture: the weights must turn from the visible to it."""

    class WantsInfrared(TinySegmentation):
        keys = ("a",)

        def loss(self, fused, target):
            return (fused - target["a"]).abs().mean() + 0 * self.network[0].weight.sum()

    torch.manual_seed(0)
    search = CAFSearch(TwoLayers(), WantsInfrared(), inner_lr=0.5, lr=1e-3)
    assert len(search.loss_weights()) == 13
    batch = make_batch(dtype=torch.float32)
    batch["a"], batch["b"] = 0.6 + 0.4 * batch["a"], 0.4 * batch["b"]
    for _ in range(15):
        search.step(batch)
    weights = search.loss_weights()
    assert weights["l1_infrared"] > 1.3 * weights["l1_visible"]
    assert weights["mse_infrared"] > weights["mse_visible"]


@pytest.mark.parametrize("product", ["finite_difference", "exact"])
@pytest.mark.parametrize("boxes", [True, False])
def test_detection_with_and_without_any_box(boxes, product):
    torch.manual_seed(0)
    task = SSDLite(["car"], size=64, width=0.25)
    search = CAFSearch(TwoLayers(), task, inner_lr=0.5, product=product)
    losses = search.step(boxed_batch(boxes))
    assert (losses["validation"] > 0) == boxes
    assert torch.isfinite(vector(search.modules)).all()
    uniform = search.loss_weights() == pytest.approx(dict.fromkeys(TERMS[:13], 1 / 13))
    assert uniform == (not boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"product": "hessian"}, "unknown product 'hessian'; expected one of finite_difference"),
        ({"radius": 0.0}, "radius is 0.0, expected a positive number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_search(**options)


def test_one_pair_is_too_few():
    with pytest.raises(ValueError, match="1 pair in a process's share of a batch; expected two"):
        make_search().step(make_batch(1))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_resumed_search_equals_an_undisturbed_one(tmp_path, momentum):
    def train(folder, steps):
        search = make_search(norm=True, momentum=momentum, warmup_steps=1)
        loader = DataLoader(LabelledPairs(), batch_size=4, shuffle=True)
        fit(search, loader, steps=steps, out_dir=tmp_path / folder, progress=False, device="cpu")
        return search

    straight = train("straight", 5)
    train("halted", 3)
    resumed = train("halted", 5)
    for (name, x), y in zip(
        straight.modules.state_dict().items(), resumed.modules.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    assert len(resumed.history) == 6
    assert resumed.history == straight.history
    assert resumed.history[-1] == list(resumed.loss_weights().values())


def test_a_search_is_followed_by_its_history_and_prints_nothing(tmp_path, capfd):
    search, seen = make_search(warmup_steps=1), {}

    def follow(step: int, losses: dict[str, float]) -> None:
        seen[step] = [list(weights) for weights in search.history]

    loader = DataLoader(LabelledPairs(), batch_size=4, shuffle=True)
    options = {"out_dir": tmp_path, "progress": False, "device": "cpu"}
    fit(search, loader, steps=3, log_every=1, on_log=follow, **options)
    assert {step: len(path) for step, path in seen.items()} == {1: 2, 2: 3, 3: 4}
    assert seen[3] == search.history
    assert seen[3][1] == seen[3][0] != seen[3][2]
    told = capfd.readouterr()
    assert told.out == told.err == ""


@pytest.mark.parametrize("product", ["finite_difference", "exact"])
@pytest.mark.parametrize("name", ["refusion", "caf", "efrufn"])
def test_networks_take_a_step(name, product):
    options = {
        "refusion": {"dim": 4, "heads": 2, "blocks": 1},
        "caf": {"dim": 4},
        "efrufn": {"width": 8, "heads": 2},
    }[name]
    network = create_model(name, **options)
    search = make_search(torch.float32, network=network, product=product, inner_lr=0.1)
    before = {part: vector(m) for part, m in search.modules.items()}
    losses = search.step(make_batch(size=(16, 16), dtype=torch.float32))
    assert all(torch.isfinite(torch.tensor(list(losses.values()))))
    for part, start in before.items():
        assert torch.isfinite(vector(search.modules[part])).all()
        assert not torch.equal(vector(search.modules[part]), start), part


# Training with the weights


def test_training_with_given_weights():
    torch.manual_seed(0)
    weights = {"l1_infrared": 0.75, "perceptual_visible": 0.25}
    features = TinyFeatures().double()
    fusion = TwoLayers().double()
    method = WeightedLossTraining(fusion, weights, features=features, lr=1e-2)
    batch = make_batch()
    a, b = batch["a"], batch["b"]
    fused = fusion(a, b)
    terms = searched_terms(a, b, fused, features)
    expected = 0.75 * terms["l1_infrared"] + 0.25 * terms["perceptual_visible"]
    expected = expected + fixed_terms(a, b, fused)
    losses = [method.step({"a": a, "b": b})["fusion"] for _ in range(15)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-10)
    assert losses[-1] < 0.95 * losses[0]


def test_weights_without_their_terms():
    with pytest.raises(ValueError, match="unknown loss term 'perceptual_visible'"):
        WeightedLossTraining(TwoLayers(), {"perceptual_visible": 1.0})
    search = make_search()
    WeightedLossTraining(TwoLayers(), search.loss_weights(), features=search.features)
