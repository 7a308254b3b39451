"""Reading and writing photographs: JPEG, PNG, TIFF, PPM and DICOM in, colour as RGB; files written whole or not at all.

A photograph that states an orientation (EXIF) is turned upright as it is read. That is the one frame of this package:
images, masks, prompts and every output are upright, of the size that viewers show.
"""

from __future__ import annotations

import gzip
import io
import logging
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import PILReader, PILWriter
from PIL import Image, ImageFile, ImageOps
from PIL.PngImagePlugin import PngInfo

from medsa_nets.data.atomic import AtomicWriter, make_folder, temporary_name
from medsa_nets.data.masks import mask_values
from medsa_nets.data.slices import decoded_pixels, is_dicom, read_dicom
from medsa_nets.errors import DataError, describe

logger = logging.getLogger(__name__)

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated file is an error here, never a half-grey image
_ORIENTATION = 0x0112  # EXIF and TIFF tag
_MOST_UNPACKED = 2**30  # bytes of a packed picture: a small file may hold endless zeros
_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")


class PhotographReader(PILReader):
    """MONAI's PIL reader, for DICOM photographs too; converts to one mode and names the file in every error.

    Args:
        mode: ``RGB`` for images (grey-scale and RGBA are converted), ``L`` for masks, whose values come as they are
            (see :func:`read_mask`).

    Arrays come as (W, H) or (W, H, channels), upright, as from :class:`monai.data.PILReader`. The metadata name the
    EXIF ``orientation`` that the file states (1: upright as it is stored) and the ``frame`` of the pixels; ``lossy``
    says whether the file is a JPEG or its like.
    """

    def __init__(self, mode: str = "RGB", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = mode

    def verify_suffix(self, filename: Any) -> bool:
        """Every file: what can't be read is told by :meth:`get_data`."""
        return True

    def read(self, data: Any, **kwargs: Any) -> Path | list[Path]:
        """The file's path; :meth:`get_data` decodes it, lest ``LoadImage`` tries its other readers."""
        if isinstance(data, (list, tuple)) and len(data) > 1:
            return [Path(path) for path in data]
        return Path(data[0] if isinstance(data, (list, tuple)) else data)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode one file to an array and its metadata; masks of several raters to an array (raters, W, H).

        Raises:
            DataError: when a file is missing, unreadable or truncated, or several are of different sizes.
        """
        paths = list(img) if isinstance(img, (list, tuple)) else [img]
        pictures = [read_mask(path) if self.mode == "L" else read_photograph(path, self.mode) for path in paths]
        for path, picture in zip(paths, pictures):
            if picture.size != pictures[0].size:
                raise DataError(
                    f"{path}: it is {picture.size[0]} x {picture.size[1]} pixels, {paths[0]} is "
                    f"{pictures[0].size[0]} x {pictures[0].size[1]}. Masks of one image have one size."
                )
        return super().get_data(pictures if len(pictures) > 1 else pictures[0])

    def _get_meta_dict(self, img: Any) -> dict[str, Any]:
        orientation = int(img.info.get("orientation", 1))
        return {
            **super()._get_meta_dict(img),
            "orientation": orientation,
            "frame": describe_frame(orientation),
            "lossy": bool(img.info.get("lossy", False)),
        }


def describe_frame(orientation: int) -> str:
    """What an output says of the frame that its pixels lie in."""
    turned = "as stored" if orientation == 1 else f"EXIF orientation {orientation} of the image is applied"
    return f"upright ({turned})"


def read_photograph(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Read one photograph as a PIL image of ``mode``, upright.

    Grey of more than 8 bits is scaled to 255 at its maximum; floating-point grey from 0 to 1, or from 0 to 255, keeps
    its brightness, other ranges are scaled from their minimum to their maximum.

    Raises:
        DataError: when the file is missing, unreadable or truncated, or holds values that are not finite.
    """
    path = Path(path)
    image = _open(path)
    info = {key: image.info[key] for key in ("orientation", "lossy")}
    try:
        if image.mode.startswith(("I", "F")):  # PIL would clip it at 255
            image = Image.fromarray(_grey_to_8_bits(np.asarray(image), path))
        if image.mode != mode:
            image = image.convert(mode)
    except DataError:
        raise
    except Exception as error:  # ValueError where PIL has no such conversion (LAB)
        raise _unreadable(path, error) from error
    image.info.update(info)
    return image


def read_mask(path: str | Path) -> Image.Image:
    """Read the mask of a photograph as a floating-point PIL image of its values, upright, nothing scaled.

    Values are grey values, the indices of a palette of colours, an alpha channel, or 0 and 255 for black and another
    colour; :func:`medsa_nets.data.masks.binarize_mask` judges them.

    Raises:
        DataError: when the file is missing, unreadable or truncated, or when its colours are no mask.
    """
    path = Path(path)
    image = _open(path, values=True)
    values = mask_values(image, str(path))
    exact = values.astype(np.float32)
    if (exact.astype(np.float64) != values).any() and not np.issubdtype(values.dtype, np.floating):
        raise DataError(
            f"{path}: the mask holds numbers of more than 24 bits, up to {values.max()}; expected two values."
        )
    out = Image.fromarray(exact)
    out.info.update({key: image.info[key] for key in ("orientation", "lossy")})
    return out


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not readable as an image ({describe(error)}). Expected a whole JPEG, PNG, BMP, "
        "TIFF, PPM or DICOM photograph; replace the file, or leave it out (--skip_unreadable true)."
    )


def _open(path: Path, values: bool = False) -> Image.Image:
    """Decode a file, upright; ``info`` says its EXIF ``orientation`` and whether it is ``lossy``.

    Args:
        path: of the file.
        values: whether grey values have to come as they are stored, as those of a mask.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        if is_dicom(path):
            image, orientation, lossy = Image.fromarray(_dicom_pixels(path, values)), 1, False
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tags that are unusual
                image = Image.open(_unpacked(path) if path.name.lower().endswith(".gz") else path)
                lossy, frames = image.format in _LOSSY, getattr(image, "n_frames", 1)
                tile = getattr(image, "tile", None) or [()]
                deep = image.mode not in ("L", "1") and ";16" in str(tile[0][-1:]) and not image.mode.startswith("I")
                orientation = _stated_orientation(image, path)  # a TIFF is turned by loading it
                _check_strips(image, path)
                image.load()
                if values and deep:
                    raise DataError(
                        f"{path}: a mask of 16 bits for each colour, of which 8 could be read. Save it as grey values."
                    )
                orientation = max(orientation, _stated_orientation(image, path))  # PNG may state it after the pixels
                image = ImageOps.exif_transpose(image) if _stated_orientation(image, path) > 1 else image
            if frames > 1 and not lossy:
                _warn_once(f"{path}: took the first of {frames} pictures in the file; left out the others.")
            if orientation > 1:
                _warn_once(f"{path}: turned upright, as its EXIF orientation {orientation} says; so are its outputs.")
    except DataError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and others for damaged files
        raise _unreadable(path, error) from error
    image.info.update({"orientation": orientation, "lossy": lossy})
    return image


def _check_strips(image: Image.Image, path: Path) -> None:
    """Refuse a TIFF that lists data for a part of its pixels only: PIL leaves the others black, without a word."""
    if not isinstance(image, ImageFile.ImageFile) or image.format != "TIFF":
        return
    places = {tuple(tile[1]) for tile in image.tile if tile[1]}  # once, where each colour has strips of its own
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in places)
    width, height = image.size
    if covered < width * height:
        raise DataError(
            f"{path}: it says that it has {width} x {height} pixels, but lists data for {covered} of these "
            f"{width * height}. Replace the file, or leave it out (--skip_unreadable true)."
        )


def _unpacked(path: Path) -> io.BytesIO:
    """What a file of gzip holds."""
    with gzip.open(path) as file:
        content = file.read(_MOST_UNPACKED + 1)
    if len(content) > _MOST_UNPACKED:
        raise DataError(
            f"{path}: it holds more than {_MOST_UNPACKED >> 30} GiB; expected one packed picture. Unpack it."
        )
    return io.BytesIO(content)


def _stated_orientation(image: Image.Image, path: Path) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or none of these."""
    try:
        stated = image.getexif().get(_ORIENTATION, 1)
        return int(stated) if int(stated) in range(1, 9) else 1
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and others for damaged EXIF data
        _warn_once(f"{path}: its EXIF data can't be read ({describe(error)}); taken as it is stored.")
        return 1


@lru_cache(maxsize=10_000)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _grey_to_8_bits(array: np.ndarray, path: Path) -> np.ndarray:
    """Grey values of any type as 8 bits, as :func:`read_photograph` says."""
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: {int((~np.isfinite(values)).sum())} pixels are not finite (NaN or infinite).")
    low, high = min(float(values.min()), 0.0), float(values.max())
    if np.issubdtype(array.dtype, np.floating) and low == 0.0 and high <= 255.0:
        high = 1.0 if high <= 1.0 else 255.0
    return _to_8_bits(values, low, high)


def _to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from ``low`` to ``high`` as 0 to 255; never wraps."""
    scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    return (scaled.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)


def read_dicom_photograph(path: str | Path) -> Image.Image:
    """Read a DICOM photograph (VL Photographic, Secondary Capture) as an RGB or grey image.

    Colours of any bit depth come as 8 bits, by the bits that the file says it stores; palettes are looked up. Grey is
    scaled from its minimum to its maximum, MONOCHROME1 inverted.

    Raises:
        DataError: when the object holds no single photograph, or its pixels or colours can't be decoded.
    """
    return Image.fromarray(_dicom_pixels(Path(path)))


def _dicom_pixels(path: Path, values: bool = False) -> np.ndarray:
    """(rows, columns) or (rows, columns, 3) of 8 bits; with ``values``, grey as it is stored."""
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = read_dicom(path)
            if "PhotometricInterpretation" not in dataset:
                raise ValueError("no PhotometricInterpretation")
            interpretation = str(dataset.PhotometricInterpretation).strip().upper()
            array = decoded_pixels(dataset)
            if interpretation == "PALETTE COLOR" and array.ndim == 2:
                array, bits = _look_up(array, dataset)
            else:
                bits = int(dataset.get("BitsStored", 0) or dataset.get("BitsAllocated", 8))
    except Exception as error:  # pydicom raises its own, AttributeError, ValueError, NotImplementedError, RuntimeError
        raise DataError(
            f"{path}: its DICOM pixels can't be read ({describe(error)}). Expected a photograph in a "
            "transfer syntax that pydicom decodes."
        ) from error
    if array.ndim == 2 and interpretation in ("MONOCHROME1", "MONOCHROME2"):
        if not np.isfinite(array).all():
            raise DataError(f"{path}: pixels are not finite (NaN or infinite). Replace them.")
        if interpretation == "MONOCHROME1":
            array = float(array.max()) + float(array.min()) - array.astype(np.float64)
        if values:
            return array.astype(np.float32 if array.dtype.itemsize > 2 else np.int32)
        return _to_8_bits(array, float(array.min()), float(array.max()))
    if array.ndim != 3 or array.shape[2] != 3:
        raise DataError(
            f"{path}: DICOM object of shape {array.shape} in {interpretation}; expected one photograph "
            "(rows, columns, 3), or grey (rows, columns)."
        )
    if interpretation not in ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"):
        raise DataError(
            f"{path}: colours in {interpretation}, which are not known here; expected RGB, PALETTE COLOR, YBR_FULL, "
            "YBR_FULL_422, YBR_ICT or YBR_RCT. Convert the photograph."
        )
    if interpretation.startswith("YBR_FULL") and int(pydicom.__version__.split(".")[0]) < 3:
        from pydicom.pixel_data_handlers.util import convert_color_space  # pydicom 3 gives RGB by itself

        array = convert_color_space(array, interpretation, "RGB")
    top = 2**bits - 1
    if int(array.max()) > top or int(array.min()) < 0:
        raise DataError(
            f"{path}: colours from {array.min()} to {array.max()}, which do not fit the {bits} bits that the file says "
            "it stores. Write it again with its true BitsStored and PixelRepresentation."
        )
    return np.ascontiguousarray(array if top == 255 and array.dtype == np.uint8 else _to_8_bits(array, 0.0, float(top)))


def _look_up(index: np.ndarray, dataset: Any) -> tuple[np.ndarray, int]:
    """Colours (rows, columns, 3) of a palette's indices, and their bits."""
    try:
        from pydicom.pixels import apply_color_lut
    except ImportError:  # pydicom 2
        from pydicom.pixel_data_handlers.util import apply_color_lut
    colours = apply_color_lut(index, dataset)[..., :3]
    stated = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    # tables of 8 bits are stored as 16 by some writers: no entry of a table of 16 bits is so small throughout
    return colours, 8 if stated == 8 or int(colours.max()) < 256 else 16


class AtomicPILWriter(AtomicWriter, PILWriter):
    """MONAI's PIL writer, whole files only; the picture's text ``Frame`` says that it lies upright.

    It keeps the rows and columns of a picture of one pixel.
    """

    data_obj: Any
    frame = describe_frame(1)

    def set_data_array(
        self, data_array: Any, channel_dim: int | None = 0, squeeze_end_dims: bool = True, **kwargs: Any
    ) -> None:
        """Set the pixels (channels, W, H)."""
        super().set_data_array(data_array, channel_dim=channel_dim, squeeze_end_dims=False, **kwargs)
        if squeeze_end_dims and self.data_obj.ndim == 3 and self.data_obj.shape[2] == 1:
            self.data_obj = self.data_obj[..., 0]

    def set_metadata(self, meta_dict: Mapping[str, Any] | None = None, resample: bool = True, **options: Any) -> None:
        """Note the frame of the image that the mask belongs to."""
        self.frame = str((meta_dict or {}).get("frame", self.frame))
        super().set_metadata(meta_dict, resample, **options)

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the picture, whole or not at all."""
        if str(filename).lower().endswith(".png"):
            kwargs.setdefault("pnginfo", _png_text(self.frame))
        super().write(filename, verbose=verbose, **kwargs)


def _png_text(frame: str) -> PngInfo:
    text = PngInfo()
    text.add_text("Frame", frame)
    return text


def save_png(image: Image.Image, path: str | Path, frame: str | None = None) -> Path:
    """Save a picture as PNG, under a temporary name until complete; folders are made.

    Args:
        image: the picture.
        path: of the file.
        frame: of its pixels, see :func:`describe_frame`; stands as the text ``Frame`` in the file.
    """
    path = Path(path)
    make_folder(path.parent)
    with temporary_name(path) as part:
        image.save(part, format="PNG", **({"pnginfo": _png_text(frame)} if frame else {}))
    return path
