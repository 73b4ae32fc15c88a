"""Any network with either mathematics: trained, resumed, and sampled by what the checkpoint says."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import sample_ddp
import train_mask_adan
from attention_mediator import train as mediator_train
from data.codec import load_codec
from diffusion.transport import Sampler, create_transport
from models.checkpoints import build_model, read_checkpoint
from runtime.draws import Purpose, normals
from tests.launch import run_script
from tests.runs import assert_same_state, final_state
from tests.shared import grey_levels
from tests.sit_checkpoints import TRANSPORT, random_checkpoint, sample
from training.checkpoint import checkpoint_files


def argv(store: Path, results: Path, model: str, *extra: str) -> list[str]:
    return [
        "--model", model, "--feature-path", str(store), "--results-dir", str(results), "--global-batch-size", "4",
        "--epochs", "100", "--max-steps", "4", "--log-every", "2", "--ckpt-every", "2", *extra,
    ]  # fmt: skip


def checkpoint_of(results: Path) -> Path:
    (run,) = results.glob("*-*")
    return checkpoint_files(run)[0]


@pytest.mark.parametrize(
    ("model", "objective", "parts"),
    [
        ("EDT-Ti/2", "transport", {"loss", "loss_plain", "loss_masked"}),
        ("EDT-Ti/2", "gaussian", {"loss", "mse", "vb", "loss_plain", "loss_masked"}),
        ("DiT-Ti/2", "transport", {"loss", "loss_plain"}),
        ("MDTv2-Ti/2", "transport", {"loss", "loss_plain", "loss_masked"}),
        ("SiT-Ti/2", "transport", {"loss", "loss_plain"}),
        ("SiT-Ti/2", "gaussian", {"loss", "mse", "vb", "loss_plain"}),
    ],
)
def test_any_network_with_either_objective(latent_store, tmp_path, model, objective, parts, fresh_accelerate_state):
    train_mask_adan.main(argv(latent_store, tmp_path, model, "--objective", objective))
    (log,) = tmp_path.glob("*/metrics.jsonl")
    record = json.loads(log.read_text().splitlines()[-1])
    assert set(record) == {"step", "lr", "grad_norm", "skipped_steps", *parts} and np.isfinite(record["loss"])
    path = checkpoint_of(tmp_path)
    assert read_checkpoint(path).objective["name"] == objective
    fresh_accelerate_state()
    steps = ["--num-sampling-steps", "4", "--num-fid-samples", "3"]
    sample_ddp.main(["--ckpt", str(path), "--sample-dir", str(tmp_path / "out"), *steps])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    named = {"gaussian": ("Gaussian", "ancestral"), "transport": ("SDE", "euler")}
    assert (settings["sampler"], settings["solver"]) == named[objective]
    assert np.load(tmp_path / "out" / "samples_3x16x16x3.npz")["arr_0"].shape == (3, 16, 16, 3)


def test_the_default_objective_follows_the_model(latent_store, tmp_path):
    grids = ("--sample-every", "1", "--sample-steps", "2", "--cfg-scale", "2")
    train_mask_adan.main(argv(latent_store, tmp_path, "SiT-Ti/2", "--max-steps", "1", *grids))
    assert [path.name for path in tmp_path.glob("*/samples/*.png")] == ["0000001.png"]
    assert read_checkpoint(checkpoint_of(tmp_path)).objective.items() >= TRANSPORT.items()


def test_the_step_learns_the_velocity(latent_store, tmp_path):
    """The loss of a fresh network, which predicts 0, is the mean of |x_data - x_noise|^2, of latents and unit noise."""
    mediator_train.main(argv(latent_store, tmp_path, "SiT-Ti/2", "--max-steps", "2", "--lr", "1e-12"))
    (log,) = tmp_path.glob("*/metrics.jsonl")
    loss = json.loads(log.read_text().splitlines()[-1])["loss"]
    data = np.load(latent_store / "latents.npy")
    assert loss == pytest.approx(1 + (data**2).mean(), rel=0.1)


def test_transport_resumes_bitwise(latent_store, tmp_path, fresh_accelerate_state):
    flags = ("--mediator-num", "4", "--path-type", "GVP")
    mediator_train.main(argv(latent_store, tmp_path / "whole", "SiT-Ti/2", *flags))
    for steps in ("2", "4"):
        fresh_accelerate_state()
        cut = argv(latent_store, tmp_path / "cut", "SiT-Ti/2", *flags, "--resume", "auto")
        mediator_train.main([*cut, "--max-steps", steps])
    assert_same_state(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
    fresh_accelerate_state()
    with pytest.raises(ValueError, match="mediator-num 4 -> 16"):
        mediator_train.main([*cut, "--mediator-num", "16"])


def test_two_processes_train_from_images_as_one(image_folder, tmp_path):
    """The images are read, cropped, mirrored and encoded on the fly by each process for its share."""
    flags = [
        "--model", "SiT-Ti/2", "--mediator-num", "4", "--data-path", str(image_folder), "--vae", "pixels", "--image-size", "16",
        "--global-batch-size", "4", "--max-steps", "3", "--log-every", "1",
    ]  # fmt: skip
    mediator_train.main([*flags, "--results-dir", str(tmp_path / "one")])
    run_script("attention_mediator/train.py", *flags, "--results-dir", str(tmp_path / "two"), processes=2)
    one, two = ([json.loads(line) for line in next(tmp_path.glob(f"{k}/*/metrics.jsonl")).open()] for k in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_dummy_data(tmp_path):
    mediator_train.main(
        ["--model", "SiT-Ti/2", "--dummy", "--vae", "pixels", "--image-size", "16", "--num-classes", "7", "--max-steps", "1",
         "--global-batch-size", "2", "--results-dir", str(tmp_path)]
    )  # fmt: skip
    checkpoint = read_checkpoint(checkpoint_of(tmp_path))
    assert checkpoint.config.num_classes == 7 and checkpoint.codec["name"] == "pixels"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("sit") / "sit.pt", mediator_num=4)


@pytest.mark.parametrize(
    ("mode", "extra"),
    [
        ("SDE", ()),
        ("SDE", ("--sampling-method", "Heun", "--cfg-scale", "2")),
        ("ODE", ("--sampling-method", "ab3")),
        ("ODE", ("--per-sample-solver",)),
        ("ODE", ("--sampling-method", "rk4", "--likelihood")),
    ],
    ids=["sde", "heun-cfg", "ab3", "dopri5-per-sample", "rk4-likelihood"],
)
def test_batch_size_does_not_change_an_image(checkpoint, tmp_path, mode, extra):
    three = sample(mode, checkpoint, tmp_path / "3", *extra)
    two = sample(mode, checkpoint, tmp_path / "2", *extra, "--per-proc-batch-size", "2")
    assert three.std() > 10 and grey_levels(three, two) <= 1
    if "--likelihood" in extra:
        tables = [np.loadtxt(tmp_path / k / "log_likelihood.csv", delimiter=",", skiprows=1) for k in ("3", "2")]
        np.testing.assert_allclose(tables[0], tables[1], rtol=1e-3)
        nats, bits = tables[0][:, 2], tables[0][:, 3]
        np.testing.assert_allclose(bits, -nats / (3 * 16 * 16 * np.log(2)), rtol=1e-6)


def test_images_are_what_the_library_gives(checkpoint, tmp_path):
    """One image through Sampler.sample_sde, as a user of the published interface would call it."""
    images = sample("SDE", checkpoint, tmp_path)
    labels = np.load(tmp_path / "samples_5x16x16x3.npz")["arr_1"]
    model = build_model(read_checkpoint(checkpoint))
    draw = Sampler(create_transport()).sample_sde(
        diffusion_form="sigma", num_steps=6, step_noise=lambda k: normals(0, Purpose.SAMPLE_NOISE, [4], k, (3, 16, 16))
    )
    with torch.no_grad():
        latents = draw(normals(0, Purpose.SAMPLE_NOISE, [4], 0, (3, 16, 16)), model, y=torch.tensor([labels[4]]))[-1]
    assert grey_levels(load_codec("pixels").decode(latents)[0].numpy(), images[4]) <= 1


def test_pictures_and_the_way_to_them(checkpoint, tmp_path):
    inference.main(
        ["--ckpt", str(checkpoint), "--classes", "1,7", "--per-class", "2", "--num-sampling-steps", "6", "--trajectory", "3",
         "--out", str(tmp_path / "grid.png"), "--mode", "ODE", "--sampling-method", "heun"]
    )  # fmt: skip
    assert Image.open(tmp_path / "grid.png").size[1] == 2 * 64 + 2
    width, height = Image.open(tmp_path / "grid-trajectory.png").size
    assert height == 2 * 64 + 2 and width >= 3 * 64


def test_a_published_checkpoint_needs_no_flags(tmp_path):
    """{"ema": ..., "args": Namespace} without a config: sizes from the keys, objective and path as published."""
    content = torch.load(random_checkpoint(tmp_path / "ours.pt", mediator_num=16), weights_only=True)
    torch.save({"ema": content["ema"], "args": Namespace(model="SiT-Ti/2")}, tmp_path / "published.pt")
    ours = sample("SDE", tmp_path / "ours.pt", tmp_path / "a")
    published = sample("SDE", tmp_path / "published.pt", tmp_path / "b", "--vae", "pixels", "--mediator-num", "16")
    assert np.array_equal(ours, published)


def test_wandb_goes_on_under_the_same_id(latent_store, tmp_path, monkeypatch, fresh_accelerate_state):
    """Offline. A key given as --flag=KEY is in no file: W&B itself records the command line."""
    key = "fedcba98" * 5
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "")
    flags = argv(latent_store, tmp_path, "SiT-Ti/2", "--wandb", f"--wandb-key={key}", "--resume", "auto", "--ckpt-every", "1")
    monkeypatch.setattr("sys.argv", ["attention_mediator/train.py", *flags])
    for steps in ("1", "2"):
        fresh_accelerate_state()
        mediator_train.main([*flags, "--max-steps", steps])
    (folder,) = tmp_path.glob("*-SiT-Ti-2")
    runs = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len({name.split("-")[-1] for name in runs}) == 1
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
