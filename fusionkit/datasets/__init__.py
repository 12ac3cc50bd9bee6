"""Data: folders of pairs, the named sets of the papers, and embedded scenes."""

from fusionkit.datasets.catalogue import dataset_info, list_datasets, load_dataset
from fusionkit.datasets.folders import PairFolder, RandomCrops

__all__ = ["PairFolder", "RandomCrops", "dataset_info", "list_datasets", "load_dataset"]
