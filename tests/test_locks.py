"""One job a folder: who holds it is said, and no lock outlives its owner."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import platform
import re
import sys
import time

import pytest

import extract_features
from runtime import locks
from runtime.locks import LOCK, folder_lock

FORK = multiprocessing.get_context("fork")


def hold(folder, told) -> None:
    sys.argv = ["/home/someone/sample_ddp.py", "--wandb-key", "hunter2"]
    with folder_lock(folder):
        told.send("held")
        told.recv()


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.2)


@contextlib.contextmanager
def held_elsewhere(folder):
    """Another process, which looks like a script of ours, holds ``folder`` until it is sent anything."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, there))
    process.start()
    try:
        assert here.poll(20) and here.recv() == "held"
        process.let_go = lambda: (here.send("end"), process.join())
        yield process
    finally:
        process.kill()
        process.join()


def test_the_folder_is_made_and_its_owner_written_down(tmp_path):
    folder = tmp_path / "new" / "folder"
    with folder_lock(folder):
        owner = json.loads((folder / LOCK).read_text())
        assert (owner["host"], owner["process"]) == (platform.node(), os.getpid())
        assert owner.keys() == {"host", "process", "since", "script"}
        assert abs(time.time() - time.mktime(time.strptime(owner["since"], "%Y-%m-%d %H:%M:%S"))) < 60
        with pytest.raises(BlockingIOError):  # as the kernel sees it
            fcntl.flock((folder / LOCK).open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (folder / LOCK).read_bytes() == b""
    fcntl.flock((folder / LOCK).open(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_second_job_is_refused_until_the_first_is_gone(tmp_path, capsys):
    with held_elsewhere(tmp_path) as process:
        expected = (
            rf"{tmp_path} is in use by sample_ddp\.py, process {process.pid} on host {re.escape(platform.node())} since 20"
        )
        with pytest.raises(ValueError, match=rf"{expected}.*: wait for it or use another folder"), folder_lock(tmp_path):
            pytest.fail("two jobs hold one folder")
        assert "waiting up to 0.2 seconds" in capsys.readouterr().err
        assert "hunter2" not in (tmp_path / LOCK).read_text()
        process.let_go()
        with folder_lock(tmp_path):
            pass
    assert capsys.readouterr().err == ""  # it ended well: nothing to tell


def test_a_killed_owner_is_named_and_its_lock_taken_over(tmp_path, capsys):
    with held_elsewhere(tmp_path) as process:
        process.kill()
        process.join()
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    told = capsys.readouterr().err
    assert told.startswith(f"note: {tmp_path} is taken over from sample_ddp.py, process {process.pid} on host ")
    assert told.endswith("which left without finishing\n")


def test_an_owner_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 30)
    with held_elsewhere(tmp_path) as process:
        monkeypatch.setattr(locks, "note", lambda text: process.kill() if "in use by" in text else None)
        with folder_lock(tmp_path):
            process.join()
            assert process.exitcode == -9


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1, 2]", b'{"host": "node7"', b'{"host": "node7"}', b"7" * 10**5])
def test_what_the_lock_file_holds_cannot_stop_a_job(tmp_path, capsys, content):
    (tmp_path / LOCK).write_bytes(content)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        with pytest.raises(ValueError, match=f"in use by .*process {os.getpid()} on"), folder_lock(tmp_path):
            pass
    assert ("unknown, process unknown on host node7 since unknown" in capsys.readouterr().err) == content.endswith(b'"}')


def test_an_error_of_the_job_frees_the_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_lock(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / LOCK).read_bytes() == b""
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_noted(tmp_path, capsys, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder_lock(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"note: the file system of {tmp_path} has no locks: see to it that no other job writes there\n"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_lock_that_cannot_be_written(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.os, "pwrite", refuse)
    with pytest.raises(OSError, match=f"cannot write {tmp_path / LOCK}: {os.strerror(number)}"), folder_lock(tmp_path):
        pass
    monkeypatch.undo()
    with folder_lock(tmp_path):  # the failed one let go
        pass


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is a file: name a folder"), folder_lock(tmp_path / "file"):
        pass


def test_two_extractions_into_one_folder(image_folder, tmp_path, fails):
    store = tmp_path / "store"
    argv = ["--data-path", image_folder, "--features-path", store, "--vae", "pixels", "--image-size", 16, "--num-workers", 0]
    with held_elsewhere(store) as process:
        assert f"{store} is in use by sample_ddp.py, process {process.pid} on host" in fails(extract_features.main, *argv)
        assert os.listdir(store) == [LOCK]
        process.kill()
        process.join()
        extract_features.main(list(map(str, argv)))  # a folder with nothing but a lock is new
    with held_elsewhere(store):
        extract_features.main(list(map(str, argv)))  # it is complete: whoever holds it does no harm
