"""The solvers of `fixed_point.solve`: from a state and its value to the next state.

Sources: Anderson, Iterative procedures for nonlinear integral equations, JACM 1965; Broyden, A
class of methods for solving nonlinear simultaneous equations, Math. Comp. 1965.

Each is called with x and H(x), (B, ...), and remembers what it needs; items of the batch never mix.
"""

from __future__ import annotations

import torch

SUMMED_AT_ONCE = 2**16


class Plain:
    """x ← x + β (H(x) - x)."""

    def __init__(self, memory: int, mixing: float, regularisation: float) -> None:
        self.mixing = mixing

    def __call__(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value if self.mixing == 1 else x.lerp(value, self.mixing)


class Anderson:
    """x ← Σ αᵢ (xᵢ + β gᵢ), gᵢ = H(xᵢ) - xᵢ, the α by which Σ αᵢ gᵢ is smallest; Σ αᵢ = 1."""

    def __init__(self, memory: int, mixing: float, regularisation: float) -> None:
        self.memory, self.mixing, self.regularisation = memory, mixing, regularisation
        self.count = 0

    def __call__(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.count == 0:
            self.values = value.new_empty(len(value), self.memory, value[0].numel())
            self.residuals = torch.empty_like(self.values)
            self.gram = value.new_empty(len(value), self.memory, self.memory)
        slot = self.count % self.memory  # the newest takes the oldest's place; order is no matter
        self.values[:, slot], self.residuals[:, slot] = value.flatten(1), (value - x).flatten(1)
        self.count += 1
        kept = min(self.count, self.memory)
        values, residuals = self.values[:, :kept], self.residuals[:, :kept]
        row = torch.stack([products(item, item[slot]) for item in residuals])  # one is new
        self.gram[:, slot, :kept] = self.gram[:, :kept, slot] = row
        weights = mixing_weights(self.gram[:, :kept, :kept], self.regularisation)[:, None]
        mixed = weights @ values
        if self.mixing != 1:
            mixed = mixed - (1 - self.mixing) * (weights @ residuals)
        return mixed.view_as(value)


def products(rows: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Scalar products (N, D), (D,) -> (N,), summed in parts.

    A single product over the 10⁷ numbers of a picture's features loses four digits in float32, and
    Anderson's weights move the picture by 10⁻³ for that. Not batched: that is slow on a CPU.
    """
    if rows.device.type != "cpu":
        return (rows * vector).sum(dim=1)
    parts = zip(rows.split(SUMMED_AT_ONCE, dim=1), vector.split(SUMMED_AT_ONCE), strict=True)
    return torch.stack([torch.mv(*part) for part in parts]).sum(dim=0)


def mixing_weights(gram: torch.Tensor, regularisation: float) -> torch.Tensor:
    """α = (G + λE)⁻¹ 1, scaled to sum 1: (B, n, n) -> (B, n).

    λ never lies below the rounding error of G, and grows until G + λE has a Cholesky factor: equal
    or vanishing residuals stop nothing. Equal weights for a G with NaN or infinity.
    """
    exact = gram.cpu().double()  # tiny, and not every device has doubles or a fast solver
    sound = exact.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    exact = torch.where(sound, exact, torch.eye(gram.shape[-1], dtype=exact.dtype))
    scale = exact.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    ridge = (torch.finfo(gram.dtype).eps * scale).clamp_min(max(regularisation, 1e-30))
    identity = torch.eye(gram.shape[-1], dtype=exact.dtype)
    while True:
        factor, info = torch.linalg.cholesky_ex(exact + ridge[:, None, None] * identity)
        if not info.any():
            break
        ridge = torch.where(info > 0, 10 * ridge, ridge)
    weights = torch.cholesky_solve(torch.ones_like(exact[..., :1]), factor)[..., 0]
    return (weights / weights.sum(dim=-1, keepdim=True)).to(gram)


class Broyden:
    """x ← x - B g, g = H(x) - x; B stands for the inverse of g's Jacobian.

    B = -β E + Σ uᵢ wᵢᵀ, learned from the steps by the "good" update, which makes B Δg = Δx:
    w = Bᵀ Δx, u = (Δx - B Δg) / (wᵀ Δg). A full memory is forgotten.
    """

    def __init__(self, memory: int, mixing: float, regularisation: float) -> None:
        self.memory, self.mixing, self.regularisation = memory, mixing, regularisation
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shape, x = x.shape, x.flatten(1)
        g = value.flatten(1) - x
        if self.last is not None:
            self._learn(x - self.last[0], g - self.last[1])
        self.last = x, g
        return (x - self._times(g)).view(shape)

    def _learn(self, dx: torch.Tensor, dg: torch.Tensor) -> None:
        if len(self.pairs) == self.memory:
            self.pairs.clear()
        w = -self.mixing * dx
        for u_i, w_i in self.pairs:
            w = w + _dot(u_i, dx) * w_i
        denominator = _dot(w, dg)
        sound = denominator.abs() > self.regularisation * _dot(dx, dx)
        u = (dx - self._times(dg)) / torch.where(sound, denominator, torch.ones_like(denominator))
        self.pairs.append((torch.where(sound, u, torch.zeros_like(u)), w))

    def _times(self, v: torch.Tensor) -> torch.Tensor:
        product = -self.mixing * v
        for u_i, w_i in self.pairs:
            product = product + _dot(w_i, v) * u_i
        return product


SOLVERS = {"plain": Plain, "anderson": Anderson, "broyden": Broyden}


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, D) twice -> (B, 1)."""
    return torch.stack([products(x[None], y) for x, y in zip(a, b, strict=True)])
