"""Files that are either old or new, never half-written."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; on success flush it to disk and move it to ``path``, on any error remove it.

    durable False leaves the flushing to the system: for thousands of files that can be made again after a power cut.
    Raises OSError with the path and what to do; whatever was at ``path`` before is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # After a failed write some writers fail again while closing; the first reason is the one to report.
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError or ValueError now for a ``path`` that :func:`atomic_file` could not write after hours of work."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def save_atomic(state: dict, path: str | os.PathLike) -> None:
    """``torch.save`` through :func:`atomic_file`. torch reports a full disk as RuntimeError: it is raised as OSError."""
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def write_json(value: object, path: str | os.PathLike) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


class SharedRows:
    """A ``.npy`` array of fixed shape that many processes fill row by row, and that survives being killed.

    Beside ``<name>.npy`` stands ``<name>.progress``, one byte a row: 0 missing, 1 written, 2 left out on purpose. Rows are
    written with ``pwrite`` at their own offset, so that processes (also on other machines, over a network file system) do not
    overwrite one another's neighbours; a row is marked after its data.
    """

    MISSING, WRITTEN, LEFT_OUT = 0, 1, 2

    def __init__(self, path: str | os.PathLike, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.progress_path = self.path.with_suffix(".progress")
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._header_bytes = 0

    def create(self) -> None:
        """Make the two files, or keep those that fit. One process calls this before the others :meth:`open`."""
        if self.path.exists() and self.progress_path.exists():
            existing = np.load(self.path, mmap_mode="r")
            if existing.shape == self.shape and existing.dtype == self.dtype:
                return
            raise ValueError(
                f"{self.path} holds {existing.shape} {existing.dtype}, not {self.shape} {self.dtype}: "
                "remove it or use a new folder"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:
            np.lib.format.write_array_header_2_0(file, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})
            file.truncate(file.tell() + self.shape[0] * self._row_bytes)
        with atomic_file(self.progress_path) as file:
            file.truncate(self.shape[0])

    def open(self) -> "SharedRows":
        with open(self.path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_2_0(file)
            self._header_bytes = file.tell()
        self._data = open(self.path, "r+b", buffering=0)
        self._progress = open(self.progress_path, "r+b", buffering=0)
        return self

    def close(self) -> None:
        """Flush to disk, data before marks, and close. Raises OSError when the disk refuses; network disks often say so only
        here."""
        for file in (self._data, self._progress):
            with file:
                os.fsync(file.fileno())

    def __enter__(self) -> "SharedRows":
        return self.open()

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, row: int, value: np.ndarray) -> None:
        """Write one row and mark it. Raises ValueError for a wrong shape, OSError (with the file's name) when the disk
        refuses."""
        if value.shape != self.shape[1:]:
            raise ValueError(f"{self.path}: row {row} has shape {value.shape}, the array's rows have {self.shape[1:]}")
        self._pwrite(
            self._data,
            np.ascontiguousarray(value, self.dtype).tobytes(),
            self._header_bytes + row * self._row_bytes,
            self.path,
        )
        self.mark(row, self.WRITTEN)

    def mark(self, row: int, state: int) -> None:
        self._pwrite(self._progress, bytes([state]), row, self.progress_path)

    @staticmethod
    def _pwrite(file, data: bytes, offset: int, path: Path) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; rows written so far are kept, run the command again to go on"
            ) from error

    def progress(self) -> np.ndarray:
        """The state of every row, uint8 (N,)."""
        return np.fromfile(self.progress_path, np.uint8)

    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.progress_path.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append one line in a single write, so that a kill leaves whole lines."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
    finally:
        os.close(descriptor)
