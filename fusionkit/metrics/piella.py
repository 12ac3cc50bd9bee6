"""Quality indices that weigh the sources' local similarities. Larger is better, at most 1.

In each window they take the similarity of the fused picture with each source, and differ in how
the sources share the window. Constants and windows are those of the MATLAB collection of Liu et
al., Objective assessment of multiresolution image fusion algorithms for context enhancement in
night vision, 2012.
"""

from __future__ import annotations

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import correlate, gaussian, pad
from fusionkit.metrics._sobel import magnitude
from fusionkit.metrics._ssim import FLAT, GAUSSIAN, Moments, check_size, ssim_map
from fusionkit.metrics.remember import remembered
from fusionkit.names import check_name

EDGE_CONVENTIONS = ("liu", "mefb", "piella")
SHARE_CONVENTIONS = ("mefb", "cvejic")
PREWITT = ((-1, 0, 1), (-1, 0, 1), (-1, 0, 1))
SMALL_GAUSSIAN = tuple(gaussian(7, 1.5))
ALIKE = 0.75  # SSIM of the sources from which Yang's index averages them


def qs(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_S: mean over the windows of λ SSIM(a, f) + (1 - λ) SSIM(b, f); (B,).

    λ is source a's share of the sources' two variances, one half where both are flat. Gaussian
    window of 11 with σ 1.5, and SSIM's constants for 255, which the paper's index has not.

    Raises:
        ValueError: pictures smaller than 11×11.

    Source: Piella and Heijmans, A new quality metric for image fusion, 2003, eq. 5.
    """

    def value(a, b, f):
        check_size(f, len(GAUSSIAN), "Q_S")
        similarity, _ = _weighted_similarity(a, b, f)
        return similarity.mean((-2, -1))

    return by_picture(value, a, b, fused)


def qw(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_W: as Q_S, each window weighted by the larger variance of the sources; (B,).

    NaN where both sources are constant.

    Raises:
        ValueError: pictures smaller than 11×11.

    Source: Piella and Heijmans, A new quality metric for image fusion, 2003, eq. 6.
    """

    def value(a, b, f):
        check_size(f, len(GAUSSIAN), "Q_W")
        return _qw(a, b, f)

    return by_picture(value, a, b, fused)


def qe(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, convention: str = "liu"
) -> torch.Tensor:
    """Q_E: Q_W with a part for edges, of the Prewitt magnitudes (zeros beyond the border); (B,).

    NaN where both sources are constant and black.

    Args:
        convention: "liu" is the square of the magnitudes' Q_W, as that MATLAB collection; "mefb"
            is that Q_W itself, which MEFB's code returns as "Qw"; "piella" the paper's product of
            the pictures' Q_W and the magnitudes' (α = 1), NaN where both sources are constant.

    Raises:
        ValueError: pictures smaller than 11×11, or an unknown convention.

    Source: Piella and Heijmans, A new quality metric for image fusion, 2003, eq. 7.
    """
    check_name(convention, EDGE_CONVENTIONS, "convention")

    def value(a, b, f):
        check_size(f, len(GAUSSIAN), "Q_E")
        edges = _qw(*(_edges(x) for x in (a, b, f)))
        if convention == "mefb":
            return edges
        return edges * (edges if convention == "liu" else _qw(a, b, f))

    return by_picture(value, a, b, fused)


def qc(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, convention: str = "mefb"
) -> torch.Tensor:
    """Q_C: mean over the windows of μ Q(a, f) + (1 - μ) Q(b, f); (B,).

    μ is the share of cov(a, f) in cov(a, f) + cov(b, f), one half where both are 0. Q is the
    universal quality index in a Gaussian window of 7 with σ 1.5; of two flat windows only the
    means are compared.

    Args:
        convention: says what becomes of a share below 0 or above 1, where one covariance is
            negative. "mefb": the window's value is 0 or 1, as in MEFB's MATLAB code, so that the
            sources are not treated alike; "cvejic": the share is 0 or 1, as in the paper. On
            multi-focus pairs the first is up to 0.3 less. In windows flat in a picture the MATLAB
            code has rounding noise for share and quality, and is not followed.

    Raises:
        ValueError: pictures smaller than 7×7, or an unknown convention.

    Source: Cvejic et al., A similarity metric for assessment of image fusion algorithms, 2005.
    """
    check_name(convention, SHARE_CONVENTIONS, "convention")

    def value(a, b, f):
        check_size(f, len(SMALL_GAUSSIAN), "Q_C")
        moments = Moments(SMALL_GAUSSIAN, a=a, b=b, f=f)
        (with_a, cov_a), (with_b, cov_b) = (_quality_index(moments, x, "f") for x in "ab")
        share = _divided(cov_a, cov_a + cov_b, 0.5)
        limited = share.clamp(0, 1)
        quality = limited * with_a + (1 - limited) * with_b
        if convention == "mefb":
            quality = torch.where(share == limited, quality, limited)
        return quality.mean((-2, -1))

    return by_picture(value, a, b, fused)


def qy(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_Y: where the sources are alike, their similarities as in Q_S; elsewhere the larger; (B,).

    Alike is SSIM(a, b) of at least 0.75. SSIM has no constants here (the universal quality index)
    and a Gaussian window of 7 with σ 1.5. Of two flat windows only the means are compared. Windows
    flat in all three pictures are left out: the MATLAB code divides rounding noise by rounding
    noise there, and has anything from the value below to infinity. NaN where all three are
    constant.

    Raises:
        ValueError: pictures smaller than 7×7.

    Source: Yang et al., A novel similarity based quality metric for image fusion, 2008.
    """

    def value(a, b, f):
        check_size(f, len(SMALL_GAUSSIAN), "Q_Y")
        moments = Moments(SMALL_GAUSSIAN, a=a, b=b, f=f)
        with_a, with_b = (_quality_index(moments, x, "f")[0] for x in "ab")
        share = _share(moments.variance["a"], moments.variance["b"])
        quality = torch.where(
            _quality_index(moments, "a", "b")[0] >= ALIKE,
            share * with_a + (1 - share) * with_b,
            torch.maximum(with_a, with_b),
        )
        varies = torch.stack(list(moments.variance.values())).amax(0) >= FLAT
        return (quality * varies).sum((-2, -1)) / varies.sum((-2, -1))

    return by_picture(value, a, b, fused)


def _weighted_similarity(
    a: torch.Tensor, b: torch.Tensor, f: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In each window, SSIM of f with the sources by their variances; and the larger variance."""
    moments = Moments(GAUSSIAN, a=a, b=b, f=f)
    share = _share(moments.variance["a"], moments.variance["b"])
    similarity = share * ssim_map(moments, "a", "f") + (1 - share) * ssim_map(moments, "b", "f")
    return similarity, _no_noise(torch.maximum(moments.variance["a"], moments.variance["b"]))


def _qw(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    similarity, saliency = _weighted_similarity(a, b, f)
    return (saliency * similarity).sum((-2, -1)) / saliency.sum((-2, -1))


@remembered
def _edges(x: torch.Tensor) -> torch.Tensor:
    x = pad(x, 1, "zeros")
    transposed = tuple(zip(*PREWITT, strict=True))
    return magnitude(correlate(x, PREWITT), correlate(x, transposed))


def _quality_index(moments: Moments, x: str, y: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Wang and Bovik's universal quality index, SSIM's limit for constants of 0; the covariance."""
    product = 2 * moments.mean[x] * moments.mean[y]
    squares = moments.mean[x].square() + moments.mean[y].square()
    luminance = _divided(product, squares, 1)
    var_x, var_y = moments.variance[x], moments.variance[y]
    flat_x, flat_y = var_x < FLAT, var_y < FLAT
    covariance = torch.where(flat_x | flat_y, 0, moments.covariance(x, y))
    total = torch.where(flat_x & flat_y, 0, var_x + var_y)
    structure = _divided(2 * covariance, total, 1)
    return luminance * structure, covariance


def _share(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x / (x + y) of two variances; one half where both are flat."""
    x, y = _no_noise(x), _no_noise(y)
    return _divided(x, x + y, 0.5)


def _divided(x: torch.Tensor, y: torch.Tensor, otherwise: float) -> torch.Tensor:
    """x / y, and `otherwise` where y is 0, with gradient 0 there."""
    none = y == 0
    return torch.where(none, otherwise, x / y.masked_fill(none, 1))


def _no_noise(variance: torch.Tensor) -> torch.Tensor:
    return torch.where(variance < FLAT, 0, variance)
