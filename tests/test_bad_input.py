"""What a user can get wrong: one line that names it, exit code 1 (or 2 for the command line), and no traceback."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import extract_features
import inference
import sample_ddp
import train_mask_adan
from evaluations import evaluator
from models import create_model
from runtime import cli
from tests.launch import ROOT, run_script
from tests.runs import train_argv


def fails(monkeypatch, capsys, main, argv, code: int = 1) -> str:
    """Run a script's main as the command line does; returns the message."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "edt.pt"
    torch.save({"ema": create_model("EDT-Ti/2").state_dict()}, path)
    return path


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_missing_and_empty_folders(monkeypatch, capsys, tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    for path in (missing, empty):
        argv = ["--data-path", path, "--features-path", out, "--vae", "pixels", "--image-size", "16"]
        assert str(path) in fails(monkeypatch, capsys, extract_features.main, argv)
        assert str(path) in fails(monkeypatch, capsys, train_mask_adan.main, ["--feature-path", path, "--results-dir", out])
    assert not list(tmp_path.glob("out/*"))  # nothing was begun


def test_latents_the_model_cannot_take(monkeypatch, capsys, image_folder, tmp_path):
    """12 pixels are not divisible by 8, as two halvings of 2x2 patches need."""
    store = tmp_path / "store"
    extract_features.main(
        ["--data-path", str(image_folder), "--features-path", str(store), "--vae", "pixels", "--image-size", "12"]
    )
    message = fails(monkeypatch, capsys, train_mask_adan.main, train_argv(store, tmp_path / "runs"))
    assert "input_size must be divisible by 8, got 12" in message


def test_weights_for_other_latents(monkeypatch, capsys, latent_store, tmp_path):
    torch.save({"ema": create_model("EDT-Ti/2", in_channels=4).state_dict()}, tmp_path / "four.pt")
    argv = train_argv(latent_store, tmp_path / "runs", "--init-from", str(tmp_path / "four.pt"))
    message = fails(monkeypatch, capsys, train_mask_adan.main, argv)
    assert (
        "four.pt does not fit the model: x_embedder.proj.weight has shape (64, 4, 2, 2), the model's is (64, 3, 2, 2)"
        in message
    )


def test_label_beyond_num_classes(monkeypatch, capsys, latent_store, tmp_path):
    argv = train_argv(latent_store, tmp_path, "--num-classes", "2")
    assert "holds label 2, but --num-classes is 2" in fails(monkeypatch, capsys, train_mask_adan.main, argv)


def test_label_beyond_the_models_classes(monkeypatch, capsys, checkpoint):
    argv = ["--ckpt", checkpoint, "--classes", "3,10", "--vae", "pixels"]
    assert "label 10 does not exist, the model has classes 0 to 9" in fails(monkeypatch, capsys, inference.main, argv)


def test_checkpoint_of_another_model(monkeypatch, capsys, checkpoint):
    argv = ["--ckpt", checkpoint, "--model", "EDT-S/2", "--vae", "pixels"]
    message = fails(monkeypatch, capsys, inference.main, argv)
    assert "edt.pt holds EDT-Ti/2, not EDT-S/2" in message


def test_resume_from_another_model(monkeypatch, capsys, latent_store, tmp_path):
    train_mask_adan.main(train_argv(latent_store, tmp_path, "--max-steps", "1"))
    argv = train_argv(latent_store, tmp_path, "--resume", str(tmp_path / "000-EDT-Ti-2"), "--model", "EDT-S/2")
    assert "is a run of EDT-Ti/2, not of --model EDT-S/2" in fails(monkeypatch, capsys, train_mask_adan.main, argv)


def test_truncated_checkpoint(monkeypatch, capsys, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    for main in (inference.main, sample_ddp.main):
        message = fails(monkeypatch, capsys, main, ["--ckpt", checkpoint, "--vae", "pixels"])
        assert "edt.pt is damaged or no checkpoint" in message


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_malicious_pickle_is_refused(monkeypatch, capsys, tmp_path, protocol):
    path, target = tmp_path / "evil.pt", tmp_path / "owned"
    content = {"ema": Malicious(target)}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    message = fails(monkeypatch, capsys, inference.main, ["--ckpt", path, "--vae", "pixels"])
    assert "evil.pt" in message and ("refused" in message or "damaged" in message)
    assert not target.exists()


def test_unknown_and_malformed_flags(monkeypatch, capsys, latent_store):
    base = ["--feature-path", latent_store]
    for argv, words in (
        ([*base, "--modle", "EDT-S/2"], "unrecognized arguments: --modle"),
        ([*base, "--model", "EDT-Q/2"], "invalid choice: 'EDT-Q/2'"),
        ([*base, "--max-steps", "0"], "--max-steps: 0 must be at least 1"),
        ([*base, "--masked", "maybe"], "--masked takes True or False, got 'maybe'"),
        ([*base, "--resume", "runs", "--init-from", "x"], "use one of them"),
        ([], "one of the arguments --feature-path --data-path --dummy/--no-dummy is required"),
    ):
        assert words in fails(monkeypatch, capsys, train_mask_adan.main, argv, code=2)


def test_fp16_on_a_cpu(monkeypatch, capsys, latent_store, checkpoint, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = train_argv(latent_store, tmp_path, "--precision", "fp16")
    assert "--precision fp16 needs a GPU" in fails(monkeypatch, capsys, train_mask_adan.main, argv)
    argv = ["--ckpt", checkpoint, "--precision", "fp16", "--vae", "pixels"]
    assert "--precision fp16 needs a GPU" in fails(monkeypatch, capsys, inference.main, argv)


def test_batch_not_divisible_by_the_processes(latent_store, tmp_path):
    done = run_script(
        "train_mask_adan.py", *train_argv(latent_store, tmp_path, "--global-batch-size", "5"), processes=2, expect=1
    )  # fmt: skip
    assert "--global-batch-size 5 is not divisible by the number of processes, 2" in done.stderr
    assert 'train_mask_adan.py", line' not in done.stderr  # no traceback of ours


def test_wrong_codec(monkeypatch, capsys, checkpoint, tiny_vae):
    message = fails(monkeypatch, capsys, inference.main, ["--ckpt", checkpoint, "--vae", tiny_vae])
    assert "latents of 3 channels" in message and "decodes 4" in message


def test_amm_of_a_block_that_does_not_exist(monkeypatch, capsys, checkpoint):
    argv = ["--ckpt", checkpoint, "--vae", "pixels", "--amm", "exp:99"]
    assert "those that can have it are 0 to 5" in fails(monkeypatch, capsys, inference.main, argv)


def test_evaluator_without_files(monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    argv = [tmp_path / "missing.npz", tmp_path / "a.npz", "--features", "pixels"]
    assert "missing.npz does not exist" in fails(monkeypatch, capsys, evaluator.main, argv)


def test_a_reader_that_has_seen_enough_is_no_error():
    """``python -m models | head`` ended in "Broken pipe"."""
    process = subprocess.Popen([sys.executable, "-m", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE and not error
