"""A disk whose writes fail, and small jobs that write."""

import builtins
import contextlib
import errno
import io
import os
from pathlib import Path

import pytest


class FailingDisk:
    """Counts the calls that write below ``root``; from the ``fail_at``-th on, or at it alone, they raise ``number``."""

    def __init__(self, root: Path, number: int, fail_at: int | None):
        self.root, self.number, self.fail_at = str(root), number, fail_at
        self.calls: list[str] = []  # their names; "data" is what is written to a file opened in Python
        self.failed: list[str] = []

    def _call(self, call: str, *names: str) -> None:
        self.calls.append(call)
        count = len(self.calls)
        if self.fail_at and (count == self.fail_at or (count > self.fail_at and self.number == errno.ENOSPC)):
            self.failed.append(call)
            raise OSError(self.number, os.strerror(self.number), *names)

    @contextlib.contextmanager
    def mounted(self):
        disk, real_open = self, builtins.open

        class File(io.FileIO):
            def write(self, data):
                disk._call("data")
                return super().write(data)

        def watched_open(file, mode="r", buffering=-1, *args, **kwargs):
            if set(mode) & set("wax") and "b" in mode and str(file).startswith(disk.root):
                return io.BufferedWriter(File(file, mode), buffering if buffering > 0 else io.DEFAULT_BUFFER_SIZE)
            return real_open(file, mode, buffering, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", watched_open)
            for name in ("write", "pwrite", "fsync", "replace"):
                patch.setattr(os, name, self._failing(getattr(os, name)))
            yield self

    def _failing(self, function):
        def call(*args):
            # The system names paths only.
            self._call(function.__name__, *([args[0], None, args[1]] if function.__name__ == "replace" else []))
            return function(*args)

        return call


def contents(folder: Path) -> dict[str, bytes]:
    """All that is below ``folder`` but for locks, which tell who came last."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def extract_argv(images: Path, store: Path) -> list:
    return ["--data-path", images, "--features-path", store, "--vae", "pixels", "--image-size", 16, "--num-workers", 0,
            "--batch-size", 4, "--flip"]  # fmt: skip


def sample_argv(checkpoint: Path, folder: Path) -> list:
    return ["--ckpt", checkpoint, "--vae", "pixels", "--sample-dir", folder, "--num-fid-samples", 5, "--num-sampling-steps", 2,
            "--per-proc-batch-size", 2]  # fmt: skip
