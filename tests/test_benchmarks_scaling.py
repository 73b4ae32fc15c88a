"""Fits and projections against closed forms, and benchmarks.scaling from end to end. Nothing here depends on real speed."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from benchmarks import scaling
from benchmarks.projection import CallCost, TrainingProjection, fit_power, sampling_hours
from models.macs import trained_parameters
from models.registry import model_config
from tests.launch import ROOT

CPU = torch.device("cpu")
SMALL = ["--size", "Ti", "--image-sizes", "64", "128", "--batch-sizes", "1", "2", "--repeats", "1", "--processes", "1", "2"]


# Fits


def test_power_law_is_found():
    law = fit_power({256: 3 * 256**1.5, 576: 3 * 576**1.5, 4096: 3 * 4096**1.5})
    assert law.exponent == pytest.approx(1.5) and law.constant == pytest.approx(3) and law.error < 1e-9
    assert (law.low, law.high) == (256, 4096)
    assert law(100) == pytest.approx(3000)


def test_error_of_a_fit_is_its_worst():
    """1, 2, 4 against 1, 2, 8: in logarithms of 2 the line has slope 1.5 and misses by 1/6, 1/3 and 1/6."""
    law = fit_power({1: 1, 2: 2, 4: 8})
    assert law.exponent == pytest.approx(1.5)
    assert law.error == pytest.approx(2 ** (1 / 3) - 1)


def test_one_size_is_no_law():
    with pytest.raises(ValueError, match="two sizes or more"):
        fit_power({256: 1.0})


def test_call_cost_is_a_line_without_negative_parts():
    cost = CallCost.fit({1: 0.5 + 0.2, 2: 0.5 + 0.4, 8: 0.5 + 1.6})
    assert cost.fixed == pytest.approx(0.5) and cost.per_image == pytest.approx(0.2)
    assert cost(4) == pytest.approx(1.3)
    assert CallCost.fit({1: 0.1, 2: 0.4}) == CallCost(0.0, pytest.approx(0.15))  # grows faster than a line from 0
    assert CallCost.fit({4: 0.8}) == CallCost(0.0, pytest.approx(0.2))


# Projections


def test_training_is_divided_until_the_exchange_shows():
    """256 images of 3 ms; 1 GB at 10 GB/s."""
    run = TrainingProjection(CallCost(0.0, 3e-3), gradient_bytes=1e9, link=1e10)
    assert run.step_seconds(1) == pytest.approx(0.768) and run.exchange_seconds(1) == 0
    assert run.exchange_seconds(2) == pytest.approx(0.1) and run.exchange_seconds(64) == pytest.approx(0.2 * 63 / 64)
    assert run.step_seconds(2) == pytest.approx(0.384) and run.efficiency(2) == pytest.approx(1)  # hidden
    work = 0.768 / 64
    assert run.step_seconds(64) == pytest.approx(work + 0.2 * 63 / 64 - 2 / 3 * work)
    assert run.efficiency(64) == pytest.approx(work / run.step_seconds(64))
    assert run.hours(1) == pytest.approx(400_000 * 0.768 / 3600)


def test_fixed_cost_is_not_divided():
    run = TrainingProjection(CallCost(0.1, 1e-3), gradient_bytes=0, link=1.0)
    assert run.efficiency(4) == pytest.approx((0.1 + 0.256) / 4 / (0.1 + 0.064))


def test_sampling_is_as_long_as_the_longest_share():
    assert sampling_hours(1e-3, 1) == pytest.approx(50_000 * 250 * 2 * 1e-3 / 3600)
    assert sampling_hours(1e-3, 64) == pytest.approx(782 * 250 * 2 * 1e-3 / 3600)


def test_flags_take_the_place_of_measurements():
    args = scaling.parse(["--train-ms", "2", "--forward-ms", "0.5", "--link-gbytes", "50"])
    found = scaling.Measured(training={1: 9.0}, forward={1: 9.0})
    projection, forward = scaling.project(args, found)
    assert projection.cost == CallCost(0.0, 0.002) and forward == 0.0005 and projection.link == 50e9
    assert projection.gradient_bytes == 4 * trained_parameters(model_config("EDT-S/2"))
    measured, forward = scaling.project(
        scaling.parse([]), scaling.Measured(training={1: 3.0, 2: 5.0}, forward={1: 2.0, 4: 4.0})
    )
    assert measured.cost == CallCost(pytest.approx(1.0), pytest.approx(2.0)) and forward == 1.0
    assert scaling.project(scaling.parse([]), scaling.Measured()) == (None, None)


# What is measured


def test_workers_take_equal_shares(tmp_path):
    """Two processes over gloo, each with its own images: one line of JSON, from the first."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "benchmarks.scaling_worker"]
    ran = subprocess.run(
        [sys.executable, *command, "--model", "EDT-Ti/2", "--batch-size", "1", "--repeats", "1"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    [line] = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    times = json.loads(line)
    assert times["step"] > 0 and times["exchange"] > 0
    assert times["gradient_bytes"] == 4 * trained_parameters(model_config("EDT-Ti/2"))


def test_a_failing_worker_is_told_of(monkeypatch):
    def run(command):
        assert "--nproc_per_node=1" in command
        return subprocess.CompletedProcess(command, 1, "", "note: x\nRuntimeError: no memory\n  exitcode : 1\n")

    monkeypatch.setattr(scaling, "_run", run)
    with pytest.raises(ValueError, match=r"with 1 processes failed: RuntimeError: no memory$"):
        scaling.measure_processes(scaling.parse(SMALL), scaling.Measured(), CPU)


def test_a_worker_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(scaling, "PATIENCE_SECONDS", 0.5)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(scaling.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(ValueError, match=r"with 1 processes took over 0.5 s: give a smaller --process-batch-size than 4"):
        scaling.measure_processes(scaling.parse(SMALL), scaling.Measured(), CPU)
    assert started[0].poll() is not None


def test_small_run_writes_section_and_picture(capsys, monkeypatch, tmp_path):
    def processes(args, found, device) -> None:
        found.processes |= {1: 0.4, 2: 0.5}
        found.exchange |= {1: 0.0, 2: 0.05}

    written = []
    monkeypatch.setitem(scaling.MEASURES, "processes", processes)
    monkeypatch.setattr(scaling, "write_section", lambda title, text: written.append((title, text)))
    monkeypatch.setattr(scaling, "plot_path", lambda size, device: tmp_path / "scaling.png")
    scaling.main(SMALL)
    text = capsys.readouterr().out.rstrip("\n")
    [(title, section)] = written
    assert title.startswith("benchmarks.scaling: size Ti on ") and section == text
    for label in ("EDT-Ti/2", "DiT-Ti/2", "SiT-Ti/2", "SiT-Ti/2 M=16"):
        assert re.search(rf"^\| {label} +\|( +\S+ \|){{2}}$", text, re.MULTILINE), text
        assert re.search(rf"^- {label}: time grows as tokens\^\S+ from 16 to 64 tokens", text, re.MULTILINE), text
    assert "- 2 processes, 8 images in all: 500 ms a step, of the gradient alone 50 ms; 80 % of the speed" in text
    assert [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| \d+ +\|", line)] == [
        "1", "2", "1", "2", "4", "8", "16", "32", "64"
    ]  # fmt: skip
    assert "goes round a ring" in text and text.endswith("(scaling.png)")
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--image-sizes", "256"], "a fit needs two different ones"),
        (["--image-sizes", "256", "260"], "--image-sizes 260: it must be divisible by 8"),
        (["--image-sizes", "256", "272"], "--image-sizes 272: EDT halves its token grid twice"),
        (["--batch-sizes", "2", "2"], "a fit needs two different ones"),
    ],
)
def test_unfit_flags_are_refused_before_anything_is_timed(flags, says, capsys):
    with pytest.raises(SystemExit):
        scaling.main(flags)
    assert says in capsys.readouterr().err
