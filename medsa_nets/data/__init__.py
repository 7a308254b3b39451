"""Data: lists of images and masks, reading of photographs, datasets with reproducible randomness."""

from medsa_nets.data.datalists import image_id, list_photographs, load_datalist
from medsa_nets.data.dataset import EpochSampler, SeededDataset, stable_seed
from medsa_nets.data.photographs import AtomicPILWriter, PhotographReader, read_dicom_photograph, save_png

__all__ = [
    "AtomicPILWriter",
    "EpochSampler",
    "PhotographReader",
    "SeededDataset",
    "image_id",
    "list_photographs",
    "load_datalist",
    "read_dicom_photograph",
    "save_png",
    "stable_seed",
]
