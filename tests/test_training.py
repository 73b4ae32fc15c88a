"""The training step, its data and the whole script: invariances and exact resume."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import train_mask_adan
from data.store import LatentStore
from diffusion import create_diffusion
from diffusion.timesteps import LossSecondMomentSampler, UniformSampler
from models import create_model
from runtime.distributed import start_training
from tests.runs import final_state, train_argv
from tests.shared import perturb
from training.checkpoint import checkpoint_files, last_run_folder, new_run_folder, save_checkpoint
from training.data import Batch, Batches, DataOrder
from training.ema import EMA
from training.optim import ADAN_BETAS, create_optimizer, linear_lr
from training.step import PARTS, TrainingStep

TINY = {"depths": (1, 1, 1, 1, 1), "widths": (16, 24, 32, 24, 16), "num_heads": 2}


@pytest.fixture(scope="module")
def store(latent_store) -> LatentStore:
    return LatentStore.open(latent_store)


def tiny_model(seed: int = 0):
    """Random weights everywhere, also where the initialisation is zero."""
    torch.manual_seed(seed)
    return perturb(create_model("EDT-Ti/2", **TINY, num_classes=3), 0.05)


def one_step(store, *, micro_batch_size: int, masked: bool = True, sampler=None, step: int = 0, model=None):
    """The gradient of a step (before the optimizer uses it), its sums, and the timestep sampler. model: an EDT by default."""
    accelerator = start_training("fp32")
    model = model or tiny_model()
    order = DataOrder(store.num_images, 6, seed=3)
    batches = Batches(store, order, range(6), null_label=3, mask_places=model.config.mask_places if masked else None)
    gradients = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    wrapped, optimizer = accelerator.prepare(model.train(), Recorder(model.parameters(), lr=0.0))
    sampler = sampler or UniformSampler()
    train_step = TrainingStep(
        accelerator, wrapped, optimizer, EMA(model, 0.9), create_diffusion(min_snr_gamma=5), sampler, 3, 6, range(6),
        micro_batch_size
    )  # fmt: skip
    sums = train_step(step, batches(step), lr=0.0).sums
    return model, batches(step), gradients, dict(zip(PARTS, sums.tolist(), strict=True)), train_step


def test_micro_batches_give_the_gradient_of_the_whole_batch(store):
    _, _, whole, whole_sums, _ = one_step(store, micro_batch_size=6)
    _, _, parts, parts_sums, _ = one_step(store, micro_batch_size=4)  # 4 + 2: unequal parts
    assert whole_sums == pytest.approx(parts_sums, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_pair_together_equals_two_separate_passes(store):
    """The gradient of mean(w L_plain) + mean(w L_masked), each pass alone through the network."""
    model, batch, together, sums, train_step = one_step(store, micro_batch_size=6)
    t, weights = map(train_step._own, train_step._sample_timesteps(0))
    diffusion = create_diffusion(min_snr_gamma=5)
    kwargs = [{"y": batch.y[0]}, {"y": batch.y[1], "kept": batch.kept}]
    model.zero_grad()
    losses = [diffusion.training_losses(model, batch.x0, t, kwargs[i], noise=batch.noise[i])["loss"] for i in (0, 1)]
    sum((weights * loss).mean() for loss in losses).backward()
    assert sums["loss_plain"] == pytest.approx(losses[0].sum().item(), rel=1e-5)
    assert sums["loss_masked"] == pytest.approx(losses[1].sum().item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_unmasked_training_has_one_pass(store):
    _, batch, _, sums, _ = one_step(store, micro_batch_size=6, masked=False)
    assert batch.y.shape == (1, 6) and batch.kept == []
    assert sums["loss_masked"] == 0 and sums["loss"] == pytest.approx(sums["loss_plain"])


def test_the_timestep_sampler_learns_the_unweighted_sum_of_both_losses(store):
    sampler = LossSecondMomentSampler()
    *_, sums, train_step = one_step(store, micro_batch_size=6, sampler=sampler)
    t, _ = train_step._sample_timesteps(0)
    history = np.array(sampler.state_dict()["history"])
    assert history.sum() == pytest.approx(sums["loss"], rel=1e-5)
    in_parts = LossSecondMomentSampler()
    one_step(store, micro_batch_size=4, sampler=in_parts)
    np.testing.assert_allclose(in_parts.state_dict()["history"], history, rtol=1e-4)
    assert set(np.flatnonzero(history.any(1))) == set(t.tolist())


def test_a_step_asks_other_processes_once(store, monkeypatch):
    """For what the step is worth, whether to stop, and the losses that the timestep sampler learns from."""
    asked, gather = [], Accelerator.gather
    monkeypatch.setattr(Accelerator, "gather", lambda self, tensor: asked.append(tensor.shape) or gather(self, tensor))
    monkeypatch.setattr(TrainingStep, "any_process", lambda *_: pytest.fail("another exchange"))
    one_step(store, micro_batch_size=4, sampler=LossSecondMomentSampler())
    assert asked == [(3 + 6,)]
    one_step(store, micro_batch_size=4)
    assert asked[1:] == [(3,)]


def test_draws_do_not_depend_on_the_share(store):
    """A process that owns positions 2..4 makes just what one owning all makes there."""
    order = DataOrder(store.num_images, 6, seed=3)
    places = create_model("EDT-Ti/2", **TINY).config.mask_places
    whole = Batches(store, order, range(6), null_label=3, mask_places=places)(5)
    part = Batches(store, order, range(2, 4), null_label=3, mask_places=places)(5)
    assert torch.equal(whole.x0[2:4], part.x0) and torch.equal(whole.noise[:, 2:4], part.noise)
    assert torch.equal(whole.y[:, 2:4], part.y)
    assert all(torch.equal(a[2:4], b) for a, b in zip(whole.kept, part.kept, strict=True))
    assert not torch.equal(whole.noise[0], whole.noise[1])  # the passes are independent


def test_mask_ratio_lies_in_the_published_range(store):
    places = create_model("EDT-S/2").config.mask_places
    batches = Batches(store, DataOrder(store.num_images, 64, 0), range(64), null_label=3, mask_places=places)
    dropped = np.array([[1 - mask.float().mean().item() for mask in batches(step).kept] for step in range(8)])
    assert (dropped[:, 0] > 0.38).all() and (dropped[:, 0] < 0.52).all()
    assert (dropped[:, 1] > 0.08).all() and (dropped[:, 1] < 0.22).all()
    assert dropped[:, 0].std() > 0.01  # one ratio per pass, not one for ever


def test_every_epoch_visits_every_image_once():
    order = DataOrder(10, 4, seed=1)
    seen = np.concatenate([order.indices(step) for step in range(5)])
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert list(seen[:10]) != list(seen[10:])
    assert order.num_steps(2) == 5 and DataOrder(3, 8, 0).num_steps(1) == 1
    assert sorted(np.bincount(DataOrder(3, 9, 0).indices(0))) == [3, 3, 3]  # a batch larger than the data


def test_threaded_batches_equal_inline_ones(store):
    batches = Batches(store, DataOrder(store.num_images, 4, 0), range(4), null_label=3)
    for (i, a), (j, b) in zip(batches.ahead(2, 5, torch.device("mps")), batches.ahead(2, 5, torch.device("cpu")), strict=True):
        assert i == j and torch.equal(a.noise, b.noise) and torch.equal(a.x0, b.x0)


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_makes_them(store, monkeypatch):
    threads = []
    monkeypatch.setattr(Batch, "pin", lambda batch: threads.append(threading.current_thread()) or batch)
    batches = Batches(store, DataOrder(store.num_images, 4, 0), range(4), null_label=3)
    assert len(list(batches.ahead(0, 3, torch.device("cuda")))) == len(threads) == 3
    assert threading.main_thread() not in threads
    list(batches.ahead(0, 3, torch.device("cpu")))
    assert len(threads) == 3


def test_ema_closed_form():
    """After k updates from a to constant weights b: b + decay^k (a - b). Fixed tables stay as they are."""
    model = tiny_model()
    ema = EMA(model, 0.9)
    before = {name: p.clone() for name, p in ema.model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for _ in range(3):
        ema.update()
    for name, parameter in ema.model.named_parameters():
        moved = 0.0 if name.endswith("pos_embed") else 1 - 0.9**3
        torch.testing.assert_close(parameter, before[name] + moved)


def test_linear_lr():
    assert linear_lr(0, 1e-3, 5e-5, 400_000) == 1e-3
    assert linear_lr(200_000, 1e-3, 5e-5, 400_000) == pytest.approx(5.25e-4)
    assert linear_lr(500_000, 1e-3, 5e-5, 400_000) == pytest.approx(5e-5)
    assert linear_lr(500_000, 1e-3, 5e-5, 0) == 1e-3


def test_both_adans_agree_from_the_second_step_on():
    """adan-pytorch names the complements of the betas: passed wrongly, the two would part at once. Their first steps differ,
    since one starts the averages at zero; constant gradients make the directions equal."""
    results = {}
    for name in ("adan", "adan-pytorch"):
        parameter = torch.nn.Parameter(torch.zeros(3))
        optimizer = create_optimizer(name, [parameter], lr=0.1)
        path = []
        for _ in range(200):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5])
            optimizer.step()
            path.append(parameter.detach().clone())
        results[name] = path[-1] - path[-2]
    assert ADAN_BETAS == (0.98, 0.92, 0.99)
    torch.testing.assert_close(results["adan"], results["adan-pytorch"], rtol=0.05, atol=1e-3)


def test_checkpoint_folder_keeps_the_newest(tmp_path):
    folder = new_run_folder(tmp_path, "EDT-Ti/2")
    assert folder.name == "000-EDT-Ti-2" and new_run_folder(tmp_path, "EDT-S/2").name == "001-EDT-S-2"
    for step in (1, 2, 3):
        save_checkpoint({"step": step}, folder, step, keep=2)
    assert [path.name for path in checkpoint_files(folder)] == ["0000003.pt", "0000002.pt"]
    assert (folder / "checkpoints" / "latest").resolve().name == "0000003.pt"
    assert last_run_folder(tmp_path, "EDT-Ti/2") == folder
    assert last_run_folder(tmp_path, "EDT-S/2") is None  # it has no checkpoint yet


@pytest.fixture(scope="module")
def uninterrupted(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("uninterrupted")
    train_mask_adan.main(train_argv(latent_store, results))
    return results


def test_training_writes_what_it_promises(uninterrupted):
    folder = uninterrupted / "000-EDT-Ti-2"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss_plain"] + record["loss_masked"], rel=1e-5)
        assert record["loss"] == pytest.approx(record["mse"] + record["vb"], rel=1e-5)
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").glob("events*"))
    state = final_state(uninterrupted)
    assert state["config"]["model"] == "EDT-Ti/2" and state["config"]["codec"]["name"] == "pixels"
    assert state["config"]["class_names"] == ["ant", "bee", "cat"] and state["args"]["global_batch_size"] == 4


def test_init_from_takes_all_but_another_label_table(latent_store, uninterrupted, tmp_path):
    checkpoint = checkpoint_files(uninterrupted / "000-EDT-Ti-2")[0]
    argv = train_argv(latent_store, tmp_path, "--init-from", str(checkpoint), "--num-classes", "5", "--max-steps", "1")
    train_mask_adan.main([*argv, "--init-lr", "1e-12", "--final-lr", "0"])
    ema, old = final_state(tmp_path)["ema"], torch.load(checkpoint, weights_only=True)["ema"]
    table = "y_embedder.embedding_table.weight"
    assert len(ema[table]) == 6 and len(old[table]) == 4
    for key in old:
        if key != table:
            torch.testing.assert_close(ema[key], old[key])


def test_bf16_learns_as_fp32(latent_store, tmp_path, fresh_accelerate_state):
    losses = {}
    for precision in ("fp32", "bf16"):
        argv = train_argv(latent_store, tmp_path / precision, "--precision", precision, "--timestep-sampler", "uniform")
        fresh_accelerate_state()
        train_mask_adan.main(argv)
        (log,) = tmp_path.glob(f"{precision}/*/metrics.jsonl")
        losses[precision] = json.loads(log.read_text().splitlines()[-1])["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_training_follows_eager(latent_store, tmp_path, fresh_accelerate_state):
    logs = []
    for extra in ((), ("--compile",)):
        fresh_accelerate_state()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        results = tmp_path / str(len(logs))
        train_mask_adan.main(train_argv(latent_store, results, "--max-steps", "4", *extra))
        logs.append([json.loads(line) for line in next(results.glob("*/metrics.jsonl")).open()])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 4  # one for each width, though there are six blocks, and Adan's step
    assert not counters["graph_break"]
    for eager, compiled in zip(*logs, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)


def test_sample_every_draws_a_grid(latent_store, tmp_path):
    argv = train_argv(latent_store, tmp_path, "--max-steps", "2", "--sample-every", "1", "--sample-steps", "2")
    train_mask_adan.main(argv)
    assert sorted(path.name for path in tmp_path.glob("*/samples/*.png")) == ["0000001.png", "0000002.png"]


def test_in_fp16_a_loss_scale_that_is_too_high_is_halved_until_steps_are_made(store, monkeypatch):
    """As on a GPU, with torch's scaler of the CPU: accelerate itself refuses fp16 there."""
    accelerator = start_training("fp32")
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    wrapped, optimizer = accelerator.prepare(model.train(), create_optimizer("adamw", model.parameters(), 1e-3))
    wrapped.forward = model.__class__.forward.__get__(model)  # in fp32 after all
    batches = Batches(store, DataOrder(store.num_images, 6, seed=3), range(6), null_label=3)
    step = TrainingStep(
        accelerator, wrapped, optimizer, EMA(model, 0.9), create_diffusion(min_snr_gamma=5), UniformSampler(), 3, 6, range(6), 6
    )
    losses = step.diffusion.training_losses
    large = lambda *args, **kwargs: {key: 1e4 * loss for key, loss in losses(*args, **kwargs).items()}  # noqa: E731
    monkeypatch.setattr(step.diffusion, "training_losses", large)  # scaled, their gradient is infinite
    faults = [step(k, batches(k), 1e-3).fault for k in range(24)]
    assert faults[0] == "the gradient is not finite" and faults[-1] is None
    skipped = sum(fault is not None for fault in faults)
    assert faults == ["the gradient is not finite"] * skipped + [None] * (24 - skipped)
    assert accelerator.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
