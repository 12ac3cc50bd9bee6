"""Metrics from information theory, on histograms of the 256 gray levels (values are rounded).

Each takes a, b and fused, (B, 1, H, W) in [0, 1], gives (B,) float64, and refuses other shapes,
NaN and values outside [0, 1] with a ValueError. Counting has no gradient.
"""

from __future__ import annotations

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._histograms import entropy_of, histogram, joint_histogram
from fusionkit.names import check_name

UNITS = {"bits": 2.0, "nats": torch.e}
REDUCTIONS = ("sum", "mean")
CONVENTIONS = ("paper", "mefb")
TSALLIS_ORDER = 1.85


def entropy(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """EN: Shannon entropy of the fused picture's 256 gray levels, in bits (0 to 8); (B,).

    Larger is better, though noise raises it as well. The sources do not enter.

    Source: Roberts et al., Assessment of image fusion procedures using entropy, 2008.
    """
    return by_picture(lambda a, b, f: entropy_of(histogram(f)), a, b, fused)


def mutual_information(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    unit: str = "bits",
    reduction: str = "sum",
) -> torch.Tensor:
    """MI: what the fused picture tells of the sources, I(a, f) + I(b, f); (B,).

    Larger is better; 0 for a constant picture; at most 8 bits a source.

    Args:
        unit: "bits", as in most code and papers; or "nats", as in VIFB's MATLAB code, 0.69 times
            as much. (VIFB also stretches each picture to 0 to 255 first. That keeps whole levels
            apart, so it changes nothing.)
        reduction: "sum" over the sources, as in the MATLAB files; or "mean", as in many papers.

    Raises:
        ValueError: unknown unit or reduction.

    Source: Qu et al., Information measure for performance of image fusion, 2002.
    """
    check_name(unit, UNITS, "unit")
    check_name(reduction, REDUCTIONS, "reduction")

    def value(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return _mutual_information(a, f, UNITS[unit]) + _mutual_information(b, f, UNITS[unit])

    total = by_picture(value, a, b, fused)
    return total / 2 if reduction == "mean" else total


def nmi(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Normalised MI, 2 [I(a, f) / (H(a) + H(f)) + I(b, f) / (H(b) + H(f))], 0 to 2; (B,).

    Larger is better. NaN where the fused picture and a source are both constant. Qu's own MI
    without the normalisation is `mutual_information`; some papers call that NMI.

    Source: Hossny et al., Comments on "Information measure for performance of image fusion", 2008.
    """

    def value(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return 2 * sum(
            _mutual_information(x, f) / (entropy_of(histogram(x)) + entropy_of(histogram(f)))
            for x in (a, b)
        )

    return by_picture(value, a, b, fused)


def qncie(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_NCIE, nonlinear correlation information entropy, 0 to 1; (B,).

    1 + Σ (λ/3) log_256 (λ/3) over the eigenvalues of the 3×3 matrix of nonlinear correlations of
    a, b and fused: mutual information in units of 8 bits, with 1 on the diagonal. Larger is
    better, but pictures that share nothing have 0.802 already. Constant pictures correlate 0.

    Source: Wang et al., A nonlinear correlation measure for multivariable data set, 2005.
    """

    def value(*pictures: torch.Tensor) -> torch.Tensor:
        matrix = torch.eye(3, dtype=torch.float64, device=pictures[0].device)
        matrix = matrix.repeat(len(pictures[0]), 1, 1)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            shared = _mutual_information(pictures[i], pictures[j], base=256)
            matrix[:, i, j] = matrix[:, j, i] = shared
        shares = torch.linalg.eigvalsh(matrix).clamp(min=0) / 3
        return 1 - entropy_of(shares, base=256)

    return by_picture(value, a, b, fused)


def cross_entropy(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """CE: mean over the sources of Σ p log2(p / q), p the source's, q the fused histogram; (B,).

    In bits; smaller is better, 0 for equal histograms. Levels that either picture lacks are left
    out, as in VIFB's MATLAB code, so it may be negative, and is 0 for pictures without a common
    level. This is a relative entropy (Kullback and Leibler), in spite of its name.

    Source: Bulanon et al., Image fusion of visible and thermal images for fruit detection, 2009.
    """

    def value(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        q = histogram(f)
        total = 0
        for source in (a, b):
            p = histogram(source)
            both = (p > 0) & (q > 0)
            total = total + torch.where(both, p * torch.log2(p / q), 0).sum(1)
        return total / 2

    return by_picture(value, a, b, fused)


def tsallis_entropy(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, convention: str = "paper"
) -> torch.Tensor:
    """TE: mutual information by Tsallis's entropy of order q = 1.85, summed over the sources; (B,).

    I_q(x, f) = [Σ p(x, f)^q / (p(x) p(f))^(q - 1) - 1] / (q - 1). Larger is better.

    Args:
        convention: "paper", the definition: 0 for a constant picture. "mefb", what the MATLAB code
            of MEFB and of Liu's collection gives: it stretches each picture to 0 to 255 and takes
            the two marginals in the wrong order, p(x = j) p(f = i) beside p(x = i, f = j), leaving
            out pairs where that is 0: hundreds of times as much where the histograms differ, NaN
            for a constant picture. Published TE columns come from it.

    Raises:
        ValueError: unknown convention.

    Source: Cvejic et al., Image fusion metric based on mutual information and Tsallis entropy,
    2006.
    """
    check_name(convention, CONVENTIONS, "convention")

    def value(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        if convention == "paper":
            return _tsallis(a, f) + _tsallis(b, f)
        a, b, f = (_stretched(x) for x in (a, b, f))
        total = _tsallis(a, f, swapped=True) + _tsallis(b, f, swapped=True)
        constant = torch.stack([x.amax((-2, -1)) == 0 for x in (a, b, f)]).any(0)
        return torch.where(constant, torch.nan, total)

    return by_picture(value, a, b, fused)


def _mutual_information(x: torch.Tensor, y: torch.Tensor, base: float = 2.0) -> torch.Tensor:
    joint = joint_histogram(x, y)
    parts = entropy_of(joint.sum(2), base) + entropy_of(joint.sum(1), base)
    return parts - entropy_of(joint, base)


def _tsallis(x: torch.Tensor, y: torch.Tensor, swapped: bool = False) -> torch.Tensor:
    joint = joint_histogram(x, y)
    product = joint.sum(2)[:, :, None] * joint.sum(1)[:, None]
    if swapped:
        product = product.mT
    both = (joint > 0) & (product > 0)
    ratio = joint * (joint / product) ** (TSALLIS_ORDER - 1)
    return (torch.where(both, ratio, 0).sum((1, 2)) - 1) / (TSALLIS_ORDER - 1)


def _stretched(x: torch.Tensor) -> torch.Tensor:
    """Whole levels stretched to 0 to 255, halves rounded up; zeros for a constant picture."""
    x = x.round()
    x = x - x.amin((-2, -1), keepdim=True)
    return (x * 255 / x.amax((-2, -1), keepdim=True).clamp(min=1) + 0.5).floor()
