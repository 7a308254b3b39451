"""Arrays on the wire: a header, the shape, and blosc2 chunks; every size is checked before memory is taken for it.

The form, all numbers little-endian: ``NNIA``, version (1), codec (1: Zstandard, 2: LZ4, 0: chunks as they are, which
the protocol does not have: the server's own page takes them), number of dimensions and
length of the type's name (one byte each), the name in ASCII, the shape (int64 each), the number of chunks (uint32), and
for each chunk its length before and after compression (uint64 each) and the compressed bytes.
"""

from __future__ import annotations

import math
import struct

import blosc2
import numpy as np

from medsa_nets.server.errors import RequestError

MAGIC, VERSION = b"NNIA", 1
RAW, ZSTD, LZ4 = 0, 1, 2  # codecs
TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
         "float64")  # fmt: skip
CHUNK = 1 << 30  # most bytes of a chunk before compression; blosc2 takes less than 2^31
MAX_DIMENSIONS, MAX_LENGTH = 4, 1 << 20
# Of a chunk's header of 32 bytes (C-Blosc2, README_CHUNK_FORMAT.rst): the compressor stands in the upper three bits of
# the flags (0 for bytes that were copied, 1 LZ4, 4 Zstandard), filters are none, shuffle and bit shuffle, and the last
# byte tells of runs of one value in bits 4 to 6, and of dictionaries, other byte orders and chunks on disk elsewhere.
CHUNK_HEADER = struct.Struct("<BBBBiii6BBB6BBB")
COMPRESSORS, FILTERS, RUNS = (0, 1, 4), (0, 1, 2), 0x70


def pack_array(array: np.ndarray, raw: bool = False) -> bytes:
    """An array as bytes.

    Args:
        array: of a type in :data:`TYPES`.
        raw: as it is, in one chunk.
    """
    array = np.ascontiguousarray(array)
    name = array.dtype.name.encode("ascii")
    head = struct.pack("<4sBBBB", MAGIC, VERSION, RAW if raw else LZ4, array.ndim, len(name)) + name
    values = array.reshape(-1).view(np.uint8).data
    shape = struct.pack(f"<{array.ndim}q", *array.shape)
    if raw:
        return b"".join([head, shape, struct.pack("<IQQ", 1, len(values), len(values)), values])
    starts = range(0, len(values), CHUNK)
    parts = [head, shape, struct.pack("<I", len(starts))]
    for start in starts:
        own = values[start : start + CHUNK]
        packed = blosc2.compress2(
            own, typesize=array.itemsize, codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.NOFILTER], nthreads=1
        )
        parts += [struct.pack("<QQ", len(own), len(packed)), packed]
    return b"".join(parts)


def read_header(body: bytes | memoryview) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type and shape that an array says it has, and where its chunks begin; nothing else is read.

    Raises:
        RequestError: when it has another form.
    """
    if len(body) < 8:
        raise RequestError("array: it is cut: fewer than 8 bytes.")
    magic, version, codec, dims, length = struct.unpack_from("<4sBBBB", body, 0)
    if magic != MAGIC or version != VERSION or codec not in (RAW, ZSTD, LZ4):
        raise RequestError("array: it begins with something else than NNIA, version 1, and a known codec.")
    if not 1 <= dims <= MAX_DIMENSIONS or len(body) < 8 + length + 8 * dims + 4:
        raise RequestError(f"array: expected 1 to {MAX_DIMENSIONS} dimensions and a whole header.")
    name = bytes(body[8 : 8 + length])
    known = {own.encode("ascii"): own for own in TYPES}
    if name not in known:
        raise RequestError(f"array: its type is none of {', '.join(TYPES)}.")
    shape = struct.unpack_from(f"<{dims}q", body, 8 + length)
    if not all(1 <= n <= MAX_LENGTH for n in shape):
        raise RequestError(f"array: each axis must have 1 to {MAX_LENGTH} voxels.")
    return np.dtype(known[name]), shape, 8 + length + 8 * dims


def unpack_array(body: bytes | memoryview, max_bytes: int) -> np.ndarray:
    """The array that bytes hold.

    Args:
        body: as a client sent it.
        max_bytes: most bytes that the array may take; checked before any is taken.

    Raises:
        RequestError: when the bytes hold no such array, or a larger one (status 413).
    """
    view = memoryview(body)
    dtype, shape, place = read_header(view)
    total = math.prod(shape) * dtype.itemsize
    if total > max_bytes:
        raise RequestError(f"array: it takes {total} bytes, this server takes {max_bytes} at most.", 413)
    uncompressed = view[5] == RAW
    chunks = _find_chunks(view, place, total, dtype.itemsize, uncompressed)
    out = np.zeros(math.prod(shape), dtype=dtype)  # what a damaged chunk leaves out is zero, never another's memory
    raw = out.view(np.uint8)
    written = 0
    for chunk, length in chunks:
        if uncompressed:
            raw[written : written + length] = np.frombuffer(chunk, np.uint8)
            written += length
            continue
        try:
            blosc2.decompress2(chunk, dst=raw[written : written + length], nthreads=1)
        except Exception as error:  # blosc2 raises RuntimeError, ValueError and others
            raise RequestError("array: a chunk is damaged.") from error
        written += length
    if dtype == np.bool_:  # other bytes than 0 and 1 are no booleans
        np.not_equal(raw, 0, out=out)
    return out.reshape(shape)


def _find_chunks(
    view: memoryview, place: int, total: int, itemsize: int, uncompressed: bool
) -> list[tuple[memoryview, int]]:
    """Chunks and their lengths before compression, checked against the array's size and their own headers."""
    (count,) = struct.unpack_from("<I", view, place)
    place += 4
    if count > 1 + total // itemsize:
        raise RequestError("array: it has more chunks than voxels.")
    found = []
    left = total
    for _ in range(count):
        if len(view) < place + 16:
            raise RequestError("array: it is cut.")
        length, packed = struct.unpack_from("<QQ", view, place)
        place += 16
        if not 0 < length <= min(left, CHUNK) or length % itemsize:
            raise RequestError("array: a chunk has another length than its array.")
        if packed > len(view) - place or packed < (length if uncompressed else CHUNK_HEADER.size):
            raise RequestError("array: it is cut.")
        chunk = view[place : place + packed]
        if not uncompressed:
            _check_chunk(chunk, length)
        elif packed != length:
            raise RequestError("array: a chunk has another length than its array.")
        found.append((chunk, length))
        place += packed
        left -= length
    if left:
        raise RequestError("array: its chunks hold less than its shape.")
    return found


def _check_chunk(chunk: memoryview, length: int) -> None:
    """Whether a chunk's own header says what the array's says, and asks for nothing but known compressors."""
    fields = CHUNK_HEADER.unpack_from(chunk)
    flags, nbytes, blocksize, cbytes, filters = fields[2], fields[4], fields[5], fields[6], fields[7:13]
    fitting = nbytes == length and cbytes == len(chunk) and 0 < blocksize <= max(nbytes, 1)
    plain = (flags >> 5) in COMPRESSORS and all(own in FILTERS for own in filters) and not fields[-1] & ~RUNS
    if not (fitting and plain):
        raise RequestError("array: a chunk is damaged, or compressed by something else than Zstandard or LZ4.")
