"""Training methods: one file a paper's method; each takes any fusion network."""

from fusionkit.methods.base import Method
from fusionkit.methods.refusion import ReFusionMethod

__all__ = ["Method", "ReFusionMethod"]
