"""A job whose process was killed is started again by the launcher, and ends as if nothing had happened."""

import functools
import signal

import pytest
import torch

from tests.launch import launcher_store, run_job
from tests.restarts import restart
from tests.runs import assert_same_state, be_killed, final_state, in_own_step, train_argv
from training.checkpoint import checkpoint_files


def test_attempts_that_share_a_store(latent_store, tmp_path):
    """A launcher keeps its store over restarts. The killed attempt's addresses in it made 7 of 11 restarts hang."""
    run_job("train_mask_adan", train_argv(latent_store, tmp_path / "whole"), 2)
    argv = train_argv(latent_store, tmp_path / "killed", "--resume", "auto")
    store = launcher_store()
    for victim, codes in ((1, [1, -signal.SIGKILL]), (0, [-signal.SIGKILL, 1])):
        ended = run_job(
            "train_mask_adan",
            argv,
            2,
            prepare=functools.partial(in_own_step, 3, (victim,), be_killed),
            store=store,
            expect=None,
        )
        assert ended.codes == codes
    run_job("train_mask_adan", argv, 2, store=store)
    assert_same_state(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_the_launcher_starts_it_again(latent_store, tmp_path, seed):
    flags = ("--max-steps", "20", "--ckpt-every", "3")
    run_job("train_mask_adan", train_argv(latent_store, tmp_path / "whole", *flags), 2)
    kills = 1 + seed // 2
    assert restart(train_argv(latent_store, tmp_path / "killed", *flags), seed=seed, kills=kills) == kills
    # A run killed before its first checkpoint leaves a folder without one.
    (folder,) = [path for path in (tmp_path / "killed").iterdir() if checkpoint_files(path)]
    assert_same_state(torch.load(checkpoint_files(folder)[0], weights_only=True), final_state(tmp_path / "whole"))
