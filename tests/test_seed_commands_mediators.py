"""The command lines of the published mediator README, with paths, sizes and process counts replaced, and nothing else: 64, 128
and 256 pixels stand for 256, 512 and 1024, 1, 4 and 16 mediators for 4, 16 and 64; ports are free ones; W&B works offline."""

import csv
import subprocess

import numpy as np
import pytest
import torch

from tests.launch import free_port, run_command

WANDB = (
    "--wandb", "--wandb_name", "exp", "--wandb_entity", "someone", "--wandb_project", "mediators",
    "--wandb_key", "0123456789" * 4,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_folder, tiny_vae):
    return tmp_path_factory.mktemp("mediators")


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        yield


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return run_command("torchrun", "--nnodes=1", "--nproc_per_node=2", f"--master_port={free_port()}", *command)


@pytest.fixture(scope="module")
def checkpoints(place, image_folder, tiny_vae) -> dict:
    """By number of mediators: the README's three training lines."""
    found = {}
    for index, mediators in enumerate((1, 4, 16)):
        done = torchrun(
            "attention_mediator/train.py", "--model", "SiT-S/2",
            "--epochs", "1", "--image_size", "64", "--global_batch_size", "8", "--mediator_num", str(mediators),
            "--data_path", image_folder, "--results_dir", place / "runs", "--vae", tiny_vae, *WANDB,
        )  # fmt: skip
        assert "done: 1 steps" in done.stdout  # 14 images, one epoch of batch 8
        found[mediators] = place / "runs" / f"{index:03d}-SiT-S-2" / "checkpoints" / "latest"
    return found


def test_finetuning_256_to_512_to_1024(checkpoints, place, image_folder, tiny_vae):
    source = checkpoints[16]
    for script, size, index in (("train_256to512.py", 128, 3), ("train_512to1024.py", 256, 4)):
        torchrun(
            f"attention_mediator/{script}", "--model", "SiT-S/2",
            "--epochs", "1", "--epoch_ckpt_every", "2", "--image_size", str(size), "--global_batch_size", "8",
            "--mediator_num", "16", "--data_path", image_folder, "--results_dir", place / "runs", "--vae", tiny_vae,
            "--resume_ckpt_low_resolution", source, *WANDB,
        )  # fmt: skip
        source = place / "runs" / f"{index:03d}-SiT-S-2" / "checkpoints" / "latest"
        state = torch.load(source, weights_only=True)
        assert state["ema"]["pos_embed"].shape[1] == (size // 16) ** 2
        assert state["step"] == 1


def test_static_number_of_mediators(checkpoints, place, tiny_vae):
    torchrun(
        "attention_mediator/sample_ddp.py", "SDE",
        "--model", "SiT-S/2", "--num_fid_samples", "6", "--image_size", "64", "--cfg_scale", "1.0",
        "--sample_dir", place / "static", "--ckpt", checkpoints[4], "--mediator_num", "4", "--num_sampling_steps", "3",
    )  # fmt: skip
    assert np.load(place / "static" / "samples_6x64x64x3.npz")["arr_0"].shape == (6, 64, 64, 3)


def test_step_wise_adjusting(checkpoints, place):
    done = torchrun(
        "time_step_wise_adjusting/sample_ddp_three.py", "SDE",
        "--model", "SiT-S/2", "--num_fid_samples", "6", "--image_size", "64", "--cfg_scale", "1.0",
        "--per_proc_batch_size", "1", "--first_several_num", "3", "--distence_func", "mae",
        "--sample_dir", place / "three",
        "--mediator_num1", "1", "--mediator_num2", "4", "--mediator_num3", "16",
        "--ckpt1", checkpoints[1], "--ckpt2", checkpoints[4], "--ckpt3", checkpoints[16],
        "--switch_ratio1", "5", "--switch_ratio2", "0.001", "--num_sampling_steps", "8",
    )  # fmt: skip
    assert np.load(place / "three" / "samples_6x64x64x3.npz")["arr_0"].shape == (6, 64, 64, 3)
    with open(place / "three" / "switch_steps.csv") as file:
        rows = list(csv.DictReader(file))
    # The first change that is compared is delta_4, after solver step 5; any ratio of 5 is then met, one of 0.001 never.
    assert [row["switch_1_to_2"] for row in rows] == ["5"] * 6 and {row["switch_2_to_3"] for row in rows} == {"-1"}
    assert {(row["evaluations_1"], row["evaluations_2"], row["evaluations_3"]) for row in rows} == {("5", "3", "0")}
    assert "GMAC a call on average" in done.stdout


def test_the_key_is_nowhere(checkpoints, place):
    """W&B itself records the command line of a run; the key must not be in it, nor in the checkpoint's arguments."""
    files = [path for path in place.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert b"0123456789" * 4 not in path.read_bytes(), path
