"""What every script shares: command lines, random draws, files that are never half-written, shares of the work."""

import errno
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime import cli, files
from runtime.cli import ArgumentParser, BooleanFlag
from runtime.distributed import my_share
from runtime.draws import Purpose, generator, normals, uniforms
from runtime.files import SharedRows, append_line, atomic_file, save_atomic, write_json

# Command lines


def parse(*args):
    parser = ArgumentParser("A script.")
    parser.add_argument("--cfg-scale", type=cli.non_negative_float, default=1.5, help="guidance")
    parser.add_argument("--batch-size", type=cli.positive_int)
    parser.add_argument("--results-dir", default=".")
    parser.add_argument("--use-amm", action=BooleanFlag)
    parser.add_argument("--compile", action=BooleanFlag, default=True)
    parser.add_argument("files", nargs="*")
    return parser.parse_args(args)


@pytest.mark.parametrize("args", [["--cfg-scale", "2"], ["--cfg_scale", "2"], ["--cfg_scale=2"], ["--cfg-scale=2"]])
def test_underscores_are_dashes(args):
    assert parse(*args).cfg_scale == 2.0


def test_values_keep_their_underscores():
    args = parse("--results_dir=my_results", "a_b", "_c")
    assert (args.results_dir, args.files) == ("my_results", ["a_b", "_c"])
    assert parse("--results-dir", "my_results/x_y").results_dir == "my_results/x_y"


def test_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--cfg_scale", "3"])
    parser = ArgumentParser("A script.")
    parser.add_argument("--cfg-scale", type=float)
    assert parser.parse_args().cfg_scale == 3


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], False),
        (["--use-amm"], True),
        (["--use_amm"], True),
        (["--use-amm", "True"], True),
        (["--use_amm=true"], True),
        (["--use-amm", "1"], True),
        (["--use-amm", "False"], False),
        (["--use-amm=no"], False),
        (["--no-use-amm"], False),
        (["--no_use_amm"], False),
        (["--use-amm", "--no-use-amm"], False),
        (["--no-use-amm", "--use-amm"], True),
        (["--use-amm", "--cfg-scale", "2"], True),
    ],
)
def test_booleans(args, expected):
    assert parse(*args).use_amm is expected


def test_booleans_that_are_on():
    assert parse().compile is True
    assert parse("--no-compile").compile is False
    assert parse("--compile", "False").compile is False


@pytest.mark.parametrize(
    "args, message",
    [
        (["--unknown", "1"], "--unknown"),
        (["--cfg", "2"], "--cfg"),  # an abbreviation
        (["--no-use"], "--no-use"),
        (["--use-amm", "maybe"], "--use-amm takes True or False, got 'maybe'"),
        (["--no-use-amm", "True"], "--no-use-amm takes no value"),
        (["--batch-size", "0"], "0 must be at least 1"),
        (["--batch-size", "2.5"], "'2.5' is not a whole number"),
        (["--batch-size", "two"], "'two' is not a whole number"),
        (["--cfg-scale", "-1"], "-1 must be at least 0"),
        (["--cfg-scale", "nan"], "nan must be"),
        (["--cfg-scale", "inf"], "finite"),
        (["--cfg-scale", "x"], "'x' is not a number"),
    ],
)
def test_mistakes_end_with_code_2(capsys, args, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (cli.positive_int, ["1", "50000"], ["0", "-1", "1.0", ""]),
        (cli.non_negative_int, ["0", "7"], ["-1", "0.5"]),
        (cli.positive_float, ["1e-9", "3"], ["0", "-1", "nan", "inf"]),
        (cli.non_negative_float, ["0", "0.0", "2.5"], ["-0.1", "nan", "inf", "-inf"]),
    ],
)
def test_numbers(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
        assert isinstance(kind(text), int if kind in (cli.positive_int, cli.non_negative_int) else float)
    for text in bad:
        with pytest.raises(cli.argparse.ArgumentTypeError):
            kind(text)


def test_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "guidance (default: 1.5)" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text


@pytest.mark.parametrize(
    "error, code, message",
    [
        (ValueError("--batch-size 3 does not fit"), 1, "error: --batch-size 3 does not fit\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/y"), 1, "error: [Errno 2] No such file: '/x/y'\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "lower the batch size"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_run_says_it_in_one_line(capsys, monkeypatch, error, code, message):
    monkeypatch.delenv("TRACEBACK", raising=False)

    def main(args):
        assert args is None
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == code
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_run_with_traceback(capsys, monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(SystemExit):
        cli.run(lambda args: int("x"))
    assert "Traceback" in capsys.readouterr().err


def test_run_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda args: 1 / 0)
    assert cli.run(lambda args: None) is None


# Random draws


@pytest.mark.parametrize("draw", [normals, uniforms])
def test_draws_do_not_depend_on_the_batch(draw):
    together = draw(7, Purpose.NOISE, range(10), step=3, shape=(4, 5))
    assert together.shape == (10, 4, 5)
    assert together.dtype == torch.float32
    for indices in ([3], [9, 0, 3], range(2, 8), [5, 5]):
        assert torch.equal(draw(7, Purpose.NOISE, indices, step=3, shape=(4, 5)), together[list(indices)])
    assert draw(7, Purpose.NOISE, [], shape=(4, 5)).shape == (0, 4, 5)
    assert draw(7, Purpose.NOISE, [1, 2]).shape == (2,)


@pytest.mark.parametrize("draw", [normals, uniforms])
def test_every_stream_is_its_own(draw):
    """No value is found in another stream: 24-bit and 32-bit floats would repeat by chance, so whole rows of 4 are compared."""
    streams = [
        (seed, purpose, index, step)
        for seed in (0, 1, 2**40)
        for purpose in (Purpose.NOISE, Purpose.NOISE_MASKED, Purpose.SAMPLE_NOISE)
        for index in (0, 1, 2, 10**6)
        for step in (0, 1, 2, 400_000)
    ]
    rows = [draw(seed, purpose, [index], step, (50, 4)).view(50, 4) for seed, purpose, index, step in streams]
    assert len(torch.cat(rows).unique(dim=0)) == 50 * len(streams)


def test_a_row_is_what_its_generator_draws():
    """Also after a longer row, and after an odd number of values: nothing is left over from the row before."""
    for shape in ((), (3,), (2, 5)):
        rows = normals(5, Purpose.LATENT, [4, 0, 9], step=6, shape=shape), uniforms(5, Purpose.LATENT, [4, 0, 9], 6, shape)
        for k, index in enumerate((4, 0, 9)):
            alone = generator(5, Purpose.LATENT, index, 6).standard_normal(shape, dtype=np.float32)
            np.testing.assert_array_equal(rows[0][k].numpy(), alone)
            alone = generator(5, Purpose.LATENT, index, 6).random(shape, dtype=np.float32)
            np.testing.assert_array_equal(rows[1][k].numpy(), alone)


def test_seeds_have_64_bits():
    """The key passed through float64: seeds from 2^63 on lost their low bits, and -1 gave the draws of seed 0."""
    seeds = (0, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, -1)
    assert len({uniforms(seed, Purpose.NOISE, [0], shape=(4,)).sum().item() for seed in seeds}) == len(seeds)


def test_draws_are_fixed_for_ever():
    """Published samples depend on these values."""
    assert uniforms(0, Purpose.SAMPLE_LABEL, [0, 1]).tolist() == pytest.approx([0.25682235, 0.91672432], abs=1e-7)
    assert normals(42, Purpose.SAMPLE_NOISE, [3], step=2, shape=(3,))[0].tolist() == pytest.approx(
        [-0.3972322, 1.4502614, 0.767579], abs=1e-6
    )


def test_purposes_are_distinct_and_fixed():
    assert len(set(map(int, Purpose))) == len(Purpose.__members__)
    assert {"DATA_ORDER": 1, "TIMESTEP": 2, "NOISE": 3, "SAMPLE_LABEL": 20, "SAMPLE_NOISE": 21}.items() <= {
        name: int(value) for name, value in Purpose.__members__.items()
    }.items()


def test_moments():
    """100 streams of 1000 draws: mean, variance, kurtosis and the correlation of neighbours within 4 standard errors."""
    n = 100_000
    z = normals(1, Purpose.NOISE, range(100), shape=(1000,)).double()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((z[1:] * z[:-1]).mean()) < 4 / n**0.5
    u = uniforms(1, Purpose.NOISE, range(100), shape=(1000,)).double()
    assert abs(u.mean() - 0.5) < 4 / (12 * n) ** 0.5
    assert 0 <= u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1


def test_a_stream_is_longer_than_any_sample():
    """The counter's lowest word counts blocks: a long draw does not run into the stream of the next index or step."""
    long = generator(0, Purpose.NOISE, index=0, step=0).random(10**6)
    for index, step in ((1, 0), (0, 1)):
        assert not np.isin(generator(0, Purpose.NOISE, index, step).random(100), long).any()


# Files


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    return path


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_atomic_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failing_writer_leaves_the_old_file(written, error):
    with pytest.raises(type(error)), atomic_file(written) as file:
        file.write(b"half")
        raise error
    assert written.read_bytes() == b"old"
    assert os.listdir(written.parent) == ["a.bin"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(written, monkeypatch, function):
    monkeypatch.setattr(files.os, function, fail_with(OSError(errno.ENOSPC, "No space left on device")))
    with (
        pytest.raises(OSError, match=r"cannot write .*a\.bin: No space left on device.*unchanged"),
        atomic_file(written) as file,
    ):
        file.write(b"new")
    assert written.read_bytes() == b"old"
    assert os.listdir(written.parent) == ["a.bin"]


def test_files_that_need_not_be_durable(written, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", fail_with(AssertionError("flushed")))
    with atomic_file(written, durable=False) as file:
        file.write(b"new")
    assert written.read_bytes() == b"new"


def test_the_disk_is_flushed_before_the_file_is_moved(written, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    with atomic_file(written) as file:
        file.write(b"new")
    assert calls == ["fsync", "replace"]


def test_save_atomic(tmp_path):
    save_atomic({"step": 3, "weights": torch.arange(3)}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["step"] == 3
    assert loaded["weights"].tolist() == [0, 1, 2]


def test_save_atomic_on_a_full_disk(written, monkeypatch):
    """torch's RuntimeError passed the scripts' handling of OSError, and the user saw a traceback."""
    monkeypatch.setattr(files.torch, "save", fail_with(RuntimeError("[enforce fail] . unexpected pos 64 vs 0\nframes")))
    with pytest.raises(OSError, match=r"a\.bin.*unexpected pos 64 vs 0") as caught:
        save_atomic({"a": torch.zeros(3)}, written)
    assert "frames" not in str(caught.value)
    assert written.read_bytes() == b"old"
    assert os.listdir(written.parent) == ["a.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_save_atomic_on_a_disk_that_is_really_full(written, monkeypatch):
    opened = open
    monkeypatch.setattr("builtins.open", lambda path, mode: opened("/dev/full", mode))
    with pytest.raises(OSError, match=r"cannot write .*a\.bin"):
        save_atomic({"a": torch.zeros(10**6)}, written)
    assert written.read_bytes() == b"old"


def test_json_and_lines(tmp_path):
    write_json({"a": [1, None]}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    for line in ("one", "zwölf"):
        append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwölf\n"


def rows(path, shape=(6, 2, 3), dtype=np.float16):
    return SharedRows(path / "latents.npy", shape, dtype)


def row(i):
    return np.full((2, 3), i, np.float16) + np.arange(3, dtype=np.float16) / 4


def test_two_handles_write_disjoint_rows(tmp_path):
    rows(tmp_path).create()
    with rows(tmp_path) as even, rows(tmp_path) as odd:
        for i in (0, 1, 4, 3):  # interleaved
            (odd if i % 2 else even).write(i, row(i))
        odd.mark(5, SharedRows.LEFT_OUT)
        assert even.progress().tolist() == odd.progress().tolist() == [1, 1, 0, 0, 0, 2]  # the last of each is not flushed yet
    assert rows(tmp_path).progress().tolist() == [1, 1, 0, 1, 1, 2]
    array = np.load(tmp_path / "latents.npy")  # as any reader sees it
    assert (array.shape, array.dtype) == ((6, 2, 3), np.float16)
    for i in (0, 1, 3, 4):
        np.testing.assert_array_equal(array[i], row(i))
    assert not array[[2, 5]].any()
    np.testing.assert_array_equal(rows(tmp_path).array(), array)


def test_rows_survive_a_restart(tmp_path):
    rows(tmp_path).create()
    with rows(tmp_path) as first:
        first.write(2, row(2))
    rows(tmp_path).create()
    with rows(tmp_path) as second:
        assert second.progress().tolist() == [0, 0, 1, 0, 0, 0]
        for i in (0, 1, 3, 4, 5):
            second.write(i, row(i))
        assert not second.progress().all()
    assert rows(tmp_path).progress().all()
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), np.stack([row(i) for i in range(6)]))


def test_rows_without_their_progress_start_again(tmp_path):
    rows(tmp_path).create()
    with rows(tmp_path) as first:
        first.write(2, row(2))
    first.progress_path.unlink()
    rows(tmp_path).create()
    assert not rows(tmp_path).progress().any()


@pytest.mark.parametrize("shape, dtype", [((7, 2, 3), np.float16), ((6, 3, 2), np.float16), ((6, 2, 3), np.float32)])
def test_rows_of_another_shape_are_refused(tmp_path, shape, dtype):
    rows(tmp_path).create()
    with rows(tmp_path) as first:
        first.write(2, row(2))
    with pytest.raises(ValueError, match=r"latents\.npy holds \(6, 2, 3\) float16.*use a new folder"):
        rows(tmp_path, shape, dtype).create()
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy")[2], row(2))


def test_a_row_of_the_wrong_shape(tmp_path):
    rows(tmp_path).create()
    with rows(tmp_path) as handle:
        with pytest.raises(ValueError, match=r"row 1 has shape \(3, 2\)"):
            handle.write(1, row(1).T)
        assert not handle.progress().any()
    assert not np.load(tmp_path / "latents.npy").any()


def test_rows_are_converted_and_may_be_strided(tmp_path):
    rows(tmp_path).create()
    with rows(tmp_path) as handle:
        handle.write(0, np.asfortranarray(row(3), np.float64))
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy")[0], row(3))


def test_rows_on_a_full_disk(tmp_path, monkeypatch):
    """A row is marked after its data: when the data does not fit, it is not marked. Short writes are continued."""
    rows(tmp_path).create()
    pwrite = os.pwrite
    with rows(tmp_path) as handle:
        monkeypatch.setattr(files.os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
        handle.write(1, row(1))
        monkeypatch.setattr(files.os, "pwrite", fail_with(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"cannot write .*latents\.npy: No space left on device.*run the command again"):
            handle.write(2, row(2))
        monkeypatch.undo()
    assert rows(tmp_path).progress().tolist() == [0, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy")[1], row(1))


def test_rows_that_the_disk_lost_are_missing(tmp_path, monkeypatch):
    """A network disk refuses as late as in fsync: nobody knows then which rows arrived. The rows were marked already, and the
    process that had finished first declared the whole complete."""
    rows(tmp_path).create()
    with rows(tmp_path) as first:
        first.write(0, row(0))
    handle = rows(tmp_path).open()
    for i in (1, 2, 3):
        handle.write(i, row(i))
    assert handle.progress().tolist() == [1, 1, 1, 0, 0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail_with(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match=r"cannot write .*latents\.npy: Input/output error.*run the command again"):
            handle.close()
    assert rows(tmp_path).progress().tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name, size", [("latents.npy", 150), ("latents.npy", 20), ("latents.npy", 0), ("latents.progress", 5)])
def test_rows_of_a_cut_copy_are_refused(tmp_path, name, size):
    """numpy's own error for it was shown, or none before the end."""
    rows(tmp_path).create()
    os.truncate(tmp_path / name, size)
    with pytest.raises(ValueError, match=rf"{name} (is cut short or damaged|has 5 marks for 6 rows).*: remove it"):
        rows(tmp_path).create()
    (tmp_path / name).unlink()
    rows(tmp_path).create()
    assert rows(tmp_path).progress().tolist() == [0] * 6


def test_marks_of_an_array_that_is_gone_are_not_kept(tmp_path, monkeypatch):
    """A kill between the new array and its new marks left the old marks beside rows of zeros."""
    rows(tmp_path).create()
    with rows(tmp_path) as first:
        first.write(0, row(0))
    first.path.unlink()
    replaced, replace = [], os.replace
    monkeypatch.setattr(files.os, "replace", lambda *args: replaced.append(args) or replace(*args) if not replaced else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows(tmp_path).create()
    monkeypatch.undo()
    rows(tmp_path).create()
    assert not rows(tmp_path).progress().any()


def test_temporary_files_of_the_killed_are_removed(tmp_path):
    for name in (".a.pt.123.tmp", ".samples.npy", ".b.tmp", "c.1.tmp", ".latest.tmp"):
        (tmp_path / name).touch()
    files.remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".b.tmp", ".latest.tmp", ".samples.npy", "c.1.tmp"]


def test_a_line_that_does_not_fit_leaves_no_half(tmp_path, monkeypatch):
    """The next line was glued to the half that had been written."""
    path, write = tmp_path / "log", os.write
    append_line(path, "one")

    def full(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", full)
        with pytest.raises(OSError, match=r"cannot write .*log: No space left on device"):
            append_line(path, "twenty-two!")
    append_line(path, "three")
    assert path.read_text() == "one\nthree\n"
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    append_line(path, "short writes go on")
    assert path.read_text() == "one\nthree\nshort writes go on\n"


def test_remove_rows(tmp_path):
    rows(tmp_path).create()
    rows(tmp_path).remove()
    assert os.listdir(tmp_path) == []
    rows(tmp_path).remove()


# Shares


@pytest.mark.parametrize("world", range(1, 6))
@pytest.mark.parametrize("count", [0, 1, 4, 10, 13])
def test_shares_make_up_the_whole(world, count):
    shares = [my_share(range(count), SimpleNamespace(process_index=rank, num_processes=world)) for rank in range(world)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
