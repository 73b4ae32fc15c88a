"""``--help`` of every script, as it stands in tests/golden/help/. After a change of flags write the files anew, and read the
difference: UPDATE_HELP=1 python -m pytest tests/test_help.py"""

import os
import sys

import pytest

from tests.launch import ROOT
from tests.parsers import parser_of, scripts, with_subparsers
from tests.shared import GOLDEN

FOLDER = GOLDEN / "help"


def golden_file(script: str):
    return FOLDER / f"{script.removesuffix('.py').replace('/', '.')}.txt"


@pytest.mark.parametrize("script", scripts())
def test_help(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = parser_of(script)
    if parser is None:
        pytest.skip("it hands its arguments to another script")
    text = "\n".join(one.format_help() for one in with_subparsers(parser))
    assert str(ROOT) not in text  # the same wherever the repository lies
    file = golden_file(script)
    if os.environ.get("UPDATE_HELP"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"{script} has no golden file: UPDATE_HELP=1 python -m pytest tests/test_help.py writes it"
    assert text == file.read_text()


def test_no_file_is_left_over():
    """Of a script that was renamed or removed."""
    wanted = {golden_file(script).name for script in scripts() if parser_of(script)}
    assert {path.name for path in FOLDER.glob("*.txt")} <= wanted
    assert sys.version_info[:2] == (3, 11)  # argparse words its help otherwise in others
