"""The recipes: they parse, say the published hyper-parameters, and run; the Slurm script's turns, with stand-ins for Slurm."""

import importlib
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from models.macs import trained_parameters
from models.registry import model_config
from tests.launch import BIN, ROOT
from tests.runs import final_state
from training import setup

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.sh"))
FAMILIES = {"edt": "EDT", "mdt": "MDTv2", "dit": "DiT", "sit": "SiT"}
TI = {"S": 33e6, "B": 131e6, "XL": 675e6}  # parameters of DiT, which the others' are like


def run_recipe(name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FEATURES": "FEATURES", "LAUNCH": "echo", **environment}
    return subprocess.run(["bash", f"recipes/{name}.sh", *flags], cwd=ROOT, env=environment, capture_output=True, text=True)


def parsed(name: str, **environment: str):
    """The flags that a recipe gives its script, through the script's parser."""
    script, *flags = run_recipe(name, **environment).stdout.split()
    with mock.patch.object(setup, "train") as train:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with mock.patch.object(module, "train", train):
            module.main(flags)
    return train.call_args.args[0]


def test_there_is_one_for_each():
    assert sorted(f"{family}_{size}" for family in FAMILIES for size in ("s", "b", "xl")) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_published_hyper_parameters(name):
    family, size = name.split("_")
    args = parsed(name)
    assert args.model == f"{FAMILIES[family]}-{size.upper()}/2"
    masked = family in ("edt", "mdt")
    expected = {
        "global_batch_size": 256, "ema_decay": 0.9999, "weight_decay": 0.0, "label_dropout": 0.1, "resume": "auto",
        "optimizer": "adan" if masked else "adamw", "lr_decay_steps": 400_000 if masked else 0,
        "init_lr": (5e-4 if size == "xl" else 1e-3) if masked else 1e-4,
    }  # fmt: skip
    if masked:
        expected |= {"masked": True, "final_lr": 5e-5, "min_snr_gamma": 5.0, "timestep_sampler": "loss-second-moment"}
    if family == "dit":
        expected |= {"masked": False, "min_snr_gamma": 0.0, "timestep_sampler": "uniform", "objective": "gaussian"}
    if family == "sit":
        expected |= {"objective": "transport", "mediator_num": 64, "mediator_layers": 4 if size == "xl" else None}
    if name == "mdt_s":
        expected |= {"decode_layer": 6}
    assert {key: getattr(args, key) for key in expected} == expected
    steps = 1_281_167 // 256 * args.epochs
    assert 400_000 <= steps < 406_000
    overrides = {key: getattr(args, key) for key in setup.MODEL_FLAGS if getattr(args, key)}
    assert trained_parameters(model_config(args.model, **overrides)) == pytest.approx(TI[size.upper()], rel=0.2)


def test_number_of_mediators():
    assert parsed("sit_s", MEDIATORS="16").mediator_num == 16
    plain = parsed("sit_xl", MEDIATORS="0")
    assert plain.mediator_num is None and plain.mediator_layers is None


def test_without_features():
    done = run_recipe("edt_s", FEATURES="")
    assert done.returncode != 0 and "FEATURES: the latent store" in done.stderr


# Slurm


@pytest.fixture
def slurm(tmp_path, latent_store):
    """The script's environment: srun runs its command here, scontrol names one node and writes down what it is asked."""
    programs = tmp_path / "programs"
    programs.mkdir()
    scripts = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(BIN), os.environ["PATH"]])
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "PROCESSES": "1"}
    return {
        **os.environ, **variables, "PATH": path, "FEATURES": str(latent_store), "RESULTS": str(tmp_path / "runs"),
        "PORT": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def submit(environment: dict, *flags: str, **kwargs) -> subprocess.Popen:
    command = ["bash", "recipes/slurm.sbatch", "recipes/edt_s.sh", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def stand_in(environment: dict, script: str) -> None:
    """Another torchrun."""
    program = environment["PATH"].split(os.pathsep)[0] + "/torchrun"
    with open(program, "w") as file:
        file.write(f"#!{sys.executable}\n{script}")
    os.chmod(program, 0o755)


def asked(tmp_path) -> str:
    path = tmp_path / "asked"
    return path.read_text() if path.exists() else ""


def test_told_of_its_end_it_saves_and_queues_again(slurm, tmp_path):
    stand_in(
        slurm,
        "import signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.5); open(sys.argv[-1], 'a').write('saved'); raise SystemExit(1)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "open(sys.argv[-1], 'w').write('began ')\n"
        "time.sleep(60)\n",
    )
    mark = tmp_path / "mark"
    job = submit(slurm, str(mark))
    while not mark.exists() or not mark.read_text():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=30)
    assert mark.read_text() == "began saved", out
    assert asked(tmp_path) == "requeue 7\n"
    assert job.returncode == 0


def test_a_mistake_is_not_started_again(slurm, tmp_path):
    stand_in(slurm, "raise SystemExit(3)")
    job = submit(slurm)
    job.communicate(timeout=30)
    assert job.returncode == 3 and not asked(tmp_path)


def test_training_by_torchrun(slurm, tmp_path):
    flags = ["--model", "EDT-Ti/2", "--global-batch-size", "4", "--max-steps", "2", "--log-every", "1"]
    out, _ = submit(slurm, *flags).communicate(timeout=120)
    assert "done: 2 steps" in out, out
    assert final_state(tmp_path / "runs")["step"] == 2
    assert not asked(tmp_path)
