"""fusionkit: five papers of image fusion on one thin PyTorch package.

>>> import fusionkit as fk
>>> fused = fk.fuse("ir.png", "visible.png", task="ivif")
>>> fk.evaluate("ir.png", "visible.png", fused)
"""

from fusionkit.datasets import list_datasets, load_dataset
from fusionkit.fuse import fuse, fuse_folders
from fusionkit.images import save_image, to_pil
from fusionkit.metrics import evaluate
from fusionkit.models import create_model, list_models

__version__ = "0.1.0"

__all__ = [
    "create_model",
    "evaluate",
    "fuse",
    "fuse_folders",
    "list_datasets",
    "list_models",
    "load_dataset",
    "save_image",
    "to_pil",
]
