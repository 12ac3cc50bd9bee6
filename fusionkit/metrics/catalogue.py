"""Every metric by name, in families, and which way each one points."""

from __future__ import annotations

from fusionkit.metrics.contrast import qcb, qcv
from fusionkit.metrics.edges import nabf, qabf, qg
from fusionkit.metrics.features import (
    average_gradient,
    edge_intensity,
    spatial_frequency,
    standard_deviation,
)
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
from fusionkit.metrics.vif import vif, viff

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
