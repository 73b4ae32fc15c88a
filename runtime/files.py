"""Files that are either old or new, never half-written."""

import contextlib
import hashlib
import json
import os
import re
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
    path, temporary = Path(path), _temporary(path)
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no regular file'}; name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # another's, or a link that leads elsewhere
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: str | os.PathLike) -> Path:
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a temporary one of :func:`atomic_file`."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def remove_temporaries(folder: str | os.PathLike) -> None:
    """What killed processes left in ``folder``. Only for one that nobody else writes in now (runtime.locks)."""
    for path in Path(folder).glob(".*.tmp"):
        if is_temporary(path.name):
            path.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError or ValueError now for a ``path`` that :func:`atomic_file` could not write after hours of work."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file: name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary(path).touch()
        _temporary(path).unlink()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def save_atomic(state: dict, path: str | os.PathLike) -> None:
    """``torch.save`` through :func:`atomic_file`. torch reports a full disk as RuntimeError: it is raised as OSError."""
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch tells of positions in the file; what it met before was the disk's reason.
            reason = error.__context__.strerror if isinstance(error.__context__, OSError) else str(error).splitlines()[0]
            raise OSError(reason) from error


def write_json(value: object, path: str | os.PathLike) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


class SharedRows:
    """A ``.npy`` array of fixed shape that many processes fill row by row, and that survives being killed.

    Beside ``<name>.npy`` stands ``<name>.progress``, one byte a row: 0 missing, 1 written, 2 left out on purpose. Rows are
    written with ``pwrite`` at their own offset, so that processes (also on other machines, over a network file system) do not
    overwrite one another's neighbours; a row is marked after its data. Each process marks its last row only in :meth:`close`:
    when all rows are marked, all data has reached the disk.
    """

    MISSING, WRITTEN, LEFT_OUT = 0, 1, 2

    def __init__(self, path: str | os.PathLike, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.progress_path = self.path.with_suffix(".progress")
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._header_bytes = 0

    def create(self) -> None:
        """Make the two files, or keep those that fit. One process calls this before the others :meth:`open`.

        Raises ValueError for files that do not fit, or are not whole.
        """
        if self.path.exists() and self.progress_path.exists():
            self._check()
            return
        self.progress_path.unlink(missing_ok=True)  # marks of an array that is gone must not stand beside the new one
        with atomic_file(self.path) as file:
            np.lib.format.write_array_header_2_0(file, {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape})
            file.truncate(file.tell() + self.shape[0] * self._row_bytes)
        with atomic_file(self.progress_path) as file:
            file.write(bytes(self.shape[0]))  # no hole: a mark finds room when a row no longer does

    def _check(self) -> None:
        try:
            existing = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path} is cut short or damaged ({error}): remove it to make its rows again") from error
        if existing.shape != self.shape or existing.dtype != self.dtype:
            raise ValueError(
                f"{self.path} holds {existing.shape} {existing.dtype}, not {self.shape} {self.dtype}: "
                "remove it or use a new folder"
            )
        marks = self.progress_path.stat().st_size
        if marks != self.shape[0]:
            raise ValueError(f"{self.progress_path} has {marks} marks for {self.shape[0]} rows: remove it to make them again")

    def open(self) -> "SharedRows":
        with open(self.path, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_2_0(file)
            self._header_bytes = file.tell()
        self._data = open(self.path, "r+b", buffering=0)
        self._progress = open(self.progress_path, "r+b", buffering=0)
        self._rows: list[int] = []  # written here since
        return self

    def close(self) -> None:
        """Flush to disk, data before marks, and close. Raises OSError when the disk refuses; network disks often say so only
        here. The rows written since :meth:`open` are then missing again, for nobody knows which of them arrived."""
        with self._data, self._progress:
            try:
                self._flush(self._data, self.path)
            except OSError:
                for row in self._rows:
                    self.mark(row, self.MISSING)
                raise
            if self._rows:
                self.mark(self._rows[-1], self.WRITTEN)
            self._flush(self._progress, self.progress_path)

    def __enter__(self) -> "SharedRows":
        return self.open()

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else that came first, and is the one to report
                raise

    def write(self, row: int, value: np.ndarray) -> None:
        """Write one row, and mark the one written before. Raises ValueError for a wrong shape, OSError (with the file's name)
        when the disk refuses."""
        if value.shape != self.shape[1:]:
            raise ValueError(f"{self.path}: row {row} has shape {value.shape}, the array's rows have {self.shape[1:]}")
        self._pwrite(
            self._data,
            np.ascontiguousarray(value, self.dtype).tobytes(),
            self._header_bytes + row * self._row_bytes,
            self.path,
        )
        if self._rows:
            self.mark(self._rows[-1], self.WRITTEN)
        self._rows.append(row)

    def mark(self, row: int, state: int) -> None:
        self._pwrite(self._progress, bytes([state]), row, self.progress_path)

    def _pwrite(self, file: BinaryIO, data: bytes, offset: int, path: Path) -> None:
        view = memoryview(data)
        with self._named(path):
            while view:
                written = os.pwrite(file.fileno(), view, offset)
                view, offset = view[written:], offset + written

    def _flush(self, file: BinaryIO, path: Path) -> None:
        with self._named(path):
            os.fsync(file.fileno())

    @staticmethod
    @contextlib.contextmanager
    def _named(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; what was written before is kept, run the command again"
            ) from error

    def progress(self) -> np.ndarray:
        """The state of every row, uint8 (N,)."""
        return np.fromfile(self.progress_path, np.uint8)

    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def exists(self) -> bool:
        return self.path.exists() or self.progress_path.exists()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.progress_path.unlink(missing_ok=True)


def batches_to_do(progress: np.ndarray, batch_size: int) -> list[list[int]]:
    """The batches that have missing rows, without the rows left out. progress: of :class:`SharedRows`.

    Batches are cut from all rows at multiples of batch_size, whatever is done already and whichever process takes them: a row
    is always computed in the same company, so that it has the same bytes.
    """
    firsts = np.unique(np.flatnonzero(progress == SharedRows.MISSING) // batch_size) * batch_size
    wanted = progress != SharedRows.LEFT_OUT
    return [[row for row in range(first, min(first + batch_size, len(progress))) if wanted[row]] for first in firsts.tolist()]


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: str | os.PathLike, line: str) -> None:
    """Append one line in a single write, so that a kill leaves whole lines. Only one process may write to the file.

    Raises OSError with the path; a part that the disk took before it refused is cut off again.
    """
    data = memoryview((line + "\n").encode())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                while data:  # more than once only after a short write, whose reason the next one tells
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; the lines before are kept") from error
