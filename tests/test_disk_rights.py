"""Folders that may not be written, and paths that are too long: one line names them and the reason, nothing is left there."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import extract_features
import inference
import sample_ddp
import train_mask_adan
from evaluations import evaluator, reference
from models.checkpoints import __main__ as checkpoints_command
from tests.disk import extract_argv, sample_argv
from tests.edt_checkpoints import random_checkpoint
from tests.runs import train_argv


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "edt.pt")


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
