"""``--fsdp``: the same training in shards, and what its checkpoints are good for."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train_mask_adan
from attention_mediator import train as train_sit
from models import load_checkpoint
from models.checkpoints import build_model, read_checkpoint
from runtime import cli
from tests.launch import run_job
from tests.runs import assert_same_state, final_state, metrics, run_folder, train_argv
from training import consolidate, shards
from training.checkpoint import ENTRIES, checkpoint_files, remove_leftovers, whole_checkpoint
from training.shards import FILES, join, read_facts, read_whole, split
from training.step import TrainingStep

UNIFORM = ("--timestep-sampler", "uniform")
SIT = ("--model", "SiT-Ti/2", "--mediator-num", "4", "--mediator-layers", "2", "--grad-clip", "0.5")
MDT = ("--model", "MDTv2-Ti/2", *UNIFORM)
SHORT = ("--max-steps", "4")
HALF = "shard-00002-model-00001-of-00003.safetensors"


def argv(features: Path, results: Path, *extra: str) -> list[str]:
    """Six images a step, which two and three processes can share; an average that moves."""
    return train_argv(features, results, "--global-batch-size", "6", "--ema-decay", "0.5", *extra)


def consolidated(folder: Path, out: Path) -> dict:
    consolidate.main([str(folder), str(out)])
    return torch.load(out, weights_only=True)


def difference(a: dict, b: dict) -> float:
    """The largest one of weights and averages of two checkpoints in one layout."""
    assert a.keys() == b.keys() and a["opt"]["state"].keys() == b["opt"]["state"].keys()
    for i, entries in a["opt"]["state"].items():
        assert {key: value.shape for key, value in entries.items()} == {k: v.shape for k, v in b["opt"]["state"][i].items()}
    assert list(a["model"]) == list(b["model"]) and list(a["ema"]) == list(b["ema"])
    return max((a[which][key] - b[which][key]).abs().max().item() for which in ("model", "ema") for key in a[which])


def assert_same_losses(a: Path, b: Path, rel: float = 1e-4) -> None:
    for one, other in zip(metrics(a), metrics(b), strict=True):
        assert one == pytest.approx(other, rel=rel), (one, other)


def assert_same_optimizer(a: dict, b: dict) -> None:
    """But for the order of sums."""
    for i, entries in b["state"].items():
        for key, value in entries.items():
            scale = torch.as_tensor(value).abs().max().item()
            torch.testing.assert_close(a["state"][i][key], value, rtol=0, atol=1e-5 * scale)
    assert a["param_groups"] == b["param_groups"]


def small_files(rank: int) -> None:
    shards.FILE_BYTES = 2**22


def stop_second_process_in_step_3(rank: int) -> None:
    small_files(rank)
    call = TrainingStep.__call__

    def stopping(self, step, *args, **kwargs):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, step, *args, **kwargs)

    TrainingStep.__call__ = stopping


def fill_second_process_disk_after_step_4(rank: int) -> None:
    save, stepped, call = safetensors.torch.save, [], TrainingStep.__call__

    def counting(self, step, *args, **kwargs):
        stepped.append(step)
        return call(self, step, *args, **kwargs)

    def full(*args, **kwargs):
        if rank == 1 and stepped[-1] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    TrainingStep.__call__, safetensors.torch.save = counting, full


def spoil_second_process_batch_in_step_1(rank: int) -> None:
    small_files(rank)
    call = TrainingStep.__call__

    def spoiling(self, step, batch, *args, **kwargs):
        if rank == 1 and step == 0:
            batch = dataclasses.replace(batch, x0=torch.full_like(batch.x0, torch.nan))
        return call(self, step, batch, *args, **kwargs)

    TrainingStep.__call__ = spoiling


def spoil_it_and_kill_in_second_write(rank: int) -> None:
    """Half of a file of the second checkpoint is on the disk then."""
    spoil_second_process_batch_in_step_1(rank)
    folders, write, save = [], shards._write_tensors, safetensors.torch.save

    def counting(tensors, folder):
        folders.append(folder)
        write(tensors, folder)

    def killing(*args, **kwargs):
        content = save(*args, **kwargs)
        if rank == 1 and len(folders) == 2:
            (folders[-1] / HALF).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return content

    shards._write_tensors, safetensors.torch.save = counting, killing


@pytest.fixture(scope="module")
def whole(latent_store, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("whole")
    train_mask_adan.main(argv(latent_store, results, *UNIFORM))
    return results


@pytest.fixture(scope="module")
def sharded(latent_store, tmp_path_factory) -> Path:
    """EDT, masked, with Adan, in two processes; one of them is asked to stop in step 3, and three go on."""
    results = tmp_path_factory.mktemp("sharded")
    flags = argv(latent_store, results, *UNIFORM, "--fsdp", "--micro-batch-size", "2", "--resume", "auto")
    ended = run_job("train_mask_adan", flags, 2, prepare=stop_second_process_in_step_3)
    assert "after step 3, all is saved" in ended.stdout
    assert (run_folder(results) / "checkpoints" / "latest").resolve().name == "0000003"
    run_job("train_mask_adan", flags, 3, prepare=small_files)
    return results


@pytest.fixture(scope="module")
def learning(latent_store, tmp_path_factory) -> Path:
    """Two processes in shards whose timestep sampler learns, and that skip step 1."""
    results = tmp_path_factory.mktemp("learning")
    flags = argv(latent_store, results, *SHORT, "--fsdp")
    run_job("train_mask_adan", flags, 2, prepare=spoil_second_process_batch_in_step_1)
    return results


@pytest.fixture
def copied(sharded, tmp_path) -> Path:
    """The run's folder, that may be changed."""
    shutil.copytree(sharded, tmp_path / "runs", symlinks=True)
    return run_folder(tmp_path / "runs")


def test_two_then_three_processes_in_shards_train_as_one(whole, sharded, tmp_path):
    assert_same_losses(whole, sharded)
    names = [path.name for path in checkpoint_files(run_folder(sharded))]
    assert names == ["0000006", "0000004", "0000003"]  # of 2, 3, 4 and 6 the newest three
    state = consolidated(run_folder(sharded) / "checkpoints" / "latest", tmp_path / "edt.pt")
    assert difference(state, final_state(whole)) < 1e-4
    assert not list(sharded.rglob(".*.tmp"))


def test_everything_in_a_checkpoint_is_that_of_two_whole_processes(latent_store, learning, tmp_path):
    """What the sampler has learned, what was skipped, and the optimizer's state among it."""
    run_job("train_mask_adan", argv(latent_store, tmp_path, *SHORT), 2, prepare=spoil_second_process_batch_in_step_1)
    state, expected = consolidated(run_folder(learning) / "checkpoints" / "latest", tmp_path / "edt.pt"), final_state(tmp_path)
    assert difference(state, expected) < 1e-6
    assert_same_optimizer(state["opt"], expected["opt"])
    assert {"sampler", "skipped", "config", "data", "sums", "scaler", *ENTRIES} <= state.keys() == expected.keys()
    for key in expected.keys() - {"model", "ema", "opt", "sampler", "sums", "args"}:
        assert state[key] == expected[key], key
    assert state["config"]["class_names"] == ["ant", "bee", "cat"] and state["skipped"] == 1
    torch.testing.assert_close(state["sums"], expected["sums"])
    assert_learned_the_same(state["sampler"], expected["sampler"])
    assert_same_losses(tmp_path, learning, rel=1e-5)
    moved = {"fsdp", "results_dir"}
    assert {**state["args"], **dict.fromkeys(moved)} == {**expected["args"], **dict.fromkeys(moved)}


def assert_learned_the_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in b.items():
        torch.testing.assert_close(torch.as_tensor(a[key]), torch.as_tensor(value), rtol=1e-5, atol=0)
    assert torch.tensor(a["history"]).count_nonzero() == 3 * 6  # of the four steps, the first was skipped


def test_killed_within_a_write_and_continued_equals_uninterrupted(latent_store, learning, tmp_path):
    flags = argv(latent_store, tmp_path / "killed", *SHORT, "--fsdp", "--resume", "auto")
    ended = run_job("train_mask_adan", flags, 2, prepare=spoil_it_and_kill_in_second_write, expect=None)
    assert ended.codes == [1, -signal.SIGKILL] and "lost another process" in ended.errors[0]
    folder = run_folder(tmp_path / "killed")
    assert [path.name for path in checkpoint_files(folder)] == ["0000002"]
    run_job("train_mask_adan", flags, 2, prepare=small_files)
    results = {"killed": tmp_path / "killed", "whole": learning}
    states = [
        consolidated(run_folder(path) / "checkpoints" / "latest", tmp_path / f"{name}.pt") for name, path in results.items()
    ]
    assert_same_state(*states)
    assert metrics(tmp_path / "killed") == metrics(learning)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_full_disk_on_one_process_ends_all_and_leaves_what_was_saved(latent_store, tmp_path, fresh_accelerate_state):
    """SiT with AdamW, recomputing its blocks."""
    flags = argv(latent_store, tmp_path / "sharded", *SIT, "--fsdp", "--gradient-checkpointing", "--micro-batch-size", "2")
    prepare = fill_second_process_disk_after_step_4
    ended = run_job("attention_mediator.train", flags, 2, prepare=prepare, expect=1)
    (line,) = ended.errors
    assert "0000006" in line and "No space left on device; earlier checkpoints are unchanged" in line
    folder = run_folder(tmp_path / "sharded")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000002", "0000004", "latest"]
    train_sit.main(argv(latent_store, tmp_path / "whole", *SIT))
    expected = torch.load(run_folder(tmp_path / "whole") / "checkpoints" / "0000004.pt", weights_only=True)
    state = consolidated(folder / "checkpoints" / "latest", tmp_path / "sit.pt")
    assert difference(state, expected) < 1e-4
    assert_same_losses(tmp_path / "whole", tmp_path / "sharded")


def test_shards_go_on_from_a_plain_run_and_it_from_them(latent_store, tmp_path, fresh_accelerate_state):
    """MDTv2, whose encoder's blocks are called twice in a masked step."""
    train_mask_adan.main(argv(latent_store, tmp_path / "whole", *MDT, "--keep-checkpoints", "0"))
    expected = final_state(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "mixed", symlinks=True)
    checkpoints = run_folder(tmp_path / "mixed") / "checkpoints"
    flags = argv(latent_store, tmp_path / "mixed", *MDT)
    run_job("train_mask_adan", [*flags, "--fsdp", "--resume", checkpoints / "0000002.pt", "--max-steps", "4"], 2)
    with pytest.raises(ValueError, match=r"0000004 is in shards: add --fsdp, or make one file of them .*0000004\.pt"):
        fresh_accelerate_state()
        train_mask_adan.main([*flags, "--resume", "auto"])
    consolidate.main([str(checkpoints / "0000004"), str(checkpoints / "0000004.pt")])
    fresh_accelerate_state()
    train_mask_adan.main([*flags, "--resume", "auto"])
    assert difference(final_state(tmp_path / "mixed"), expected) < 1e-4
    assert_same_losses(tmp_path / "whole", tmp_path / "mixed")


def test_bf16_is_that_of_autocast(latent_store, tmp_path):
    """Blocks are gathered in bf16, as autocast rounds them; the rest, and what is stored, is fp32."""
    flags = [*SIT, "--max-steps", "2", "--log-every", "1", "--init-lr", "0.003"]  # a block matters from the second step on
    for name, extra in (("sharded", ("bf16", "--fsdp")), ("ddp", ("bf16",)), ("fp32", ("fp32",))):
        run_job("attention_mediator.train", argv(latent_store, tmp_path / name, *flags, "--precision", *extra), 2)
    assert_same_losses(tmp_path / "ddp", tmp_path / "sharded", rel=1e-6)
    rounded, exact = metrics(tmp_path / "sharded")[-1], metrics(tmp_path / "fp32")[-1]
    assert rounded["loss"] != pytest.approx(exact["loss"], rel=1e-5)
    assert rounded["grad_norm"] != pytest.approx(exact["grad_norm"], rel=1e-4)
    folder = run_folder(tmp_path / "sharded") / "checkpoints" / "latest"
    state = consolidated(folder, tmp_path / "sit.pt")
    assert {value.dtype for value in state["model"].values()} == {torch.float32}


def test_a_consolidated_checkpoint_is_any_other(sharded, tmp_path):
    folder = run_folder(sharded) / "checkpoints" / "0000004"
    state = consolidated(folder, tmp_path / "edt.pt")
    assert state["step"] == 4 and FILES not in state
    for which in ("model", "ema"):
        weights = load_checkpoint(tmp_path / "edt.pt", which=which)
        assert all(torch.equal(value, state[which][key]) for key, value in weights.items())
    model = build_model(read_checkpoint(tmp_path / "edt.pt"))
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"], state["ema"]["blocks.0.mlp.fc1.weight"])
    with pytest.raises(ValueError, match=r"is in shards: make one file of them with python -m training\.consolidate"):
        load_checkpoint(folder)
    with pytest.raises(SystemExit) as exit_:
        consolidate.main([str(folder), str(tmp_path / "edt.pt")])
    assert exit_.value.code == 2
    with pytest.raises(ValueError, match="no sharded checkpoint"):
        consolidate.main([str(folder.parent), str(tmp_path / "other.pt")])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last tensor
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("shard-00002-model-00002-of-00003.safetensors", flip, "checksum of shard-00002"),
        ("shard-00003-model-00001-of-00003.safetensors", cut, "checksum of shard-00003"),
        (
            "shard-00001-model-00003-of-00003.safetensors",
            Path.unlink,
            "of-00003.safetensors is missing",
        ),
        ("facts.pt", cut, "damaged"),
        ("facts.pt", Path.unlink, "damaged"),
    ],
)
def test_a_damaged_newest_one_is_set_aside(copied, name, damage, said):
    damage(copied / "checkpoints" / "0000006" / name)
    path, (remark,) = whole_checkpoint("auto", copied)
    assert path.name == "0000004" == (copied / "checkpoints" / "latest").resolve().name
    assert said in remark and "set aside as 0000006.damaged" in remark
    with pytest.raises(ValueError, match=r"damaged|no sharded checkpoint"):
        consolidate.main([str(copied / "checkpoints" / "0000006.damaged"), str(copied / "out.pt")])


def test_half_a_folder_that_a_kill_left_is_no_checkpoint_and_is_removed(copied):
    checkpoints = copied / "checkpoints"
    (checkpoints / "0000006").rename(checkpoints / ".0000006.tmp")  # one that is removed, or was not written to its end
    assert [path.name for path in checkpoint_files(copied)] == ["0000004", "0000003"]
    remove_leftovers(copied)
    assert not list(checkpoints.glob(".*.tmp")) and (checkpoints / "0000004" / "facts.pt").is_file()


class Code:
    def __reduce__(self):
        return print, ("code was run",)


def test_nothing_is_unpickled_but_tensors_and_plain_values(copied, capsys):
    folder = copied / "checkpoints" / "0000006"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".pt"}
    torch.save({FILES: {}, "step": Code()}, folder / "facts.pt")
    for read in (read_facts, read_whole):
        with pytest.raises(ValueError, match="could run code: refused"):
            read(folder)
    assert "code was run" not in capsys.readouterr().out


def test_facts_name_no_file_outside_their_folder(copied):
    folder = copied / "checkpoints" / "0000006"
    torch.save({FILES: {"../../metrics.jsonl": "0"}}, folder / "facts.pt")
    with pytest.raises(ValueError, match="does not name the files of its folder"):
        read_whole(folder)


def test_a_state_without_shards_is_split_and_joined_as_it_was():
    state = {"opt": {"state": {0: {"step": 3, "none": None}}}, "names": ("a",), "sums": torch.ones(2)}
    facts, tensors = split(state)
    assert tensors == {} and json.dumps(facts["opt"]) == json.dumps(state["opt"])
    assert join(facts, {}) == facts
    assert join({"opt": {0: {"m": None, "n": None}}}, {"opt/0/m": 5}) == {"opt": {0: {"m": 5, "n": None}}}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--sample-every", "2"), "leave --sample-every out, and sample a checkpoint"),
        (("--precision", "fp16"), "--fsdp has no loss scaling"),
    ],
)
def test_what_does_not_go_with_shards_is_a_usage_error(latent_store, tmp_path, capsys, extra, said):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda _: train_mask_adan.main(argv(latent_store, tmp_path, "--fsdp", *extra)))
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_one_process_has_nobody_to_share_with(latent_store, tmp_path, fails):
    assert "start several with torchrun" in fails(train_mask_adan.main, *argv(latent_store, tmp_path, "--fsdp"))
    assert not list(tmp_path.iterdir())
