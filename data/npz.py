"""``.npz`` files larger than memory: an array is read and written as blocks of rows.

An ``.npz`` is a zip whose member ``<key>.npy`` holds a header (dtype, order, shape) followed by the rows.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from runtime.files import atomic_file

BLOCK_BYTES = 16 * 2**20


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
    with _open_member(path, key) as member:
        return _read_header(member, path, key)


def read_batches(path: str | os.PathLike, key: str, batch_size: int) -> Iterator[np.ndarray]:
    """Yield array ``key`` as blocks (b, ...) of its rows, b = ``batch_size`` except in the last; only one block is in memory.

    Raises ValueError, naming the file, when it is missing, no ``.npz``, cut short or damaged, lacks ``key``, or when the array
    cannot be read by rows (a scalar, pickled objects, Fortran order).
    """
    with _open_member(path, key) as member:
        shape, dtype = _read_header(member, path, key)
        if not shape:
            raise ValueError(f"{path}: {key} is a single number, not an array of rows")
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        for start in range(0, shape[0], batch_size):
            rows = min(batch_size, shape[0] - start)
            data = _read_exactly(member, rows * row_bytes)
            if len(data) < rows * row_bytes:
                raise ValueError(
                    f"{path}: {key} ends within row {start + len(data) // row_bytes} of {shape[0]}: write it again"
                )
            yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])


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
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, an .npz file is needed") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole .npz file ({error}): write or copy it again") from error


@contextmanager
def _open_member(path: str | os.PathLike, key: str) -> Iterator[BinaryIO]:
    with _open_zip(path) as archive:
        names = archive.namelist()
        if f"{key}.npy" not in names:
            present = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
            raise ValueError(f"{path} has no array named {key}; it holds {present}")
        with archive.open(f"{key}.npy") as member:
            yield member


def _read_header(member: BinaryIO, path: str | os.PathLike, key: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(member)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"format version {version} holds structured arrays")
        shape, fortran_order, dtype = readers[version](member)
    except ValueError as error:
        raise ValueError(f"{path}: {key} has no readable header ({error})") from error
    if dtype.hasobject:
        raise ValueError(f"{path}: {key} holds pickled Python objects, which are not loaded: save it as an array of numbers")
    if fortran_order and len(shape) > 1:
        raise ValueError(f"{path}: {key} is in Fortran order and has no rows to read: save np.ascontiguousarray({key})")
    return shape, dtype


def _read_exactly(member: BinaryIO, size: int) -> bytearray:
    """``size`` bytes, or fewer at the end of the member: a single read may return less than asked for."""
    data = bytearray()
    while len(data) < size and (chunk := member.read(size - len(data))):
        data += chunk
    return data
