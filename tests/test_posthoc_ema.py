"""Averages of any length from stored ones: against closed forms, scipy, brute force, and lengths that were really tracked."""

import math
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import sample_ddp
import train_mask_adan
from models.checkpoints import load_checkpoint
from models.checkpoints.files import write_safetensors
from tests.launch import run_job
from tests.runs import assert_same_run, assert_same_state, final_state, in_step, run_folder, train_argv
from training import placement, posthoc_ema
from training.posthoc_ema import combine, find_snapshots, products, solve
from training.profiles import (
    MAX_HALF,
    PROFILE,
    Profiles,
    Snapshot,
    gamma_of,
    read_snapshot,
    snapshot_files,
    snapshot_path,
    update_share,
)

LENGTHS = (0.05, 0.10)
CONFIG = {"model": "EDT-Ti/2"}


def test_gamma_of_the_paper_and_of_a_beta_distribution():
    """Section 3.1 gives both pairs; tau/t of a profile is Beta(gamma + 1, 1)."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3) and gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    for sigma_rel in (0.01, 0.1, 0.2, 0.288):
        assert scipy.stats.beta(gamma_of(sigma_rel) + 1, 1).std() == pytest.approx(sigma_rel, rel=1e-9)


def track(values: list[float], lengths=LENGTHS) -> dict[float, float]:
    """The averages of one weight that takes these values after step 1, 2, ..."""
    network = nn.Linear(1, 1, bias=False)
    profiles = Profiles(network, lengths)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(network.weight, value)
        profiles.update(step)
    return {length: average["weight"].item() for length, average in profiles.averages.items()}


def test_a_constant_weight_stays_and_the_initial_one_is_forgotten():
    assert track([0.3] * 50) == {length: pytest.approx(0.3, rel=1e-6) for length in LENGTHS}
    assert update_share(1, 5.0) == 1.0


def test_the_average_of_a_ramp():
    """Step k has the weight (k^(g+1) - (k-1)^(g+1)) / t^(g+1); for long runs the mean of tau is (g+1)/(g+2) of t."""
    t = 400
    steps = np.arange(1, t + 1)
    for length, average in track(steps.tolist()).items():
        power = gamma_of(length) + 1
        weights = ((steps / t) ** power) - ((steps - 1) / t) ** power
        assert average == pytest.approx((weights * steps).sum(), rel=1e-5)
        assert average == pytest.approx(t * power / (power + 1), rel=2e-3)


def test_inner_products_are_integrals():

    def product(x, t, g, u, h):
        return (g + 1) * x**g / t ** (g + 1) * (h + 1) * x**h / u ** (h + 1)

    for t, g, u, h in [(100, 6.9, 40, 17.0), (40, 17.0, 100, 6.9), (30, 3.0, 30, 9.0)]:
        integral, _ = scipy.integrate.quad(product, 0, min(t, u), (t, g, u, h))
        assert products(*map(np.float64, (t, g, u, h))) == pytest.approx(integral, rel=1e-7)


def stored(count: int, last: int, lengths=LENGTHS) -> list[Snapshot]:
    return [Snapshot(Path("x"), last * k // count, length, {}) for k in range(1, count + 1) for length in lengths]


@pytest.mark.parametrize(("step", "sigma_rel"), [(1000, 0.15), (1000, 0.07), (930, 0.08), (500, 0.2)])
def test_weights_are_those_of_brute_force(step, sigma_rel):
    """On a fine grid, with the sum of 1 by elimination of the last weight."""
    snapshots = stored(10, 1000)
    grid = (np.arange(200_000) + 0.5) / 200

    def discretised(t, sigma):
        return np.where(grid <= t, (gamma_of(sigma) + 1) * (grid / t) ** gamma_of(sigma) / t, 0)

    columns = np.stack([discretised(s.step, s.sigma_rel) for s in snapshots], axis=1)
    wanted = discretised(step, sigma_rel)
    free = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1], rcond=None)[0]
    brute = np.append(free, 1 - free.sum())
    weights, error = solve(snapshots, step, sigma_rel)
    assert_close(weights, brute, rtol=0, atol=2e-3)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert error == pytest.approx(np.linalg.norm(columns @ brute - wanted) / np.linalg.norm(wanted), rel=1e-2)


def test_more_snapshots_come_nearer():
    errors = [solve(stored(count, 4000), 4000, 0.15)[1] for count in (5, 10, 20, 40)]
    assert all(later < earlier / 2 for earlier, later in pairwise(errors))
    assert errors[-1] < 2e-3


@pytest.fixture
def walk(tmp_path):
    """walk(every): snapshots of a random walk of 800 steps, and what lengths tracked on the way came to, by step."""

    def run(every: int, lengths: tuple[float, ...]) -> tuple[list[Snapshot], dict]:
        torch.manual_seed(0)
        network, folder = nn.Linear(16, 16), tmp_path / str(every)
        kept, wanted, tracked = Profiles(network, LENGTHS), Profiles(network, lengths), {}
        for step in range(1, 801):
            with torch.no_grad():
                network.weight.add_(torch.randn(16, 16))
            kept.update(step)
            wanted.update(step)
            if step % every == 0:
                kept.save(folder, step, CONFIG)
            tracked[step] = {sigma: average["weight"].clone() for sigma, average in wanted.averages.items()}
        return find_snapshots(folder), tracked

    return run


def test_a_length_that_was_not_stored_equals_the_one_tracked_in_the_same_run(walk):
    lengths, spread = (0.07, 0.15, 0.2), 800**0.5
    errors = []
    for every in (100, 50, 25):
        snapshots, tracked = walk(every, lengths)
        found = combine(snapshots, [solve(snapshots, 800, sigma)[0] for sigma in lengths])
        errors.append([(state["weight"] - tracked[800][s]).std() / spread for state, s in zip(found, lengths, strict=True)])
    assert max(errors[-1]) < 4e-4
    assert (np.array(errors[0]) > 4 * np.array(errors[1])).all()  # then float16 is what is left
    (between,) = combine(snapshots, [solve(snapshots, 610, 0.15)[0]])  # a step without a snapshot
    assert (between["weight"] - tracked[610][0.15]).std() / spread < 2e-3


def test_what_was_stored_is_given_back_as_it_is(walk):
    snapshots, _ = walk(100, ())
    for snapshot in snapshots[3], snapshots[-1]:
        (state,) = combine(snapshots, [solve(snapshots, snapshot.step, snapshot.sigma_rel)[0]])
        held = load_file(snapshot.path)
        assert held["weight"].dtype == torch.float16 and state["weight"].dtype == torch.float32
        assert all(torch.equal(value, held[name].float()) for name, value in state.items())


def test_snapshots_keep_what_float16_does_not_hold(tmp_path):
    network = nn.Linear(2, 1)
    nn.init.constant_(network.weight, 2 * MAX_HALF)
    Profiles(network, (0.1,)).save(tmp_path, 5, CONFIG)
    held = load_file(snapshot_path(tmp_path, 5, 0.1))
    assert held["weight"].tolist() == [[2 * MAX_HALF] * 2] and held["bias"].dtype == torch.float16


# --- the training script


FLAGS = ("--ema-profiles", "0.05,0.10", "--init-lr", "1e-2")


@pytest.fixture(scope="module")
def profiled(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("profiled")
    train_mask_adan.main(train_argv(latent_store, results, *FLAGS))
    return results


def test_a_run_stores_snapshots_that_load_as_checkpoints(profiled):
    folder, state = run_folder(profiled), final_state(profiled)
    paths = [path for _, path in snapshot_files(folder)]
    assert [path.name for path in paths] == [f"{step:07d}-{s}.safetensors" for step in (2, 4, 6) for s in ("0.05", "0.1")]
    for path, length in zip(paths[-2:], ("0.05", "0.1"), strict=True):
        held = load_checkpoint(path)
        assert held.keys() == state["ema"].keys()
        for name, value in held.items():
            assert_close(value.float(), state["profiles"][length][name], rtol=2**-11, atol=1e-7)
        assert torch.equal(held["pos_embed"], state["ema"]["pos_embed"])  # what is not trained is kept in full


def test_profiles_are_of_the_weights_after_every_step(latent_store, profiled, tmp_path, fresh_accelerate_state):
    """The weights of each step, from checkpoints, averaged by the closed form."""
    train_mask_adan.main(train_argv(latent_store, tmp_path, *FLAGS, "--ckpt-every", "1", "--keep-checkpoints", "0"))
    weights = [torch.load(path, weights_only=True)["model"] for path in sorted(run_folder(tmp_path).glob("checkpoints/0*.pt"))]
    power, name = gamma_of(0.05) + 1, "x_embedder.proj.weight"
    shares = [(k / 6) ** power - ((k - 1) / 6) ** power for k in range(1, 7)]
    expected = sum(share * state[name].double() for share, state in zip(shares, weights, strict=True))
    assert (weights[-1][name] - expected).abs().max() > 1e-4
    assert_close(final_state(tmp_path)["profiles"]["0.05"][name].double(), expected, rtol=0, atol=1e-6)


def test_profiles_do_not_change_the_run_and_resume_bitwise(
    latent_store, profiled, tmp_path, monkeypatch, fresh_accelerate_state
):
    train_mask_adan.main(train_argv(latent_store, tmp_path / "plain", "--init-lr", "1e-2"))
    plain, with_profiles = final_state(tmp_path / "plain"), final_state(profiled)
    assert_same_state(plain, with_profiles)
    assert "profiles" not in plain
    argv = train_argv(latent_store, tmp_path / "stopped", *FLAGS, "--resume", "auto")
    with monkeypatch.context() as patch:
        in_step(patch, 2, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
        fresh_accelerate_state()
        train_mask_adan.main(argv)
    fresh_accelerate_state()
    train_mask_adan.main(argv)
    assert_same_run(tmp_path / "stopped", profiled)
    resumed = final_state(tmp_path / "stopped")["profiles"]
    for length, state in with_profiles["profiles"].items():
        assert all(torch.equal(value, resumed[length][name]) for name, value in state.items())
    for (_, one), (_, other) in zip(*map(snapshot_files, map(run_folder, (profiled, tmp_path / "stopped"))), strict=True):
        tensors = load_file(other)  # the header's order differs from file to file
        assert one.name == other.name and all(torch.equal(value, tensors[name]) for name, value in load_file(one).items())


def assert_same_but_for_rounding(results: Path, profiled: Path) -> None:
    """Sums in another order, of which Adan's first steps make up to a whole step of weights with no gradient to speak of."""
    found, expected = final_state(results), final_state(profiled)
    for length in ("0.05", "0.1"):
        assert distance(found["profiles"][length], expected["profiles"][length]) < 1e-5
        assert distance(expected["model"], expected["profiles"][length]) > 1e-3  # the difference that an average makes


def distance(a: dict, b: dict) -> float:
    """As a share of b's norm."""
    a, b = (torch.cat([value.double().flatten() for value in state.values()]) for state in (a, b))
    return ((a - b).norm() / b.norm()).item()


def test_two_processes_that_resume_come_to_the_same_profiles(latent_store, profiled, tmp_path):
    argv = train_argv(latent_store, tmp_path, *FLAGS, "--resume", "auto")
    for last in "3", "6":
        run_job("train_mask_adan", [*argv, "--max-steps", last], 2)
    assert_same_but_for_rounding(tmp_path, profiled)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_the_compiled_step_comes_to_the_same_profiles(latent_store, profiled, tmp_path, monkeypatch, fresh_accelerate_state):
    monkeypatch.setattr(placement, "compile_blocks", lambda network: None)  # they take long, and know of no average
    train_mask_adan.main(train_argv(latent_store, tmp_path, *FLAGS, "--compile"))
    assert_same_but_for_rounding(tmp_path, profiled)


def test_going_back_sets_later_snapshots_aside(latent_store, profiled, tmp_path, fails, fresh_accelerate_state):
    shutil.copytree(profiled, tmp_path / "runs", symlinks=True)
    folder = run_folder(tmp_path / "runs")
    argv = train_argv(latent_store, tmp_path / "runs", *FLAGS)
    train_mask_adan.main([*argv, "--resume", str(folder / "checkpoints/0000002.pt"), "--max-steps", "4"])
    assert [step for step, _ in snapshot_files(folder)] == [2, 2, 4, 4]
    assert len(list(folder.glob("ema_profiles/*.set-aside"))) == 4
    # Written after the last checkpoint by a job that was then killed: of steps that are made again.
    shutil.copy(snapshot_path(folder, 4, 0.1), snapshot_path(folder, 5, 0.1))
    fresh_accelerate_state()
    train_mask_adan.main([*argv, "--resume", "auto", "--max-steps", "4"])
    assert [step for step, _ in snapshot_files(folder)] == [2, 2, 4, 4]
    fresh_accelerate_state()
    train_mask_adan.main([*argv, "--ema-profiles", "0.10,0.05", "--resume", "auto", "--max-steps", "4"])  # the same two
    other = [*argv, "--ema-profiles", "0.05,0.2", "--resume", "auto"]
    assert "--ema-profiles (0.05, 0.1) -> (0.05, 0.2)" in fails(train_mask_adan.main, *other)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_reconstructed_checkpoint_is_sampled(profiled, tmp_path, suffix, fresh_accelerate_state):
    out = tmp_path / f"a-{{}}.{suffix}"
    posthoc_ema.main([str(run_folder(profiled)), "--sigma-rel", "0.08,0.15", "--out", str(out)])
    sample_ddp.main(
        ["--ckpt", str(out).replace("{}", "0.15"), "--num-fid-samples", "4", "--num-sampling-steps", "2", "--no-png",
         "--sample-dir", str(tmp_path / "samples")]
    )  # fmt: skip
    assert list(tmp_path.glob("samples/*.npz"))
    one, other = (load_checkpoint(str(out).replace("{}", length)) for length in ("0.08", "0.15"))
    snapshots = find_snapshots(run_folder(profiled))
    by_hand = combine(snapshots, [solve(snapshots, 6, 0.15)[0]])[0]
    assert all(torch.equal(value, by_hand[name]) for name, value in other.items())
    assert any(not torch.equal(value, one[name]) for name, value in other.items())


def test_what_cannot_be_reconstructed(profiled, tmp_path, fails, capsys):
    folder = run_folder(profiled)
    out = ("--out", tmp_path / "x.pt")
    assert "holds no snapshots" in fails(posthoc_ema.main, tmp_path, "--sigma-rel", "0.1", *out)
    line = fails(posthoc_ema.main, folder, "--sigma-rel", "0.15", "--step", "7", *out)
    assert "--step 7: the last snapshot of" in line and "is of step 6; give at most that" in line
    line = fails(posthoc_ema.main, folder, "--sigma-rel", "0.15", "--step", "1", *out)
    assert "--step 1: the first snapshot of" in line and "is of step 2; give at least that" in line
    wrong = {"0.3": "is no sigma_rel", "0": "is no sigma_rel", "nan": "is no sigma_rel", "a": "is no list of lengths"}
    for text, reason in {**wrong, "0.1,0.10": "names a length twice"}.items():
        with pytest.raises(SystemExit) as exit_:
            posthoc_ema.main([str(folder), "--sigma-rel", text, "--out", "x.pt"])
        assert exit_.value.code == 2 and reason in capsys.readouterr().err
    for extra, reason in ((("0.1,0.2", "x.pt"), "put {} where"), (("0.1", "x.bin"), "must end in")):
        with pytest.raises(SystemExit):
            posthoc_ema.main([str(folder), "--sigma-rel", extra[0], "--out", extra[1]])
        assert reason in capsys.readouterr().err


def test_a_step_between_snapshots_is_told_of(profiled, tmp_path, capsys):
    posthoc_ema.main([str(run_folder(profiled)), "--sigma-rel", "0.15", "--step", "5", "--out", str(tmp_path / "x.pt")])
    assert "to its profile. --step 4 or 6, which are stored, do" in capsys.readouterr().err


def test_what_may_change_within_a_run_is_no_other_model(profiled, tmp_path):
    """A moved VAE, other names of classes, settings that a later version added; the newest snapshot's are taken."""
    folder = shutil.copytree(run_folder(profiled), tmp_path / "run", symlinks=True)
    for step, path in snapshot_files(folder)[-2:]:
        snapshot = read_snapshot(path)
        model_config = snapshot.config["model_config"] | {"came_later": 1}
        config = snapshot.config | {"codec": snapshot.config["codec"] | {"name": "moved"}, "class_names": ["a"]}
        config |= {"model_config": model_config, PROFILE: {"sigma_rel": snapshot.sigma_rel}}
        tensors = load_file(path)
        write_safetensors(tensors, str(path), which="ema", config=config, step=step)
    posthoc_ema.main([str(folder), "--sigma-rel", "0.15", "--out", str(tmp_path / "x.pt")])
    assert torch.load(tmp_path / "x.pt", weights_only=True)["config"]["codec"]["name"] == "moved"


def test_an_average_that_is_not_finite_is_not_stored(tmp_path):
    network = nn.Linear(2, 2)
    profiles = Profiles(network, LENGTHS)
    profiles.averages[0.05]["bias"][1] = math.nan
    profiles.save(tmp_path, 5, CONFIG)
    assert [path for _, path in snapshot_files(tmp_path)] == [snapshot_path(tmp_path, 5, 0.1)]


def test_damaged_and_foreign_snapshots_are_named(profiled, tmp_path, fails):
    shutil.copytree(run_folder(profiled), tmp_path / "run", symlinks=True)
    argv = (tmp_path / "run", "--sigma-rel", "0.15", "--out", tmp_path / "x.pt")
    paths = [path for _, path in snapshot_files(tmp_path / "run")]
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    assert f"{paths[2]} is no snapshot of --ema-profiles, or damaged" in fails(posthoc_ema.main, *argv)
    paths[2].write_bytes(whole)
    config = read_snapshot(paths[0]).config
    for changed in ({"model": "EDT-S/2"}, {"model_config": config["model_config"] | {"patch_size": 4}}):
        Profiles(nn.Linear(2, 2), (0.2,)).save(tmp_path / "run", 4, config | changed)
        assert "is of another model than" in fails(posthoc_ema.main, *argv)
    Profiles(nn.Linear(2, 2), (0.2,)).save(tmp_path / "run", 4, config)
    assert "-0.2.safetensors holds other tensors than" in fails(posthoc_ema.main, *argv)
    snapshot_path(tmp_path / "run", 4, 0.2).unlink()
    tensors = load_file(paths[2])
    tensors["x_embedder.proj.bias"][0] = math.inf
    write_safetensors(tensors, str(paths[2]), which="ema", config=config | {PROFILE: {"sigma_rel": 0.05}}, step=4)
    assert f"{paths[2]}: x_embedder.proj.bias is not finite, for the run had diverged: remove it" in fails(
        posthoc_ema.main, *argv
    )
    save_file({"a": torch.zeros(1)}, paths[0])
    assert f"{paths[0]} is no snapshot" in fails(posthoc_ema.main, *argv)
    assert not (tmp_path / "x.pt").exists()


def test_training_refuses_what_does_not_go_with_profiles(latent_store, tmp_path, capsys):
    for extra, reason in (
        (("--ema-profiles", "0.1", "--fsdp"), "leave --ema-profiles out"),
        (("--ema-profile-every", "3"), "stores averages of --ema-profiles"),
        (("--ema-profiles", "0.5"), f"to below {math.sqrt(1 / 12):.4g}"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train_mask_adan.main(train_argv(latent_store, tmp_path, *extra))
        assert exit_.value.code == 2 and reason in capsys.readouterr().err
