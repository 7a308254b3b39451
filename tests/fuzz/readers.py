"""Damaged files for every reader: ``python tests/fuzz/readers.py --cases 2000``; prints one line of JSON.

Seeds are files of every format, written here, and the test files of pydicom and nibabel where they are installed. Bytes
and DICOM elements are changed, and each file is read and written as a run does. A case passes when that ends in an
image and a whole output, or in one error of this package, on one line, and no output. The process limits its own
memory, and ends with a traceback of where it was when a case takes longer than ``--seconds``.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import gzip
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pydicom
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import SaveImage
from PIL import Image

from medsa_nets.data import NamedOutputs, list_photographs, list_volumes, volume_writer
from medsa_nets.data.datalists import read_datalist
from medsa_nets.data.masks import binarize_mask
from medsa_nets.data.photographs import AtomicPILWriter, read_mask, read_photograph
from medsa_nets.data.volumes import read_volume
from medsa_nets.errors import MedSAError
from medsa_nets.transforms import ReadPromptsd

SEED_BYTES = 300_000  # larger test files are left out: they add time, not forms
TEXT_KINDS = ("mask", "prompts", "list")
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1)
TEXTS = ("", "0", "-1", "1e308", "nan", "inf", "999999999999", "a\\b", "\0", "\u00e9" * 70, "1\\2\\3\\4\\5\\6\\7")


@dataclass(frozen=True)
class Seed:
    """A whole file, under the name that it is given, and the reader that takes it."""

    name: str
    content: bytes
    kind: str  # volume, photograph, mask, prompts, list
    beside: tuple[tuple[str, bytes], ...] = ()  # files in the same folder
    installed: bool = False  # whether it is a library's test file


# ---------------------------------------------------------------- seeds


def volume_seeds(folder: Path) -> list[Seed]:
    values = np.random.default_rng(0).integers(-1000, 1000, (9, 8, 5)).astype(np.int16)
    affine = np.array([[-2.0, 0, 0, 30], [0, -1.5, 0.1, 40], [0, 0, 3.0, -70], [0, 0, 0, 1]])
    out = []
    for name, kind in {"a.nii": np.int16, "b.nii.gz": np.float32, "c.nii.gz": np.uint8}.items():
        nib.save(nib.Nifti1Image(values.astype(kind), affine), folder / name)
        out.append(name)
    nib.save(nib.Nifti2Image(values, affine), folder / "d.nii")
    image = itk.image_from_array(np.ascontiguousarray(values.T))
    for name, packed in {"e.nrrd": False, "f.nrrd": True, "g.mha": False, "h.mha": True}.items():
        itk.imwrite(image, str(folder / name), compression=packed)
        out.append(name)
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nsizes: 9 8 5\nspace directions: (2,0,0) (0,1.5,0) (0,0,3)\n"
        'space units: "mm" "mm" "mm"\nencoding: ascii\nspace origin: (0,0,0)\n\n'
    )
    (folder / "i.nrrd").write_text(header + " ".join(map(str, values.T.ravel())))
    itk.imwrite(image, str(folder / "j.mhd"))
    seeds = [Seed(name, (folder / name).read_bytes(), "volume") for name in (*out, "d.nii", "i.nrrd")]
    raw = (("j.raw", (folder / "j.raw").read_bytes()),)
    return [*seeds, Seed("j.mhd", (folder / "j.mhd").read_bytes(), "volume", raw)]


def new_object(sop_class: str) -> pydicom.FileDataset:
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, pydicom.uid.generate_uid()
    data = pydicom.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.SpecificCharacterSet, data.PatientName, data.StudyInstanceUID = "ISO_IR 100", "A^B", "1.2.3"
    data.SeriesInstanceUID, data.FrameOfReferenceUID, data.Modality = "1.2.4", "1.2.5", "CT"
    return data


def set_pixels(data: pydicom.Dataset, pixels: np.ndarray, interpretation: str = "MONOCHROME2") -> None:
    colours = pixels.shape[-1] == 3
    rows, columns = pixels.shape[-3:-1] if colours else pixels.shape[-2:]
    data.Rows, data.Columns, data.SamplesPerPixel = rows, columns, 3 if colours else 1
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    data.PhotometricInterpretation, data.PixelData = interpretation, pixels.tobytes()
    if colours:
        data.PlanarConfiguration = 0


def encoded(data: pydicom.FileDataset) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(buffer, data)
    return buffer.getvalue()


def dicom_seeds() -> list[Seed]:
    values = np.random.default_rng(0).integers(0, 2000, (4, 7, 6)).astype(np.uint16)
    slices, packed = [], []
    for z in range(4):
        data = new_object(pydicom.uid.CTImageStorage)
        set_pixels(data, values[z], "MONOCHROME1" if z % 2 else "MONOCHROME2")
        data.PixelSpacing, data.SliceThickness = [1.5, 2.0], 3.0
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-30.0, -40.0, 3.0 * z]
        data.RescaleSlope, data.RescaleIntercept, data.InstanceNumber = 1, -1024, z
        slices.append(encoded(data))
        buffer = io.BytesIO()
        Image.fromarray(values[z]).save(buffer, format="JPEG2000", no_jp2=True)
        data.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
        data.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        packed.append(encoded(data))
    out = []
    for name, files in (("series", slices), ("packed", packed)):
        beside = tuple((f"{name}{z}.dcm", content) for z, content in enumerate(files) if z != 1)
        out.append(Seed(f"{name}1.dcm", files[1], "volume", beside))
    out.append(Seed("bare.IMA", slices[0][slices[0].index(b"\x08\0\x05\0") :], "volume"))
    data = new_object(pydicom.uid.EnhancedCTImageStorage)
    set_pixels(data, values)
    data.NumberOfFrames, frames, shared = 4, [], pydicom.Dataset()
    measures, orientation = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, measures.SliceThickness = [1.5, 2.0], 3.0
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    for z in range(4):
        place, frame = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [-30.0, -40.0, 3.0 * z]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], frames
    out.append(Seed("frames.dcm", encoded(data), "volume"))
    data = new_object(pydicom.uid.VLPhotographicImageStorage)
    set_pixels(data, np.random.default_rng(1).integers(0, 256, (7, 6, 3), dtype=np.uint8), "RGB")
    out.append(Seed("photograph.dcm", encoded(data), "photograph"))
    return out


def picture_seeds() -> list[Seed]:
    rng = np.random.default_rng(2)
    colour = Image.fromarray(rng.integers(0, 256, (19, 23, 3), dtype=np.uint8))
    grey = Image.fromarray(rng.integers(0, 256, (19, 23), dtype=np.uint8))
    mask = Image.fromarray(((np.indices((19, 23)).sum(0) > 20) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 65536, (19, 23), dtype=np.uint16))
    unit = Image.fromarray(rng.random((19, 23), dtype=np.float32))
    pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "a.jpg": (colour, {"exif": exif}), "b.jpg": (colour, {"progressive": True}), "c.png": (colour, {"exif": exif}),
        "d.png": (grey, {}), "e.png": (deep, {}), "f.png": (colour.convert("P"), {}),
        "g.png": (colour.convert("RGBA"), {}), "p.tif": (grey.convert("1"), {}),
        "h.tif": (colour, {}), "i.tif": (unit, {}), "j.tif": (colour, {"compression": "tiff_lzw"}),
        "k.tif": (deep, {"compression": "tiff_deflate"}), "l.bmp": (colour, {}), "m.bmp": (grey, {}),
        "n.tif": (colour, {"compression": "jpeg"}), "o.jpg": (colour.convert("CMYK"), {}),
    }  # fmt: skip
    out = []
    for name, (picture, options) in pictures.items():
        buffer = io.BytesIO()
        picture.save(
            buffer, format={".jpg": "JPEG", ".tif": "TIFF"}.get(Path(name).suffix, name[-3:].upper()), **options
        )
        out.append(Seed(name, buffer.getvalue(), "photograph"))
    for name, picture in {"q.png": mask, "r.png": mask.convert("1"), "s.png": mask.convert("P"), "t.tif": mask}.items():
        buffer = io.BytesIO()
        picture.save(buffer, format="TIFF" if name.endswith("tif") else "PNG")
        out.append(Seed(name, buffer.getvalue(), "mask"))
    return out


def text_seeds() -> list[Seed]:
    prompts = {
        "image.png": {
            "points": [[4, 5], [7, 2]], "labels": [1, 0], "box": [1, 2, 9, 9], "mask": "m.png",
            "scribbles": [{"points": [[1, 1], [5, 5]], "label": 1}], "lasso": [{"points": [[1, 1], [5, 1], [5, 5]]}],
        }
    }  # fmt: skip
    listed = {"training": [{"image": "a.png", "label": "b.png"}], "validation": [], "labels": {"1": "lesion"}}
    beside = (("a.png", b"x"), ("b.png", b"x"))
    buffer = io.BytesIO()
    Image.fromarray(np.full((19, 23), 255, np.uint8)).save(buffer, format="PNG")
    return [
        Seed("prompts.json", json.dumps(prompts).encode(), "prompts", (("m.png", buffer.getvalue()),)),
        Seed("dataset.json", json.dumps(listed).encode(), "list", beside),
    ]


def installed_seeds() -> list[Seed]:
    """Test files of pydicom and nibabel, for the readers of volumes and of photographs."""
    out = []
    for package, folder, patterns in (
        ("pydicom", "data/test_files", ("*.dcm", "DICOMDIR*")),
        ("nibabel", "tests/data", ("*.nii", "*.nii.gz")),
    ):
        found = importlib.util.find_spec(package)
        for root in (found.submodule_search_locations or []) if found else []:
            for pattern in patterns:
                for file in sorted((Path(root) / folder).rglob(pattern)):
                    if file.is_file() and file.stat().st_size <= SEED_BYTES:
                        content = file.read_bytes()
                        out.append(Seed(file.name, content, "volume", installed=True))
                        if package == "pydicom":
                            out.append(Seed(file.name, content, "photograph", installed=True))
    return out


def make_seeds() -> list[Seed]:
    """All seeds, those that were written here first."""
    with tempfile.TemporaryDirectory() as folder:
        return [*volume_seeds(Path(folder)), *dicom_seeds(), *picture_seeds(), *text_seeds(), *installed_seeds()]


# ---------------------------------------------------------------- damage


@dataclass(frozen=True)
class Damage:
    """One change of bytes: what, where (share of the file, or of its first bytes), and with what."""

    what: str
    place: float
    head: bool
    number: int
    size: int


damages = st.lists(
    st.builds(
        Damage,
        what=st.sampled_from(["byte", "bit", "number", "cut", "delete", "double", "zero", "swap", "inside", "element"]),
        place=st.floats(0, 1, allow_nan=False),
        head=st.booleans(),
        number=st.sampled_from(NUMBERS) | st.integers(0, 2**32 - 1),
        size=st.sampled_from([1, 2, 4, 8, 16, 64, 300]),
    ),
    min_size=1,
    max_size=3,
)


def apply(content: bytes, damage: Damage, name: str) -> bytes:
    """The bytes after one change."""
    if not content:
        return content
    if damage.what == "inside" and name.endswith(".gz"):
        try:
            inner = gzip.decompress(content)
        except (OSError, EOFError, ValueError, zlib.error):
            return content
        place = Damage("number", damage.place, damage.head, damage.number, damage.size)
        return gzip.compress(apply(inner, place, ""), mtime=0)
    if damage.what == "element":
        return change_element(content, damage)
    where = int(damage.place * ((min(len(content), 400) if damage.head else len(content)) - 1))
    data = bytearray(content)
    piece = data[where : where + damage.size]
    if damage.what == "byte":
        data[where] = damage.number % 256
    elif damage.what == "bit":
        data[where] ^= 1 << damage.number % 8
    elif damage.what in ("number", "inside"):
        size = (1, 2, 4)[damage.size % 3]
        data[where : where + size] = (damage.number % 256**size).to_bytes(size, "little")
    elif damage.what == "cut":
        del data[where:]
    elif damage.what == "delete":
        del data[where : where + damage.size]
    elif damage.what == "double":
        data[where:where] = piece * (1 + damage.number % 3)
    elif damage.what == "zero":
        data[where : where + damage.size] = b"\0" * len(piece)
    else:
        data[where : where + damage.size] = piece[::-1]
    return bytes(data)


def change_element(content: bytes, damage: Damage) -> bytes:
    """A DICOM object with one element deleted, emptied, or of another value."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(io.BytesIO(content))
            tags = list(data.keys())
            tag = tags[int(damage.place * (len(tags) - 1))]
            way = damage.number % 4
            if way == 0:
                del data[tag]
            elif way == 1:
                data[tag].value = None
            elif way == 2:
                data[tag].value = damage.number % 65536
            else:
                element = pydicom.DataElement(tag, "LO", TEXTS[damage.size % len(TEXTS)])
                data[tag] = element
            return encoded(data)
    except Exception:  # no DICOM, or nothing that pydicom can write: bytes are changed in other cases
        return content


# ---------------------------------------------------------------- a run's reading and writing


def save(image: MetaTensor, folder: Path, writer: Any, extension: str) -> None:
    SaveImage(
        folder_layout=NamedOutputs(folder, "segmentation", extension), output_ext=extension, resample=False,
        output_dtype=np.uint8, writer=writer, print_log=False,
    )(image)  # fmt: skip


def run_volume(path: Path, output: Path) -> None:
    folder = len(list(path.parent.iterdir())) > 1 and path.suffix == ".dcm"
    for entry in list_volumes(path.parent if folder else path):
        volume = read_volume(entry["image"])
        assert volume.ndim == 4, volume.shape
        assert volume.dtype == torch.float32
        assert bool(torch.isfinite(volume.as_tensor()).all())
        assert np.isfinite(np.asarray(volume.affine)).all()
        save(MetaTensor((volume > 0).float(), affine=volume.affine, meta=dict(volume.meta)), output,
             volume_writer(".nii.gz"), ".nii.gz")  # fmt: skip
        written = nib.load(next(output.glob("*.nii.gz")))
        assert written.shape == tuple(volume.shape[1:]), (written.shape, volume.shape)
        assert (np.asarray(written.dataobj) == (volume[0] > 0).numpy()).all()


def run_photograph(path: Path, output: Path) -> None:
    entries = list_photographs(path)
    picture = read_photograph(entries[0]["image"])
    assert picture.mode == "RGB"
    red = torch.from_numpy(np.array(picture)[..., 0].T.copy())[None]
    save(MetaTensor(red.float(), meta={"filename_or_obj": str(path)}), output, AtomicPILWriter, ".png")
    assert Image.open(next(output.glob("*.png"))).size == picture.size


def run_mask(path: Path, output: Path) -> None:
    values = np.asarray(read_mask(path))
    assert binarize_mask(values, str(path)).shape == values.shape


def run_prompts(path: Path, output: Path) -> None:
    image = MetaTensor(torch.zeros(1, 23, 19), meta={"filename_or_obj": str(path.with_name("image.png"))})
    ReadPromptsd(str(path))({"image": image})


def run_list(path: Path, output: Path) -> None:
    read_datalist(path, path.parent, lambda root: {})


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "volume": run_volume, "photograph": run_photograph, "mask": run_mask, "prompts": run_prompts, "list": run_list,
}  # fmt: skip


@dataclass
class Tally:
    """What became of the cases."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: dict[str, str] = field(default_factory=dict)


def run_case(seed_file: Seed, content: bytes, tally: Tally, seconds: float, kept: Path | None) -> None:
    """Read and write one damaged file, and note what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    try:
        (folder / "in").mkdir()
        path, output = folder / "in" / seed_file.name, folder / "out"
        output.mkdir()
        for name, beside in seed_file.beside:
            (folder / "in" / name).write_bytes(beside)
        path.write_bytes(content)
        tally.cases += 1
        tally.kinds[seed_file.kind] += 1
        started, wrong = time.perf_counter(), ""
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            RUNS[seed_file.kind](path, output)
            tally.read += 1
        except MedSAError as error:
            tally.refused += 1
            text = str(error)
            if "\n" in text or not text.strip():
                wrong = f"message of {len(text.splitlines())} lines: {text[:200]!r}"
            elif list(output.iterdir()):
                wrong = f"an output in spite of {text[:200]!r}"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {str(error)[:200]}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        tally.slowest = max(tally.slowest, time.perf_counter() - started)
        if wrong:
            key = f"{seed_file.kind}: {wrong.replace(str(folder), '')[:60]}"
            if key not in tally.failures and kept is not None:
                shutil.copytree(folder / "in", kept / f"{len(tally.failures)}_{seed_file.kind}", dirs_exist_ok=True)
            tally.failures.setdefault(key, f"{seed_file.name}: {wrong}")
    finally:
        shutil.rmtree(folder)


def memory(name: str) -> int:
    """A size of this process in MiB: ``VmSize``, ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) // 1024
    return 0


def limit_memory(mebibytes: int) -> None:
    """Let this process grow by so much, where the system has such a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return
    if Path("/proc/self/status").is_file():
        bound = (memory("VmSize") + mebibytes) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="longest time of one case")
    parser.add_argument("--memory", type=int, default=3072, help="MiB by which the process may grow")
    parser.add_argument("--keep", type=Path, help="folder for the files of cases that fail")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    seeds, tally, started = make_seeds(), Tally(), time.perf_counter()
    for whole in seeds:  # warm, and what memory is counted from
        run_case(whole, whole.content, tally, options.seconds, options.keep)
    before = memory("VmHWM")
    # each kind of file as often as those of libraries, which are many
    own = [whole for whole in seeds if not whole.installed]
    groups = [[whole for whole in own if whole.kind in kinds] for kinds in (("volume",), ("photograph",), TEXT_KINDS)]
    chosen = st.one_of(*(st.sampled_from(group) for group in (*groups, [w for w in seeds if w.installed] or own)))
    limit_memory(options.memory)

    @seed(options.seed)
    @settings(
        max_examples=options.cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(chosen, damages)
    def one(whole: Seed, changes: list[Damage]) -> None:
        content = whole.content
        for change in changes:
            content = apply(content, change, whole.name)
        run_case(whole, content, tally, options.seconds, options.keep)

    one()
    summary = {"seeds": len(seeds), "cases": tally.cases, "read": tally.read, "refused": tally.refused}
    summary |= {"seconds": round(time.perf_counter() - started, 1), "slowest": round(tally.slowest, 2)}
    summary |= {"grown_mib": memory("VmHWM") - before, "kinds": dict(tally.kinds), "failures": tally.failures}
    print(json.dumps(summary))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    faulthandler.enable()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
