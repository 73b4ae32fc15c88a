"""``--micro-batch-size auto``: the search, the step that it tries, and what the script makes of it."""

import math

import pytest
import torch

import train_mask_adan
from models import create_model
from runtime.distributed import start_training
from tests.launch import run_job
from tests.runs import final_state, metrics, train_argv
from training import autobatch, setup
from training.autobatch import largest_fitting, runs_out_of_memory, trial_step
from training.objective import create_objective
from training.step import TrainingStep

AUTO = ("--micro-batch-size", "auto")


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_the_search_finds_every_limit_in_few_trials(most):
    for limit in range(most + 20):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        assert largest_fitting(fits, most) == min(limit, most)
        assert all(1 <= size <= most for size in tried) and len(set(tried)) == len(tried)
        assert len(tried) <= 2 * math.log2(most) + 2


def test_running_out_of_memory_is_told_from_other_errors():
    def fail(error):
        raise error

    assert runs_out_of_memory(lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert runs_out_of_memory(lambda: fail(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")))
    assert not runs_out_of_memory(lambda: None)
    with pytest.raises(RuntimeError, match="sizes"):
        runs_out_of_memory(lambda: fail(RuntimeError("sizes do not fit")))


@pytest.mark.parametrize("model", ["EDT-Ti/2", "MDTv2-Ti/2", "SiT-Ti/2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_is_a_whole_step_and_leaves_the_network_alone(monkeypatch, model, precision):
    """Sizes up to the one that is asked for go through the network at once, twice where there is a masked pass."""
    args = train_mask_adan.parse(["--dummy", "--model", model, "--precision", precision, "--gradient-checkpointing"])
    accelerator = start_training(precision)
    network = create_model(model, num_classes=3)
    places = network.config.mask_places if args.masked else None
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen, optimizers, create, forward = [], [], autobatch.create_optimizer, type(network).forward
    watched = lambda self, x, *a, **kwargs: seen.append(len(x)) or forward(self, x, *a, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(network), "forward", watched)
    monkeypatch.setattr(autobatch, "create_optimizer", lambda *a: optimizers.append(create(*a)) or optimizers[-1])
    step = trial_step(args, network, create_objective(args), places, accelerator)
    step(1)
    step(3)
    passes = 2 if args.masked else 1
    assert seen == [passes, passes, 3 * passes]  # the first leaves the optimizer's state in memory, and is taken again
    assert optimizers[0].param_groups[0]["step"] == 3 and "exp_avg" in next(iter(optimizers[0].state.values()))
    assert all(weight.grad is None for weight in optimizers[0].param_groups[0]["params"])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_a_trial_that_runs_out_of_memory_does_not_spoil_the_next(monkeypatch):
    args = train_mask_adan.parse(["--dummy", "--model", "EDT-Ti/2"])
    network, accelerator = create_model("EDT-Ti/2", num_classes=3), start_training("fp32")
    step = trial_step(args, network, create_objective(args), network.config.mask_places, accelerator)
    losses = TrainingStep._losses

    def too_many(self, batch, t):
        if len(t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, batch, t)

    monkeypatch.setattr(TrainingStep, "_losses", too_many)
    assert largest_fitting(lambda size: not runs_out_of_memory(lambda: step(size)), 8) == 2


def test_on_a_cpu_the_flag_is_an_error_before_anything_is_made(latent_store, tmp_path, fails):
    message = fails(train_mask_adan.main, *train_argv(latent_store, tmp_path / "runs", *AUTO))
    assert "--micro-batch-size auto" in message and "cpu" in message and "give a number" in message
    assert not (tmp_path / "runs").exists()


def test_the_flag_takes_a_number_or_auto(capsys):
    assert train_mask_adan.parse(["--dummy", *AUTO]).micro_batch_size == "auto"
    assert train_mask_adan.parse(["--dummy", "--micro-batch-size", "3"]).micro_batch_size == 3
    for wrong in (["--micro-batch-size", "automatic"], ["--micro-batch-size", "-1"], [*AUTO, "--fsdp"]):
        with pytest.raises(SystemExit):
            train_mask_adan.parse(["--dummy", *wrong])
        assert "--micro-batch-size" in capsys.readouterr().err


def pretend_to_fit(rank: int) -> None:
    """Seven images on the first process, five on the second."""
    setup.check_auto = lambda device: None
    autobatch.memory_probe = lambda *args: lambda size: size <= (7, 5)[rank]


def test_all_processes_take_the_smallest_answer_in_equal_parts(latent_store, tmp_path):
    """Of a share of eight, at most five at once: four and four, with the result of any other micro-batch."""
    flags = ("--global-batch-size", "16", "--max-steps", "2", "--timestep-sampler", "uniform")
    ended = run_job("train_mask_adan", train_argv(latent_store, tmp_path / "auto", *flags, *AUTO), 2, prepare=pretend_to_fit)
    assert "5 images fit at once, 4 are used" in ended.stderr
    run_job("train_mask_adan", train_argv(latent_store, tmp_path / "four", *flags, "--micro-batch-size", "4"), 2)
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "four")
    assert final_state(tmp_path / "auto")["args"]["micro_batch_size"] == "auto"


def test_where_not_one_image_fits_the_run_ends_without_a_folder(latent_store, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(setup, "check_auto", lambda device: None)
    monkeypatch.setattr(autobatch, "memory_probe", lambda *args: lambda size: False)
    message = fails(train_mask_adan.main, *train_argv(latent_store, tmp_path / "runs", *AUTO))
    assert "does not take one image" in message and "--gradient-checkpointing" in message
    assert not (tmp_path / "runs").exists()
