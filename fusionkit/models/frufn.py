"""The fusion rule unfolded: FRUFN, whose iterations have own weights, and EFRUFN, a fixed point.

Source: Wang et al., A General Image Fusion Approach Exploiting Gradient Transfer Learning and
Fusion Rule Unfolding, section 3.2, and the authors' release where it differs: 8 attention heads in
place of 6, one residual block in place of two, and a ReLU on the difference of the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.models.blocks import conv3x3
from fusionkit.models.fixed_point import BACKWARDS, FixedPoint, fixed_point
from fusionkit.models.solvers import SOLVERS
from fusionkit.models.unfolding import ResidualBlock, UnfoldingUnit
from fusionkit.names import check_name

RULES = ("reconstructed", "paper")
COARSEST = 8  # the mask generator halves the picture three times


class Trace(NamedTuple):
    """What an unfolding network did with a pair, without gradients.

    Attributes:
        fused, mask: the result, as `forward` returns it, and the last mask, (B, 1, H, W).
        pictures, masks: decoded features and mask after each iteration, (B, 1, H, W) each.
        features: the features F after each iteration, (B, width, H, W) each.
        residuals: how far each iteration moved, L2 norm per item, (iterations, B). For EFRUFN it
            is the solver's residual and covers the features and the mask.
    """

    fused: torch.Tensor
    mask: torch.Tensor
    pictures: list[torch.Tensor]
    masks: list[torch.Tensor]
    features: list[torch.Tensor]
    residuals: torch.Tensor


class UnfoldingNetwork(nn.Module):
    """What FRUFN and EFRUFN share: two encoders T₁ and T₂, and the decoder T⁻¹.

    One source is the base, whose features the iteration refines (the paper's I₂ and F₂); the other
    is the guide, which it draws on (I₁ and F₁). The authors call their networks with the base
    first: (visible, infrared), (far, near), (under, over). Here b is the base, so that
    `forward(infrared, visible)` and `forward(near, far)` are their calls; theirs for exposures is
    `base="a"`.
    """

    def __init__(self, width: int, base: str) -> None:
        super().__init__()
        self.base = check_name(base, ("a", "b"), "base")
        self.base_encoder = nn.Sequential(conv3x3(1, width), ResidualBlock(width))
        self.guide_encoder = nn.Sequential(conv3x3(1, width), ResidualBlock(width))
        self.decoder = nn.Sequential(ResidualBlock(width), conv3x3(width, 1))

    def encode(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's and the guide's features, (B, width, H', W') each.

        H' and W' are the next multiples of 8: the pictures are padded below and to the right by
        their last row and column.

        Raises:
            ValueError: the sources are not both (B, 1, H, W).
        """
        if a.ndim != 4 or a.shape[1] != 1 or a.shape != b.shape:
            raise ValueError(
                f"sources of {tuple(a.shape)} and {tuple(b.shape)}; expected (B, 1, H, W) twice"
            )
        height, width = a.shape[-2:]
        padding = (0, -width % COARSEST, 0, -height % COARSEST)
        a, b = (F.pad(x, padding, mode="replicate") for x in (a, b))
        base, guide = (a, b) if self.base == "a" else (b, a)
        return self.base_encoder(base), self.guide_encoder(guide)

    def decode(self, features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Features (B, width, H', W') -> a picture of the size of `like`, not clamped."""
        return _crop(self.decoder(features), like)

    def autoencode(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each source from its own features alone, (B, 1, H, W) twice, not clamped."""
        base, guide = (self.decode(features, a) for features in self.encode(a, b))
        return (base, guide) if self.base == "a" else (guide, base)

    def _trace(
        self,
        like: torch.Tensor,
        last: tuple[torch.Tensor, torch.Tensor],
        states: list[tuple[torch.Tensor, torch.Tensor]],
        residuals: torch.Tensor,
    ) -> Trace:
        features, mask = last
        return Trace(
            self.decode(features, like),
            _crop(mask, like),
            [self.decode(f, like) for f, _ in states],
            [_crop(m, like) for _, m in states],
            [_crop(f, like) for f, _ in states],
            residuals,
        )


class FRUFN(UnfoldingNetwork):
    """The fusion rule unfolding network (eq. 14 and 15; 863,562 parameters at its defaults).

    Args:
        width: channels of the features; a multiple of `heads`.
        heads: attention heads.
        units: iterations N; 1 is the paper's "without unfolding".
        shared: all iterations have one unit's weights (the paper's "shared params").
        mask: False fixes M = 1.
        base: the source that is refined; see `UnfoldingNetwork`.
    """

    def __init__(
        self,
        width: int = 32,
        heads: int = 8,
        units: int = 5,
        shared: bool = False,
        mask: bool = True,
        base: str = "b",
    ) -> None:
        super().__init__(width, base)
        if units < 1:
            raise ValueError(f"units {units}; expected 1 or more")
        self.iterations = units
        count = 1 if shared else units
        self.units = nn.ModuleList(UnfoldingUnit(width, heads, mask) for _ in range(count))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Luminances a, b (B, 1, H, W) in [0, 1] -> fused (B, 1, H, W), not clamped; any size."""
        for features, _ in self._states(*self.encode(a, b)):  # noqa: B007 - the last one counts
            pass
        return self.decode(features, a)

    @torch.no_grad()
    def trace(self, a: torch.Tensor, b: torch.Tensor) -> Trace:
        """Every iteration's features, mask and picture for the same a and b as `forward`."""
        base, guide = self.encode(a, b)
        states = list(self._states(base, guide))
        before = [base, *(features for features, _ in states[:-1])]
        moves = [(f - last).flatten(1) for (f, _), last in zip(states, before, strict=True)]
        return self._trace(a, states[-1], states, torch.stack([m.norm(dim=1) for m in moves]))

    def _states(
        self, base: torch.Tensor, guide: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        features, mask = base, self.units[0].first_mask(base)
        for n in range(self.iterations):
            step, mask = self.units[n % len(self.units)](features, guide, mask)
            features = features + step
            yield features, mask


class EFRUFN(UnfoldingNetwork):
    """The efficient one: one unit, iterated to its fixed point (eq. 16 to 20; 217,794 parameters).

    The state is F and M together, (B, width + 1, H, W), and starts at (base, 0).

    Args:
        width, heads, mask, base: as for `FRUFN`.
        rule: "paper" adds the unit's update to the running features, F + M ⊙ T(d) (eq. 16): at a
            fixed point the update would be 0, and with the authors' weights it diverges.
            "reconstructed" adds it to the base's features, E + M ⊙ T(d), to which those weights
            converge; their class is not released.
        solver, max_evaluations, tolerance: of `fixed_point.solve`; the residual is absolute. The
            defaults are those of the authors' test for infrared and visible pairs, which as a rule
            ends after its 5 evaluations.
        backward, terms: the gradient, of `fixed_point.fixed_point`.

    Where the iteration diverges, a `FixedPointWarning` tells the residual, and the picture is that
    of the state with the smallest one.
    """

    def __init__(
        self,
        width: int = 32,
        heads: int = 8,
        rule: str = "reconstructed",
        mask: bool = True,
        base: str = "b",
        solver: str = "anderson",
        max_evaluations: int = 5,
        tolerance: float = 1e-3,
        backward: str = "jacobian_free",
        terms: int = 5,
    ) -> None:
        super().__init__(width, base)
        self.width, self.rule = width, check_name(rule, RULES, "rule")
        self.unit = UnfoldingUnit(width, heads, mask)
        self.solver = check_name(solver, SOLVERS, "solver")
        self.max_evaluations, self.tolerance = max_evaluations, tolerance
        self.backward, self.terms = check_name(backward, BACKWARDS, "backward"), terms

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Luminances a, b (B, 1, H, W) in [0, 1] -> fused (B, 1, H, W), not clamped; any size."""
        return self.decode(self._solve(*self.encode(a, b)).value[:, : self.width], a)

    @torch.no_grad()
    def trace(self, a: torch.Tensor, b: torch.Tensor) -> Trace:
        """Every evaluation's features, mask and picture for the same a and b as `forward`.

        `fused` and `mask` belong to the evaluation with the smallest residual.
        """
        states = []
        solution = self._solve(*self.encode(a, b), states)
        split = [s.split([self.width, 1], dim=1) for s in (solution.value, *states)]
        return self._trace(a, split[0], split[1:], solution.residuals)

    def step(self, state: torch.Tensor, base: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        """H, one application of the unit (eq. 17): (B, width + 1, H, W) -> the next state."""
        features, mask = state.split([self.width, 1], dim=1)
        update, mask = self.unit(features, guide, mask)
        origin = features if self.rule == "paper" else base
        return torch.cat([origin + update, mask], dim=1)

    def _solve(
        self, base: torch.Tensor, guide: torch.Tensor, states: list[torch.Tensor] | None = None
    ) -> FixedPoint:
        def H(state: torch.Tensor) -> torch.Tensor:
            value = self.step(state, base, guide)
            if states is not None:
                states.append(value)
            return value

        return fixed_point(
            H,
            torch.cat([base, self.unit.first_mask(base)], dim=1),
            backward=self.backward,
            terms=self.terms,
            solver=self.solver,
            max_evaluations=self.max_evaluations,
            tolerance=self.tolerance,
        )


def _crop(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x[..., : like.shape[-2], : like.shape[-1]]
