"""Evaluations while training: the evaluator's numbers, the same on any number of processes, and no effect on the run."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import sample_ddp
import train_mask_adan
from attention_mediator import train as train_sit
from data.npz import write_npz
from evaluations import evaluator, reference
from runtime.files import atomic_file
from tests.launch import run_job
from tests.runs import assert_same_run, assert_same_state, final_state, metrics, run_folder, train_argv
from training import evaluation, logging

SAMPLES, BATCH, STEPS = 10, 4, 3


@pytest.fixture(scope="module")
def ref(image_folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ref") / "ref.npz"
    reference.main([str(image_folder), str(path), "--image-size", "16", "--features", "pixels"])
    return path


def argv_of(store: Path, results: Path, ref: Path, *extra: str) -> list[str]:
    """Evaluations after the third and the sixth of six steps."""
    return train_argv(
        store, results, "--eval-every", "3", "--eval-ref", str(ref), "--eval-features", "pixels",
        "--eval-samples", str(SAMPLES), "--eval-batch-size", str(BATCH), "--eval-steps", str(STEPS),
        "--ema-decay", "0.5", "--init-lr", "1e-2", *extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(latent_store, ref, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("evaluated")
    train_mask_adan.main(argv_of(latent_store, results, ref))
    return results


def evaluations(results: Path) -> dict[int, dict]:
    return {record["step"]: record for record in metrics(results) if "eval/fid" in record}


def test_it_is_logged_everywhere_and_the_training_is_the_one_without(latent_store, evaluated, tmp_path):
    train_mask_adan.main(train_argv(latent_store, tmp_path, "--ema-decay", "0.5", "--init-lr", "1e-2"))
    assert_same_state(final_state(tmp_path), final_state(evaluated))
    assert metrics(tmp_path) == [record for record in metrics(evaluated) if "eval/fid" not in record]
    found = evaluations(evaluated)
    assert list(found) == [3, 6] and found[3]["eval/fid"] != found[6]["eval/fid"]
    made = {"features": "pixels", "ref": "ref.npz", "samples": SAMPLES, "steps": STEPS, "cfg_scale": 1.0}
    assert {name: found[6].pop(f"eval/{name}") for name in made} == made
    assert found[6].keys() == {"step", "eval/fid", "eval/precision", "eval/recall"}
    assert (run_folder(evaluated) / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder(evaluated) / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("eval/fid")]
    assert logged == [(step, pytest.approx(record["eval/fid"])) for step, record in found.items()]


@pytest.mark.parametrize(
    ("main", "model", "solver"),
    [
        (train_mask_adan.main, "EDT-Ti/2", evaluation.GAUSSIAN_SOLVER),
        (train_sit.main, "SiT-Ti/2", evaluation.ODE_SOLVER),
    ],
    ids=["gaussian", "transport"],
)
def test_the_numbers_are_the_evaluators_of_samples_of_the_same_checkpoint(
    latent_store, ref, tmp_path, fresh_accelerate_state, main, model, solver
):
    extra = ("--model", model, "--max-steps", "2", "--seed", "5", "--eval-cfg-scale", "1.5", "--precision", "bf16")
    main(argv_of(latent_store, tmp_path / "runs", ref, *extra))
    fresh_accelerate_state()
    sample_ddp.main(
        ["--ckpt", str(run_folder(tmp_path / "runs") / "checkpoints/latest"), "--seed", "5", "--cfg-scale", "1.5",
         "--solver", solver, "--num-sampling-steps", str(STEPS), "--precision", "bf16",
         "--num-fid-samples", str(SAMPLES), "--per-proc-batch-size", str(BATCH), "--no-png",
         "--sample-dir", str(tmp_path / "samples")]
    )  # fmt: skip
    (samples,) = (tmp_path / "samples").glob("*.npz")
    fresh_accelerate_state()
    expected = evaluator.main([str(ref), str(samples), "--features", "pixels", "--batch-size", str(BATCH)])
    found = evaluations(tmp_path / "runs")[2]
    for name in ("fid", "precision", "recall"):
        assert found[f"eval/{name}"] == expected[name], name


def copied(results: Path, to: Path, *, without_evaluations: bool) -> Path:
    shutil.copytree(results, to, symlinks=True)
    if without_evaluations:
        log = run_folder(to) / "metrics.jsonl"
        kept = [record for record in metrics(to) if "eval/fid" not in record]
        log.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return to


@pytest.mark.parametrize("processes", [2, 4])  # of three batches: the fourth process has none
def test_any_number_of_processes_print_the_same_numbers(latent_store, ref, evaluated, tmp_path, processes):
    """A finished run that lacks its last evaluation makes it up: of the same weights."""
    results = copied(evaluated, tmp_path / "runs", without_evaluations=True)
    run_job("train_mask_adan", argv_of(latent_store, results, ref, "--resume", "auto"), processes)
    assert evaluations(results) == {6: evaluations(evaluated)[6]}


def stop_in_evaluation(rank: int, ranks=(0,), at: int = 1) -> None:
    """``prepare``, or in a test: ask these processes to stop within a batch of the first evaluation."""
    check, calls = evaluation.Evaluation._images, []

    def images(self, network, image_ids, leave):
        if len(image_ids) == 1:  # what is tried before the first step
            return check(self, network, image_ids, leave)

        def counted():
            calls.append(leave)
            if rank in ranks and len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return leave()

        return check(self, network, image_ids, counted)

    evaluation.Evaluation._images = images


@pytest.mark.parametrize("at", [1, STEPS + 1])
def test_stopped_within_an_evaluation_a_run_saves_and_makes_it_up(
    latent_store, ref, evaluated, tmp_path, monkeypatch, capsys, fresh_accelerate_state, at
):
    argv = argv_of(latent_store, tmp_path, ref, "--resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "_images", evaluation.Evaluation._images)  # put back afterwards
        stop_in_evaluation(0, at=at)
        train_mask_adan.main(argv)
    assert "stopped by SIGTERM after step 3, all is saved" in capsys.readouterr().out
    assert final_state(tmp_path)["step"] == 3 and not evaluations(tmp_path)
    fresh_accelerate_state()
    train_mask_adan.main(argv)
    assert_same_run(tmp_path, evaluated)


def test_one_process_of_two_is_asked_to_stop(latent_store, ref, tmp_path):
    argv = argv_of(latent_store, tmp_path, ref, "--resume", "auto")
    ended = run_job("train_mask_adan", argv, 2, prepare=partial(stop_in_evaluation, ranks=(1,)))
    assert "stopped by another process after step 3, all is saved" in ended.stdout
    assert final_state(tmp_path)["step"] == 3 and not evaluations(tmp_path)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def fail_once(rank: int, of: int = 1, error: Exception = OUT_OF_MEMORY) -> None:
    """``prepare``: one process has no features of its first batch of samples."""
    measure, failed = evaluation.extract_batches, []

    def failing(*args):
        for k, batch in enumerate(measure(*args)):
            if rank == of and k == 0 and not failed:
                failed.append(True)
                raise error
            yield batch

    evaluation.extract_batches = failing


def test_a_failing_process_is_told_of_and_the_training_goes_on(latent_store, ref, tmp_path):
    ended = run_job("train_mask_adan", argv_of(latent_store, tmp_path, ref), 2, prepare=fail_once)
    assert "not evaluated: no memory is left beside the training: lower --eval-batch-size" in ended.stdout
    assert list(evaluations(tmp_path)) == [6] and final_state(tmp_path)["step"] == 6


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, OSError("no disk"), ValueError("no features")], ids=lambda e: str(e)[:7])
def test_what_an_evaluation_meets_does_not_end_a_training(latent_store, ref, evaluated, tmp_path, monkeypatch, capsys, error):
    """The evaluation that a run makes up before its first step, too."""
    results = copied(evaluated, tmp_path / "runs", without_evaluations=True)
    monkeypatch.setattr(evaluation, "extract_batches", evaluation.extract_batches)  # put back afterwards
    fail_once(0, of=0, error=error)
    train_mask_adan.main(argv_of(latent_store, results, ref, "--resume", "auto", "--max-steps", "7"))
    assert "step       6  not evaluated: no " in capsys.readouterr().out
    assert list(evaluations(results)) == [7]


def test_another_error_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="sizes"), evaluation._enough_memory():
        raise RuntimeError("sizes do not fit")


def test_only_evaluations_made_alike_are_drawn_together(latent_store, ref, evaluated, tmp_path, monkeypatch):
    results = copied(evaluated, tmp_path / "runs", without_evaluations=False)
    drawn = []
    monkeypatch.setattr(logging, "draw_evaluations", lambda records, path: drawn.append([r["step"] for r in records]))
    argv = argv_of(latent_store, results, ref, "--resume", "auto", "--eval-every", "1", "--eval-cfg-scale", "2")
    train_mask_adan.main([*argv, "--max-steps", "8"])
    assert list(evaluations(results)) == [3, 6, 7, 8] and drawn == [[7], [7, 8]]


def test_images_of_one_colour_are_told_of(latent_store, ref, tmp_path, monkeypatch, capsys):
    """As a NaN ends."""
    made = evaluation.Evaluation._images

    def images(*args):
        for batch in made(*args):
            batch[0] = 128
            yield batch

    monkeypatch.setattr(evaluation.Evaluation, "_images", images)
    train_mask_adan.main(argv_of(latent_store, tmp_path, ref, "--max-steps", "1"))
    assert "the evaluation's samples: 3 image(s) of one colour throughout, at 0, 4, 8." in capsys.readouterr().err


def test_mistakes_are_found_before_the_first_step(latent_store, ref, image_folder, tmp_path, tiny_vae, fails):
    runs = tmp_path / "runs"
    line = lambda *extra: fails(train_mask_adan.main, *argv_of(latent_store, runs, ref, *extra))  # noqa: E731
    assert "nowhere.npz" in line("--eval-ref", "nowhere.npz")
    # The reference, which takes long to measure, waits for what takes no time.
    assert "no.pt" in line("--eval-ref", "nowhere.npz", "--init-from", str(tmp_path / "no.pt"))
    small = tmp_path / "small.npz"
    reference.main([str(image_folder), str(small), "--image-size", "8", "--features", "pixels"])
    assert "holds images of 8 x 8 pixels, the run's have 16" in line("--eval-ref", str(small))
    write_npz(tmp_path / "other.npz", {"mu": np.zeros(8), "sigma": np.eye(8), "features": np.array(["another"])})
    assert "carries statistics of --features another" in line("--eval-ref", str(tmp_path / "other.npz"))
    write_npz(tmp_path / "thin.npz", {"mu": np.zeros(8), "sigma": np.eye(8), "features": np.array(["pixels"])})
    assert "carries statistics of 8 features" in line("--eval-ref", str(tmp_path / "thin.npz"))
    assert "decodes latents of 4 channels, the run's have 3" in line("--vae", str(tiny_vae))
    assert "there is no such file" in line("--eval-features", str(tmp_path / "module.pt"))
    module = torch.jit.script(torch.nn.Flatten(start_dim=3))  # features (B, 3, 16, 16), not (B, D)
    with atomic_file(tmp_path / "module.pt") as file:
        torch.jit.save(module, file)
    assert "must return features (4, D) for 4 images" in line("--eval-features", str(tmp_path / "module.pt"))
    assert not runs.exists()


def test_flags_that_do_not_go_together(latent_store, ref, tmp_path, capsys):
    for argv, reason in (
        (train_argv(latent_store, tmp_path, "--eval-every", "2"), "--eval-every needs --eval-ref"),
        (train_argv(latent_store, tmp_path, "--eval-ref", str(ref)), "does nothing without --eval-every"),
        (train_argv(latent_store, tmp_path, "--eval-samples", "9"), "--eval-samples 9 does nothing without --eval-every"),
        (train_argv(latent_store, tmp_path, "--timm-weights", "x"), "--timm-weights x does nothing without --eval-every"),
        (argv_of(latent_store, tmp_path, ref, "--fsdp"), "leave --eval-every out"),
        (argv_of(latent_store, tmp_path, ref, "--eval-samples", "3"), "must be at least 4"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train_mask_adan.main(argv)
        assert exit_.value.code == 2 and reason in capsys.readouterr().err
