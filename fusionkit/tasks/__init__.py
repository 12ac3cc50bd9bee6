"""Perception networks that guide fusion: segmentation, detection, and the protocol they share."""

from fusionkit.tasks.base import PerceptionTask

__all__ = ["PerceptionTask"]
