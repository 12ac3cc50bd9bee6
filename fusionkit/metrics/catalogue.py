"""Every metric by name, in families, and which way each one points.

What does not agree with the field's MATLAB values, and why. Differences are relative, on the rows
of the reference table (12 to 16 pictures for each MATLAB file). Metrics not listed agree to 1e-6,
in the convention that their docstring names for that code; `ms_ssim` has no MATLAB values there
and agrees with piq's.

========================  =====================================================================
`qp`                      up to 5e-4 on pictures of odd size, 1.5e-4 on others; not explained.
`qc`                      6 of 13 miss 1e-3: four by up to 5e-3; two with flat regions entirely,
                          where MATLAB's value is rounding noise (1.18 and -0.86).
`fmi_gradient`            up to 5e-4, and the next three up to 3e-4: windows that are flat but for
`fmi_pixel`               one pixel, which the reference decides by its rounding; for the edges
`fmi_wavelet`, `fmi_edge` slopes of exactly 45° as well. `fmi_dct` agrees to 1e-6: the
                          windows' distributions are in single precision.
`qy`                      up to 4e-4 on pictures with flat regions: windows flat in all three
                          pictures are noise over noise in MATLAB and left out here. On one
                          picture, not counted, MATLAB has infinity and NaN for it.
`qs`                      up to 1.3e-5, `qw` and `qe` 4e-8, on pictures with flat regions.
========================  =====================================================================
"""

from __future__ import annotations

from fusionkit.metrics.contrast import qcb, qcv
from fusionkit.metrics.edges import nabf, qabf, qg
from fusionkit.metrics.features import (
    average_gradient,
    edge_intensity,
    spatial_frequency,
    standard_deviation,
)
from fusionkit.metrics.fidelity import vif, viff
from fusionkit.metrics.fmi import fmi_dct, fmi_edge, fmi_gradient, fmi_pixel, fmi_wavelet
from fusionkit.metrics.information import (
    cross_entropy,
    entropy,
    mutual_information,
    nmi,
    qncie,
    tsallis_entropy,
)
from fusionkit.metrics.mef import mef_ms_ssim, mef_ssim
from fusionkit.metrics.piella import qc, qe, qs, qw, qy
from fusionkit.metrics.reference import psnr, rmse
from fusionkit.metrics.structure import cc, ms_ssim, scd, ssim
from fusionkit.metrics.transform import qm, qp

FAMILIES = {
    "information": (
        entropy,
        mutual_information,
        nmi,
        qncie,
        cross_entropy,
        tsallis_entropy,
        fmi_pixel,
        fmi_gradient,
        fmi_edge,
        fmi_dct,
        fmi_wavelet,
    ),
    "features": (
        standard_deviation,
        spatial_frequency,
        average_gradient,
        edge_intensity,
        qabf,
        nabf,
        qg,
        qp,
        qm,
    ),
    "structure": (ssim, ms_ssim, mef_ssim, mef_ms_ssim, qs, qw, qe, qc, qy, cc, scd),
    "perception": (vif, viff, qcb, qcv),
    "reference": (psnr, rmse),
}
METRICS = {metric.__name__: metric for family in FAMILIES.values() for metric in family}

# What most papers of the field print, and quick to compute.
COMMON = (
    "entropy",
    "standard_deviation",
    "spatial_frequency",
    "average_gradient",
    "mutual_information",
    "scd",
    "viff",
    "qabf",
    "ssim",
)
# Distances and artefacts; every other metric is better the larger it is.
SMALLER_IS_BETTER = frozenset({"cross_entropy", "nabf", "qcv", "rmse"})
