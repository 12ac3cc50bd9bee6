"""Fusion metrics: functions `metric(a, b, fused) -> (B,)`, and tables of them by `evaluate`.

Pictures are (B, 1, H, W) in [0, 1]; values are those of the field's MATLAB code on 0 to 255. Every
metric is an attribute of this module, and stands in `METRICS` by name and in `FAMILIES` by kind.

A metric of your own is any function of that form. Give it to `evaluate` or `leaderboard` beside
the names: `fk.evaluate(a, b, fused, metrics=["ssim", mine])`.
"""

from fusionkit.metrics.catalogue import *  # noqa: F403
from fusionkit.metrics.catalogue import COMMON, FAMILIES, METRICS, SMALLER_IS_BETTER
from fusionkit.metrics.evaluate import evaluate, summary
from fusionkit.metrics.reference import reference_psnr, reference_rmse, reference_ssim

__all__ = [
    "COMMON",
    "FAMILIES",
    "METRICS",
    "SMALLER_IS_BETTER",
    "evaluate",
    "reference_psnr",
    "reference_rmse",
    "reference_ssim",
    "summary",
    *METRICS,
]
