"""Damaged files of every kind, read by the scripts that read such files."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis.strategies import SearchStrategy

from tests.fuzz_batches import batch_command, make_batches, npz_cases, spoil_batch
from tests.fuzz_checkpoints import READ_CHECKPOINT, checkpoint_cases, make_checkpoints, spoil_checkpoint
from tests.fuzz_commands import main_of
from tests.fuzz_images import READ_IMAGES, image_cases, make_images, spoil_images
from tests.fuzz_shards import READ_SHARDS, make_shards, shards_cases, spoil_shards
from tests.fuzz_stores import READ_STORE, make_stores, spoil_store, store_cases
from tests.fuzzing import CLEAR, FAILURE, Outcome, Tally, case_folder, draw, run_case


@dataclass(frozen=True)
class Kind:
    """make: fills a folder with good files. spoil: damages them in a case's folder as the case says. command: the script
    that reads them and its arguments. memory: whether an error may be the lack of it, which names no file."""

    cases: Callable[[], SearchStrategy]
    make: Callable[[Path], None]
    spoil: Callable[[dict, Path], None]
    command: Callable[[dict], tuple[str, str]]
    memory: bool = False


def _by_name(commands: dict[str, tuple[str, str]]) -> Callable[[dict], tuple[str, str]]:
    def command(case: dict) -> tuple[str, str]:
        script, arguments = commands[case["read"]]
        return script, arguments.replace("NAME", case.get("name", ""))

    return command


KINDS = {
    "checkpoints": Kind(checkpoint_cases, make_checkpoints, spoil_checkpoint, _by_name(READ_CHECKPOINT)),
    "npz": Kind(npz_cases, make_batches, spoil_batch, batch_command),
    "images": Kind(image_cases, make_images, spoil_images, _by_name(READ_IMAGES), memory=True),
    "stores": Kind(store_cases, make_stores, spoil_store, _by_name(READ_STORE)),
    "shards": Kind(shards_cases, make_shards, spoil_shards, _by_name(READ_SHARDS)),
}


def fuzz_files(name: str, num_cases: int, number: int) -> Tally:
    """name: one of KINDS. The same cases for the same seed ``number``."""
    return run_files(name, draw(KINDS[name].cases(), num_cases, number))


def run_files(name: str, cases: Sequence[dict]) -> Tally:
    tally, kind = Tally(), KINDS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        template = Path(place) / "inputs"
        kind.make(template / "files")
        torch.jit.save(torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4)), template / "module.pt")
        for case in cases:
            with case_folder(template) as folder:
                kind.spoil(case, folder)
                script, arguments = kind.command(case)
                outcome = run_case(main_of(script), arguments.split(), folder)
                tally.add(f"{name}: {script}", named(outcome, folder, kind.memory), case)
    return tally


def named(outcome: Outcome, folder: Path, memory: bool) -> Outcome:
    """An error is clear only if it names a file; or, with ``memory``, tells of the lack of it."""
    if outcome.kind != CLEAR or str(folder) in outcome.message or (memory and "out of memory" in outcome.message):
        return outcome
    return Outcome(FAILURE, f"names no file: {outcome.message}")
