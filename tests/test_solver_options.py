"""--solver: what it builds, what it refuses, and that it changes nothing about images being functions of (seed, i)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import sample_ddp
from runtime import cli
from sampling.options import add_sampling_arguments
from sampling.samplers import GAUSSIAN_SOLVERS, ODE_SOLVERS, WATCHABLE_SOLVERS
from sampling.solver_options import add_transport_arguments, build_sampler
from tests import edt_checkpoints
from tests.launch import run_job
from tests.shared import grey_levels
from tests.sit_checkpoints import random_checkpoint
from time_step_wise_adjusting import sample_ddp_three

GAUSSIAN = SimpleNamespace(objective={"name": "gaussian"}, path=Path("edt.pt"))
TRANSPORT = SimpleNamespace(objective={"name": "transport"}, path=Path("sit.pt"))
LABELS = torch.zeros(2, dtype=torch.long)


def parse(*flags):
    parser = cli.ArgumentParser("")
    add_sampling_arguments(parser)
    add_transport_arguments(parser)
    return parser.parse_args(["--ckpt", "x.pt", *flags])


def build(checkpoint, *flags):
    return build_sampler(parse(*flags), checkpoint)


def settings(checkpoint, *flags):
    found = build(checkpoint, *flags).settings
    return found["sampler"], found["solver"]


def count(sampler, channels):
    """Calls of a network that a sample makes."""
    calls = []

    def network(x, t, y):
        calls.append(len(x))
        return torch.cat([0.5 * x] * channels, dim=1)

    def noise(k):
        return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(k))

    *_, _ = sampler(network, noise(0), LABELS, noise)
    return len(calls)


@pytest.mark.parametrize("name", GAUSSIAN_SOLVERS)
def test_gaussian_solvers(name):
    sampler = build(GAUSSIAN, "--solver", name.upper(), "--num-sampling-steps", "5")
    assert (sampler.settings["sampler"], sampler.settings["solver"]) == ("Gaussian", name)
    assert sampler.num_steps == sampler.settings["num_sampling_steps"] == 5
    assert count(sampler, 2) == sampler.num_evaluations == (9 if name == "heun" else 5)


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_ode_solvers(name):
    """--solver alone is the ODE. Adaptive ones do not know how often they ask."""
    sampler = build(TRANSPORT, "--solver", name, "--num-sampling-steps", "6")
    assert (sampler.settings["sampler"], sampler.settings["solver"]) == ("ODE", name)
    assert sampler.process.fixed == (name in WATCHABLE_SOLVERS)
    expected = {"euler": 5, "heun": 10, "midpoint": 10, "heun3": 15, "rk4": 20} | dict.fromkeys(("ab2", "ab3", "ab4"), 6)
    assert sampler.num_evaluations == expected.get(name)
    if name != "scipy_solver":
        assert count(sampler, 1) == expected.get(name, count(sampler, 1))


@pytest.mark.parametrize("name, last_step, calls", [("euler", "Mean", 6), ("heun", "Mean", 11), ("euler", "None", 5)])
def test_sde_solvers(name, last_step, calls):
    flags = ("--mode", "SDE", "--num-sampling-steps", "6", "--last-step", last_step)
    sampler = build(TRANSPORT, *flags, "--solver", name)
    assert (sampler.settings["sampler"], sampler.settings["solver"]) == ("SDE", name)
    assert count(sampler, 1) == sampler.num_evaluations == calls
    assert sampler == build(TRANSPORT, *flags, "--sampling-method", name.title())


def test_defaults_and_the_published_spellings():
    assert settings(GAUSSIAN) == ("Gaussian", "ancestral")
    assert settings(GAUSSIAN, "--ddim") == settings(GAUSSIAN, "--ddim", "--solver", "ddim") == ("Gaussian", "ddim")
    assert settings(TRANSPORT) == ("SDE", "euler")
    assert settings(TRANSPORT, "--mode", "ODE") == ("ODE", "dopri5")
    ab3 = ("--mode", "ODE", "--num-sampling-steps", "9")
    assert build(TRANSPORT, *ab3, "--sampling-method", "AB3") == build(TRANSPORT, *ab3, "--solver", "ab3")
    assert settings(TRANSPORT, *ab3, "--sampling-method", "Heun2", "--solver", "heun") == ("ODE", "heun")


@pytest.mark.parametrize(
    "checkpoint, flags, message",
    [
        (
            GAUSSIAN,
            ("--solver", "ab4"),
            "--solver ab4: edt.pt was trained for Gaussian diffusion, which takes one of ancestral,",
        ),
        (GAUSSIAN, ("--solver", "unipc", "--ddim"), "--ddim and --solver unipc name two solvers: leave one of them out"),
        (GAUSSIAN, ("--solver", "unipc", "--mode", "ODE"), "mode ODE: edt.pt was trained for Gaussian diffusion"),
        (GAUSSIAN, ("--solver", "unipc", "--sampling-method", "heun"), "--sampling-method heun means nothing to edt.pt"),
        (
            GAUSSIAN,
            ("--solver", "dpm++2m", "--num-sampling-steps", "2"),
            "--num-sampling-steps 2: dpm++2m takes at least 3 steps",
        ),
        (GAUSSIAN, ("--num-sampling-steps", "1001"), "--num-sampling-steps 1001: respacing '1001': a section of 1000"),
        (
            GAUSSIAN,
            ("--solver", "unipc", "--num-sampling-steps", "1001"),
            "--num-sampling-steps 1001: 1001 steps cannot be taken",
        ),
        (
            TRANSPORT,
            ("--solver", "unipc"),
            "--solver unipc: sit.pt is a transport, which takes one of euler, heun, ab2, ab3, ab4,",
        ),
        (TRANSPORT, ("--solver", "ab2", "--mode", "SDE"), "--solver ab2 solves the ODE only: the mode SDE takes euler or heun"),
        (
            TRANSPORT,
            ("--solver", "ab2", "--sampling-method", "heun"),
            "--solver ab2 and --sampling-method heun name two solvers: leave one of them out",
        ),
        (
            TRANSPORT,
            ("--solver", "euler", "--last-step", "Mean"),
            "--last-step Mean means nothing to the ODE, which --solver euler",
        ),
        (TRANSPORT, ("--solver", "ab4", "--atol", "1"), "--atol 1.0 means nothing to the fixed steps of ab4"),
        (
            TRANSPORT,
            ("--solver", "ab4", "--num-sampling-steps", "4"),
            "--num-sampling-steps 4: ab4 takes at least 5 points in time, got 4: with so few, take heun",
        ),
        (
            TRANSPORT,
            ("--solver", "heun", "--num-sampling-steps", "1"),
            "--num-sampling-steps 1: num_steps counts the points of the time grid: a whole number, at least 2; got 1",
        ),
        (TRANSPORT, ("--ddim",), "--ddim True means nothing to sit.pt, which is a transport"),
    ],
)
def test_refused(checkpoint, flags, message):
    with pytest.raises(ValueError) as error:
        build(checkpoint, *flags)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_unknown_name_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--solver", "dmp++2m")
    assert exit_.value.code == 2
    assert "argument --solver: 'dmp++2m' is none of ancestral, ddim, dpm++2m" in capsys.readouterr().err


def test_switching_needs_a_solver_that_can_be_watched(tmp_path, fails):
    path = random_checkpoint(tmp_path / "1.pt", seed=1, mediator_num=1)
    flags = ("ODE", "--ckpts", path, path, "--switch-ratios", "0.5", "--sample-dir", tmp_path / "out")
    error = fails(sample_ddp_three.main, *flags, "--solver", "bosh3")
    assert error == "error: --solver bosh3 cannot be watched step by step: use one of euler, heun, ab2, ab3, ab4"


@pytest.fixture(scope="module")
def edt(tmp_path_factory) -> Path:
    return edt_checkpoints.random_checkpoint(tmp_path_factory.mktemp("edt") / "0000001.pt")


def test_two_processes_give_the_same_bits(edt, tmp_path):
    flags = ["--ckpt", edt, "--solver", "dpm++sde2m", "--num-sampling-steps", "4", "--cfg-scale", "2"]
    flags += ["--num-fid-samples", "5", "--per-proc-batch-size", "2", "--no-png", "--sample-dir"]
    run_job("sample_ddp", [*flags, tmp_path / "two"], 2)
    sample_ddp.main([*map(str, flags), str(tmp_path / "one")])
    one, two = (np.load(tmp_path / name / "samples_5x16x16x3.npz")["arr_0"] for name in ("one", "two"))
    assert one.std() > 10 and np.array_equal(one, two)
    written = json.loads((tmp_path / "one" / "settings.json").read_text())
    assert (written["sampler"], written["solver"], written["num_sampling_steps"]) == ("Gaussian", "dpm++sde2m", 4)


def test_a_folder_of_another_solver_is_refused(edt, tmp_path, fails, fresh_accelerate_state):
    flags = ["--ckpt", edt, "--num-sampling-steps", "3", "--num-fid-samples", "2", "--sample-dir", tmp_path, "--no-png"]
    sample_ddp.main([*map(str, flags), "--solver", "unipc"])
    fresh_accelerate_state()
    assert "solver" in fails(sample_ddp.main, *flags, "--solver", "heun")


def test_pictures_and_their_trajectory(edt, tmp_path):
    """inference.py takes every solver; Heun's two calls a step are one column."""
    flags = ["--ckpt", str(edt), "--classes", "1,2", "--per-class", "1", "--num-sampling-steps", "3", "--trajectory", "3"]
    inference.main([*flags, "--solver", "heun", "--out", str(tmp_path / "heun.png")])
    inference.main([*flags, "--ddim", "--out", str(tmp_path / "ddim.png")])
    heun, ddim = (np.array(Image.open(tmp_path / f"{name}-trajectory.png")) for name in ("heun", "ddim"))
    assert heun.shape == ddim.shape
    assert grey_levels(heun, ddim) > 0
