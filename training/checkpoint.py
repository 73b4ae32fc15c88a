"""The results folder: ``<results>/<index>-<model>/checkpoints/<step>.pt``, and how a run finds its last good state."""

import contextlib
import os
import re
import zipfile
from pathlib import Path

from models.checkpoints import read_file
from runtime.files import save_atomic

LATEST = "latest"
ENTRIES = ("model", "ema", "opt", "step", "config", "args", "data", "sampler", "skipped")  # without which no run goes on


def new_run_folder(results_dir: str | os.PathLike, model_name: str) -> Path:
    """Make ``<results>/<index>-<model>`` with the next free index."""
    results = Path(results_dir)
    results.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for path in results.iterdir() if (match := re.match(r"(\d+)-", path.name))]
    index = max(taken, default=-1) + 1
    while True:
        folder = results / f"{index:03d}-{_file_name(model_name)}"
        with contextlib.suppress(FileExistsError):  # another job's, made just now
            folder.mkdir()
            return folder
        index += 1


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


def run_folder_of(resume: str, results_dir: str | os.PathLike, model_name: str) -> Path | None:
    """The run that ``--resume`` names: by one of its checkpoints, its folder, or "auto": the last run of this model in
    ``results_dir``, None if there is none. Raises ValueError for a path that is not of a run."""
    if resume == "auto":
        return last_run_folder(results_dir, model_name)
    path = Path(resume)
    if not path.exists():
        raise ValueError(f"--resume {path} does not exist")
    if path.is_dir():
        if not checkpoint_files(path):
            raise ValueError(f"--resume {path}: the folder holds no checkpoints/*.pt")
        return path.resolve()
    folder = path.resolve().parent
    if folder.name != "checkpoints":
        raise ValueError(
            f"--resume {path} does not lie in a run's checkpoints folder; start a new run from it with --init-from"
        )
    return folder.parent


def whole_checkpoint(resume: str, folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint of the run in ``folder`` to go on from, and what there is to say of others.

    resume: the file, where it names one other than ``latest``; otherwise the newest that is whole: newer ones that are damaged
    are renamed ``<name>.damaged``. Raises ValueError where none is left, or the named one is damaged. One process calls this
    before others read.
    """
    if resume != "auto" and not Path(resume).is_dir() and Path(resume).name != LATEST:
        check_whole(Path(resume).resolve())
        return Path(resume).resolve(), []
    remarks = []
    for path in checkpoint_files(folder):
        try:
            check_whole(path)
        except ValueError as error:
            path.rename(path.with_name(path.name + ".damaged"))
            remarks.append(f"{error}; it is set aside as {path.name}.damaged")
            continue
        if remarks:
            _point_latest_to(path)
        return path, remarks
    raise ValueError(f"--resume {resume}: no checkpoint of {folder} is whole; {'; '.join(remarks)}")


def check_whole(path: Path) -> None:
    """Raises ValueError for a file whose bytes are not those that were written, or that holds no training state."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch itself does not look at the checksums
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if broken:
        raise ValueError(f"{path} is damaged (the checksum of {broken} is wrong)")
    content = read_file(path)
    missing = [key for key in ENTRIES if key not in content]
    if missing:
        raise ValueError(f"--resume {path}: {', '.join(missing)} missing, a run cannot be continued from it; try --init-from")


def remove_leftovers(run_folder: Path) -> None:
    """Half a checkpoint that a killed process left behind. Only for the owner of the folder."""
    for path in (run_folder / "checkpoints").glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _file_name(model_name: str) -> str:
    return model_name.replace("/", "-")
