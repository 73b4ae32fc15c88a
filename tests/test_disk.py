"""A disk that is full, broken, read-only or not ours: what was there stays whole, and one line names the file and the reason.

The disk fails at the k-th of all calls that write, for k over all of them. ENOSPC lasts, EIO strikes once.
"""

import builtins
import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

import extract_features
import inference
import sample_ddp
import train_mask_adan
from data.npz import write_npz
from evaluations import evaluator, reference
from models import create_model
from models.checkpoints import __main__ as checkpoints_command
from runtime.files import append_line, save_atomic, write_json
from sampling.generate import Batch
from sampling.grids import save_grid
from sampling.writers import SampleFolder, Table
from tests.runs import assert_same_state, final_state, metrics, train_argv
from training.checkpoint import checkpoint_files, save_checkpoint
from training.logging import draw_loss

ERRORS = (errno.ENOSPC, errno.EIO)


class FailingDisk:
    """Counts the calls that write below ``root``; from the ``fail_at``-th on, or at it alone, they raise ``number``."""

    def __init__(self, root: Path, number: int, fail_at: int | None):
        self.root, self.number, self.fail_at, self.calls = str(root), number, fail_at, 0

    def _call(self, *names: str) -> None:
        self.calls += 1
        if self.fail_at and (self.calls == self.fail_at or (self.calls > self.fail_at and self.number == errno.ENOSPC)):
            raise OSError(self.number, os.strerror(self.number), *names)

    @contextlib.contextmanager
    def mounted(self):
        disk, real_open = self, builtins.open

        class File(io.FileIO):
            def write(self, data):
                disk._call()
                return super().write(data)

        def watched_open(file, mode="r", buffering=-1, *args, **kwargs):
            if set(mode) & set("wa") and "b" in mode and str(file).startswith(disk.root):
                return io.BufferedWriter(File(file, mode), buffering if buffering > 0 else io.DEFAULT_BUFFER_SIZE)
            return real_open(file, mode, buffering, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", watched_open)
            for name in ("write", "pwrite", "fsync", "replace"):
                patch.setattr(os, name, self._failing(getattr(os, name)))
            yield self

    def _failing(self, function):
        def call(*args):
            self._call(*([args[0], None, args[1]] if function.__name__ == "replace" else []))  # the system names paths only
            return function(*args)

        return call


def spread(count: int, wanted: int) -> list[int]:
    """At most so many of the numbers from 1 to count, the ends among them."""
    return sorted(set(np.linspace(1, count, wanted).astype(int).tolist()))


def contents(folder: Path) -> dict[str, bytes]:
    """All that is below ``folder`` but for locks, which tell who came last."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


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
    for k in spread(counted.calls, 2 if name == "loss.png" else 6):  # drawing takes its time
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        write(path, 1)
        with (
            FailingDisk(tmp_path, number, k).mounted(),
            pytest.raises(OSError, match=os.strerror(number)) as caught,
        ):
            write(path, 2)
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
        begun = counted.calls
        folder("whole").finish(np.arange(3))
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == ["calls.csv", "samples_3x4x4x3.npz", "settings.json"]
    for k in range(1, counted.calls - begun + 1):
        before = contents(filled(str(k)).folder)
        with FailingDisk(tmp_path, number, k).mounted(), pytest.raises(OSError, match=os.strerror(number)) as caught:
            folder(str(k)).finish(np.arange(3))
        assert str(tmp_path / str(k)) in str(caught.value)
        after = contents(tmp_path / str(k))
        assert before.items() <= after.items() and set(after) <= {*before, "calls.csv"}
        folder(str(k)).prepare()
        folder(str(k)).finish(np.arange(3))
        assert contents(tmp_path / str(k)) == whole


def extract_argv(images: Path, store: Path) -> list:
    return ["--data-path", images, "--features-path", store, "--vae", "pixels", "--image-size", 16, "--num-workers", 0,
            "--batch-size", 4, "--flip"]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "edt.pt"
    torch.save({"ema": create_model("EDT-Ti/2").state_dict()}, path)
    return path


def sample_argv(checkpoint: Path, folder: Path) -> list:
    return ["--ckpt", checkpoint, "--vae", "pixels", "--sample-dir", folder, "--num-fid-samples", 5, "--num-sampling-steps", 2,
            "--per-proc-batch-size", 2]  # fmt: skip


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
    for k in spread(counted.calls, 8):
        folder = tmp_path / str(k)
        with FailingDisk(tmp_path, number, k).mounted():
            message = fails(main, *argv(folder))
        assert f"cannot write {folder}" in message and os.strerror(number) in message
        assert not [name for name in contents(folder) if name.endswith(".tmp")]
        main(list(map(str, argv(folder))))
        assert contents(folder) == whole


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_training_goes_on_when_the_disk_is_mended(latent_store, tmp_path, fails, number):
    with FailingDisk(tmp_path, number, None).mounted() as counted:
        train_mask_adan.main(train_argv(latent_store, tmp_path / "whole", "--max-steps", "4"))
    for k in (counted.calls // 2, counted.calls - 1):
        results = tmp_path / str(k)
        with FailingDisk(tmp_path, number, k).mounted():
            message = fails(train_mask_adan.main, *train_argv(latent_store, results, "--max-steps", "4"))
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


# Rights and names


@pytest.fixture
def open_to_all():
    """A folder that anybody reaches: pytest's own are the user's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def commands(image_folder, checkpoint, latent_store, open_to_all):
    """name -> (main, path -> a command line that writes there)"""
    images, store = open_to_all / "images", open_to_all / "store"
    for source, target in ((image_folder, images), (latent_store, store)):
        shutil.copytree(source, target).chmod(0o755)
    ckpt, npz = shutil.copy(checkpoint, open_to_all), open_to_all / "a.npz"
    np.savez(npz, arr_0=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8))
    pictures = ["--ckpt", ckpt, "--vae", "pixels", "--num-sampling-steps", 2, "--classes", "1", "--per-class", 1]
    return {
        "--features-path": (extract_features.main, lambda path: extract_argv(images, path)),
        "--sample-dir": (sample_ddp.main, lambda path: sample_argv(ckpt, path)),
        "--results-dir": (train_mask_adan.main, lambda path: train_argv(store, path)),
        "--out": (inference.main, lambda path: [*pictures, "--out", path / "grid.png"]),
        "--json": (evaluator.main, lambda path: [npz, npz, "--features", "pixels", "--json", path / "scores.json"]),
        "REF": (reference.main, lambda path: [images, path / "ref.npz", "--image-size", 16, "--no-statistics"]),
        "convert": (checkpoints_command.main, lambda path: ["convert", ckpt, path / "edt.safetensors"]),
    }


COMMANDS = ("--features-path", "--sample-dir", "--results-dir", "--out", "--json", "REF", "convert")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30)], ids=["name", "path"])
def test_paths_too_long(commands, tmp_path, fails, command, name):
    main, argv = commands[command]
    message = fails(main, *argv(tmp_path / name))
    assert os.strerror(errno.ENAMETOOLONG) in message and name[:200] in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@contextlib.contextmanager
def no_superuser():
    """Root is refused nothing, so its rights are laid down for a while."""
    if os.geteuid():
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_written(commands, open_to_all, fails, command):
    main, argv = commands[command]
    main(list(map(str, argv(open_to_all / "allowed"))))  # also imports what is not to be imported without rights
    denied = open_to_all / "denied"
    denied.mkdir(mode=0o555)
    for path in (denied, denied / "new"):
        with no_superuser():
            message = fails(main, *argv(path))
        assert os.strerror(errno.EACCES) in message and str(denied) in message
    assert not list(denied.iterdir())


def test_what_is_finished_may_be_asked_for_where_nobody_may_write(commands, open_to_all, capsys):
    """Nothing is left to write, not even a lock."""
    for command in ("--features-path", "--sample-dir"):
        main, argv = commands[command]
        given, folder = list(map(str, argv(open_to_all / command))), open_to_all / command
        main(given)
        for path in (folder, folder / "png"):
            if path.exists():
                path.chmod(0o555)
        with no_superuser():
            main(given)
    assert "is complete already" in capsys.readouterr().out
