"""Every script's parser, and its verdict on a command line, without running the script."""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from unittest import mock

from runtime import cli
from tests.launch import ROOT


class _Caught(BaseException):
    """Carries a parser out of its script."""


@cache
def scripts() -> tuple[str, ...]:
    """Paths of all that is run by name: files that end in a call of their ``main``."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = []
    for name in files.stdout.split():
        path = ROOT / name
        if (
            path.is_file()
            and not name.startswith("tests/")
            and re.search(r'^if __name__ == "__main__":', path.read_text(), re.M)
        ):
            found.append(name)
    return tuple(sorted(found))


def parser_of(script: str) -> argparse.ArgumentParser | None:
    """None for a script without a parser of its own."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if not hasattr(module, "main"):
        return None

    def catch(parser, *args, **kwargs):
        raise _Caught(parser)

    with mock.patch.object(cli.ArgumentParser, "parse_args", catch), mock.patch.object(sys, "argv", [script]):
        try:
            module.main([])
        except _Caught as caught:
            return caught.args[0]
    raise AssertionError(f"{script} has a main without a parser")


def parse_only(main: Callable, argv: Sequence[str]) -> None:
    """``main(argv)`` up to where its parser has taken the arguments."""
    parse = cli.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise _Caught(parser)

    with mock.patch.object(cli.ArgumentParser, "parse_args", stop):
        try:
            main(argv)
        except _Caught:
            return
    raise AssertionError(f"{main.__module__} does not parse its arguments")


def with_subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(one for action in actions for one in action.choices.values())]


@cache
def all_flags() -> frozenset[str]:
    """Names of all scripts' flags, with dashes and without the two before them."""
    parsers = [parser for script in scripts() if (parser := parser_of(script))]
    actions = [action for parser in parsers for one in with_subparsers(parser) for action in one._actions]
    return frozenset(option.removeprefix("--") for action in actions for option in action.option_strings)
