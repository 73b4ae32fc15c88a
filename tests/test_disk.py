"""A disk that is full or broken: what was there stays whole, and one line names the file and the reason.

The disk fails at the k-th of all calls that write, for k over all of them. ENOSPC lasts, EIO strikes once.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import extract_features
import sample_ddp
import train_mask_adan
from data.npz import write_npz
from models.checkpoints import __main__ as checkpoints_command
from runtime.files import append_line, save_atomic, write_json
from sampling.generate import Batch
from sampling.grids import save_grid
from sampling.writers import SampleFolder, Table
from tests.disk import FailingDisk, contents, extract_argv, sample_argv
from tests.edt_checkpoints import random_checkpoint
from tests.runs import assert_same_state, final_state, metrics, train_argv
from training.checkpoint import checkpoint_files, save_checkpoint
from training.logging import draw_loss

ERRORS = (errno.ENOSPC, errno.EIO)


def spread(calls: list[str], wanted: int) -> list[int]:
    """Numbers of calls, from 1: so many at most, spread over all, and the first of each kind."""
    return sorted({*np.linspace(1, len(calls), wanted).astype(int).tolist(), *(calls.index(call) + 1 for call in {*calls})})


def save_next_checkpoint(path: Path, version: int) -> None:
    save_checkpoint({"weights": torch.full((1000,), float(version)), "step": version}, path.parent, version, keep=1)


# path, version -> writes that version to the path
WRITERS = {
    "a.pt": lambda path, version: save_atomic({"weights": torch.full((50_000,), float(version))}, path),
    "meta.json": lambda path, version: write_json({"version": version}, path),
    "samples.npz": lambda path, version: write_npz(path, {"arr_0": np.full((9, 8), version), "arr_1": np.arange(9)}),
    "grid.png": lambda path, version: save_grid(np.full((4, 64, 64, 3), version, np.uint8), path, 2),
    "loss.png": lambda path, version: draw_loss([{"step": 1, "loss": 1.0}, {"step": 2, "loss": float(version)}], path),
    "metrics.jsonl": lambda path, version: append_line(path, json.dumps({"step": version})),
    "checkpoints": save_next_checkpoint,
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_leaves_what_was_there(tmp_path, name, number):
    path, write = tmp_path / "folder" / name, WRITERS[name]
    path.parent.mkdir()
    write(path, 1)
    before = contents(tmp_path)
    with FailingDisk(tmp_path, number, None).mounted() as counted:
        write(path, 2)
    after = contents(tmp_path)
    assert after != before
    assert ("write" if name == "metrics.jsonl" else "data") in counted.calls
    for k in spread(counted.calls, 2 if name == "loss.png" else 6):  # drawing takes its time
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        write(path, 1)
        with (
            FailingDisk(tmp_path, number, k).mounted() as disk,
            pytest.raises(OSError, match=os.strerror(number)) as caught,
        ):
            write(path, 2)
        assert disk.failed[0] == counted.calls[k - 1]
        assert str(path) in str(caught.value)
        if name == "checkpoints" and (path / "0000002.pt").exists():  # whole, and only the pointer to it failed
            assert [checkpoint.name for checkpoint in checkpoint_files(path.parent)] == ["0000002.pt", "0000001.pt"]
            assert torch.load(path / "0000002.pt", weights_only=True)["step"] == 2
        else:
            assert contents(tmp_path) == before
        write(path, 2)
        assert contents(tmp_path) == after


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_folder_is_packed_when_the_disk_is_mended(tmp_path, number):
    """The table, then the .npz, then the work files go: whatever fails, what follows finds what it needs."""

    def folder(name: str) -> SampleFolder:
        table = Table("calls.csv", ("calls", "time"), lambda batch: np.array([[i, i / 3] for i in batch.image_ids]))
        return SampleFolder(tmp_path / name, 3, 4, {"seed": 0}, png=False, table=table)

    def filled(name: str) -> SampleFolder:
        made = folder(name)
        made.prepare()
        images = torch.arange(3 * 4 * 4 * 3, dtype=torch.uint8).view(3, 4, 4, 3)
        with made:
            made.write(Batch([0, 1, 2], torch.arange(3), images, [], {}), np.ones(3, bool))
        return made

    with FailingDisk(tmp_path, number, None).mounted() as counted:
        filled("whole")
        begun = len(counted.calls)
        folder("whole").finish(np.arange(3))
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == ["calls.csv", "samples_3x4x4x3.npz", "settings.json"]
    for k in range(1, len(counted.calls) - begun + 1):
        before = contents(filled(str(k)).folder)
        with FailingDisk(tmp_path, number, k).mounted(), pytest.raises(OSError, match=os.strerror(number)) as caught:
            folder(str(k)).finish(np.arange(3))
        assert str(tmp_path / str(k)) in str(caught.value)
        after = contents(tmp_path / str(k))
        assert before.items() <= after.items() and set(after) <= {*before, "calls.csv"}
        folder(str(k)).prepare()
        folder(str(k)).finish(np.arange(3))
        assert contents(tmp_path / str(k)) == whole


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "edt.pt")


@pytest.fixture
def jobs(image_folder, checkpoint):
    """name -> (main, folder -> its command line)"""
    return {
        "extract": (extract_features.main, lambda folder: extract_argv(image_folder, folder)),
        "sample": (sample_ddp.main, lambda folder: sample_argv(checkpoint, folder)),
    }


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("job", ["extract", "sample"])
def test_a_job_goes_on_when_the_disk_is_mended(jobs, tmp_path, fails, job, number):
    main, argv = jobs[job]
    with FailingDisk(tmp_path, number, None).mounted() as counted:
        main(list(map(str, argv(tmp_path / "whole"))))
    whole = contents(tmp_path / "whole")
    assert {*counted.calls} >= {"data", "pwrite", "fsync", "replace"}
    for k in spread(counted.calls, 8):
        folder = tmp_path / str(k)
        with FailingDisk(tmp_path, number, k).mounted() as disk:
            message = fails(main, *argv(folder))
        assert disk.failed[0] == counted.calls[k - 1]
        assert f"cannot write {folder}" in message and os.strerror(number) in message
        assert not [name for name in contents(folder) if name.endswith(".tmp")]
        main(list(map(str, argv(folder))))
        assert contents(folder) == whole


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_training_goes_on_when_the_disk_is_mended(latent_store, tmp_path, fails, number):
    with FailingDisk(tmp_path, number, None).mounted() as counted:
        train_mask_adan.main(train_argv(latent_store, tmp_path / "whole", "--max-steps", "4"))
    data = [k for k, call in enumerate(counted.calls, start=1) if call == "data"]
    for k in (len(counted.calls) // 2, data[len(data) // 2], len(counted.calls) - 1):
        results = tmp_path / str(k)
        with FailingDisk(tmp_path, number, k).mounted() as disk:
            message = fails(train_mask_adan.main, *train_argv(latent_store, results, "--max-steps", "4"))
        assert disk.failed
        assert str(results) in message and os.strerror(number) in message
        assert not [name for name in contents(results) if name.endswith(".tmp")]
        train_mask_adan.main(train_argv(latent_store, results, "--max-steps", "4", "--resume", "auto"))
        (*_, run), (whole,) = sorted(results.iterdir()), (tmp_path / "whole").iterdir()
        assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert_same_state(*(torch.load(checkpoint_files(folder)[0], weights_only=True) for folder in (run, whole)))


def test_tensorboard_on_a_full_disk(latent_store, tmp_path, monkeypatch, capfd):
    """Its thread died with a traceback, and the run with it, by an error that named no file."""
    written, write = [], LocalFileSystem._write

    def full(self, *args):
        written.append(args)
        if len(written) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args)

    monkeypatch.setattr(LocalFileSystem, "_write", full)
    train_mask_adan.main(train_argv(latent_store, tmp_path))
    out, err = capfd.readouterr()
    assert len(written) == 7
    assert out.count("tensorboard is given up") == 1 and "No space left on device" in out
    assert "Traceback" not in err
    assert [record["step"] for record in metrics(tmp_path)] == [2, 4, 6] and final_state(tmp_path)["step"] == 6


def test_tensorboard_cannot_begin(latent_store, tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(LocalFileSystem, "_write", full)
    message = fails(train_mask_adan.main, *train_argv(latent_store, tmp_path))
    assert f"cannot write {tmp_path}/000-EDT-Ti-2/tensorboard: {os.strerror(errno.EDQUOT)}" in message


@contextlib.contextmanager
def largest_file(num_bytes: int):
    """The kernel's own refusal to write on, without a signal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("num_bytes", [0, 100, 3000])
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_when_the_kernel_refuses(tmp_path, name, num_bytes):
    path, write = tmp_path / "folder" / name, WRITERS[name]
    path.parent.mkdir()
    write(path, 1)
    before = contents(tmp_path)
    with largest_file(num_bytes):
        try:
            write(path, 2)
        except OSError as error:
            assert str(error).startswith(f"cannot write {path}")
            assert contents(tmp_path) == before
        else:
            assert num_bytes and contents(tmp_path) != before
    write(path, 2)


@pytest.mark.parametrize("num_bytes", [0, 100, 2000])
@pytest.mark.parametrize("job", ["extract", "sample"])
def test_a_job_when_the_kernel_refuses(jobs, tmp_path, fails, job, num_bytes):
    main, argv = jobs[job]
    main(list(map(str, argv(tmp_path / "whole"))))
    with largest_file(num_bytes):
        message = fails(main, *argv(tmp_path / "job"))
    assert f"cannot write {tmp_path / 'job'}" in message and os.strerror(errno.EFBIG) in message
    assert not [name for name in contents(tmp_path / "job") if name.endswith(".tmp")]
    main(list(map(str, argv(tmp_path / "job"))))
    assert contents(tmp_path / "job") == contents(tmp_path / "whole")


def test_a_converted_checkpoint_when_the_kernel_refuses(checkpoint, tmp_path, fails):
    """The library writes this file itself, outside Python."""
    out = tmp_path / "edt.safetensors"
    out.write_bytes(b"the file before")
    for num_bytes in (0, 100, 10**6):
        with largest_file(num_bytes):
            message = fails(checkpoints_command.main, "convert", checkpoint, out, "--force")
        assert f"cannot write {out}" in message
        assert contents(tmp_path) == {out.name: b"the file before"}


def test_disk_full_while_saving_keeps_the_previous_checkpoint(monkeypatch, latent_store, tmp_path, fails):
    saves, save = [], torch.save

    def full(state, file):
        saves.append(state["step"])
        if len(saves) > 1:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    message = fails(train_mask_adan.main, *train_argv(latent_store, tmp_path))
    assert "0000004.pt: No space left on device" in message
    monkeypatch.undo()
    assert saves == [2, 4] and final_state(tmp_path)["step"] == 2
    folder = tmp_path / "000-EDT-Ti-2" / "checkpoints"
    assert (folder / "latest").resolve().name == "0000002.pt"
    assert sorted(path.name for path in folder.iterdir()) == ["0000002.pt", "latest"]  # no half file is left
