"""Training methods: one file a paper's method; each takes any fusion network."""

from fusionkit.methods.base import Method
from fusionkit.methods.caf import CAFSearch
from fusionkit.methods.color import ColorNetMethod
from fusionkit.methods.gradient_transfer import GradientTransferMethod, train_stages
from fusionkit.methods.mae import MAEMethod
from fusionkit.methods.perception import TaskTraining
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.methods.tcmoa import TCMoAMethod
from fusionkit.methods.tdfusion import TDFusionMethod
from fusionkit.methods.weighted_loss import WeightedLossTraining

__all__ = [
    "CAFSearch",
    "ColorNetMethod",
    "GradientTransferMethod",
    "MAEMethod",
    "Method",
    "ReFusionMethod",
    "TCMoAMethod",
    "TDFusionMethod",
    "TaskTraining",
    "WeightedLossTraining",
    "train_stages",
]
