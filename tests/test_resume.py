"""Runs that are killed, stopped, damaged and continued."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train_mask_adan
from attention_mediator import train as train_sit
from diffusion import timesteps
from runtime import watch
from runtime.stopping import StopRequest, duration
from tests import kills
from tests.runs import (
    assert_same_run,
    final_state,
    in_step,
    keep_the_finished_run,
    metrics,
    run_folder,
    train_argv,
)
from training.checkpoint import _check_archive, checkpoint_files
from training.step import TrainingStep


@pytest.fixture(scope="module")
def uninterrupted(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("uninterrupted")
    train_mask_adan.main(train_argv(latent_store, results))
    return results


@pytest.fixture
def continued(uninterrupted, tmp_path) -> Path:
    """A copy of that run that may be changed."""
    shutil.copytree(uninterrupted, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def test_resume_after_kills_is_bitwise_the_uninterrupted_run(latent_store, uninterrupted, tmp_path):
    """Published training restored the optimizer only."""
    line = lambda k: train_argv(latent_store, tmp_path / str(k), "--resume", "auto")  # noqa: E731
    for k in range(kills.run_with_kills("train_mask_adan", line, num_kills=4, seed=0, longest=60)):
        keep_the_finished_run(tmp_path / str(k))
        assert_same_run(tmp_path / str(k), uninterrupted)
        assert not list((tmp_path / str(k)).rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("main", "extra"),
    [
        (train_mask_adan.main, ()),
        (train_mask_adan.main, ("--model", "MDTv2-Ti/2", "--micro-batch-size", "3", "--grad-clip", "0.1")),
        (train_sit.main, ("--model", "SiT-Ti/2", "--mediator-num", "4", "--optimizer", "adamw")),
    ],
    ids=["EDT", "MDTv2", "SiT"],
)
def test_stopped_between_log_lines_and_resumed_is_bitwise_uninterrupted(
    latent_store, tmp_path, monkeypatch, capsys, fresh_accelerate_state, main, extra
):
    """With a timestep sampler that has learned enough to weigh; the stop is neither at a log line nor at a checkpoint."""
    learning = lambda: timesteps.LossSecondMomentSampler(2, history_per_term=1)  # noqa: E731
    monkeypatch.setitem(timesteps.SAMPLERS, "loss-second-moment", learning)
    main(train_argv(latent_store, tmp_path / "whole", *extra))
    argv = train_argv(latent_store, tmp_path / "stopped", *extra, "--resume", "auto")
    with monkeypatch.context() as patch:
        in_step(patch, 2, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
        fresh_accelerate_state()
        main(argv)
    assert final_state(tmp_path / "stopped")["step"] == 3
    folder = run_folder(tmp_path / "stopped")
    assert f"stopped by SIGTERM after step 3, all is saved: go on with the same command and --resume {folder}" in (
        capsys.readouterr().out
    )
    fresh_accelerate_state()
    main(argv)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    counts = final_state(tmp_path / "whole")["sampler"].get("counts", [1])
    assert min(counts) >= 1  # the sampler weighed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_signals_stop_too(latent_store, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    in_step(monkeypatch, 0, lambda batch: os.kill(os.getpid(), number))
    train_mask_adan.main(train_argv(latent_store, tmp_path))
    assert final_state(tmp_path)["step"] == 1
    assert signal.getsignal(number) is before


def send_sigint_twice() -> None:
    call = TrainingStep.__call__

    def twice(self, step, *args, **kwargs):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return call(self, step, *args, **kwargs)

    TrainingStep.__call__ = twice


def test_a_second_signal_ends_at_once(latent_store, tmp_path):
    code, _ = kills.run("train_mask_adan", train_argv(latent_store, tmp_path), prepare=send_sigint_twice)
    assert code == 128 + signal.SIGINT
    assert final_state(tmp_path)["step"] == 2


def test_under_a_launcher_what_it_forwards_is_not_a_second_signal(monkeypatch):
    """A terminal interrupts the launcher and its workers, and the launcher then asks the workers to end."""
    monkeypatch.setattr(watch, "LAUNCHED", True)
    with StopRequest() as stop:
        assert stop.reason is None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(0.1)  # the thread hears them, too
        assert stop.reason == "SIGINT"


def test_time_limit_stops_as_a_signal_does(latent_store, tmp_path, capsys):
    train_mask_adan.main(train_argv(latent_store, tmp_path, "--max-steps", "100000", "--time-limit", "0:01"))
    assert 0 < final_state(tmp_path)["step"] < 100_000
    assert "stopped by --time-limit (1 s) after step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-00", 86400), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_durations_are_written_as_for_slurm(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "-5", "1:2:3:4", "x", "1.5", "1-", "-1:00", "²"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError):
        duration(text)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    """A bit in the middle, which is in a weight: torch reads such a file without complaint."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("resume", "damage"), [("auto", cut), ("folder", flip), ("latest", empty)])
def test_a_damaged_newest_checkpoint_is_set_aside(latent_store, uninterrupted, continued, capsys, damage, resume):
    folder = run_folder(continued)
    newest = folder / "checkpoints" / "0000006.pt"
    damage(newest)
    named = {"auto": "auto", "folder": str(folder), "latest": str(folder / "checkpoints" / "latest")}[resume]
    train_mask_adan.main(train_argv(latent_store, continued, "--resume", named))
    assert_same_run(continued, uninterrupted)
    message = capsys.readouterr().err
    assert f"{newest} is damaged" in message and "it is set aside as 0000006.pt.damaged" in message
    assert (folder / "checkpoints" / "0000006.pt.damaged").exists()
    assert (folder / "checkpoints" / "latest").resolve().name == "0000006.pt"  # made again


def test_no_whole_checkpoint_or_a_damaged_one_by_name(latent_store, continued, fails):
    folder = run_folder(continued) / "checkpoints"
    cut(folder / "0000004.pt")
    named = train_argv(latent_store, continued, "--resume", str(folder / "0000004.pt"))
    assert "0000004.pt is damaged" in fails(train_mask_adan.main, *named)
    assert (folder / "0000004.pt").exists()  # nothing is renamed that the user named
    for path in folder.glob("*.pt"):
        cut(path)
    for _ in range(2):  # and nothing where none is left: the next attempt would begin anew without a word
        assert "no checkpoint of" in fails(train_mask_adan.main, *train_argv(latent_store, continued, "--resume", "auto"))
    assert len(list(folder.glob("*.pt"))) == 3


def test_a_checkpoint_of_older_code_is_not_damaged(latent_store, continued, fails):
    folder = run_folder(continued) / "checkpoints"
    state = torch.load(folder / "0000006.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "skipped"}, folder / "0000006.pt")
    message = fails(train_mask_adan.main, *train_argv(latent_store, continued, "--resume", "auto"))
    assert "0000006.pt lacks skipped: no run can be continued from it" in message
    assert (folder / "0000006.pt").exists()


def test_a_flipped_bit_in_the_table_of_contents_is_harmless_or_told(continued):
    """One says "encrypted", which ended in a traceback."""
    path = run_folder(continued) / "checkpoints" / "0000006.pt"
    data, told = path.read_bytes(), 0
    entry = data.rindex(b"PK\x01\x02")
    for bit in range(8 * entry, 8 * (entry + 46)):  # the fixed part of the last file's entry
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            _check_archive(path)
        except ValueError:
            told += 1
    assert told > 100


def test_folders_that_are_set_aside_are_no_checkpoints(tmp_path):
    for name in ("0000002", "0000004.set-aside", "0000006.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "facts.pt").touch()
    assert [path.name for path in checkpoint_files(tmp_path)] == ["0000002"]


def test_changed_flags_are_refused_unless_allowed(latent_store, continued, capsys, fails, fresh_accelerate_state):
    changed = ("--resume", "auto", "--seed", "1", "--init-lr", "1e-4", "--grad-clip", "1")
    message = fails(train_mask_adan.main, *train_argv(latent_store, continued, *changed))
    assert "--seed 0 -> 1, --init-lr 0.001 -> 0.0001, --grad-clip 0.0 -> 1.0" in message and "--allow-changed" in message
    fresh_accelerate_state()
    train_mask_adan.main(train_argv(latent_store, continued, *changed, "--allow-changed", "--max-steps", "7"))
    assert "going on with other flags than the run was begun with: --seed 0 -> 1" in capsys.readouterr().err
    assert final_state(continued)["step"] == 7


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--optimizer", "adamw"), "--optimizer adan -> adamw"),
        (("--no-masked",), "--masked True -> False"),
        (("--num-classes", "5"), "num-classes 3 -> 5"),
        (("--objective", "transport"), "--objective gaussian -> transport"),
    ],
)
def test_what_the_state_does_not_fit_is_refused_though_changes_are_allowed(latent_store, continued, fails, extra, words):
    argv = train_argv(latent_store, continued, "--resume", "auto", "--allow-changed", *extra)
    message = fails(train_mask_adan.main, *argv)
    assert words in message and "--init-from" in message


def test_flags_that_say_the_default_are_no_change(latent_store, continued):
    """--decode-layer 2, which a MDTv2-Ti/2 has, was once refused as changed from none."""
    argv = ("--resume", "auto", "--num-classes", "3", "--final-lr", "5e-5")
    train_mask_adan.main(train_argv(latent_store, continued, *argv))


def test_other_data_is_refused(latent_store, image_folder, continued, tmp_path, fails):
    import extract_features

    (tmp_path / "images").mkdir()
    for name in ("ant", "bee", "cat"):
        shutil.copytree(image_folder / name, tmp_path / "images" / name)
    next((tmp_path / "images" / "cat").iterdir()).unlink()
    store = tmp_path / "fewer"
    extract_features.main(["--data-path", str(tmp_path / "images"), "--features-path", str(store), "--vae", "pixels",
                           "--image-size", "16", "--num-workers", "0"])  # fmt: skip
    assert "num-images 14 -> 13, listing " in fails(train_mask_adan.main, *train_argv(store, continued, "--resume", "auto"))


def test_as_many_other_images_are_refused(latent_store, image_folder, continued, fails):
    argv = [flag for flag in train_argv(latent_store, continued, "--resume", "auto") if flag not in (str(latent_store),)]
    argv[argv.index("--feature-path")] = "--data-path"
    argv.insert(argv.index("--data-path") + 1, str(image_folder))
    message = fails(train_mask_adan.main, *argv, "--vae", "pixels", "--image-size", "16")
    assert "kind latents -> images" in message


def test_a_changed_weight_decay_has_an_effect(latent_store, continued):
    """The optimizer's state brought the old one back."""
    argv = train_argv(latent_store, continued, "--resume", "auto", "--allow-changed", "--weight-decay", "0.3")
    train_mask_adan.main([*argv, "--max-steps", "7"])
    state = final_state(continued)
    assert state["args"]["weight_decay"] == 0.3 and [group["weight_decay"] for group in state["opt"]["param_groups"]] == [0.3]


def test_a_warm_start_that_was_stopped_goes_on_by_the_same_command(latent_store, uninterrupted, tmp_path, monkeypatch):
    start = run_folder(uninterrupted) / "checkpoints" / "0000006.pt"
    argv = train_argv(latent_store, tmp_path, "--init-from", str(start), "--resume", "auto")
    with monkeypatch.context() as patch:
        in_step(patch, 0, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
        train_mask_adan.main(argv)
    assert final_state(tmp_path)["step"] == 1
    train_mask_adan.main(argv)
    assert final_state(tmp_path)["step"] == 6


def test_going_back_twice_keeps_both(latent_store, continued):
    """The second time overwrote what the first had set aside."""
    folder = run_folder(continued) / "checkpoints"
    argv = train_argv(latent_store, continued, "--resume", str(folder / "0000002.pt"), "--max-steps", "4", "--allow-changed")
    before = {}
    for seed in ("1", "2"):
        before[seed] = (folder / "0000004.pt").read_bytes()
        train_mask_adan.main([*argv, "--seed", seed])
    assert (folder / "0000004.pt.set-aside").read_bytes() == before["1"]
    assert (folder / "0000004.pt.set-aside.1").read_bytes() == before["2"]
    logs = [(folder.parent / f"metrics.jsonl.set-aside{end}").read_text() for end in ("", ".1")]
    assert len(logs[0].splitlines()) == 3 and len(logs[1].splitlines()) == 2


def test_going_back_to_an_older_checkpoint(latent_store, continued):
    """The later ones once counted as newest: the first new checkpoint was deleted at once, and ``latest`` pointed nowhere."""
    folder = run_folder(continued) / "checkpoints"
    argv = train_argv(latent_store, continued, "--resume", str(folder / "0000002.pt"), "--keep-checkpoints", "1")
    train_mask_adan.main([*argv, "--max-steps", "4"])
    assert (folder / "latest").resolve().name == "0000004.pt"
    assert sorted(path.name for path in folder.iterdir()) == [
        "0000004.pt", "0000004.pt.set-aside", "0000006.pt.set-aside", "latest",
    ]  # fmt: skip
    assert [record["step"] for record in metrics(continued)] == [2, 4]


def test_two_jobs_cannot_continue_one_run(latent_store, continued, fails, monkeypatch):
    from runtime import locks

    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(sys, "argv", ["train_mask_adan.py"])
    argv = train_argv(latent_store, continued, "--resume", "auto")
    with locks.folder_lock(run_folder(continued)):
        assert "is in use by train_mask_adan.py" in fails(train_mask_adan.main, *argv)


def test_a_log_line_cut_by_a_kill_is_written_again(latent_store, continued, uninterrupted):
    path = run_folder(continued) / "metrics.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps({"step": 8, "loss": 1.0})[:9])
    train_mask_adan.main(train_argv(latent_store, continued, "--resume", "auto"))
    assert_same_run(continued, uninterrupted)


def test_a_mistake_leaves_no_run_folder(latent_store, tmp_path, tiny_vae, fails, monkeypatch):
    """The codec of --sample-every was once looked for when the folder was there; a wrong W&B key left it empty."""
    argv = train_argv(latent_store, tmp_path / "runs", "--sample-every", "1", "--vae", str(tiny_vae))
    assert "decodes latents of 4 channels, the run's have 3" in fails(train_mask_adan.main, *argv)
    from accelerate.tracking import WandBTracker

    def refuse(self):
        raise RuntimeError("api key not configured")

    monkeypatch.setattr(WandBTracker, "start", refuse)
    argv = train_argv(latent_store, tmp_path / "runs", "--wandb")
    assert "--wandb could not be started: api key not configured" in fails(train_mask_adan.main, *argv)
    assert not list(tmp_path.glob("runs/*"))
