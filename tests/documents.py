"""What the documents say: their commands, links, flags and files."""

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from tests.launch import ROOT

PAGES = tuple(sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]))


@dataclass(frozen=True)
class Command:
    """A line of a ```bash block without its launcher. program: a script's path, or a word of the shell; text: as written."""

    program: str
    arguments: list[str]
    text: str
    environment: dict[str, str] = field(default_factory=dict)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[Command]:
    """Every command of a page's ```bash blocks, in order; ``a && b`` is two, but for the shell's own work."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("for", "mkdir"):
                yield Command("shell", [line], line)
                continue
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield _command(words[:end], line)
                words = words[end + 1 :]


def _command(words: list[str], text: str) -> Command:
    """Takes the environment and the launcher off; the launchers' own parsers take theirs."""
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if words[0] == "srun":
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        parsed = get_args_parser().parse_args(rest)
        program, rest = _script(parsed.training_script, parsed.module), parsed.training_script_args
    elif words[:2] == ["accelerate", "launch"]:
        parsed = launch_command_parser().parse_args(rest[1:])
        program, rest = _script(parsed.training_script, parsed.module), parsed.training_script_args
    elif program == "python":
        program, rest = (_script(rest[1], True), rest[2:]) if rest[0] == "-m" else (_script(rest[0], False), rest[1:])
    elif program in ("bash", "sbatch"):
        program, rest = ("recipe", rest[1:] if program == "sbatch" else rest)
    return Command(program, rest, text, environment)


def _script(name: str, is_module: bool) -> str:
    """The script's path in the repository; a module that is not ours by its name. Raises ValueError for a missing script."""
    path = Path(name.replace(".", "/")) if is_module else Path(name)
    for candidate in (path / "__main__.py", path.with_suffix(".py")):
        if (ROOT / candidate).is_file():
            return str(candidate)
    if is_module:
        return name
    raise ValueError(f"there is no script {name}")


@functools.cache
def make_targets() -> frozenset[str]:
    heads = re.findall(r"^([^\s#:=][^:=\n]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return frozenset(target for head in heads for target in head.split())
