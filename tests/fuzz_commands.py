"""Command lines drawn from the scripts' own parsers: a good tiny one, changed by values that flags take and that none takes."""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import extract_features
import train_mask_adan
from runtime import cli
from tests.fuzz_shards import write_in_shards
from tests.fuzzing import CLEAR, FAILURE, HERE, NOT_ENDED, SUCCESS, USAGE, Outcome, Tally, case_folder, draw, run_case
from tests.launch import BIN, ROOT
from tests.parsers import parse_only, parser_of
from tests.sit_checkpoints import TRANSPORT, random_checkpoint
from time_step_wise_adjusting import sample_ddp_three

SAMPLING = "--vae pixels --num-sampling-steps 3"
MANY = f"{SAMPLING} --sample-dir {HERE}/out --num-fid-samples 3 --per-proc-batch-size 2"
LOOK = "--vae pixels --num-images 2 --num-sampling-steps 2"
LENGTH = f"--results-dir {HERE}/runs --global-batch-size 4 --max-steps 1"
STAGES = f"--ckpt1 {HERE}/sit1.pt --ckpt2 {HERE}/sit4.pt --ckpt3 {HERE}/sit16.pt --first-several-num 1"
SWITCHING = f"SDE {STAGES} {MANY} --switch-ratio1 0.8 --switch-ratio2 0.6"


def _training(model: str, *sources: str) -> tuple[str, ...]:
    return tuple(f"--model {model} {LENGTH} {source}" for source in sources)


FROM_STORE, FROM_IMAGES = (
    f"--feature-path {HERE}/store",
    f"--data-path {HERE}/images --image-size 16 --vae pixels --num-workers 0",
)
DUMMY = "--dummy --image-size 16 --vae pixels --num-classes 3"
EVAL = f"--eval-every 1 --eval-ref {HERE}/ref16.npz --eval-features pixels --eval-samples 4 --eval-steps 3"
PROFILES = "--ema-profiles 0.05,0.1"
LOWER = f"--resume-ckpt-low-resolution {HERE}/small.pt --image-size 16 --mediator-num 4"

# Script -> good command lines, short enough to be run to the end.
BASES = {
    "train_mask_adan": _training(
        "EDT-Ti/2",
        f"{FROM_STORE} {PROFILES}",
        FROM_IMAGES,
        DUMMY,
        f"{FROM_STORE} --resume auto",
        f"{FROM_STORE} --init-from {HERE}/edt.pt",
        f"{FROM_STORE} {EVAL}",
    ),
    "attention_mediator.train": _training("SiT-Ti/2", FROM_STORE, f"{FROM_IMAGES} --mediator-num 4 {EVAL} {PROFILES}"),
    "attention_mediator.train_256to512": _training("SiT-Ti/2", f"{FROM_STORE} {LOWER}", f"{FROM_IMAGES} {LOWER}"),
    "attention_mediator.train_512to1024": _training("SiT-Ti/2", f"{FROM_STORE} {LOWER}"),
    "extract_features": (
        f"--data-path {HERE}/images --features-path {HERE}/new --vae pixels --image-size 16 --num-workers 0",
        f"--data-path {HERE}/images --features-path {HERE}/store --vae pixels --image-size 16 --num-workers 0",
    ),
    "sample_ddp": (
        f"--ckpt {HERE}/edt.pt {MANY}",
        f"--ckpt {HERE}/edt.pt {MANY} --solver dpm++2m --cfg-scale 2 --guide-ckpt {HERE}/edt.pt --guide-weights model",
        f"--ckpt {HERE}/sit4.pt {MANY} --mode ODE --sampling-method euler",
    ),
    "inference": (
        f"--ckpt {HERE}/edt.pt {SAMPLING} --classes 0,1 --per-class 1 --out {HERE}/grid.png",
        f"--ckpt {HERE}/sit4.pt {SAMPLING} --classes 0 --per-class 2 --out {HERE}/grid.png --trajectory 2 --solver ab2",
    ),
    "attention_mediator.sample_ddp": (
        f"SDE --ckpt {HERE}/sit4.pt {MANY}",
        f"SDE --ckpt {HERE}/sit4.pt {MANY} --solver heun --cfg-scale 2 --guide-ckpt {HERE}/sit1.pt",
        f"ODE --ckpt {HERE}/sit4.pt {MANY} --sampling-method heun",
        f"ODE --ckpt {HERE}/sit4.pt {MANY} --likelihood",
    ),
    "time_step_wise_adjusting.sample_ddp_three": (
        SWITCHING,
        f"ODE --ckpts {HERE}/sit4.pt {HERE}/sit16.pt {MANY} --switch-ratios 0.9",
    ),
    "sampling.calibrate_switch": (f"SDE {STAGES} --num-sampling-steps 5 --num-samples 2 --budget-gmac 0.03",),
    "evaluations.evaluator": (f"{HERE}/ref.npz {HERE}/samples.npz --features pixels --split-size 5",),
    "evaluations.reference": (
        f"{HERE}/images {HERE}/new.npz --image-size 16 --features pixels",
        f"{HERE}/store {HERE}/new.npz --features pixels",
    ),
    "models.checkpoints.__main__": (
        f"inspect {HERE}/edt.pt",
        f"convert {HERE}/sit4.pt {HERE}/new.safetensors",
    ),
    "models.__main__": ("--image-size 64",),
    "models.show_amm": (
        f"--model EDT-Ti/2 --amm exp:1 --image-size 64 --out {HERE}/new.png",
        f"--ckpt {HERE}/edt.pt --blocks 0,1 --out {HERE}/new.png {LOOK}",
    ),
    "models.show_mediators": (f"--ckpt {HERE}/sit4.pt {HERE}/sit16.pt --out {HERE}/new.png {LOOK}",),
    "sampling.show_switching": (f"{HERE}/switched --out {HERE}/new.png", f"{HERE}/switched {HERE}/switched --titles a b"),
    "training.posthoc_ema": (
        f"{HERE}/runs/000-EDT-Ti-2 --sigma-rel 0.08 --out {HERE}/new.safetensors",
        f"{HERE}/runs/000-EDT-Ti-2 --sigma-rel 0.05,0.12 --step 1 --out {HERE}/new-{{}}.pt",
    ),
    "training.consolidate": (f"{HERE}/sharded {HERE}/new.pt", f"{HERE}/sharded {HERE}/edt.pt --force"),
    # Of these only the parser: a benchmark times what it does, a page waits.
    "app": (f"--ckpt {HERE}/edt.pt", f"--ckpts {HERE}/sit4.pt {HERE}/sit16.pt --mode ODE --solver ab2 --frames 3"),
    "benchmarks.compare": ("--size Ti",),
    "benchmarks.plot": (f"{HERE}/results.json",),
    "benchmarks.run": ("--size Ti",),
    "benchmarks.scaling": ("--size Ti",),
    "benchmarks.scaling_worker": ("--model EDT-Ti/2 --batch-size 1",),
    "benchmarks.curves": ("--steps 100",),
    "benchmarks.mediators": ("--image-sizes 64 --mediators 4",),
    "benchmarks.evaluator": ("--quick",),
    "examples.digits": (f"prepare {HERE}/digits", f"report --data {HERE} --samples a --samples-amm b --run c --out {HERE}/d"),
    "examples.switching": (f"--data {HERE} --samples a --samples-last b --switch-steps c --ckpts d --out {HERE}/e",),
    "examples.steps": (f"report --measured {HERE}/steps --out {HERE}/e",),
    "examples.compare": ("steps --model EDT-Ti/2 --batch-size 4 --budget-gmac 5", f"report --data a --runs b --out {HERE}/c"),
}
PARSED_ONLY = ("app", "benchmarks.", "examples.")
FACTS_OF_FOLDERS = ("settings.json", "meta.json")  # of samples and of a store, written before what they are about

NUMBERS = (
    "0", "1", "2", "3", "4", "5", "7", "9", "16", "32", "64", "-1", "-0", "0.5", "0.99", "1.5", "1e-3", "1e-30", "1e-320",
    "1e30", "1e300", "1e999", "inf", "-inf", "nan", "100000", "1000000", "1000000000", "1000000000000", "2147483648",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "9" * 5000, "1_000", "0x10", "1e3", " 3 ", "٣", "+2",
)  # fmt: skip
PATHS = tuple(
    f"{HERE}/{name}"
    for name in (
        "images", "store", "sharded", "edt.pt", "sit1.pt", "sit4.pt", "sit16.pt", "small.pt", "ref.npz", "samples.npz",
        "module.pt", "labels.txt", "runs", "runs/000-EDT-Ti-2", "runs/000-EDT-Ti-2/checkpoints/latest", "missing",
        "missing/deep/file.pt", "missing.npz", "missing.safetensors", "empty", "text.txt", "text.txt/below", "broken", "loop",
        "fifo", "fifo.pt", "fifo.npz", "empty.pt", "empty.npz",
        "noise.pt", "noise.npz", "noise.safetensors", "locked", "locked/file", "a" * 300, "picture.png",
        "missing/picture.svg", "locked/picture.pdf", "switched", "ref16.npz", "ünïcode-Ω-文.pt", "new line\n.pt",
        "",
    )
)  # fmt: skip
WORDS = (
    "", " ", "pixels", "ema", "sd-vae-ft-ema", "auto", "random", "balanced", "None", "True", "False", "0,1", "0,99", "-1,0",
    ",", "0.06,0.2", "exp:1,2", "exp:", "cos:999", "inception", "inception-tf", "timm:", "timm:no_such",
    "timm:vit_tiny_patch16_224", "dopri5", "euler", "Heun", "ab4", "bosh3", "dpm++2m", "unipc", "scipy_solver",
    "nul\0byte", "x" * 5000, "é", "文", "\udcff", "{}", "%s",
    "owner/name",
    "owner/name@main/file.pt", "https://user:s3cret-pass@host.invalid/a.pt?token=t0ken-value", "http://[::1", "https://",
    "file:///no/such/file.pt", "file://host/file.pt", "https://host.invalid/a.pt#sha256=12", "ftp://host.invalid/a.pt",
    "~", "-",
)  # fmt: skip
# A flag whose great values are no mistake of ours to find: processes as many, networks as large.
KEPT_SMALL = {
    "num_workers": ("0", "1", "-1", "x", "1.5"),
    "model": ("EDT-Ti/2", "SiT-Ti/2", "DiT-Ti/2", "MDTv2-Ti/2", "EDT-S/2", "EDT-Q/2", "edt-ti/2"),
}


@dataclass(frozen=True)
class Flag:
    """options: its spellings; empty for a positional. nargs: the most values it takes. values: of which many are accepted."""

    options: tuple[str, ...]
    nargs: int
    values: tuple[str, ...]


def main_of(script: str) -> Callable:
    module = importlib.import_module(script)
    if not script.startswith(PARSED_ONLY):
        return module.main
    if hasattr(module, "parse"):
        return module.parse

    return partial(parse_only, module.main)


@cache
def flags_of(script: str) -> dict[str, tuple[Flag, ...]]:
    """Every flag of a script's parser, by sub-command; "" where it has none."""

    parser = parser_of(script)
    subparsers = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = subparsers[0] if subparsers else {"": parser}
    return {
        name: tuple(_flag(action) for action in one._actions if not isinstance(action, argparse._HelpAction))
        for name, one in parsers.items()
    }


def _flag(action: argparse.Action) -> Flag:
    accepted = [value for value in (*NUMBERS, *WORDS, *PATHS) if action.type and _takes(action.type, value)]
    if action.dest in KEPT_SMALL:
        values = KEPT_SMALL[action.dest]
    elif isinstance(action, cli.BooleanFlag):
        values = ("True", "False", "yes", "0", "exp:1,2", "maybe")
    elif action.choices:
        values = (*map(str, action.choices), "no such choice")
    elif action.type is None or action.type is Path:
        values = (*PATHS, *WORDS)
    else:
        values = tuple(accepted)
    most = action.nargs if isinstance(action.nargs, int) else {"+": 3, "*": 3, "?": 1, None: 1}[action.nargs]
    return Flag(tuple(action.option_strings), most, values)


def _takes(kind: Callable, value: str) -> bool:
    try:
        kind(value)
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return True


@st.composite
def command_lines(draw_, script: str) -> list[str]:
    """A good command line with some flags more, a positional replaced or an argument dropped."""
    base = draw_(st.sampled_from(BASES[script])).split()
    commands = flags_of(script)
    flags = commands[base[0] if base[0] in commands else ""]
    argv, positionals = list(base), [flag for flag in flags if not flag.options]  # these come first in BASES
    for flag in draw_(st.lists(st.sampled_from(flags), max_size=4)):
        garbage = draw_(st.integers(0, 19)) == 19
        text = st.text(st.characters(exclude_characters="/~", exclude_categories=["Cs"]), max_size=20)
        value = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), text) if garbage else st.sampled_from(flag.values)
        values = draw_(st.lists(value, min_size=min(1, flag.nargs), max_size=max(1, flag.nargs))) if flag.nargs else []
        if not flag.options:
            argv[positionals.index(flag) + (base[0] in commands)] = values[0]
        elif len(values) == 1 and draw_(st.booleans()):
            argv.append(f"{draw_(st.sampled_from(flag.options))}={values[0]}")
        else:
            argv += [draw_(st.sampled_from(flag.options)), *values]
    if draw_(st.integers(0, 19)) == 19:
        argv.pop(draw_(st.integers(0, len(argv) - 1)))
    return argv


# The tiny inputs.


def make_inputs(folder: Path) -> Path:
    """Images, their latent store, checkpoints, batches of images and a training run, and much that is none of these."""
    rng = np.random.default_rng(0)
    for i in range(6):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(path)
    store = ["--data-path", str(folder / "images"), "--features-path", str(folder / "store")]
    extract_features.main([*store, "--vae", "pixels", "--image-size", "16", "--num-workers", "0"])
    for mediators in (1, 4, 16):
        random_checkpoint(folder / f"sit{mediators}.pt", mediator_num=mediators, num_classes=3, seed=mediators)
    random_checkpoint(folder / "small.pt", mediator_num=4, num_classes=3, input_size=8, objective=TRANSPORT)
    train_mask_adan.main(BASES["train_mask_adan"][0].replace(HERE, str(folder)).split())
    (run,) = (folder / "runs").iterdir()
    os.link(run / "checkpoints" / "0000001.pt", folder / "edt.pt")
    write_in_shards(folder / "sharded")
    for name, side, extra in (("ref", 4, {}), ("samples", 4, {"arr_1": rng.integers(0, 3, 12)}), ("ref16", 16, {})):
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (12, side, side, 3), np.uint8), **extra)
    sample_ddp_three.main(SWITCHING.replace("/out", "/switched").replace(HERE, str(folder)).split())
    torch.jit.save(torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 3, 4, 4)), folder / "module.pt")
    (folder / "labels.txt").write_text("0\n1\n2\n")
    _add_odd_ones(folder, rng)
    return folder


def _add_odd_ones(folder: Path, rng: np.random.Generator) -> None:
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("words")
    (folder / "broken").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    for suffix in ("pt", "npz"):
        (folder / f"empty.{suffix}").touch()
    for suffix in ("pt", "npz", "safetensors"):
        (folder / f"noise.{suffix}").write_bytes(rng.bytes(3000))


def add_pitfalls(folder: Path) -> None:
    """What cannot be copied: a folder that none but root enters, and pipes to which nobody writes, so that a reader waits."""
    (folder / "locked").mkdir(mode=0)
    for name in ("fifo", "fifo.pt", "fifo.npz"):
        os.mkfifo(folder / name)


# Running them.


def fuzz_command_lines(num_cases: int, number: int, scripts: tuple[str, ...] = tuple(BASES)) -> Tally:
    """``num_cases`` in all, shared out to the scripts; the same ones for the same seed ``number``."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        template = make_inputs(Path(place) / "inputs")
        for i, script in enumerate(scripts):
            share = (i + 1) * num_cases // len(scripts) - i * num_cases // len(scripts)
            for argv in draw(command_lines(script), share, number):
                with case_folder(template) as folder:
                    add_pitfalls(folder)
                    tally.add(script, run_case(main_of(script), argv, folder), argv)
    return tally


def fuzz_subprocesses(num_cases: int, number: int, seconds: float = 90) -> Tally:
    """The same in processes of their own, where nothing cuts the work short: whoever still works after ``seconds`` is ended."""
    tally, scripts = Tally(), [script for script in BASES if not script.startswith(PARSED_ONLY)]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        template = make_inputs(Path(place) / "inputs")
        for i in range(num_cases):
            script = scripts[i % len(scripts)]
            printable = command_lines(script).filter(lambda argv: not any("\0" in part or len(part) > 4000 for part in argv))
            drawn = draw(printable, 10 * (num_cases // len(scripts) + 1), number)
            argv = drawn[-1 - i // len(scripts)]  # the first ones are the plainest
            with case_folder(template) as folder:
                add_pitfalls(folder)
                tally.add(f"{script} (process)", run_process(script, argv, folder, seconds), argv)
    return tally


def run_process(script: str, argv: list[str], folder: Path, seconds: float) -> Outcome:
    """``python -m script ...`` in ``folder``. After ``seconds`` it must at least have begun its work."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", script.removesuffix(".__main__"), *(part.replace(HERE, str(folder)) for part in argv)]
    before = set(folder.rglob("*"))
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        sign = _sign_of_work(out, err, set(folder.rglob("*")) - before)
        return Outcome(NOT_ENDED, sign) if sign else Outcome(FAILURE, f"hangs: no sign of work, {err[-300:]!r}")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if process.returncode == 0:
        return Outcome(SUCCESS, "worked")
    if process.returncode == 2 and "usage: " in err:
        return Outcome(USAGE, err.splitlines()[-1])
    if process.returncode == 1 and len(errors) == 1 and "Traceback" not in err:
        return Outcome(CLEAR, errors[0])
    return Outcome(FAILURE, f"exit code {process.returncode}: {err[-400:]}")


def _sign_of_work(out: str, err: str, new: set[Path]) -> str | None:
    """What shows that a process's arguments were accepted: what it said, a progress bar, or a folder that it has begun."""
    if out.strip():
        return out.strip().splitlines()[-1]
    bars = re.findall(r"\d+%\|[^\r\n]*", err)
    if bars:
        return bars[-1]
    begun = (path for path in new if path.name in FACTS_OF_FOLDERS or (path.is_dir() and re.match(r"\d{3,}-", path.name)))
    return next(map(str, begun), None)
