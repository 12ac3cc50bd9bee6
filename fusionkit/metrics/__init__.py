"""Fusion metrics: functions `metric(a, b, fused) -> (B,)`, and tables of them by `evaluate`.

Pictures are (B, 1, H, W) in [0, 1]; values are those of the field's MATLAB code on 0 to 255.
"""

from fusionkit.metrics.evaluate import METRICS, evaluate
from fusionkit.metrics.features import average_gradient, spatial_frequency, standard_deviation
from fusionkit.metrics.information import entropy
from fusionkit.metrics.structure import scd, ssim

__all__ = [
    "METRICS",
    "average_gradient",
    "entropy",
    "evaluate",
    "scd",
    "spatial_frequency",
    "ssim",
    "standard_deviation",
]
