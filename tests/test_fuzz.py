"""The quick half of the fuzzing: a few cases for every script and kind of file. ``make soak`` runs thousands."""

import argparse
import sys
import time

import pytest

from runtime import cli
from tests import fuzzing
from tests.fuzz_commands import BASES, command_lines, flags_of, fuzz_command_lines, run_process
from tests.fuzz_files import KINDS, fuzz_files, named, run_files
from tests.fuzzing import CLEAR, FAILURE, NOT_ENDED, SUCCESS, USAGE, Outcome, Tally, draw, run_case
from tests.parsers import parser_of, scripts


def check(tally: Tally, num_cases: int) -> None:
    assert not tally.failures, "\n".join(tally.failures)
    assert sum(counts.total() for counts in tally.counts.values()) == num_cases


def test_command_lines():
    check(fuzz_command_lines(2 * len(BASES), 0), 2 * len(BASES))


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind):
    check(fuzz_files(kind, 15, 0), 15)


ENCODE = {"name": "pipeline", "read": "encode", "file": "vae/config.json", "json": ("scaling_factor",)}
# What ended otherwise than in a clear error when it was found
FOUND = {
    "npz": [
        {"name": "samples.npz", "flags": "--per-class", "zip": "encrypted"},  # RuntimeError
        {"name": "ref.npz", "flags": "", "zip": "claims less"},  # BadZipFile from numpy's own reader
        {"name": "samples.npz", "flags": "", "bytes": (("remove", -229, 38),)},  # "Invalid argument", of no file
        {"name": "ref.npz", "flags": "", "header": ("arr_0", {"descr": "|V0"})},  # "itemsize cannot be zero", of no file
        {"name": "ref.npz", "flags": "", "header": ("arr_0", {"descr": "V999999999"})},  # 12 GB asked for, of 576 bytes
        # TypeError
        {"name": "ref.npz", "flags": "", "header": ("sigma", {"descr": [("a", "u1")]})},
    ],
    "stores": [
        {"name": "latents", "read": "reference", "file": "meta.json", "entry": ("scale",), "value": {}},  # TypeError
        {"name": "latents", "read": "train", "file": "labels.npy", "bytes": (("put", 20, b"{"),)},  # TokenError
        {
            "name": "published",
            "read": "train",
            "file": "imagenet16_labels/0.npy",
            "array": "one label far beyond",
        },  # 2^62 classes
        {"name": "latents", "read": "reference", "file": "latents.npy", "array": "one nan"},  # became a picture
    ],
    "images": [
        {"read": "train", "odd": "fifo"},  # waited for ever
        {"read": "reference", "odd": "device"},  # /dev/zero has no end
    ],
    "checkpoints": [ENCODE | {"value": "x"}, ENCODE | {"value": None}, ENCODE | {"read": "inspect", "value": "x"}],  # TypeError
}


@pytest.mark.parametrize("kind", FOUND)
def test_found(kind):
    tally = run_files(kind, FOUND[kind])
    check(tally, len(FOUND[kind]))
    assert {outcome for counts in tally.counts.values() for outcome in counts} == {CLEAR}


def test_a_link_to_itself_is_left_out_as_other_bad_files_are():
    """Listing the folder failed on it, whatever --skip-bad said."""
    (counts,) = run_files("images", [{"read": "extract others", "odd": "link to itself"}]).counts.values()
    assert counts[SUCCESS] == 1


def test_cases_are_the_same_for_the_same_seed():
    strategy = command_lines("inference")
    first, again, other = (draw(strategy, 20, number) for number in (1, 1, 2))
    assert first == again != other and len(first) == 20


def test_every_script_is_among_the_command_lines():
    found = {script.removesuffix(".py").replace("/", ".") for script in scripts() if parser_of(script)}
    assert found == set(BASES)


def test_flags_come_from_the_parsers():
    by_command = flags_of("models.checkpoints.__main__")
    assert set(by_command) == {"inspect", "convert"}
    (epochs,) = [flag for flag in flags_of("train_mask_adan")[""] if "--epochs" in flag.options]
    assert {"1", "0.5", "1e300"} <= set(epochs.values) and not {"0", "-1", "nan", "inf"} & set(epochs.values)


# The harness finds what it looks for.


def say_and_exit(*lines: str, code: int = 1):
    def main(argv):
        print(*lines, sep="\n", file=sys.stderr)
        raise SystemExit(code)

    return main


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "kind"),
    [
        (lambda argv: None, SUCCESS),
        (raising(fuzzing.Worked()), SUCCESS),
        (say_and_exit("usage: x", "x: error: y", code=2), USAGE),
        (raising(ValueError("a.pt is damaged")), CLEAR),
        (raising(OSError("a.pt: no space")), CLEAR),
        (say_and_exit("words", code=2), FAILURE),
        (say_and_exit("error: a.pt is damaged", code=3), FAILURE),
        (say_and_exit("error: a.pt is damaged", "error: b.pt too"), FAILURE),
        (say_and_exit("words"), FAILURE),
        (raising(ValueError("x")), FAILURE),  # says nothing
        (raising(TypeError("x")), FAILURE),
        (raising(AssertionError("x")), FAILURE),
        (raising(RuntimeError("x")), FAILURE),
        (say_and_exit("Traceback (most recent call last):", "error: a.pt is damaged"), FAILURE),
    ],
)
def test_outcomes(main, kind, tmp_path):
    assert run_case(main, [], tmp_path).kind == kind


def test_a_hang_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "HANG_SECONDS", 0.2)
    outcome = run_case(lambda argv: time.sleep(60), [], tmp_path)
    assert outcome.kind == FAILURE and "hangs" in outcome.message


def test_left_overs_and_leaks_are_failures(tmp_path):
    def stores(argv):
        (tmp_path / "log.txt").write_text(argv[0])

    secret = f"--key={fuzzing.SECRETS[0]}"
    assert "log.txt holds" in run_case(stores, [secret], tmp_path).message
    assert run_case(stores, ["--key=public"], tmp_path).kind == SUCCESS
    assert "the output shows" in run_case(lambda argv: print(argv), [secret], tmp_path).message
    assert "left behind: .a.tmp" in run_case(lambda argv: (tmp_path / ".a.tmp").touch(), [], tmp_path).message


def test_a_usage_error_that_shows_a_secret_is_a_failure(tmp_path):
    def parsing(kind):
        def main(argv):
            parser = kind("")
            parser.add_argument("--count", type=int)
            parser.parse_args(argv)

        return main

    password, token = fuzzing.SECRETS
    for argv in ([f"--count=https://user:{password}@host/a?token={token}"], [f"--kye={token}"], ["--kye", token]):
        assert run_case(parsing(cli.ArgumentParser), argv, tmp_path).kind == USAGE
        assert "the output shows" in run_case(parsing(argparse.ArgumentParser), argv, tmp_path).message


SLEEPER = """
import sys, time
from pathlib import Path
exec(sys.argv[1])
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("begins", "kind", "said"),
    [
        ("", FAILURE, "hangs"),
        ("print('note: a warning', file=sys.stderr); Path('new').mkdir(); Path('old/settings.json').touch()", FAILURE, "hangs"),
        ("print('step 1')", NOT_ENDED, "step 1"),
        ("print('  7%|7   | 1/14 [00:01<?]', file=sys.stderr)", NOT_ENDED, "1/14"),
        ("Path('runs/000-EDT-Ti-2').mkdir(parents=True)", NOT_ENDED, "000-EDT-Ti-2"),
        ("Path('settings.json').touch()", NOT_ENDED, "settings.json"),
    ],
)
def test_a_process_that_does_not_end_must_have_begun_its_work(tmp_path, begins, kind, said):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").touch()
    outcome = run_process("sleeper", [begins], tmp_path, 1)
    assert outcome.kind == kind and said in outcome.message


def test_an_error_names_a_file_or_where_it_is_meant_the_lack_of_memory(tmp_path):
    clear = Outcome(CLEAR, f"error: {tmp_path}/a.png is damaged")
    memory = Outcome(CLEAR, "error: this machine ran out of memory")
    assert named(clear, tmp_path, False) == clear and named(memory, tmp_path, True) == memory
    assert named(memory, tmp_path, False).kind == named(Outcome(CLEAR, "error: bad"), tmp_path, True).kind == FAILURE
    assert [name for name, kind in KINDS.items() if kind.memory] == ["images"]


def test_a_tally_counts_and_keeps_failures():
    tally, other = Tally(), Tally()
    tally.add("a", Outcome(SUCCESS, ""), ["x"])
    other.add("a", Outcome(FAILURE, "TypeError"), ["--flag"])
    tally.update(other)
    assert tally.table().splitlines()[-1] == "| all | 2 | 1 | 0 | 0 | 0 | 1 |"
    assert len(tally.failures) == 1 and "--flag" in tally.failures[0] and "TypeError" in tally.failures[0]
