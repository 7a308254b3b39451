"""Data: lists of images and masks, reading of photographs and volumes, datasets with reproducible randomness."""

from medsa_nets.data.datalists import image_id, list_photographs, load_datalist
from medsa_nets.data.dataset import (
    EpochSampler,
    SeededCacheDataset,
    SeededDataset,
    SeededPersistentDataset,
    make_dataset,
    repeat_volumes,
    stable_seed,
)
from medsa_nets.data.outputs import (
    NamedOutputs,
    check_names,
    class_postfix,
    image_path,
    output_name,
    prepare_folders,
    prepare_outputs,
    result_endings,
    unique_names,
)
from medsa_nets.data.photographs import AtomicPILWriter, PhotographReader, read_dicom_photograph, save_png
from medsa_nets.data.volumes import list_volumes, load_volume_datalist, read_volume, volume_id, volume_writer

__all__ = [
    "AtomicPILWriter",
    "EpochSampler",
    "NamedOutputs",
    "PhotographReader",
    "SeededCacheDataset",
    "SeededDataset",
    "SeededPersistentDataset",
    "check_names",
    "class_postfix",
    "image_id",
    "image_path",
    "list_photographs",
    "list_volumes",
    "load_datalist",
    "load_volume_datalist",
    "make_dataset",
    "output_name",
    "prepare_folders",
    "prepare_outputs",
    "read_dicom_photograph",
    "read_volume",
    "repeat_volumes",
    "result_endings",
    "save_png",
    "stable_seed",
    "unique_names",
    "volume_id",
    "volume_writer",
]
