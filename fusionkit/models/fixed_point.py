"""Fixed points F* = H(F*) of a network's map, and gradients through them.

Source: Bai et al., Deep equilibrium models, NeurIPS 2019. Equation numbers are those of the
gradient-transfer paper (FRUFN, EFRUFN), section 3.2.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from fusionkit.models.solvers import SOLVERS
from fusionkit.names import check_name

Map = Callable[[torch.Tensor], torch.Tensor]
BACKWARDS = ("jacobian_free", "neumann", "exact")


class FixedPointWarning(UserWarning):
    """An iteration that diverges, stalls or meets NaN; the message carries the residual."""


class FixedPoint(NamedTuple):
    """What a solver found.

    Attributes:
        value: of all H(x) that were evaluated, each item's with the smallest residual (the authors
            look from the third on); always finite if the start is. (B, ...), as the start.
        residuals: ‖H(x) - x‖ of every evaluation, (evaluations, B); infinite or NaN where H was.
        evaluations: how often H was called.
        converged: whether every item came below the tolerance.
    """

    value: torch.Tensor
    residuals: torch.Tensor
    evaluations: int
    converged: bool


@torch.no_grad()
def solve(
    H: Map,
    start: torch.Tensor,
    *,
    solver: str = "anderson",
    tolerance: float = 1e-3,
    relative: bool = False,
    max_evaluations: int = 30,
    memory: int = 6,
    mixing: float = 1.0,
    regularisation: float = 1e-4,
) -> FixedPoint:
    """A fixed point of H, without gradients. Each item of the batch is a problem of its own.

    Args:
        H: the map, (B, ...) -> (B, ...).
        start: the first state.
        solver: "plain" iterates x ← H(x); "anderson" mixes the last values by the weights with
            the smallest combined residual; "broyden" is a quasi-Newton method for H(x) - x = 0.
        tolerance: stop once every item's residual is at most that.
        relative: the residual is ‖H(x) - x‖ / ‖H(x)‖ in place of ‖H(x) - x‖ (L2 over an item).
        max_evaluations: the most calls of H.
        memory: how many past states Anderson's and Broyden's methods remember.
        mixing: how far to go along the residual, 1 all the way; "plain" knows it too.
        regularisation: Anderson's: added to the diagonal of the residuals' Gram matrix; where it
            outweighs them, at residuals below its root, the weights become equal and the gain over
            "plain" is lost. Broyden's: an update whose denominator is below that share of ‖Δx‖²
            is left out.

    Warns:
        FixedPointWarning: H gave NaN or infinity, or the residual did not even halve.

    Raises:
        ValueError: an unknown solver, or fewer than one evaluation or remembered state.
    """
    check_name(solver, SOLVERS, "solver")
    for name, number in (("max_evaluations", max_evaluations), ("memory", memory)):
        if number < 1:
            raise ValueError(f"{name} {number}; expected 1 or more")
    propose = SOLVERS[solver](max(1, min(memory, max_evaluations - 1)), mixing, regularisation)
    x = start.detach()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # sums over a whole picture need full precision
    best, smallest = x, torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    residuals = []
    for _ in range(max_evaluations):
        value = H(x.to(start.dtype)).detach().to(x.dtype)
        residual = _norm(value - x)
        if relative:
            residual = residual / _norm(value).clamp_min(torch.finfo(value.dtype).tiny)
        residuals.append(residual)
        best = _where(residual < smallest, value, best)  # never true of NaN
        smallest = torch.where(residual < smallest, residual, smallest)
        converged = bool((smallest <= tolerance).all())
        if converged or len(residuals) == max_evaluations:
            break
        usable = residual.isfinite()
        if not usable.all():  # go on from the best state, as if it were the solution
            x, value = _where(usable, x, best), _where(usable, value, best)
        with torch.autocast(x.device.type, enabled=False):
            x = propose(x, value)
    residuals = torch.stack(residuals)
    _warn_of_divergence(residuals, smallest, tolerance, converged)
    return FixedPoint(best.to(start.dtype), residuals, len(residuals), converged)


def fixed_point(
    H: Map,
    start: torch.Tensor,
    *,
    backward: str = "jacobian_free",
    terms: int = 5,
    **options,
) -> FixedPoint:
    """A fixed point of H whose gradient reaches all that H closes over, in constant memory.

    With F* found without gradients, H is applied to it once more, and a gradient v = ∂L/∂F* is
    replaced by vᵀ (E - J)⁻¹, J = ∂H/∂F at F*, on its way into that application:

        ∂L/∂θ = ∂L/∂F* (E - J)⁻¹ ∂H(F*)/∂θ        (eq. 19, with J where the paper's slip has ∂L/∂F*)

    No gradient reaches `start`. Where gradients are off this is `solve`.

    Args:
        backward: "jacobian_free" takes E for the inverse (eq. 20); "neumann" takes the first
            `terms` of E + J + J² + ...; "exact" solves w = Jᵀ w + v by the same solver, to a
            relative tolerance of ε^¾, at most 200 products with Jᵀ.
        terms: of the Neumann series; 1 is "jacobian_free".
        options: those of `solve`.

    Second derivatives take F* and J's place for constant: "jacobian_free" and "neumann" have them,
    "exact" raises NotImplementedError. Forward mode knows "jacobian_free" alone.

    Raises:
        ValueError: as `solve`; an unknown `backward`; no terms.
    """
    check_name(backward, BACKWARDS, "backward")
    if terms < 1:
        raise ValueError(f"terms {terms}; expected 1 or more")
    solution = solve(H, start, **options)
    if not torch.is_grad_enabled():
        return solution
    # Older versions of torch would use again what autocast has cast without gradients.
    torch.clear_autocast_cache()
    point = solution.value
    if backward == "jacobian_free":
        return solution._replace(value=_finite_or(H(point), point))
    point = point.detach().requires_grad_()
    value = H(point)
    if not value.requires_grad:
        return solution._replace(value=_finite_or(value, point.detach()))

    def times_jacobian(w: torch.Tensor) -> torch.Tensor:
        graph = {"retain_graph": True, "create_graph": torch.is_grad_enabled()}
        (product,) = torch.autograd.grad(
            value, point, w, **graph, allow_unused=True, materialize_grads=True
        )
        return product

    def neumann(v: torch.Tensor) -> torch.Tensor:
        total = power = v
        for _ in range(terms - 1):
            power = times_jacobian(power)
            total = total + power
        return total

    def exact(v: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'second derivatives with backward="exact"; use "jacobian_free" or "neumann"'
            )
        return _solve_adjoint(times_jacobian, v, options.get("solver", "anderson"))

    # The hook sits on a view, so that the products inside it do not call it again.
    through = value.view_as(value)
    through.register_hook(neumann if backward == "neumann" else exact)
    return solution._replace(value=_finite_or(through, point.detach()))


def _solve_adjoint(times_jacobian: Map, v: torch.Tensor, solver: str) -> torch.Tensor:
    """w = Jᵀ w + v."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FixedPointWarning)  # one warning, the one below
        solution = solve(
            lambda w: times_jacobian(w) + v,
            v,
            solver=solver,
            tolerance=torch.finfo(v.dtype).eps ** 0.75,
            relative=True,
            max_evaluations=200,
            memory=10,
            regularisation=0.0,
        )
    if not solution.converged:
        worst = solution.residuals.nan_to_num(torch.inf).amin(dim=0).max().item()
        warnings.warn(
            f"the exact gradient was not reached: relative residual {worst:.3g} after "
            f"{solution.evaluations} evaluations",
            FixedPointWarning,
            stacklevel=2,
        )
    return solution.value


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _where(item: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """`yes` for the items of the batch marked in `item`, (B,), else `no`."""
    return torch.where(item.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def _finite_or(value: torch.Tensor, fallback: torch.Tensor) -> torch.Tensor:
    return value if value.isfinite().all() else torch.where(value.isfinite(), value, fallback)


def _warn_of_divergence(
    residuals: torch.Tensor, smallest: torch.Tensor, tolerance: float, converged: bool
) -> None:
    first, last = residuals[0], residuals[-1]
    halved = converged or len(residuals) == 1 or bool((last <= first / 2).all())
    if residuals.isfinite().all() and halved:
        return
    trouble = "did not halve" if residuals.isfinite().all() else "is not finite"
    warnings.warn(
        f"no fixed point: the residual {trouble}, from {first.max():.3g} to {last.max():.3g} in "
        f"{len(residuals)} evaluations (tolerance {tolerance:g}); the state returned has "
        f"{smallest.max():.3g}",
        FixedPointWarning,
        stacklevel=4,  # past `solve` and its no_grad, to its caller
    )
