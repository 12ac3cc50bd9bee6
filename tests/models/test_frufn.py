"""FRUFN and EFRUFN: the authors' outputs with the authors' weights, rules, ablations, gradients."""

from __future__ import annotations

import re
import warnings
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.func import functional_call, jvp
from torch.nn import functional as F

from fusionkit.color import luminance
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.models import create_model, swin
from fusionkit.models.fixed_point import BACKWARDS, FixedPointWarning, solve
from fusionkit.models.frufn import EFRUFN, FRUFN
from fusionkit.models.unfolding import MaskGenerator, UnfoldingUnit

SMALL = {"width": 8, "heads": 2}


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pair(height: int = 16, width: int = 24, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    return tuple(torch.rand(2, batch, 1, height, width, generator=generator))


def build(network: type, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    return network(**{**SMALL, **options})


def calm(network: EFRUFN) -> EFRUFN:
    """A network whose map is a clear contraction, in float64."""
    with torch.no_grad():
        network.unit.transform.conv_out.weight.mul_(0.3)
    return network.double()


class Golden(dict):
    """Arrays of an npz as (1, channels, H, W) tensors."""

    def __init__(self, path) -> None:
        arrays = np.load(path)
        super().__init__({k: arrays[k] for k in arrays.files if arrays[k].dtype == np.float32})

    def __getitem__(self, key: str) -> torch.Tensor:
        value = torch.from_numpy(super().__getitem__(key))
        return value.view(1, -1, *value.shape[-2:]) if value.ndim in (2, 3) else value


def close(given: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=atol, check_stride=False)


# The authors' weights


@pytest.fixture(scope="module")
def released(shared) -> EFRUFN:
    return create_model("efrufn", checkpoint=shared / "weights" / "efrufn_ivf.safetensors").eval()


@pytest.fixture(scope="module")
def golden(shared) -> Golden:
    return Golden(shared / "golden" / "efrufn_ivf.npz")


def sources(golden: Golden, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Infrared and visible; the file has the visible as a."""
    return golden[f"b{i}"], golden[f"a{i}"]


@torch.inference_mode()
def test_authors_encoders_and_decoder(released, golden):
    for i in range(2):
        a, b = sources(golden, i)
        base, guide = released.encode(a, b)
        close(released.decode(base, a), golden[f"decF1_{i}"])
        if i == 0:
            close(base, golden["F1_0"])
            close(guide, golden["F2_0"])


@pytest.mark.parametrize("i", [0, 1])
def test_authors_plain_steps(released, golden, monkeypatch, i):
    monkeypatch.setattr(released, "solver", "plain")
    monkeypatch.setattr(released, "max_evaluations", 10)
    trace = released.trace(*sources(golden, i))
    assert len(trace.pictures) == len(trace.masks) == len(trace.features) == 10
    close(trace.masks[0], golden[f"m1_{i}"])
    if i == 0:
        close(trace.features[0], golden["X1_0"])
    for n in (1, 2, 3, 5, 10):
        close(trace.pictures[n - 1], golden[f"naive{n}_{i}"])


@torch.inference_mode()
def test_authors_picture_after_5_evaluations(released, golden):
    """Anderson's method, as in their test."""
    close(released(*sources(golden, 1)), golden["out1"])


@pytest.mark.parametrize("i", [0, 1])
def test_authors_pictures_on_the_way_to_convergence(released, golden, monkeypatch, i):
    monkeypatch.setattr(released, "max_evaluations", 12)
    trace = released.trace(*sources(golden, i))
    close(trace.pictures[4], golden[f"out{i}"])
    close(trace.masks[4], golden[f"mask{i}"])
    residuals = golden[f"abs_trace{i}"].flatten()
    torch.testing.assert_close(trace.residuals[2:5, 0], residuals, rtol=1e-3, atol=0)
    close(trace.fused, golden[f"anderson12_{i}"])
    assert trace.residuals[-1] < trace.residuals[4] / 100


def test_the_papers_rule_diverges_with_the_authors_weights(shared, golden):
    """Equation 16, with the running features in place of the base's: facts of the release."""
    weights = shared / "weights" / "efrufn_ivf.safetensors"
    network = create_model("efrufn", checkpoint=weights, rule="paper", solver="plain")
    a, b = (x[..., 40:72, 40:80] for x in sources(golden, 0))
    with pytest.warns(FixedPointWarning, match="residual did not halve"):
        trace = network.trace(a, b)
    assert trace.residuals[-1] > 2 * trace.residuals[1]
    assert trace.fused.isfinite().all()


@pytest.mark.parametrize("size", ["64x64", "64x96"])
@torch.inference_mode()
def test_authors_frufn_with_random_weights(shared, size):
    weights = shared / "weights" / "frufn_random.safetensors"
    network = create_model("frufn", checkpoint=weights).eval()
    golden = Golden(shared / "golden" / "frufn_extra.npz")
    first, second, expected = (golden[f"frufn_{k}_{size}"] for k in ("a", "b", "out"))
    base, guide = network.encode(second, first)
    close(network.decode(base, first), golden[f"frufn_dec1_{size}"])
    close(network.decode(guide, first), golden[f"frufn_dec2_{size}"])
    trace = network.trace(second, first)
    close(trace.masks[0], golden[f"frufn_mask1_{size}"])
    close(trace.mask, golden[f"frufn_mask5_{size}"])
    close(trace.fused, expected)
    close(network(second, first), expected)


# The authors' names

_CONVNEXT = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
_CONVNEXT |= {"mlp.grn.weight": "grn.gamma", "mlp.grn.bias": "grn.beta"}
INVERSE = [
    (r"base_encoder", "encoder1"),
    (r"guide_encoder", "encoder2"),
    (r"\.body\.", ".main."),
    (r"transform\.conv_(in|out)", r"\1_conv"),
    (r"transform\.attend\.norm_(in|out)", r"\1_ln"),
    (r"transform\.attend\.blocks", "glo.blocks"),
    (r"mask\.attend\.norm_(in|out)", r"gs.\1_ln"),
    (r"mask\.attend\.blocks", "gs.glo.blocks"),
    (r"mask\.project", "gs.proj_in"),
    (r"mask\.merge", "gs.tran"),
    (r"mask\.head", "gs.proj_out1"),
    *((rf"mask\.scales\.(\d)\.{re.escape(k)}", rf"gs.fe\1.{v}") for k, v in _CONVNEXT.items()),
    (r"mask\.scales\.(\d)\.norm", r"gs.fe\1.norm"),
    (r"^unit\.", "update_block."),
    (r"^units\.(\d)", lambda unit: f"fuser.u{int(unit[1]) + 1}"),
]


def authors_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in network.state_dict().items():
        for pattern, replacement in INVERSE:
            key = re.sub(pattern, replacement, key)
        state[key] = value.clone().view(1, 1, 1, -1) if ".grn." in key else value.clone()
        if key.endswith(".attn.logit_scale"):
            attention = key.removesuffix("logit_scale")
            state[attention + "relative_coords_table"] = torch.zeros(1, 3, 3, 2)
            state[attention + "relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
            if ".blocks.1." in key:
                state[attention.removesuffix("attn.") + "attn_mask"] = torch.zeros(4, 4, 4)
    if isinstance(network, EFRUFN):
        return state | {"update_block.trans.0.weight": torch.zeros(8, 16, 3, 3)}
    return state | {"out_conv.weight": torch.zeros(1, 8, 3, 3)}


@pytest.mark.parametrize("name", ["frufn", "efrufn"])
def test_authors_names_are_converted(tmp_path, name):
    network = build({"frufn": FRUFN, "efrufn": EFRUFN}[name])
    with torch.no_grad():  # no two tensors alike, so that any mix-up shows
        for parameter in network.parameters():
            parameter.normal_()
    path = tmp_path / "x.safetensors"
    state = authors_state(network)
    safetensors.torch.save_file(state, path)
    loaded = create_model(name, checkpoint=path, **SMALL).state_dict()
    assert loaded.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        close(loaded[key], value, atol=0)
    safetensors.torch.save_file({**state, "encoder3.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unknown key encoder3\.weight"):
        create_model(name, checkpoint=path, **SMALL)
    del state["encoder2.0.weight"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"missing keys guide_encoder\.0\.weight"):
        create_model(name, checkpoint=path, **SMALL)


@pytest.mark.parametrize("name", ["frufn", "efrufn"])
def test_authors_names_in_the_real_file(shared, name):
    file = {"frufn": "frufn_random", "efrufn": "efrufn_ivf"}[name]
    expected = authors_state(create_model(name)).keys()
    if name == "frufn":  # made without the masks
        expected = {key for key in expected if not key.endswith("attn_mask")}
    with safetensors.safe_open(shared / "weights" / f"{file}.safetensors", "pt") as weights:
        assert set(weights.keys()) == expected


# Sizes, numbers, roles


def test_parameter_counts():
    """The paper's and the release's counts, less what the authors' networks never use."""
    assert count(EFRUFN()) == 217_794 == 236_226 - 18_432  # without `update_block.trans`
    assert count(FRUFN()) == 863_850 - 288  # without `out_conv`
    assert count(EFRUFN().base_encoder) == count(EFRUFN().decoder) == 18_784
    unit = UnfoldingUnit(32, 8)
    assert count(unit) == 179_874 - 18_432
    assert count(unit.mask) == 110_418
    assert count(FRUFN(shared=True)) == count(FRUFN(units=1)) == count(EFRUFN())


@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
def test_checkpoints_hold_parameters_alone(network):
    network = build(network)
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (8, 31), (5, 7), (1, 1)])
@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
@torch.inference_mode()
def test_any_size_keeps_its_shape(network, size):
    a, b = pair(*size, batch=2)
    network = build(network)
    fused = network(a, b)
    assert fused.shape == (2, 1, *size)
    assert fused.isfinite().all()
    padding = (0, -size[1] % 8, 0, -size[0] % 8)
    padded = (F.pad(x, padding, mode="replicate") for x in (a, b))
    close(fused, network(*padded)[..., : size[0], : size[1]], atol=0)
    trace = network.trace(a, b)
    for picture in (trace.fused, trace.mask, *trace.pictures, *trace.masks):
        assert picture.shape == fused.shape
    assert all(f.shape == (2, 8, *size) for f in trace.features)


@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
@torch.inference_mode()
def test_pictures_of_a_batch_do_not_mix(network):
    network = build(network)
    a, b = pair(batch=3)
    one_by_one = torch.cat([network(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    close(network(a, b), one_by_one)


@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
def test_base_says_which_source_is_refined(network):
    a, b = pair()
    assert not torch.allclose(build(network)(a, b), build(network)(b, a))
    close(build(network)(a, b), build(network, base="a")(b, a), atol=0)
    base, _ = build(network).encode(a, b)
    close(base, build(network).base_encoder(b), atol=0)


def test_bad_input_is_refused():
    network = build(EFRUFN)
    a, b = pair()
    with pytest.raises(ValueError, match=r"\(1, 1, 16, 24\) and \(1, 1, 16, 16\)"):
        network(a, b[..., :16])
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\) twice"):
        network(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
    for options, message in (
        ({"rule": "papers"}, "unknown rule 'papers'.*'paper'"),
        ({"base": "c"}, "unknown base 'c'"),
        ({"solver": "newton"}, "unknown solver 'newton'"),
        ({"backward": "none"}, "unknown backward 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            EFRUFN(**SMALL, **options)
    with pytest.raises(ValueError, match="units 0; expected 1 or more"):
        FRUFN(units=0)


# The unit and the iteration


def test_the_mask_is_a_share_and_sees_the_last_mask():
    torch.manual_seed(0)
    generator = MaskGenerator(8, 2)
    difference = torch.rand(2, 8, 16, 24)
    mask = generator(difference, torch.zeros(2, 1, 16, 24))
    assert mask.shape == (2, 1, 16, 24)
    assert ((mask > 0) & (mask < 1)).all()
    assert not torch.allclose(mask, generator(difference, torch.ones(2, 1, 16, 24)))


def test_one_unit_by_hand():
    network = build(FRUFN, units=1)
    a, b = pair()
    base, guide = network.encode(a, b)
    difference = (guide - base).clamp_min(0)
    unit = network.units[0]
    mask = unit.mask(difference, torch.zeros_like(base[:, :1]))
    features = base + mask * unit.transform(difference)
    close(network(a, b), network.decoder(features), atol=1e-6)


def test_trace_of_frufn_ends_with_its_result():
    network = build(FRUFN, units=3)
    a, b = pair(batch=2)
    trace = network.trace(a, b)
    assert len(trace.pictures) == 3
    assert trace.residuals.shape == (3, 2)
    with torch.no_grad():  # as in a trace; with gradients windows attend by another route
        close(trace.fused, network(a, b), atol=0)
    close(trace.fused, trace.pictures[-1], atol=0)
    close(trace.mask, trace.masks[-1], atol=0)
    step = (trace.features[2] - trace.features[1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(trace.residuals[2], step)
    assert not trace.fused.requires_grad


def test_trace_of_efrufn_ends_with_its_result():
    network = build(EFRUFN)
    a, b = pair(batch=2)
    trace = network.trace(a, b)
    assert len(trace.pictures) == 5
    assert trace.residuals.shape == (5, 2)
    with torch.no_grad():
        close(trace.fused, network(a, b), atol=0)
    for i in range(2):
        best = trace.residuals[:, i].argmin()
        close(trace.fused[i], trace.pictures[best][i], atol=1e-6)
        close(trace.mask[i], trace.masks[best][i], atol=0)


def test_shared_units_are_one_unit_applied_again():
    shared, separate = build(FRUFN, units=3, shared=True), build(FRUFN, units=3)
    for unit in separate.units:
        unit.load_state_dict(shared.units[0].state_dict())
    for part in ("base_encoder", "guide_encoder", "decoder"):
        getattr(separate, part).load_state_dict(getattr(shared, part).state_dict())
    a, b = pair()
    close(shared(a, b), separate(a, b), atol=1e-6)


def test_plain_efrufn_with_the_papers_rule_is_shared_frufn():
    """Equation 16 is equation 14 with shared weights."""
    frufn = build(FRUFN, units=4, shared=True)
    efrufn = build(EFRUFN, rule="paper", solver="plain", max_evaluations=4, tolerance=0)
    efrufn.unit.load_state_dict(frufn.units[0].state_dict())
    for part in ("base_encoder", "guide_encoder", "decoder"):
        getattr(efrufn, part).load_state_dict(getattr(frufn, part).state_dict())
    a, b = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FixedPointWarning)
        pictures = efrufn.trace(a, b).pictures
    for ours, expected in zip(pictures, frufn.trace(a, b).pictures, strict=True):
        close(ours, expected, atol=1e-6)


def test_the_rules_differ_in_where_the_update_is_added():
    a, b = pair()
    paper, other = (build(EFRUFN, rule=rule) for rule in ("paper", "reconstructed"))
    base, guide = paper.encode(a, b)
    state = torch.randn(1, 9, 16, 24)
    difference = paper.step(state, base, guide) - other.step(state, base, guide)
    close(difference[:, :8], state[:, :8] - base)
    close(difference[:, 8:], torch.zeros(1, 1, 16, 24), atol=0)


@pytest.mark.parametrize("solver", ["plain", "anderson", "broyden"])
def test_the_result_is_a_fixed_point(solver):
    network = calm(build(EFRUFN, solver=solver, max_evaluations=60, tolerance=1e-9))
    a, b = (x.double() for x in pair())
    base, guide = network.encode(a, b)
    trace = network.trace(a, b)
    state = torch.cat([trace.features[-1], trace.masks[-1]], dim=1)
    assert trace.residuals[-1] <= 1e-9
    close(network.step(state, base, guide), state, atol=1e-9)


@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
def test_without_a_mask_the_update_counts_in_full(network):
    network = build(network, mask=False)
    assert not any("mask" in key for key in network.state_dict())
    a, b = pair()
    trace = network.trace(a, b)
    close(torch.cat(trace.masks), torch.ones(len(trace.masks), 1, 16, 24), atol=0)
    base, guide = network.encode(a, b)
    unit = network.units[0] if isinstance(network, FRUFN) else network.unit
    close(trace.features[0], base + unit.transform((guide - base).clamp_min(0)), atol=1e-6)


# Gradients


@pytest.mark.parametrize("black", ["both", "one item of the batch"])
@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
def test_every_parameter_learns_on_black_pictures_too(network, black):
    a, b = pair(8, 8, batch=2)
    dark = slice(None) if black == "both" else slice(0, 1)
    a[dark], b[dark] = 0, 0
    network = build(network)
    (network(a, b) - 0.5).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() < 100, name


def gradient(network: EFRUFN, fused: torch.Tensor) -> torch.Tensor:
    given = torch.autograd.grad(fused.square().sum(), list(network.parameters()))
    return torch.cat([g.flatten() for g in given])


@pytest.fixture(scope="module")
def unrolled_gradient() -> torch.Tensor:
    network = calm(build(EFRUFN))
    a, b = (x.double() for x in pair(8, 8))
    base, guide = network.encode(a, b)
    state = torch.cat([base, torch.zeros_like(base[:, :1])], dim=1)
    for _ in range(60):
        state = network.step(state, base, guide)
    return gradient(network, network.decode(state[:, :8], a))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradients_against_60_plain_iterations(backward, unrolled_gradient):
    options = {"max_evaluations": 60, "tolerance": 1e-11, "backward": backward, "terms": 20}
    network = calm(build(EFRUFN, **options))
    given = gradient(network, network(*(x.double() for x in pair(8, 8))))
    error = (given - unrolled_gradient).norm() / unrolled_gradient.norm()
    if backward == "jacobian_free":
        assert 1e-6 < error < 0.5
    else:
        assert error < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
def test_functional_calls_and_both_modes_agree(network):
    """What meta-learning asks of a network: v·∂F/∂θ forward and backward, on outside weights."""
    network = build(network, **({"units": 2} if network is FRUFN else {})).double()
    a, b = (x.double() for x in pair(8, 8))
    theta = {n: p.detach().clone() for n, p in network.named_parameters()}
    along = {n: torch.randn_like(p) for n, p in theta.items()}
    fused, slope = jvp(lambda t: functional_call(network, t, (a, b)), (theta,), (along,))
    leaves = {n: t.requires_grad_() for n, t in theta.items()}
    v = torch.randn_like(fused)
    back = torch.autograd.grad(
        functional_call(network, leaves, (a, b)), list(leaves.values()), v, create_graph=True
    )
    expected = sum((g * along[n]).sum() for n, g in zip(leaves, back, strict=True))
    torch.testing.assert_close((slope * v).sum(), expected)
    second = torch.autograd.grad(sum(g.square().sum() for g in back), list(leaves.values()))
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize("solver", ["plain", "anderson", "broyden"])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_mixed_precision(solver, backward):
    a, b = pair()
    network = build(EFRUFN, solver=solver, backward=backward)
    expected = network(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        fused = network(a, b)
    close(fused.float(), expected, atol=0.05)
    fused.float().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_pictures(value):
    x = torch.full((1, 1, 16, 16), value)
    assert build(EFRUFN)(x, x).isfinite().all()


# The weights that ship


@pytest.mark.parametrize("task", ["ivif", "mfif", "meif"])
def test_anderson_needs_fewer_evaluations_than_plain_iteration(task):
    network = create_model("efrufn", task, pretrained=True)
    item = EmbeddedPairs(task, count=1, size=(64, 64), seed=1)[0]
    with torch.no_grad():
        base, guide = network.encode(*(luminance(item[key])[None] for key in "ab"))
    start = torch.cat([base, network.unit.first_mask(base)], dim=1)
    options = {"tolerance": 1e-4, "relative": True, "max_evaluations": 30}
    evaluations = {}
    for solver in ("anderson", "plain"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FixedPointWarning)
            found = solve(lambda x: network.step(x, base, guide), start, solver=solver, **options)
        evaluations[solver] = found.evaluations
        assert found.converged or solver == "plain"
    assert evaluations["anderson"] < evaluations["plain"]


@pytest.mark.parametrize(("window", "tolerance"), [(2, 2e-5), (4, 1e-6)])
@pytest.mark.parametrize("size", [(2, 16, 24, 8), (1, 16, 8, 96), (1, 16, 4, 4)])
def test_windows_attend_alike_with_and_without_gradients(monkeypatch, window, tolerance, size):
    monkeypatch.setattr(swin, "BAND_PIXELS", 8 * size[-1])  # more than one band, and a smaller last
    torch.manual_seed(0)
    layer = swin.NormedSwin(16, 4, window)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(size)
    expected = layer(x)
    assert expected.requires_grad
    with torch.no_grad():
        close(layer(x), expected.detach(), atol=tolerance)


def test_past_iterations_are_not_held():
    network = FRUFN(8, 2, units=4).requires_grad_(False)
    past, held = [], []

    def look(unit, arguments):
        held.append(sum(features() is not None for features in past[1:]))  # the first is the base's
        past.append(weakref.ref(arguments[0]))

    for unit in network.units:
        unit.register_forward_pre_hook(look)
    network(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16))
    assert held == [0, 0, 0, 0]
