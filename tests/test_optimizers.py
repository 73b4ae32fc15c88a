"""Optimizers by device: the compiled Adan against timm's, torch's fused AdamW, and their states in each other's place."""

import copy
import os
import shutil
import signal

import pytest
import timm.optim
import torch
from torch.testing import assert_close

import train_mask_adan
from tests.runs import assert_same_run, final_state, in_step, train_argv
from training import placement
from training.adan import CompiledAdan
from training.ema import EMA
from training.optim import ADAN_BETAS, create_optimizer

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler")
SETTINGS = {"lr": 1e-3, "betas": ADAN_BETAS, "weight_decay": 0.02}
DECAY = 0.9
ROUNDING = 1e-6  # of a tensor's largest number: a few roundings of float32, for sums are taken in another order


def small_network() -> torch.nn.Module:
    """Tensors of four, two and one dimensions, of sizes that fill no vector register, and one that is never trained."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 2), torch.nn.Linear(7, 33), torch.nn.LayerNorm(129), torch.nn.Linear(1, 1)
    )
    network[3].bias.requires_grad_(False)
    return network


def give_gradients(network: torch.nn.Module, step: int) -> None:
    """As DDP does, in parts of one bucket. The first weight gets none in step 2."""
    bucket, start = torch.randn(1000, generator=torch.Generator().manual_seed(step)), 1
    for i, weight in enumerate(network.parameters()):
        weight.grad = (bucket[start : start + weight.numel()]).mul_(10.0 ** (i - 4)).view_as(weight)
        start += weight.numel()
    if step == 2:
        next(network.parameters()).grad = None


def take_steps(network: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, steps: range) -> None:
    for step in steps:
        give_gradients(network, step)
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        optimizer.step()
        ema.update()


def plain(network: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer, EMA]:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return network, timm.optim.Adan(trained, foreach=False, **SETTINGS), EMA(network, DECAY)


def compiled(network: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer, EMA]:
    ema = EMA(network, DECAY)
    optimizer = create_optimizer("adan", network.parameters(), SETTINGS["lr"], SETTINGS["weight_decay"], compile_with=ema)
    assert isinstance(optimizer, CompiledAdan)
    return network, optimizer, ema


def assert_same(a: tuple, b: tuple, rounding: float) -> None:
    """Weights, averages, and all of the optimizer's state."""
    assert_near(a[0].state_dict(), b[0].state_dict(), rounding)
    assert_near(a[2].model.state_dict(), b[2].model.state_dict(), rounding)
    one, other = a[1].state_dict(), b[1].state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for i, entries in one["state"].items():
        assert_near(entries, other["state"][i], rounding)


def assert_near(actual: dict, expected: dict, rounding: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(
            actual[name], value, rtol=0, atol=rounding * value.abs().max().item(), msg=lambda text, name=name: f"{name}: {text}"
        )


@needs_compiler
def test_the_compiled_adan_is_timms_whatever_the_step_learning_rate_and_shape():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, theirs = compiled(small_network()), plain(small_network())
    for steps in (range(1), range(1, 8)):
        take_steps(*ours, steps)
        take_steps(*theirs, steps)
        assert_same(ours, theirs, ROUNDING)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the other one is for single numbers


@needs_compiler
@pytest.mark.parametrize(("before", "after"), [(compiled, plain), (plain, compiled), (compiled, compiled)])
def test_states_go_from_one_adan_to_the_other(before, after):
    whole, first = (before(small_network()) for _ in range(2))
    take_steps(*whole, range(6))
    take_steps(*first, range(3))
    second = after(copy.deepcopy(first[0]))
    second[1].load_state_dict(first[1].state_dict())
    second[2].model.load_state_dict(first[2].state_dict())
    take_steps(*second, range(3, 6))
    assert_same(second, whole, 0 if before is after else ROUNDING)


@needs_compiler
def test_compiled_training_stopped_and_resumed_is_bitwise_uninterrupted(
    latent_store, tmp_path, monkeypatch, fresh_accelerate_state
):
    monkeypatch.setattr(placement, "compile_blocks", lambda network: None)
    flags = ("--compile", "--grad-clip", "0.1", "--weight-decay", "0.01", "--ema-decay", "0.5")
    train_mask_adan.main(train_argv(latent_store, tmp_path / "whole", *flags))
    argv = train_argv(latent_store, tmp_path / "stopped", *flags, "--resume", "auto")
    with monkeypatch.context() as patch:
        in_step(patch, 2, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
        fresh_accelerate_state()
        train_mask_adan.main(argv)
    assert final_state(tmp_path / "stopped")["step"] == 3
    fresh_accelerate_state()
    train_mask_adan.main(argv)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    fresh_accelerate_state()
    train_mask_adan.main(train_argv(latent_store, tmp_path / "plain", *flags, "--no-compile"))
    a, b = final_state(tmp_path / "whole"), final_state(tmp_path / "plain")
    for which in ("model", "ema"):
        assert_close(a[which], b[which], rtol=0, atol=1e-5)


def test_compile_without_a_compiler_is_an_error_before_anything_is_made(latent_store, tmp_path, monkeypatch, fails):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = fails(train_mask_adan.main, *train_argv(latent_store, tmp_path / "runs", "--compile"))
    assert "--compile" in message and "no no-such-compiler" in message and "leave --compile out" in message
    assert not (tmp_path / "runs").exists()


def test_adamw_is_fused_and_goes_on_from_the_loops_state():
    ours, theirs = (small_network() for _ in range(2))
    settings = {"lr": 1e-3, "weight_decay": 0.02}
    loop = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], foreach=False, **settings)
    fused = create_optimizer("adamw", ours.parameters(), **settings)
    assert fused.param_groups[0]["fused"]
    give_gradients(theirs, 0)
    loop.step()
    ours.load_state_dict(theirs.state_dict())
    held = copy.deepcopy(loop.state_dict())
    fused.load_state_dict({**held, "param_groups": [{**held["param_groups"][0], "fused": True}]})
    for step in range(1, 4):
        for network, optimizer in ((ours, fused), (theirs, loop)):
            give_gradients(network, step)
            optimizer.step()
    assert_near(ours.state_dict(), theirs.state_dict(), ROUNDING)
    for one, other in zip(fused.state.values(), loop.state.values(), strict=True):
        assert_near(one, other, ROUNDING)
