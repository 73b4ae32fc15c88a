"""The long half of the reliability tests: ``make soak``, which prints the tables of docs/reliability.md."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from models import create_model
from models.checkpoints import describe
from runtime.files import append_line
from tests import kills
from tests.fuzz_commands import fuzz_command_lines, fuzz_subprocesses
from tests.fuzz_files import fuzz_files
from tests.fuzzing import Tally
from tests.runs import assert_same_run, train_argv
from tests.shared import perturb
from tests.sit_checkpoints import random_checkpoint

pytestmark = pytest.mark.soak

EDT_CODEC = {"name": "pixels", "scale": 1.0, "image_size": 16}


REPORT = Path(__file__).parent.parent / "soak_report.md"


def report(text: str) -> None:
    """Add to what ``make soak`` shows at its end."""
    append_line(REPORT, text)


@dataclass(frozen=True)
class Case:
    """A script that is killed again and again. flags: from the inputs; what the script makes lies in ``{out}``."""

    script: str
    flags: tuple[str, ...]
    num_kills: int
    longest: int  # moments, of about 1/3 of the work
    seconds: float  # of about 1/3 of the work

    @property
    def trains(self) -> bool:
        return "train" in self.script


RUN = ("--max-steps", "30", "--ckpt-every", "3", "--resume", "auto")
SAMPLES = ("--num-fid-samples", "60", "--num-sampling-steps", "6", "--per-proc-batch-size", "4", "--sample-dir", "{out}")
CASES = {
    "train_mask_adan, EDT": Case("train_mask_adan", RUN, 10, 90, 2),
    "train_mask_adan, MDTv2 in micro-batches": Case(
        "train_mask_adan", ("--model", "MDTv2-Ti/2", "--micro-batch-size", "3", *RUN), 6, 90, 2
    ),
    "attention_mediator/train, SiT": Case(
        "attention_mediator.train", ("--model", "SiT-Ti/2", "--mediator-num", "4", *RUN), 6, 90, 2
    ),
    "attention_mediator/train_256to512": Case(
        "attention_mediator.train_256to512",
        ("--model", "SiT-Ti/2", "--image-size", "16", "--resume-ckpt-low-resolution", "{low}", *RUN),
        4,
        90,
        2,
    ),
    "extract_features": Case(
        "extract_features",
        ("--data-path", "{images}", "--features-path", "{out}", "--vae", "{vae}", "--image-size", "32", "--num-workers", "0",
         "--batch-size", "2", "--flip", "--store", "moments"),
        8, 60, 1,
    ),
    "sample_ddp, EDT": Case("sample_ddp", ("--ckpt", "{edt}", *SAMPLES), 6, 200, 1),
    "attention_mediator/sample_ddp, SDE": Case(
        "attention_mediator.sample_ddp", ("SDE", "--ckpt", "{sit4}", *SAMPLES), 5, 200, 1
    ),
    "sample_ddp_three, ODE": Case(
        "time_step_wise_adjusting.sample_ddp_three",
        ("ODE", "--ckpts", "{sit1}", "{sit4}", "{sit16}", "--sampling-method", "ab2",
         "--switch-ratios", "0.999", "0.95", *SAMPLES),
        5, 200, 1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(image_folder, latent_store, tiny_vae, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("soak")
    torch.manual_seed(0)
    edt = perturb(create_model("EDT-Ti/2"), 0.02)
    config = describe("EDT-Ti/2", edt.config, codec=EDT_CODEC, class_names=())
    torch.save({"ema": edt.state_dict(), "config": config}, folder / "edt.pt")
    sits = {f"sit{m}": random_checkpoint(folder / f"{m}.pt", seed=m, mediator_num=m) for m in (1, 4, 16)}
    low = random_checkpoint(folder / "low.pt", input_size=8, num_classes=3)
    return {"images": image_folder, "store": latent_store, "vae": tiny_vae, "edt": folder / "edt.pt", "low": low, **sits}


def arguments(case: Case, inputs: dict[str, Path], out: Path) -> list[str]:
    flags = [flag.format(**inputs, out=out) for flag in case.flags]
    return train_argv(inputs["store"], out, *flags) if case.trains else flags


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keep_the_finished_run(results: Path) -> None:
    """Killed before its first checkpoint, a run leaves a folder without one, and the next has a new folder."""
    for folder in results.iterdir():
        if not list(folder.glob("checkpoints/*.pt")):
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", CASES)
def test_killed_and_continued_equals_uninterrupted(name, inputs, tmp_path):
    case = CASES[name]
    code, moments = kills.run(case.script, arguments(case, inputs, tmp_path / "whole"))
    assert code == 0
    argv = arguments(case, inputs, tmp_path / "killed")
    if not REPORT.exists():
        report("| script | kills | moments of an uninterrupted run | last state |\n|---|---|---|---|")
    made = kills.run_with_kills(case.script, argv, case.num_kills, seed=len(name), longest=case.longest, seconds=case.seconds)
    if case.trains:
        keep_the_finished_run(tmp_path / "killed")
        assert_same_run(tmp_path / "killed", tmp_path / "whole")
        assert not list((tmp_path / "killed").rglob(".*.tmp"))
    else:
        assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert made >= case.num_kills // 2, "too few kills fell into the work: enlarge it"
    report(f"| {name} | {made} | {moments} | bitwise equal |")


FILES = {"checkpoints": 250, "npz": 200, "images": 150, "stores": 200}  # and 2,200 command lines: 3,000 cases


def check(tally: Tally, title: str, num_cases: int) -> None:
    report(f"\n{title}\n\n{tally.table()}")
    assert not tally.failures, "\n".join(tally.failures)
    assert sum(counts.total() for counts in tally.counts.values()) == num_cases


def test_fuzzed_command_lines():
    check(fuzz_command_lines(2200, 1), "Command lines, in this process:", 2200)


def test_fuzzed_files():
    tally = Tally()
    for kind, num_cases in FILES.items():
        tally.update(fuzz_files(kind, num_cases, 1))
    check(tally, "Damaged files, in this process:", sum(FILES.values()))


def test_fuzzed_processes():
    check(fuzz_subprocesses(30, 1, seconds=40), "Command lines, in processes of their own:", 30)
