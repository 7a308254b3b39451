"""Reading and writing photographs: JPEG, PNG and DICOM in, colour as RGB; files written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from monai.data import PILReader, PILWriter
from PIL import Image, ImageFile

from medsa_nets.data.atomic import AtomicWriter, make_folder, temporary_name
from medsa_nets.data.datalists import is_dicom
from medsa_nets.errors import DataError

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated file is an error here, never a half-grey image


class PhotographReader(PILReader):
    """MONAI's PIL reader, for DICOM photographs too; converts to one mode and names the file in every error.

    Args:
        mode: ``RGB`` for images (grey-scale and RGBA are converted), ``L`` for masks.

    Arrays come as (W, H) or (W, H, channels), as from :class:`monai.data.PILReader`.
    """

    def __init__(self, mode: str = "RGB", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = mode

    def verify_suffix(self, filename: Any) -> bool:
        """Every file: what can't be read is told by :meth:`get_data`."""
        return True

    def read(self, data: Any, **kwargs: Any) -> Path:
        """The file's path; :meth:`get_data` decodes it, lest ``LoadImage`` tries its other readers."""
        return Path(data[0] if isinstance(data, (list, tuple)) else data)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode one file to an array and its metadata.

        Raises:
            DataError: when the file is missing, unreadable or truncated.
        """
        return super().get_data(read_photograph(img, self.mode))


def read_photograph(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Read one photograph as a PIL image of ``mode``.

    Raises:
        DataError: when the file is missing, unreadable or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        image = read_dicom_photograph(path) if is_dicom(path) else Image.open(path)
        image.load()
    except DataError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and others for damaged files
        raise DataError(
            f"{path}: not readable as an image ({type(error).__name__}: {error}). Expected a whole JPEG, PNG, BMP, "
            "TIFF or DICOM photograph; replace the file, or leave it out (--skip_unreadable true)."
        ) from error
    if image.mode.startswith("I"):  # 16-bit grey, of either byte order: PIL would clip it at 255
        array = np.asarray(image, dtype=np.float32)
        top = float(array.max()) or 1.0
        image = Image.fromarray((array / top * 255.0).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def read_dicom_photograph(path: str | Path) -> Image.Image:
    """Read a DICOM photograph (VL Photographic, Secondary Capture) as an RGB or grey image.

    Raises:
        DataError: when the object holds no single photograph or its pixels can't be decoded.
    """
    import pydicom

    try:
        dataset = pydicom.dcmread(path)
        array = dataset.pixel_array
        interpretation = str(dataset.PhotometricInterpretation)
    except Exception as error:  # pydicom raises its own, AttributeError, ValueError, NotImplementedError, RuntimeError
        raise DataError(
            f"{path}: its DICOM pixels can't be read ({type(error).__name__}: {error}). Expected a photograph in a "
            "transfer syntax that pydicom decodes."
        ) from error
    if interpretation.startswith("YBR_FULL") and int(pydicom.__version__.split(".")[0]) < 3:
        from pydicom.pixel_data_handlers.util import convert_color_space  # pydicom 3 gives RGB by itself

        array = convert_color_space(array, interpretation, "RGB")
    if array.ndim == 2:
        array = array.astype(np.float32)
        array -= array.min()
        array = (array / max(float(array.max()), 1.0) * 255.0).astype(np.uint8)
        if interpretation == "MONOCHROME1":
            array = 255 - array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DataError(f"{path}: DICOM object of shape {array.shape}; expected one photograph (rows, columns, 3).")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


class AtomicPILWriter(AtomicWriter, PILWriter):
    """MONAI's PIL writer, whole files only; it keeps the rows and columns of a picture of one pixel."""

    data_obj: Any

    def set_data_array(
        self, data_array: Any, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **kwargs: Any
    ) -> None:
        """Set the pixels (channels, W, H)."""
        super().set_data_array(data_array, channel_dim=channel_dim, squeeze_end_dims=False, **kwargs)
        if squeeze_end_dims and self.data_obj.ndim == 3 and self.data_obj.shape[2] == 1:
            self.data_obj = self.data_obj[..., 0]


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Save a picture as PNG, under a temporary name until complete; folders are made."""
    path = Path(path)
    make_folder(path.parent)
    with temporary_name(path) as part:
        image.save(part, format="PNG")
    return path
