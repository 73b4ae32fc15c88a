"""Jobs that are asked to stop, that lose their launcher, and that another one meets."""

import contextlib
import functools
import os
import signal
import threading
import time
from pathlib import Path

import train_mask_adan
from runtime import locks, watch
from runtime.files import append_line
from runtime.stopping import StopRequest
from tests.launch import Ended, run_job
from tests.runs import final_state, in_own_step, in_step, metrics, train_argv
from training.step import TrainingStep


def train_by_two(store: Path, results: Path, prepare, **kwargs) -> Ended:
    return run_job("train_mask_adan", train_argv(store, results, "--log-every", "1"), 2, prepare=prepare, **kwargs)


# Signals


def be_asked_to_stop(_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_process_stops_all(latent_store, tmp_path):
    ended = train_by_two(latent_store, tmp_path, functools.partial(in_own_step, 3, (1,), be_asked_to_stop))
    assert "stopped by another process after step 3, all is saved" in ended.stdout
    assert final_state(tmp_path)["step"] == 3


def let_the_other_wait_and_be_signalled(folder: Path, rank: int) -> None:
    """Process 0 waits for process 1, in a collective, and is asked to stop twice."""
    (folder / str(rank)).write_text(str(os.getpid()))

    def signal_twice(_) -> None:
        other = int((folder / "0").read_text())
        for _ in range(2):
            time.sleep(0.5)
            os.kill(other, signal.SIGTERM)
        deadline = time.monotonic() + 20
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(other, 0)
                time.sleep(0.05)

    in_own_step(3, (1,), signal_twice, rank)


def test_a_second_signal_ends_a_process_that_waits_for_another(latent_store, tmp_path):
    """Python hears no signal in there: it was without effect."""
    prepare = functools.partial(let_the_other_wait_and_be_signalled, tmp_path)
    ended = train_by_two(latent_store, tmp_path / "runs", prepare, expect=None)
    assert ended.codes == [128 + signal.SIGTERM, 1]
    assert ended.stderr.count("stopped at once by a second signal; what was saved before is whole") == 1
    assert final_state(tmp_path / "runs")["step"] == 2


def test_afterwards_signals_are_heard_as_before():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = []
    handler = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    wakeup = signal.set_wakeup_fd(writer)
    descriptors = os.listdir("/proc/self/fd")
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.reason == "SIGUSR1" and not heard
        assert os.listdir("/proc/self/fd") == descriptors
        assert "signals" not in [thread.name for thread in threading.enumerate()]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1] and os.read(reader, 9) == bytes(heard)
        assert signal.set_wakeup_fd(wakeup) == writer
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR1, handler)
        os.close(reader)
        os.close(writer)


# Others


def lose_the_launcher(_) -> None:
    watch.LAUNCHED, watch.PARENT = True, 0


def test_the_death_of_the_launcher_stops_training(latent_store, tmp_path):
    ended = train_by_two(latent_store, tmp_path, functools.partial(in_own_step, 3, (0, 1), lose_the_launcher))
    assert "stopped by the death of the launcher after step 3, all is saved" in ended.stdout
    assert final_state(tmp_path)["step"] == 3


def spoil(batch) -> None:
    batch.x0[0, 0, 0, 0] = float("nan")


def spoil_one_and_count_updates(folder: Path, rank: int) -> None:
    in_own_step(3, (1,), spoil, rank)
    update = TrainingStep._update

    def counted(self, *args):
        append_line(folder / str(rank), "update")
        update(self, *args)

    TrainingStep._update = counted


def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_all(latent_store, tmp_path):
    prepare = functools.partial(spoil_one_and_count_updates, tmp_path)
    ended = train_by_two(latent_store, tmp_path / "runs", prepare)
    assert "step       3  skipped: the loss is not finite on process 1 (1 in a row, 1 in all)" in ended.stdout
    assert [(tmp_path / str(rank)).read_text().count("update") for rank in (0, 1)] == [5, 5]
    assert [record["skipped_steps"] for record in metrics(tmp_path / "runs")] == [0, 0, 1, 1, 1, 1]


def be_impatient(_: int) -> None:
    locks.WAIT_SECONDS = 0.2


def test_a_run_that_trains_holds_its_folder(latent_store, tmp_path, monkeypatch):
    argv, second = train_argv(latent_store, tmp_path), []

    def begin_another(_) -> None:
        second.append(run_job("train_mask_adan", [*argv, "--resume", "auto"], 1, prepare=be_impatient, expect=1))

    in_step(monkeypatch, 3, begin_another)
    train_mask_adan.main(argv)
    ((error,),) = (ended.errors for ended in second)
    assert f"{tmp_path / '000-EDT-Ti-2'} is in use by" in error and f"process {os.getpid()} on host" in error
    assert final_state(tmp_path)["step"] == 6
