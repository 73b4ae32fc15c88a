"""DiT and MDTv2 by EDT's recipe: what is trained, resumed, shared among processes and sampled."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import inference
import sample_ddp
import train_mask_adan
from data.store import LatentStore
from diffusion import create_diffusion
from models import create_model
from models.checkpoints import read_checkpoint
from tests.launch import run_script
from tests.runs import assert_same_state, final_state
from tests.shared import perturb
from tests.test_objective import argv, checkpoint_of
from tests.test_training import one_step
from tests.written_out_mdt import WrittenOut
from training.objective import create_objective
from training.setup import new_model

DIT, MDT = "DiT-Ti/2", "MDTv2-Ti/2"
LATENTS = {"input_size": 16, "in_channels": 3, "num_classes": 3}  # of the latent store
UNIFORM = ("--timestep-sampler", "uniform")


def records(results: Path) -> list[dict]:
    return [json.loads(line) for line in next(results.glob("*/metrics.jsonl")).open()]


def for_masked_pass_only(name: str) -> bool:
    return name == "mask_token" or name.startswith("sideblocks")


@pytest.fixture(scope="module")
def masked_run(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("masked")
    train_mask_adan.main(argv(latent_store, results, MDT))
    return results


@pytest.fixture(scope="module")
def dit_run(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("dit")
    train_mask_adan.main(argv(latent_store, results, DIT))
    return results


# What is trained


def test_dit_has_one_pass(dit_run):
    last, state = records(dit_run)[-1], final_state(dit_run)
    assert "loss_masked" not in last and last["loss"] == pytest.approx(last["loss_plain"])
    assert state["args"]["masked"] is False
    assert read_checkpoint(checkpoint_of(dit_run)).config == create_model(DIT, **LATENTS).config


def test_mdt_is_masked_by_default(masked_run):
    last, state = records(masked_run)[-1], final_state(masked_run)
    assert last["loss"] == pytest.approx(last["loss_plain"] + last["loss_masked"], rel=1e-5) and last["loss_masked"] > 0
    assert state["args"]["masked"] is True
    torch.manual_seed(0)
    start = create_model(MDT, **LATENTS)
    assert read_checkpoint(checkpoint_of(masked_run)).config == start.config
    for name, parameter in start.named_parameters():
        for which in ("model", "ema"):
            assert not torch.equal(state[which][name], parameter.data), (which, name)


def test_without_the_masked_pass_its_weights_stay(latent_store, tmp_path):
    """On two processes, where DDP would wait for gradients that never come; and as on one."""
    flags = ("--no-masked", "--micro-batch-size", "1", *UNIFORM)
    train_mask_adan.main(argv(latent_store, tmp_path / "one", MDT, *flags))
    run_script("train_mask_adan.py", *argv(latent_store, tmp_path / "two", MDT, *flags), processes=2)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert "loss_masked" not in a and a == pytest.approx(b, rel=1e-4)
    torch.manual_seed(0)
    start = create_model(MDT, **LATENTS)
    for count in ("one", "two"):
        state = final_state(tmp_path / count)
        for name, parameter in start.named_parameters():
            for which in ("model", "ema"):
                assert torch.equal(state[which][name], parameter.data) == for_masked_pass_only(name), (count, which, name)


@pytest.mark.parametrize("model, expected", [("MDTv2-S/2", 6), ("MDTv2-XL/2", 6)])
def test_decoder_blocks(latent_store, model, expected):
    source = LatentStore.open(latent_store)
    args = train_mask_adan.parse(["--model", model, "--feature-path", str(latent_store), "--decode-layer", str(expected)])
    with torch.device("meta"):
        network = new_model(args, source, 3, create_objective(args))
    assert network.config.decode_layer == len(network.de_blocks) == expected
    assert len(network.en_inblocks) == len(network.en_outblocks) == (network.config.depth - expected) // 2


@pytest.mark.parametrize(
    "model, flags, message",
    [
        (DIT, ("--masked",), "--masked: DiT-Ti/2 has no masked pass; leave the flag out"),
        (DIT, ("--decode-layer", "2"), "--decode-layer 2: DiT-Ti/2 has no such setting; leave the flag out"),
        (DIT, ("--mediator-num", "4"), "--mediator-num 4: DiT-Ti/2 has no such setting; leave the flag out"),
        (MDT, ("--mediator-num", "4"), "--mediator-num 4: MDTv2-Ti/2 has no such setting; leave the flag out"),
        (MDT, ("--decode-layer", "3"), "decode_layer must leave an even number of the 4 blocks to the encoder, got 3"),
        (MDT, ("--decode-layer", "4"), "decode_layer must leave an even number of the 4 blocks to the encoder, got 4"),
    ],
)
def test_flags_that_do_not_fit_the_network(latent_store, tmp_path, fails, model, flags, message):
    assert message in fails(train_mask_adan.main, *argv(latent_store, tmp_path, model, *flags))
    assert not list(tmp_path.iterdir())


# The step


def small_mdt():
    """With 2 + 2 + 2 blocks, none of whose weights is zero."""
    torch.manual_seed(0)
    settings = {"depth": 6, "width": 16, "num_heads": 2, "label_std": 0.02}
    return perturb(create_model(MDT, **settings, **LATENTS), 0.2)


@pytest.fixture(scope="module")
def store(latent_store) -> LatentStore:
    return LatentStore.open(latent_store)


def test_micro_batches_give_the_gradient_of_the_whole_batch(store):
    _, _, whole, whole_sums, _ = one_step(store, micro_batch_size=6, model=small_mdt())
    _, _, parts, parts_sums, _ = one_step(store, micro_batch_size=4, model=small_mdt())  # 4 + 2: unequal parts
    assert whole_sums == pytest.approx(parts_sums, rel=1e-5)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_the_gradient_is_that_of_the_network_written_out(store):
    """One real step: each pass alone through plain loops, a sum of both losses."""
    model, batch, gradients, _, train_step = one_step(store, micro_batch_size=6, model=small_mdt())
    t, weights = map(train_step._own, train_step._sample_timesteps(0))
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    network, diffusion = WrittenOut(leaves, model.config.num_heads), create_diffusion(min_snr_gamma=5)
    kwargs = [{"y": batch.y[0]}, {"y": batch.y[1], "kept": batch.kept}]
    losses = [diffusion.training_losses(network, batch.x0, t, kwargs[i], noise=batch.noise[i])["loss"] for i in (0, 1)]
    sum((weights * loss).mean() for loss in losses).backward()
    assert gradients.keys() == leaves.keys()
    for name, gradient in gradients.items():
        assert (gradient - leaves[name].grad).norm() < 1e-3 * leaves[name].grad.norm(), name


def test_two_processes_train_as_one(latent_store, tmp_path):
    """Each process's share keeps its own samples' tokens."""
    flags = ("--micro-batch-size", "1", *UNIFORM)
    train_mask_adan.main(argv(latent_store, tmp_path / "one", MDT, *flags))
    run_script("train_mask_adan.py", *argv(latent_store, tmp_path / "two", MDT, *flags), processes=2)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4), (a, b)
    a, b = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    for key, value in a["model"].items():
        assert_close(b["model"][key], value, rtol=0, atol=1e-4)  # Adan divides by the gradient's size


# Resume


@pytest.mark.parametrize("model, flags", [(DIT, ()), (MDT, ("--no-masked", "--weight-decay", "0.1"))])
def test_resume_is_bitwise_without_a_masked_pass(latent_store, tmp_path, model, flags, fresh_accelerate_state):
    """Weights that are not trained have no state in the optimizer."""
    train_mask_adan.main(argv(latent_store, tmp_path / "whole", model, *flags))
    for steps in ("2", "4"):
        fresh_accelerate_state()
        train_mask_adan.main(argv(latent_store, tmp_path / "cut", model, *flags, "--resume", "auto", "--max-steps", steps))
    assert_same_state(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))


def test_resume_without_the_masked_pass_is_refused(latent_store, masked_run, fails):
    common = argv(latent_store, masked_run, MDT, "--resume", "auto")
    assert "--masked True -> False" in fails(train_mask_adan.main, *common, "--no-masked")


def test_bf16_learns_as_fp32(latent_store, masked_run, tmp_path):
    train_mask_adan.main(argv(latent_store, tmp_path, MDT, "--precision", "bf16", "--max-steps", "2"))
    exact, rounded = records(masked_run)[0], records(tmp_path)[0]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2) and rounded["loss"] != exact["loss"]


# Sampling


@pytest.mark.parametrize("run", ["dit_run", "masked_run"])
def test_sampling_from_a_trained_checkpoint(run, tmp_path, request, fresh_accelerate_state):
    """With weights moved at random: a network so little trained predicts nearly 0 whatever it is asked."""
    content = torch.load(checkpoint_of(request.getfixturevalue(run)), weights_only=True)
    model = create_model(content["config"]["model"], **LATENTS)
    model.load_state_dict(content["ema"])
    torch.manual_seed(0)
    content["ema"] = perturb(model, 0.05).state_dict()
    torch.save(content, tmp_path / "moved.pt")
    images = {}
    for name, flags in {"plain": (), "amm": ("--amm", "exp:2"), "guided": ("--amm", "exp:2", "--cfg-scale", "2")}.items():
        fresh_accelerate_state()
        folder = tmp_path / name
        steps = ["--num-sampling-steps", "4", "--num-fid-samples", "3"]
        sample_ddp.main(["--ckpt", str(tmp_path / "moved.pt"), "--sample-dir", str(folder), *steps, *flags])
        images[name] = np.load(folder / "samples_3x16x16x3.npz")["arr_0"]
        assert json.loads((folder / "settings.json").read_text())["amm"] == ("exp:2" if flags else "off")
    assert not np.array_equal(images["plain"], images["amm"]) and not np.array_equal(images["amm"], images["guided"])
    fresh_accelerate_state()
    inference.main(
        ["--ckpt", str(tmp_path / "moved.pt"), "--classes", "0,2", "--per-class", "2", "--num-sampling-steps", "3", "--ddim",
         "--amm", "exp:2", "--cfg-scale", "2", "--out", str(tmp_path / "grid.png")]
    )  # fmt: skip
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
