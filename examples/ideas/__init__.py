"""The worked examples of docs/change_one_idea.md: each file holds one idea, and runs this repository's scripts with it.

python -m examples.ideas.window_attention SCRIPT [the script's flags]
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(argv: Sequence[str] | None = None) -> None:
    """``main`` of the script that the first argument names (train_mask_adan.py, attention_mediator/sample_ddp.py, or what
    python -m runs, as models or models.show_amm) on the other arguments. Raises ValueError for what is no script here."""
    script, *flags = list(sys.argv[1:] if argv is None else argv) or [""]
    path = Path(script if script.endswith(".py") else script.replace(".", "/") + ".py")
    if script and (ROOT / path.with_suffix("")).is_dir():
        path = path.with_suffix("") / "__main__.py"
    if not (ROOT / path).is_file() or ".." in path.parts or path.is_absolute():
        raise ValueError(f"{script!r} is no script of this repository: name one first, such as train_mask_adan.py")
    sys.argv[0] = script  # what --help and errors call it
    importlib.import_module(".".join(path.with_suffix("").parts)).main(flags)
