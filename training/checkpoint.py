"""The results folder: ``<results>/<index>-<model>/checkpoints/<step>.pt``, and how a run finds its last good state."""

import os
import re
from pathlib import Path

from models.checkpoints import read_file
from runtime.files import save_atomic

LATEST = "latest"


def new_run_folder(results_dir: str | os.PathLike, model_name: str) -> Path:
    """Make ``<results>/<index>-<model>`` with the next free index."""
    results = Path(results_dir)
    results.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for path in results.iterdir() if (match := re.match(r"(\d+)-", path.name))]
    folder = results / f"{max(taken, default=-1) + 1:03d}-{_file_name(model_name)}"
    folder.mkdir()
    return folder


def last_run_folder(results_dir: str | os.PathLike, model_name: str) -> Path | None:
    """The run of this model with the highest index that has a checkpoint."""
    runs = [
        path
        for path in Path(results_dir).glob(f"*-{_file_name(model_name)}")
        if re.match(r"\d+-", path.name) and checkpoint_files(path)
    ]
    return max(runs, key=lambda path: int(path.name.split("-")[0]), default=None)


def checkpoint_files(run_folder: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    files = [path for path in (run_folder / "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    return sorted(files, key=lambda path: int(path.stem), reverse=True)


def save_checkpoint(state: dict, run_folder: Path, step: int, keep: int) -> Path:
    """Write ``<step>.pt`` whole, then move ``latest`` to it, then remove all but the newest ``keep`` (0 keeps all)."""
    path = run_folder / "checkpoints" / f"{step:07d}.pt"
    save_atomic(state, path)
    _point_latest_to(path)
    for old in checkpoint_files(run_folder)[keep:] if keep else []:
        old.unlink()
    return path


def set_newer_aside(run_folder: Path, step: int) -> list[Path]:
    """Going on from an older checkpoint: later ones are renamed ``<step>.pt.set-aside``, so that they are neither continued
    from nor counted. Returns them."""
    newer = [path for path in checkpoint_files(run_folder) if int(path.stem) > step]
    for path in newer:
        path.rename(path.with_name(path.name + ".set-aside"))
    if newer:
        _point_latest_to(run_folder / "checkpoints" / f"{step:07d}.pt")
    return newer


def _point_latest_to(path: Path) -> None:
    link = path.with_name(f".{LATEST}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name(LATEST))


def read_resume(resume: str, results_dir: str | os.PathLike, model_name: str) -> tuple[Path, dict] | None:
    """The run folder to continue and the content of its checkpoint.

    resume: a checkpoint file of a run, a run folder, or "auto": the last run of this model in ``results_dir``, None if there
    is none. Raises ValueError for a file that holds no whole training state.
    """
    if resume == "auto":
        folder = last_run_folder(results_dir, model_name)
        if folder is None:
            return None
        path = checkpoint_files(folder)[0]
    else:
        path = Path(resume)
        if path.is_dir():
            found = checkpoint_files(path)
            if not found:
                raise ValueError(f"--resume {path}: the folder holds no checkpoints/*.pt")
            path = found[0]
    content = read_file(path)
    missing = [key for key in ("model", "ema", "opt", "step", "config", "args", "sampler") if key not in content]
    if missing:
        raise ValueError(f"--resume {path}: {', '.join(missing)} missing, a run cannot be continued from it; try --init-from")
    if content["config"]["model"] != model_name:
        raise ValueError(f"--resume {path} is a run of {content['config']['model']}, not of --model {model_name}")
    path = path.resolve()
    if path.parent.name != "checkpoints":
        raise ValueError(
            f"--resume {path} does not lie in a run's checkpoints folder; start a new run from it with --init-from"
        )
    return path.parent.parent, content


def _file_name(model_name: str) -> str:
    return model_name.replace("/", "-")
