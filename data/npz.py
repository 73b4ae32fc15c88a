"""``.npz`` files larger than memory: an array is read and written as blocks of rows.

An ``.npz`` is a zip whose member ``<key>.npy`` holds a header (dtype, order, shape) followed by the rows.
"""

import errno
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from runtime.files import atomic_file

BLOCK_BYTES = 16 * 2**20
READ_BYTES = 2**20
# What zipfile raises for damaged, encrypted and exotic files; its NotImplementedError is a RuntimeError.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    RuntimeError,
    UnicodeDecodeError,
    OverflowError,
)


@dataclass(frozen=True)
class RowBlocks:
    """An array that never exists as a whole: its shape and dtype, and blocks of rows that make it up in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def npz_keys(path: str | os.PathLike) -> list[str]:
    """The names of the arrays in ``path``. Raises ValueError when it is missing or not a whole ``.npz``."""
    with _open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_shape(path: str | os.PathLike, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of array ``key``, from its header alone. Raises ValueError, see :func:`read_batches`."""
    with _open_member(path, key) as (member, num_bytes):
        return _read_header(member, num_bytes, path, key)


def read_batches(path: str | os.PathLike, key: str, batch_size: int, rows: Sequence[int] | None = None) -> Iterator[np.ndarray]:
    """Yield array ``key`` as blocks (b, ...) of its rows, b = ``batch_size`` except in the last; only one block is in memory.

    rows: positions, ascending, of the rows to read; None: all. Raises ValueError, naming the file, when it is missing, no
    ``.npz``, cut short or damaged, lacks ``key``, or when the array cannot be read by rows (a scalar, pickled objects, Fortran
    order).
    """
    with _open_member(path, key) as (member, num_bytes):
        shape, dtype = _read_header(member, num_bytes, path, key)
        if not shape:
            raise ValueError(f"{path}: {key} is a single number, not an array of rows")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        first_byte = member.tell()
        rows = range(shape[0]) if rows is None else rows
        for start in range(0, len(rows), batch_size):
            block = rows[start : start + batch_size]
            data = memoryview(bytearray(len(block) * row_bytes))
            filled = 0
            for first, count in _runs(block):
                member.seek(first_byte + first * row_bytes)
                read = _fill(member, data[filled : filled + count * row_bytes])
                if read < count * row_bytes:
                    raise ValueError(f"{path}: {key} ends within row {first + read // row_bytes} of {shape[0]}: write it again")
                filled += read
            yield np.frombuffer(data, dtype).reshape(len(block), *shape[1:])


def read_array(path: str | os.PathLike, key: str) -> np.ndarray:
    """The whole array ``key``, for those that fit into memory; a single number too. Raises as :func:`read_batches`."""
    with _open_member(path, key) as (member, num_bytes):
        shape, dtype = _read_header(member, num_bytes, path, key)
        if not shape:
            return np.frombuffer(member.read(dtype.itemsize), dtype).reshape(())
    return np.concatenate([np.empty((0, *shape[1:]), dtype), *read_batches(path, key, batch_size=4096)])


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending positions as runs of neighbours: (first, how many)."""
    if isinstance(rows, range):
        yield rows.start, len(rows)
        return
    rows = np.asarray(rows)
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield int(run[0]), len(run)


def write_npz(path: str | os.PathLike, arrays: Mapping[str, "np.ndarray | RowBlocks"]) -> None:
    """Write ``arrays`` uncompressed, block by block: memory-mapped arrays and :class:`RowBlocks` are never loaded as a whole.

    ``path`` appears when the file is complete. Raises ValueError when RowBlocks do not give the rows they announced, OSError
    when the disk refuses.
    """
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for key, array in arrays.items():
            array = array if isinstance(array, RowBlocks) else _row_blocks(np.asanyarray(array))
            # A ZipInfo made by hand carries no time: the same arrays give the same bytes. The size is unknown to zipfile
            # beforehand, so that members above 2 GiB need ZIP64 announced.
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                _write_array(member, array, key)


def _row_blocks(array: np.ndarray) -> RowBlocks:
    if array.dtype.hasobject:
        raise ValueError(f"arrays of Python objects cannot be written to an .npz, got dtype {array.dtype}")
    if array.ndim == 0:
        return RowBlocks((), array.dtype, [array])
    rows = max(1, BLOCK_BYTES // max(1, array.nbytes // max(1, len(array))))
    return RowBlocks(array.shape, array.dtype, (array[start : start + rows] for start in range(0, len(array), rows)))


def _write_array(member: BinaryIO, array: RowBlocks, key: str) -> None:
    dtype = np.dtype(array.dtype)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(array.shape)}
    np.lib.format.write_array_header_1_0(member, header)
    rows = 0
    for block in array.blocks:
        if block.dtype != dtype or block.shape[1:] != tuple(array.shape[1:]):
            raise ValueError(f"{key}: a block of rows is {block.shape} {block.dtype}, announced were {array.shape} {dtype}")
        member.write(block.tobytes())
        rows += len(block) if block.ndim else 1
    announced = array.shape[0] if array.shape else 1
    if rows != announced:
        raise ValueError(f"{key}: {rows} rows were given, {announced} were announced")


@contextmanager
def _open_zip(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open ``path`` and turn everything a damaged file can raise while it is read into a ValueError with its name."""
    if os.path.exists(path) and not os.path.isfile(path):  # nobody may ever write into a pipe
        raise ValueError(f"{path} is {'a folder' if os.path.isdir(path) else 'no file'}, an .npz file is needed")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, *DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a seek to where a cut file has no bytes
            raise
        raise ValueError(f"{path} is not a whole .npz file ({error}): write or copy it again") from error


@contextmanager
def _open_member(path: str | os.PathLike, key: str) -> Iterator[tuple[BinaryIO, int]]:
    """The member, and how many bytes it says it has."""
    with _open_zip(path) as archive:
        names = archive.namelist()
        if f"{key}.npy" not in names:
            present = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
            raise ValueError(f"{path} has no array named {key}; it holds {present}")
        with archive.open(f"{key}.npy") as member:
            yield member, archive.getinfo(f"{key}.npy").file_size


def _read_header(member: BinaryIO, num_bytes: int, path: str | os.PathLike, key: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"format version {version} holds structured arrays")
        shape, fortran_order, dtype = readers[version](member)
    except DAMAGE:
        raise
    except Exception as error:  # the header is an expression: damaged, it raises anything from TokenError to TypeError
        raise ValueError(f"{path}: {key} has no readable header ({error})") from error
    if dtype.hasobject:
        raise ValueError(f"{path}: {key} holds pickled Python objects, which are not loaded: save it as an array of numbers")
    if fortran_order and len(shape) > 1:
        raise ValueError(f"{path}: {key} is in Fortran order and has no rows to read: save np.ascontiguousarray({key})")
    if not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{path}: {key} says it is {shape} {dtype}, which no array is: write it again")
    held = num_bytes - member.tell()
    if math.prod(shape) * dtype.itemsize > held:  # before memory is taken for what is not there
        row = held // (math.prod(shape[1:]) * dtype.itemsize)
        raise ValueError(f"{path}: {key} ends within row {row} of {shape[0] if shape else 1}: write it again")
    return shape, dtype


def _fill(member: BinaryIO, buffer: memoryview) -> int:
    """Read until ``buffer`` is full or the member ends; how many bytes were read. A single read may return less than asked."""
    filled = 0
    while filled < len(buffer) and (chunk := member.read(min(len(buffer) - filled, READ_BYTES))):
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return filled
