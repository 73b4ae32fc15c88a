"""Every command of README and docs runs, in small, as it is written there: taken from the pages, in their order, each page in a
folder of its own. What a page does not make is there for it; sizes are made small and nothing else; processes are one.
A command without a rule fails, and so does a rule without a command."""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import train_mask_adan
from diffusion.transport.paths import PATHS
from models.registry import CONFIGS, FAMILIES
from tests import edt_checkpoints, sit_checkpoints
from tests.documents import PAGES, Command, commands, make_targets
from tests.launch import ROOT, run_job
from tests.parsers import parse_only

SMALL_RUN = "--max-steps 2 --global-batch-size 4 --log-every 1 --ckpt-every 1"
SMALL_METRICS = "--eval-features pixels --eval-samples 4 --eval-steps 3"
ANY_RUN = "--model EDT-Ti/2 --feature-path FEATURES --results-dir ANY"  # what three dots stand for
IMAGES = "--image-size 16 --vae pixels --num-workers 0"
CLASSES = 3  # of the images


def replaced(arguments: list[str], **values: str) -> list[str]:
    """Other values for these flags, where they are given."""
    arguments = list(arguments)
    for i, argument in enumerate(arguments[:-1]):
        name = argument.removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in values:
            arguments[i + 1] = values[name]
    return arguments


def small_paths(arguments: list[str]) -> list[str]:
    """Models of size Ti, and the files that small runs leave."""
    for pattern, small in (
        (r"-(S|B|L|XL)([-/])2\b", r"-Ti\g<2>2"),
        (r"samples_\d+x256x256x3", "samples_4x16x16x3"),
        (r"samples_359x", "samples_4x"),
        (r"/0200000\.pt", "/0000001.pt"),
    ):
        arguments = [re.sub(pattern, small, argument) for argument in arguments]
    return arguments


def training(arguments: list[str]) -> list[str]:
    arguments = replaced(arguments, decode_layer="2")
    if "..." in arguments:
        place = arguments.index("...")
        arguments = [*arguments[:place], *ANY_RUN.split(), *arguments[place + 1 :]]
    images = IMAGES.split() if {"--data-path", "--data_path"} & {*arguments} else []
    metrics = SMALL_METRICS.split() if "--eval-every" in arguments else []
    return [*(a for a in arguments if a != "--compile"), *images, *metrics, *SMALL_RUN.split()]


def sampling(arguments: list[str]) -> list[str]:
    arguments = replaced(arguments, image_size="16", vae="pixels", classes="0,1", budget_gmac="0.0315")
    arguments = replaced(arguments, switch_ratio1="0.3", switch_ratio2="0.1")
    return [*(a for a in arguments if a != "--compile"), "--num-sampling-steps", "6"]


def many(arguments: list[str]) -> list[str]:
    return [*sampling(arguments), "--num-fid-samples", "4"]


def extraction(arguments: list[str]) -> list[str]:
    return [*replaced(arguments, image_size="16"), "--vae", "pixels", "--num-workers", "0"]


def measuring(arguments: list[str]) -> list[str]:
    return [*replaced(arguments, image_size="16"), "--features", "pixels"]


def looking(arguments: list[str]) -> list[str]:
    return [*arguments, "--num-images", "2", "--num-sampling-steps", "2"] if "--ckpt" in arguments else arguments


def as_it_is(arguments: list[str]) -> list[str]:
    return arguments


# Script -> what makes its arguments small.
RULES: dict[str, Callable[[list[str]], list[str]]] = {
    "extract_features.py": extraction,
    "train_mask_adan.py": training,
    "attention_mediator/train.py": training,
    "attention_mediator/train_256to512.py": lambda arguments: [*training(arguments), "--image-size", "32"],
    "training/consolidate.py": as_it_is,
    "training/posthoc_ema.py": as_it_is,
    "sample_ddp.py": many,
    "inference.py": sampling,
    "attention_mediator/sample_ddp.py": many,
    "time_step_wise_adjusting/sample_ddp_three.py": many,
    "sampling/calibrate_switch.py": lambda arguments: [*sampling(arguments), "--num-samples", "2"],
    "evaluations/reference.py": measuring,
    "evaluations/evaluator.py": measuring,
    "models/checkpoints/__main__.py": as_it_is,
    "models/__main__.py": as_it_is,
    "models/show_amm.py": looking,
    "models/show_mediators.py": looking,
    "sampling/show_switching.py": as_it_is,
    "examples/digits.py": as_it_is,
}
# What takes long, or serves: only its arguments are looked at.
PARSED_ONLY = ("app.py", "benchmarks/compare.py", "benchmarks/scaling.py", "benchmarks/curves.py")
IDEAS = tuple(f"examples/ideas/{name}.py" for name in ("window_attention", "shifted_path", "long_skips"))
# Not ours, and nothing to run.
OTHERS = ("make", "source", "pytest")


# What a page needs and does not make.


@pytest.fixture(scope="module")
def stock(tmp_path_factory, image_folder, latent_store) -> Path:
    """Checkpoints and files to begin with, by the names that pages use."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "DATA").symlink_to(image_folder)
    (folder / "FEATURES").symlink_to(latent_store)
    edt_checkpoints.random_checkpoint(folder / "EDT")
    edt_checkpoints.random_checkpoint(folder / "EDT-guide", seed=1)
    for mediators in (None, 4, 16, 64):
        path = folder / f"SiT{mediators or ''}"
        sit_checkpoints.random_checkpoint(path, mediator_num=mediators, num_classes=CLASSES)
    sit_checkpoints.random_checkpoint(folder / "SiT64-low", mediator_num=64, num_classes=CLASSES, input_size=16)
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", arr_0=rng.integers(0, 256, (12, 16, 16, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_mask_adan.main(f"{ANY_RUN} {SMALL_RUN}".split())
    return folder


@pytest.fixture
def page_folder(tmp_path, stock, monkeypatch) -> Path:
    for name in ("DATA", "FEATURES"):
        (tmp_path / name).symlink_to(stock / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ideas_forgotten():
    tables = (CONFIGS, FAMILIES, PATHS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def provide(argument: str, script: str, arguments: list[str], stock: Path) -> str:
    """Put what a page takes for granted in its place; another argument for what would be downloaded."""
    if re.match(r"https://|[a-z]+/DiT-", argument):
        argument = "CKPT"
    path = Path(argument)
    if path.exists() or path.is_symlink():
        return argument
    run = re.match(r"(.*/\d{3}-(EDT|SiT)-[^/]*)(/checkpoints/.*)?$", argument)
    if argument == "imagenet/train":
        path.parent.mkdir()
        path.symlink_to(Path("DATA").resolve())
    elif run and run[2] == "EDT":
        shutil.copytree(stock / "ANY" / "000-EDT-Ti-2", run[1], symlinks=True)
    elif run:
        path.parent.mkdir(parents=True)
        shutil.copy(stock / "SiT4", path)
    elif re.fullmatch(r"CKPT(\d*|-GUIDE)|FILE|[A-Z]\S*\.pt", argument):
        path.symlink_to(stock / weights(argument, script, arguments))
    elif argument.endswith(".npz") and script == "evaluations/evaluator.py":
        shutil.copy(stock / "images.npz", path)
    return argument


def weights(argument: str, script: str, arguments: list[str]) -> str:
    """Which of the stock's checkpoints a placeholder is."""
    if argument in ("CKPT256", "CKPT-GUIDE"):
        return "SiT64-low" if argument == "CKPT256" else "EDT-guide"
    if not script.startswith("attention_mediator") and argument in ("CKPT", "FILE", "EDT-XL.pt"):
        return "EDT"
    number = re.search(r"--mediator[_-]num (\d+)", " ".join(arguments))
    return "SiT" + (argument.removeprefix("CKPT") or (number[1] if number else "4"))


def run(command: Command, stock: Path) -> None:
    if command.program in OTHERS:
        if command.program == "make":
            assert {*command.arguments} <= make_targets()
    elif command.program == "shell":
        unpack(command.arguments[0])
    elif command.program == "recipe":
        run(from_recipe(command), stock)
    elif command.program in IDEAS:
        load(command.program).register()
        run(Command(script_of(command), command.arguments[1:], command.text), stock)
    elif command.program in PARSED_ONLY:
        parse_only(load(command.program).main, command.arguments)
    else:
        arguments = RULES[command.program](small_paths(command.arguments))
        arguments = [provide(argument, command.program, arguments, stock) for argument in arguments]
        if "--fsdp" in arguments:
            arguments = [str(Path(a).absolute()) if a.isupper() else a for a in arguments]
            with contextlib.chdir(ROOT):
                run_job(command.program.removesuffix(".py"), arguments, 2)
        else:
            load(command.program).main(arguments)


def script_of(idea: Command) -> str:
    script = idea.arguments[0]
    return script if script.endswith(".py") else f"{script}/__main__.py"


def load(program: str):
    return importlib.import_module(program.removesuffix(".py").replace("/", "."))


def from_recipe(command: Command) -> Command:
    """The training command that a recipe launches."""
    recipe, *flags = command.arguments
    environment = {**os.environ, **command.environment, "LAUNCH": "echo"}
    done = subprocess.run(["bash", ROOT / recipe, *flags], env=environment, capture_output=True, text=True, check=True)
    program, *arguments = done.stdout.split()
    return Command(program, arguments, command.text)


def unpack(line: str) -> None:
    """Lines for the shell, on an archive of two archives."""
    if not Path("ILSVRC2012_img_train.tar").exists():
        for name in ("n01", "n02"):
            subprocess.run(["tar", "-cf", f"{name}.tar", "-C", Path("DATA").resolve(), "ant/0.png"], check=True)
        subprocess.run(["tar", "-cf", "ILSVRC2012_img_train.tar", "n01.tar", "n02.tar"], check=True)
    subprocess.run(["bash", "-ec", line], check=True)
    if "for" in line:  # both archives are unpacked: from here on, enough images for a batch
        assert sorted(path.name for path in Path("imagenet/train").iterdir()) == ["n01", "n02"]
        shutil.rmtree("imagenet/train")
        Path("imagenet/train").symlink_to(Path("DATA").resolve())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, page_folder, stock, ideas_forgotten, fresh_accelerate_state, monkeypatch):
    for command in commands(page):
        monkeypatch.setattr(sys, "argv", [command.program])
        fresh_accelerate_state()
        try:
            run(command, stock)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code and "--help" in command.arguments:
                continue
            raise AssertionError(f"{page.name}: {command.text}") from error


def test_every_rule_has_a_command():
    """A rule for nothing is left over from a command that was."""
    found = [command for page in PAGES for command in commands(page)]
    programs = {command.program for command in found}
    programs |= {from_recipe(command).program for command in found if command.program == "recipe"}
    programs |= {script_of(command) for command in found if command.program in IDEAS}
    assert {*RULES, *PARSED_ONLY, *IDEAS, *OTHERS} <= programs
