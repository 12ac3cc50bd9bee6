"""Data: folders of pairs, the named sets of the papers, and embedded scenes."""

from fusionkit.datasets.catalogue import dataset_info, list_datasets, load_dataset
from fusionkit.datasets.folders import PairFolder, RandomCrops
from fusionkit.datasets.generated import GeneratedPairs
from fusionkit.datasets.labelled import LabelledCrops, LabelledFolder, collate_labelled

__all__ = [
    "GeneratedPairs",
    "LabelledCrops",
    "LabelledFolder",
    "PairFolder",
    "RandomCrops",
    "collate_labelled",
    "dataset_info",
    "list_datasets",
    "load_dataset",
]
