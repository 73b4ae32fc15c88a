"""What a user of the mediator system can get wrong: one line that names it, and nothing begun."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sample_ddp as root_sample_ddp
from attention_mediator import sample_ddp, train, train_256to512
from sampling import calibrate_switch
from tests.launch import ROOT, run_script
from tests.sit_checkpoints import random_checkpoint
from tests.test_objective import argv, checkpoint_of
from time_step_wise_adjusting import sample_ddp_three
from training.options import _without_secrets


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("sit") / "sit.pt", mediator_num=4, num_classes=3)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sit") / "gaussian.pt"
    return random_checkpoint(path, objective={"name": "gaussian"}, keep_sigma=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Of images half as wide as the store's."""
    return random_checkpoint(tmp_path_factory.mktemp("sit") / "small.pt", mediator_num=4, num_classes=3, input_size=8)


def usage_error(main, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--mediator-num", "5"), ("mediator_num must be a square number", "got 5", "4 and 9")),
        (("--mediator-num", "100"), ("mediator_num", "at most 8^2", "got 100")),
        (("--mediator-num", "4", "--mediator-layers", "99"), ("mediator_layers", "99")),
        (("--mediator-layers", "2"), ("mediator_layers=2 needs mediator_num",)),
        (("--masked",), ("--masked: SiT-Ti/2 has no masked pass",)),
        (("--image-size", "256"), ("holds images of 16 pixels, --image-size says 256",)),
        (("--prediction", "noise", "--train-eps", "0", "--loss-weight", "velocity"), ("train_eps",)),
    ],
)
def test_training_flags(fails, latent_store, tmp_path, flags, words):
    error = fails(train.main, *argv(latent_store, tmp_path / "runs", "SiT-Ti/2", *flags))
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


def test_training_usage(capsys, latent_store, tmp_path):
    base = argv(latent_store, tmp_path, "SiT-Ti/2")
    for flags, words in (
        (["--timestep-sampler", "uniform"], "--timestep-sampler means nothing to --objective transport"),
        (["--objective", "gaussian", "--path-type", "GVP"], "--path-type means nothing to --objective gaussian"),
        (["--loss-weight", "likelihood"], "--loss-weight likelihood is of --prediction noise or score"),
        (["--data-path", "x"], "not allowed with argument --feature-path"),
    ):
        assert words in usage_error(train.main, [*base, *flags], capsys)
    assert "--no-dummy names no data" in usage_error(train.main, ["--no-dummy"], capsys)


def test_a_checkpoint_of_another_resolution_without_the_transfer_flag(fails, latent_store, small, tmp_path):
    flags = ("--mediator-num", "4", "--init-from", str(small))
    error = fails(train.main, *argv(latent_store, tmp_path / "runs", "SiT-Ti/2", *flags))
    assert "latents 8 wide" in error and "16 wide" in error and "--resume-ckpt-low-resolution" in error
    assert not (tmp_path / "runs").exists()
    error = fails(
        train.main, *argv(latent_store, tmp_path / "runs", "SiT-Ti/2", "--mediator-num", "16", "--init-from", str(small))
    )
    assert "--mediator-num 16" in error and "has 4" in error


def test_finetuning(fails, latent_store, small, checkpoint, tmp_path, fresh_accelerate_state):
    base = [*argv(latent_store, tmp_path / "runs", "SiT-Ti/2", "--mediator-num", "4"), "--image-size", "16", "--max-steps", "2"]
    for resume in ([], ["--resume", "auto"]):  # never from random weights
        assert "--resume-ckpt-low-resolution is missing" in fails(train_256to512.main, *base, *resume)
    error = fails(train_256to512.main, *base, "--resume-ckpt-low-resolution", str(checkpoint))
    assert "of latents 16 wide, the data's are 16" in error
    error = fails(train_256to512.main, *base, "--resume-ckpt-low-resolution", str(small), "--path-type", "GVP")
    assert "was trained with --path-type Linear, this run has GVP: give the same" in error
    assert "holds images of 16 pixels, --image-size says 512" in fails(
        train_256to512.main, *argv(latent_store, tmp_path / "runs", "SiT-Ti/2")
    )
    assert not (tmp_path / "runs").exists()
    # The same command goes on after an interruption, though the checkpoint it began from is gone.
    moved = tmp_path / "small.pt"
    shutil.copy(small, moved)
    command = [*base, "--resume", "auto", "--resume-ckpt-low-resolution", str(moved)]
    fresh_accelerate_state()
    train_256to512.main([*command, "--max-steps", "1"])
    moved.unlink()
    fresh_accelerate_state()
    train_256to512.main(command)
    assert checkpoint_of(tmp_path / "runs").name == "0000002.pt"


def test_likelihood_is_of_the_unguided_ode(capsys, checkpoint):
    base = ["--ckpt", checkpoint, "--likelihood"]
    error = usage_error(sample_ddp.main, ["ODE", *base, "--cfg-scale", "1.5"], capsys)
    assert "--likelihood is that of the unguided model: --cfg-scale must be 1, got 1.5" in error
    assert "use the mode ODE" in usage_error(sample_ddp.main, ["SDE", *base], capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("SDE", "--diffusion-form", "SBDM", "--sample-eps", "0"), "SBDM is infinite at time 0"),
        (("SDE", "--sampling-method", "Heun", "--last-step", "None"), "the SDE's drift is infinite at t = 1"),
        (("SDE", "--sampling-method", "dopri5"), "sampling_method must be one of Euler, Heun"),
        (("SDE", "--atol", "1e-3"), "--atol 0.001 means nothing to the mode SDE"),
        (("SDE", "--last-step", "None", "--last-step-size", "0.1"), "--last-step-size 0.1 means nothing to"),
        (("ODE", "--sampling-method", "heun", "--atol", "1"), "--atol 1.0 means nothing to the fixed steps of heun"),
        (("ODE", "--last-step", "Mean"), "--last-step Mean means nothing to the mode ODE"),
        (("ODE", "--ddim"), "which is a transport"),
        (("ODE", "--num-sampling-steps", "1"), "at least 2"),
        (("SDE", "--prediction", "noise"), "--prediction noise: .* was trained with velocity"),
        (("SDE", "--mediator-num", "16"), "--mediator-num 16: .* has 4"),
        (("SDE", "--image-size", "256"), "--image-size 256: .* has 16"),
        (("SDE", "--model", "SiT-S/2"), "holds SiT-Ti/2, not SiT-S/2"),
    ],
)
def test_sampling_flags(fails, checkpoint, tmp_path, arguments, words):
    mode, *flags = arguments
    error = fails(sample_ddp.main, mode, "--ckpt", checkpoint, "--sample-dir", tmp_path / "out", *flags)
    assert re.search(words, error), error
    assert not (tmp_path / "out").exists()


def test_a_gaussian_checkpoint_has_neither_ode_nor_sde(fails, gaussian, tmp_path):
    common = ("--ckpt", gaussian, "--sample-dir", tmp_path / "out")
    assert "which has neither ODE nor SDE" in fails(sample_ddp.main, "SDE", *common)
    assert "which has neither ODE nor SDE" in fails(root_sample_ddp.main, *common, "--mode", "ODE")
    error = fails(root_sample_ddp.main, *common, "--sample-eps", "0")
    assert "--sample-eps 0.0 means nothing to" in error and "trained for Gaussian diffusion" in error
    error = fails(sample_ddp_three.main, "SDE", "--ckpts", gaussian, gaussian, "--switch-ratios", "0.5")
    assert "trained for Gaussian diffusion" in error


def test_switching_usage(capsys, checkpoint):
    for flags, words in (
        ([], "--ckpt1 is missing"),
        (["--ckpts", checkpoint, checkpoint], "2 models need 1 switch ratio(s), got 0"),
        (["--ckpts", checkpoint, "--ckpt1", checkpoint], "use one of them"),
        (["--ckpts", checkpoint, "--mediator-num1", "4"], "use one of them"),
    ):
        assert words in usage_error(sample_ddp_three.main, ["SDE", *flags], capsys)


def test_calibration_without_a_step_to_switch_at(fails, checkpoint):
    error = fails(
        calibrate_switch.main, "SDE", "--ckpts", checkpoint, checkpoint, "--budget-gmac", "1", "--num-sampling-steps", "4"
    )  # fmt: skip
    assert "--num-sampling-steps 4 leaves no step to switch at" in error


def test_the_key_is_hidden_in_both_forms():
    line = ["train.py", "--wandb_key", "first", "--wandb-key=second", "--wandb-name", "first"]
    assert _without_secrets(line) == ["train.py", "--wandb_key", "***", "--wandb-key=***", "--wandb-name", "first"]


def test_an_error_of_the_main_process_is_told_once(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    done = run_script(
        "attention_mediator/sample_ddp.py", "SDE", "--ckpt", checkpoint, "--sample-dir", tmp_path, processes=2, expect=1
    )  # fmt: skip
    assert done.stderr.count("error: ") == 1 and "is not empty" in done.stderr
    assert 'sample_ddp.py", line' not in done.stderr  # no traceback of ours


@pytest.mark.parametrize(
    "script",
    [
        "attention_mediator/train_256to512.py",
        "attention_mediator/sample_ddp.py",
        "time_step_wise_adjusting/sample_ddp_three.py",
    ],
)
def test_a_repository_that_is_not_installed(script, tmp_path):
    """-S leaves out the installed packages: what an interpreter without the repository sees."""
    (tmp_path / "numpy.py").write_text("")  # the script's own imports that come before the repository's
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", str(ROOT / script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "error: install the repository first: pip install -e ."
