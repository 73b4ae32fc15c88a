"""One job a folder: a lock that says who holds it.

The lock is the kernel's (``flock``) on ``<folder>/.lock``, so that it ends with its owner, however that ends. The file holds
its owner as JSON while there is one, and nothing after a clean end; it is never removed, for removing a locked file lets two
in.
"""

import contextlib
import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.distributed import note

LOCK, MAX_BYTES = ".lock", 4096
WAIT_SECONDS = 10  # the processes of a job that was killed may outlive it by some seconds, and hold its lock until they notice
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold ``folder`` (made if need be) for one job. Only its first process calls this; the others wait for it anyway.

    For the life of a process: ``contextlib.ExitStack().enter_context(folder_lock(folder))`` in its ``main``. A lock whose owner
    was killed is taken over, with a note; on a file system without locks there is a note and no lock. Raises ValueError naming
    the owner when another job holds the folder, OSError when the lock cannot be written.
    """
    path = Path(folder) / LOCK
    # The lock's own descriptor: on some network file systems, closing another one of the same file drops the lock.
    descriptors: list[int] = []
    lock = FileLock(path, thread_local=False, fallback_to_soft=False, preserve_lock_file=True, on_acquired=descriptors.append)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
        if descriptors:
            left = _owner(os.pread(descriptors[0], MAX_BYTES, 0))
            if left:
                note(f"{folder} is taken over from {_named(left)}, which left without finishing")
            _write_owner(descriptors[0], _self())
    except FileExistsError:
        raise ValueError(f"{folder} is a file: name a folder") from None
    except OSError as error:
        lock.release()
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if descriptors:
            with contextlib.suppress(OSError):
                _write_owner(descriptors[0], None)
        lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            note(f"{path.parent} is in use by {_holder(path)}: waiting up to {WAIT_SECONDS} seconds for it")
            lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        raise ValueError(f"{path.parent} is in use by {_holder(path)}: wait for it or use another folder") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        note(f"the file system of {path.parent} has no locks: see to it that no other job writes there")


def _self() -> dict:
    # Not the command line: its flags may hold secrets.
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "script": Path(sys.argv[0]).name or "python",
    }


def _holder(path: Path) -> str:
    try:
        return _named(_owner(path.read_bytes()[:MAX_BYTES]))
    except OSError:
        return _named({})


def _owner(content: bytes) -> dict:
    """Whom a lock file names; empty where it names nobody, or is not legible."""
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict) -> str:
    script, process, host, since = (owner.get(key, "unknown") for key in ("script", "process", "host", "since"))
    return f"{script}, process {process} on host {host} since {since}" if owner else "another job"


def _write_owner(descriptor: int, owner: dict | None) -> None:
    os.ftruncate(descriptor, 0)
    if owner:
        data = json.dumps(owner).encode()
        if os.pwrite(descriptor, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
