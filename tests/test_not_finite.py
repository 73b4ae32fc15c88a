"""Steps whose loss, gradient or weights are not finite."""

import os
import signal

import pytest

import train_mask_adan
from tests.runs import assert_same_state, final_state, in_step, metrics, train_argv
from training.step import TrainingStep


def nan(batch) -> None:
    batch.x0[0, 0, 0, 0] = float("nan")


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(
    latent_store, tmp_path, monkeypatch, capsys, fresh_accelerate_state
):
    flags = ("--log-every", "1", "--lr-decay-steps", "0")
    train_mask_adan.main(train_argv(latent_store, tmp_path / "before", *flags, "--max-steps", "3"))

    def spoil(batch) -> None:
        nan(batch)
        os.kill(os.getpid(), signal.SIGTERM)  # so that it is saved

    argv = train_argv(latent_store, tmp_path / "runs", *flags, "--resume", "auto")
    with monkeypatch.context() as patch:
        in_step(patch, 3, spoil)
        fresh_accelerate_state()
        train_mask_adan.main(argv)
    before, after = final_state(tmp_path / "before"), final_state(tmp_path / "runs")
    assert after["skipped"] == after["skipped_in_a_row"] == 1
    assert_same_state(before, {**after, **{key: before[key] for key in ("step", "skipped", "skipped_in_a_row")}})
    assert "step       4  skipped: the loss is not finite on process 0 (1 in a row, 1 in all)" in capsys.readouterr().out
    fresh_accelerate_state()
    train_mask_adan.main(argv)
    assert [record["skipped_steps"] for record in metrics(tmp_path / "runs")] == [0, 0, 0, 1, 1, 1]
    assert [record.get("loss", 0) > 0 for record in metrics(tmp_path / "runs")] == [True, True, True, False, True, True]
    assert final_state(tmp_path / "runs")["skipped_in_a_row"] == 0


def test_skipped_steps_are_counted_over_a_resume(latent_store, tmp_path, monkeypatch, fails, fresh_accelerate_state):
    call = TrainingStep.__call__

    def poisoned(self, step, batch, lr, **kwargs):
        nan(batch)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, step, batch, lr, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", poisoned)
    argv = train_argv(latent_store, tmp_path, "--max-skipped-steps", "4", "--resume", "auto")
    train_mask_adan.main(argv)
    fresh_accelerate_state()
    message = fails(train_mask_adan.main, *argv)
    assert "in step 4, the last of 4 skipped in a row" in message


def test_too_many_steps_that_are_not_finite_stop_the_run(latent_store, tmp_path, monkeypatch, fails):
    call = TrainingStep.__call__

    def poisoned(self, step, batch, lr, **kwargs):
        if step >= 3:
            nan(batch)
        return call(self, step, batch, lr, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", poisoned)
    message = fails(train_mask_adan.main, *train_argv(latent_store, tmp_path, "--max-skipped-steps", "3"))
    assert "the loss is not finite on process 0 in step 6, the last of 3 skipped in a row" in message
    assert "the last good checkpoint is" in message and "0000002.pt" in message  # not 0000004.pt, from amid the skipped steps
    assert final_state(tmp_path)["step"] == 2


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(latent_store, tmp_path, monkeypatch, capsys):
    norm = TrainingStep._gradient_norm
    steps = []

    def broken(self):
        steps.append(norm(self))
        return steps[-1] * (float("inf") if len(steps) == 2 else 1.0)

    monkeypatch.setattr(TrainingStep, "_gradient_norm", broken)
    train_mask_adan.main(train_argv(latent_store, tmp_path))
    assert "step       2  skipped: the gradient is not finite" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(latent_store, tmp_path, monkeypatch):
    """The losses of a step come from before its update: a step that ruins the weights was once saved as the last good one."""
    call = TrainingStep.__call__

    def ruinous(self, step, batch, lr, **kwargs):
        return call(self, step, batch, float("inf") if step == 3 else lr, **kwargs)

    monkeypatch.setattr(TrainingStep, "__call__", ruinous)
    with pytest.raises(ValueError, match=r"weights are not finite after step 4; .*0000002\.pt"):
        train_mask_adan.main(train_argv(latent_store, tmp_path))
    assert final_state(tmp_path)["step"] == 2
