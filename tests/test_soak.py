"""The long half of the reliability tests: ``make soak``, which prints the tables of docs/reliability.md."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.files import append_line
from tests import edt_checkpoints, kills
from tests.fuzz_commands import fuzz_command_lines, fuzz_subprocesses
from tests.fuzz_files import fuzz_files
from tests.fuzzing import Tally
from tests.runs import assert_same_run, keep_the_finished_run, train_argv
from tests.shared import files_of
from tests.sit_checkpoints import random_checkpoint

pytestmark = pytest.mark.soak

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
        ("--data-path", "{images}", "--features-path", "{out}", "--vae", "{vae}", "--image-size", "32", "--num-workers", "2",
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
    edt = edt_checkpoints.random_checkpoint(folder / "edt.pt")
    sits = {f"sit{m}": random_checkpoint(folder / f"{m}.pt", seed=m, mediator_num=m) for m in (1, 4, 16)}
    low = random_checkpoint(folder / "low.pt", input_size=8, num_classes=3)
    return {"images": image_folder, "store": latent_store, "vae": tiny_vae, "edt": edt, "low": low, **sits}


def arguments(case: Case, inputs: dict[str, Path], out: Path) -> list[str]:
    flags = [flag.format(**inputs, out=out) for flag in case.flags]
    return train_argv(inputs["store"], out, *flags) if case.trains else flags


@pytest.mark.parametrize("name", CASES)
def test_killed_and_continued_equals_uninterrupted(name, inputs, tmp_path):
    case = CASES[name]
    code, moments = kills.run(case.script, arguments(case, inputs, tmp_path / "whole"))
    assert code == 0
    if not REPORT.exists():
        report("| script | kills | of runs | moments of an uninterrupted run | last state |\n|---|---|---|---|---|")
    works = kills.run_with_kills(
        case.script, lambda k: arguments(case, inputs, tmp_path / str(k)), case.num_kills, len(name), case.longest, case.seconds
    )
    for folder in (tmp_path / str(k) for k in range(works)):
        if case.trains:
            keep_the_finished_run(folder)
            assert_same_run(folder, tmp_path / "whole")
            assert not list(folder.rglob(".*.tmp"))
        else:
            assert files_of(folder) == files_of(tmp_path / "whole")
    report(f"| {name} | {case.num_kills} | {works} | {moments} | bitwise equal |")


FILES = {"checkpoints": 220, "shards": 80, "npz": 180, "images": 140, "stores": 180}  # and 2,200 command lines: 3,000 cases


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
