"""Fixed points and gradients through them, against linear algebra and plain back-propagation."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from fusionkit.models.fixed_point import BACKWARDS, FixedPointWarning, fixed_point, solve
from fusionkit.models.solvers import SOLVERS, mixing_weights, products

TIGHT = {"tolerance": 1e-12, "max_evaluations": 200}


class Affine:
    """H(x) = A x + c for each of three items, with its fixed point; ‖A‖ = `norm`."""

    def __init__(self, norm: float = 0.9, size: int = 6) -> None:
        torch.manual_seed(0)
        a = torch.randn(3, size, size, dtype=torch.float64)
        self.matrix = norm * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
        self.shift = torch.randn(3, size, dtype=torch.float64)
        self.point = torch.linalg.solve(torch.eye(size) - self.matrix, self.shift)
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (self.matrix @ x[..., None])[..., 0] + self.shift


class Contraction(nn.Module):
    """½ tanh(conv(x)) + injected, a small contractive network in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        self.inject = nn.Conv2d(1, 2, 1, dtype=torch.float64)
        self.picture = torch.rand(2, 1, 4, 5, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(self.conv(x)) + self.inject(self.picture)

    @property
    def start(self) -> torch.Tensor:
        return self.picture.new_zeros(2, 2, 4, 5)


def loss_of(value: torch.Tensor) -> torch.Tensor:
    return (value - torch.linspace(-1, 1, value.numel()).view_as(value)).square().sum()


def gradients(network: nn.Module, value: torch.Tensor, **options) -> torch.Tensor:
    given = torch.autograd.grad(loss_of(value), list(network.parameters()), **options)
    return torch.cat([g.flatten() for g in given])


def implicit(backward: str, terms: int = 5, **options) -> torch.Tensor:
    network = Contraction()
    found = fixed_point(
        network, network.start, backward=backward, terms=terms, **{**TIGHT, **options}
    )
    return gradients(network, found.value)


def unrolled() -> torch.Tensor:
    network = Contraction()
    x = network.start
    for _ in range(200):
        x = network(x)
    return gradients(network, x)


def distance(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    return ((gradient - reference).norm() / reference.norm()).item()


# Solvers


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_find_the_fixed_point(solver):
    H = Affine()
    found = solve(H, torch.zeros_like(H.shift), solver=solver, **TIGHT)
    torch.testing.assert_close(found.value, H.point, rtol=0, atol=1e-9)
    assert found.converged
    assert found.evaluations == H.calls == len(found.residuals)
    assert found.residuals.shape == (found.evaluations, 3)
    assert found.residuals[-1].max() <= 1e-12


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_quasi_newton_solvers_end_with_the_dimension(solver):
    """On an affine map in R⁶ Anderson needs 8 evaluations and Broyden 13; plain iteration 100."""
    H = Affine()
    options = {"solver": solver, "memory": 20, "regularisation": 0.0}
    found = solve(H, torch.zeros_like(H.shift), tolerance=1e-9, max_evaluations=60, **options)
    assert found.converged
    assert found.evaluations <= {"anderson": 8, "broyden": 13}[solver]


@pytest.mark.parametrize("solver", SOLVERS)
def test_items_of_a_batch_are_problems_of_their_own(solver):
    H = Affine()
    start = torch.randn(3, 6, dtype=torch.float64)
    together = solve(H, start, solver=solver, tolerance=0, max_evaluations=9)
    for i in range(3):
        alone = Affine()
        alone.matrix, alone.shift = H.matrix[i : i + 1], H.shift[i : i + 1]
        found = solve(alone, start[i : i + 1], solver=solver, tolerance=0, max_evaluations=9)
        torch.testing.assert_close(together.residuals[:, i], found.residuals[:, 0])
        torch.testing.assert_close(together.value[i], found.value[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_may_have_any_shape(solver):
    network = Contraction()
    found = solve(network, network.start, solver=solver, **TIGHT)
    torch.testing.assert_close(network(found.value), found.value, rtol=0, atol=1e-11)
    assert not found.value.requires_grad


def test_plain_iteration_by_hand():
    found = solve(lambda x: x / 2 + 1, torch.zeros(1, 1), solver="plain", max_evaluations=3)
    assert found.value.item() == 1.75
    assert found.residuals[:, 0].tolist() == [1, 0.5, 0.25]
    assert not found.converged
    half = solve(
        lambda x: x / 2 + 1, torch.zeros(1, 1), solver="plain", mixing=0.5, max_evaluations=4
    )
    assert half.residuals[:, 0].tolist() == [1, 0.75, 0.5625, 0.421875]


def test_anderson_by_hand():
    """Two residuals r, s in one dimension: α = (s² + λ - r s, r² + λ - r s) / their sum."""
    found = solve(lambda x: 3 - x / 2, torch.zeros(1, 1, dtype=torch.float64), max_evaluations=3)
    r, s, ridge = 3.0, -1.5, 1e-4  # the residuals at x = 0 and 3
    alpha = torch.tensor([s * s + ridge - r * s, r * r + ridge - r * s], dtype=torch.float64)
    third = alpha @ torch.tensor([3.0, 1.5], dtype=torch.float64) / alpha.sum()
    torch.testing.assert_close(found.value[0, 0], 3 - third / 2)


def test_anderson_weights_solve_the_bordered_system():
    """The authors' form: [[0, 1ᵀ], [1, G + λE]] (μ, α) = (1, 0)."""
    torch.manual_seed(0)
    residuals = torch.randn(3, 4, 20, dtype=torch.float64)
    gram = residuals @ residuals.mT
    bordered = torch.ones(3, 5, 5, dtype=torch.float64)
    bordered[:, 0, 0] = 0
    bordered[:, 1:, 1:] = gram + 1e-4 * torch.eye(4)
    right = torch.eye(5, dtype=torch.float64)[0].expand(3, 5)
    torch.testing.assert_close(
        mixing_weights(gram, 1e-4), torch.linalg.solve(bordered, right)[:, 1:]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regularisation", [0.0, 1e-4])
def test_anderson_weights_of_degenerate_histories(dtype, regularisation):
    one = torch.ones(4, 4, dtype=dtype)
    indefinite = one - 1e-6 * torch.eye(4, dtype=dtype)
    gram = torch.stack([0 * one, one, 1e30 * one, 1e-30 * one, indefinite])
    weights = mixing_weights(gram, regularisation)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5, dtype=dtype))


def test_products_of_a_large_picture_keep_their_digits():
    # As many numbers as 33 maps of 480×640 have: summed in one go, float32 is off by 1e-3.
    rows = torch.rand(2, 33 * 480 * 640, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.dot(row.double(), rows[1].double()) for row in rows])
    torch.testing.assert_close(products(rows, rows[1]).double(), expected, rtol=3e-6, atol=0)


def test_mixing_moves_part_of_the_way():
    H = Affine(0.5)
    for solver in SOLVERS:
        found = solve(H, torch.zeros_like(H.shift), solver=solver, mixing=0.7, **TIGHT)
        torch.testing.assert_close(found.value, H.point, rtol=0, atol=1e-9)
        second = solve(H, torch.zeros_like(H.shift), solver=solver, mixing=0.7, max_evaluations=2)
        torch.testing.assert_close(second.value, H(0.7 * H.shift))


def test_relative_residual():
    H = Affine()
    absolute = solve(H, torch.zeros_like(H.shift), max_evaluations=1)
    relative = solve(H, torch.zeros_like(H.shift), relative=True, max_evaluations=1)
    torch.testing.assert_close(absolute.residuals[0], H.shift.norm(dim=1))
    torch.testing.assert_close(relative.residuals[0], torch.ones(3, dtype=torch.float64))


def test_the_worst_item_decides_when_to_stop():
    def H(x):
        return x * torch.tensor([[0.1], [0.8]])

    found = solve(H, torch.ones(2, 1), solver="plain", tolerance=1e-2, max_evaluations=50)
    assert found.converged
    assert found.residuals[-1, 0] < 1e-6
    assert 1e-3 < found.residuals[-1, 1] <= 1e-2


# Trouble


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_that_is_the_solution(solver):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = torch.ones(2, 3)
        found = solve(lambda x: x, start, solver=solver)
        assert found.evaluations == 1
        constant = solve(lambda x: torch.full_like(x, 2), start, solver=solver)
    assert found.converged
    assert constant.converged
    assert constant.evaluations == 2
    torch.testing.assert_close(constant.value, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_residuals_make_a_singular_history(solver):
    """H(x) = x + 1 has no fixed point; all residuals are the same vector."""
    with pytest.warns(FixedPointWarning, match=r"did not halve, from 1\.73 to 1\.73 in 12"):
        found = solve(lambda x: x + 1, torch.zeros(2, 3), solver=solver, max_evaluations=12)
    assert not found.converged
    assert found.value.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [3.0, 3e6])
def test_divergence_ends_with_a_warning_and_the_best_state(solver, factor):
    def H(x):  # x² = -1 has no real solution
        return x + factor * (x * x + 1)

    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    with pytest.warns(FixedPointWarning, match="no fixed point: the residual") as caught:
        found = solve(H, start, solver=solver, max_evaluations=40, memory=3)
    assert found.value.isfinite().all()
    best = found.residuals.nan_to_num(torch.inf).amin(dim=0)
    assert f"the state returned has {best.max():.3g}" in str(caught[0].message)
    assert (best <= found.residuals[0]).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_from_the_start_returns_the_start(solver):
    start = torch.ones(2, 3)
    with pytest.warns(FixedPointWarning, match=r"is not finite, from nan to nan in 4 .* has inf"):
        found = solve(lambda x: x * torch.nan, start, solver=solver, max_evaluations=4)
    torch.testing.assert_close(found.value, start)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_broken_item_leaves_the_others_alone(solver):
    def H(x):
        return torch.stack([x[0] / 2 + 1, x[1] / torch.zeros(3)])

    with pytest.warns(FixedPointWarning, match="is not finite"):
        found = solve(H, torch.ones(2, 3), solver=solver, tolerance=1e-5, max_evaluations=30)
    torch.testing.assert_close(found.value[0], torch.full((3,), 2.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.value[1], torch.ones(3))


def test_bad_options():
    start = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"unknown solver 'andersen'.*'anderson'"):
        solve(torch.cos, start, solver="andersen")
    with pytest.raises(ValueError, match="max_evaluations 0; expected 1 or more"):
        solve(torch.cos, start, max_evaluations=0)
    with pytest.raises(ValueError, match="memory 0; expected 1 or more"):
        solve(torch.cos, start, memory=0)
    with pytest.raises(ValueError, match="unknown backward 'full'"):
        fixed_point(torch.cos, start, backward="full")
    with pytest.raises(ValueError, match="terms 0; expected 1 or more"):
        fixed_point(torch.cos, start, backward="neumann", terms=0)


# Gradients


@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_gradient_is_that_of_200_iterations(solver):
    assert distance(implicit("exact", solver=solver), unrolled()) < 1e-6


def test_exact_gradient_of_an_affine_map_by_linear_algebra():
    H = Affine()
    H.shift.requires_grad_()
    found = fixed_point(H, torch.zeros_like(H.shift), backward="exact", **TIGHT)
    v = torch.randn_like(H.shift)
    (gradient,) = torch.autograd.grad(found.value, H.shift, v)
    expected = torch.linalg.solve((torch.eye(6) - H.matrix).mT, v)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_neumann_approaches_the_exact_gradient():
    reference = unrolled()
    errors = [distance(implicit("neumann", terms), reference) for terms in (1, 2, 4, 8, 16, 40)]
    assert all(later < 0.8 * earlier for earlier, later in pairwise(errors))
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-6


def test_jacobian_free_is_the_first_term():
    torch.testing.assert_close(implicit("jacobian_free"), implicit("neumann", 1))


def test_neumann_on_an_affine_map_by_hand():
    H = Affine()
    H.shift.requires_grad_()
    start, v = torch.zeros_like(H.shift), torch.randn_like(H.shift)
    found = fixed_point(H, start, backward="neumann", terms=3, **TIGHT)
    (gradient,) = torch.autograd.grad(found.value, H.shift, v)
    j = H.matrix.mT
    series = torch.eye(6) + j + j @ j
    torch.testing.assert_close(gradient, (series @ v[..., None])[..., 0])


@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradients_reach_functional_parameters(backward):
    network = Contraction()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()}
    options = {"backward": backward, **TIGHT}
    found = fixed_point(lambda x: functional_call(network, parameters, x), network.start, **options)
    given = torch.autograd.grad(loss_of(found.value), list(parameters.values()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in given]), implicit(backward))


def test_a_second_backward_pass_with_the_graph_retained():
    network = Contraction()
    found = fixed_point(network, network.start, backward="exact", **TIGHT)
    first = gradients(network, found.value, retain_graph=True)
    torch.testing.assert_close(gradients(network, found.value), first)


def test_without_gradients_the_map_is_not_applied_again():
    H = Affine()
    start = torch.zeros_like(H.shift)
    with torch.no_grad():
        found = fixed_point(H, start, max_evaluations=4)
    assert H.calls == found.evaluations == 4
    torch.testing.assert_close(found.value, solve(H, start, max_evaluations=4).value)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_a_map_without_parameters_has_no_gradient(backward):
    H = Affine()
    found = fixed_point(H, torch.zeros_like(H.shift), backward=backward, **TIGHT)
    torch.testing.assert_close(found.value.detach(), H.point, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backward", ["jacobian_free", "neumann"])
def test_second_derivatives_hold_the_point_constant(backward):
    """∂/∂θ of ∂(v·F*)/∂θ, written out: v or v + Jᵀ v times ∂H(F*)/∂θ, at a constant F*."""
    network = Contraction()
    start, weight = network.start, network.conv.weight
    v = torch.randn_like(start)
    found = fixed_point(network, start, backward=backward, terms=2, **TIGHT)
    (first,) = torch.autograd.grad(found.value, weight, v, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)

    point = found.value.detach().requires_grad_()
    value = network(point)
    if backward == "neumann":
        v = v + torch.autograd.grad(value, point, v, create_graph=True)[0]
    (by_hand,) = torch.autograd.grad(value, weight, v, create_graph=True)
    torch.testing.assert_close(first, by_hand)
    torch.testing.assert_close(second, torch.autograd.grad(by_hand.square().sum(), weight)[0])


def test_second_derivatives_of_the_exact_gradient_are_refused():
    network = Contraction()
    found = fixed_point(network, network.start, backward="exact", **TIGHT)
    with pytest.raises(NotImplementedError, match="jacobian_free"):
        gradients(network, found.value, create_graph=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_is_the_transpose_of_jacobian_free():
    network = Contraction()
    theta = {n: p.detach() for n, p in network.named_parameters()}
    along = {n: torch.randn_like(p) for n, p in theta.items()}
    start = network.start

    def value(parameters):
        H = lambda x: functional_call(network, parameters, x)  # noqa: E731
        return fixed_point(H, start, **TIGHT).value

    out, slope = jvp(value, (theta,), (along,))
    leaves = {n: p.clone().requires_grad_() for n, p in theta.items()}
    v = torch.randn_like(out)
    back = torch.autograd.grad(value(leaves), list(leaves.values()), v)
    expected = sum((g * along[n]).sum() for n, g in zip(theta, back, strict=True))
    torch.testing.assert_close((slope * v).sum(), expected)


def test_an_exact_gradient_that_does_not_exist_warns():
    """At 0, x ↦ 3 tanh(x) + c repels: (E - J)⁻¹ exists, but no series reaches it by iteration."""
    shift = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    found = fixed_point(
        lambda x: 3 * torch.tanh(x) + shift,
        torch.zeros(1, 2, dtype=torch.float64),
        backward="exact",
        solver="plain",
    )
    with pytest.warns(FixedPointWarning, match="exact gradient was not reached: relative residual"):
        (gradient,) = torch.autograd.grad(found.value.sum(), shift)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backward", BACKWARDS)
def test_divergence_under_gradients_gives_a_finite_picture(backward):
    factor = torch.full((1, 3), 1e30, requires_grad=True)
    with pytest.warns(FixedPointWarning):
        found = fixed_point(
            lambda x: factor * x, torch.ones(1, 3), backward=backward, max_evaluations=5
        )
    assert found.value.isfinite().all()


@pytest.mark.parametrize("gram", [[[torch.nan]], [[torch.inf, 1.0], [1.0, torch.inf]]])
def test_weights_of_a_gram_matrix_that_is_not_finite_are_equal(gram):
    sound = torch.eye(len(gram)) * torch.tensor([1.0, 3.0])[: len(gram)]
    weights = mixing_weights(torch.stack([torch.tensor(gram), sound]), 0.0)
    torch.testing.assert_close(weights[0], torch.full((len(gram),), 1 / len(gram)))
    torch.testing.assert_close(weights[1], torch.tensor([0.75, 0.25] if len(gram) == 2 else [1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sixteen_bits_are_summed_in_thirty_two(solver, dtype):
    # The squares of these residuals lie beyond float16.
    start = torch.full((1, 100_000), 10.0, dtype=dtype)
    found = solve(lambda x: 0.5 * x + 1, start, solver=solver, tolerance=1e-2)
    assert found.value.dtype == dtype
    assert found.residuals.dtype == torch.float32
    torch.testing.assert_close(
        found.value.float(), torch.full((1, 100_000), 2.0), rtol=1e-2, atol=0
    )
