"""The results folder: ``<results>/<index>-<model>/checkpoints/<step>.pt``, and how a run finds its last good state.

In the place of ``<step>.pt`` may stand a sharded checkpoint, the folder ``<step>`` (training.shards).
"""

import contextlib
import itertools
import os
import re
import shutil
import zipfile
from pathlib import Path

from data.npz import DAMAGE
from models.checkpoints import read_file
from models.checkpoints.files import SHARDED_FACTS
from runtime.files import remove_temporaries, save_atomic
from training.profiles import FOLDER, snapshot_files
from training.shards import check_files, is_sharded, read_facts

LATEST, METRICS = "latest", "metrics.jsonl"
# Without which no run goes on.
ENTRIES = dict.fromkeys(("model", "ema", "opt", "config", "args", "data", "sampler"), dict) | {"step": int, "skipped": int}


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
    """A run's checkpoints, newest first; of one step, the file before the folder."""
    paths = [
        path
        for path in (run_folder / "checkpoints").glob("*")
        if path.stem.isdecimal() and (path.suffix == ".pt" or (path.suffix == "" and is_sharded(path)))
    ]
    return sorted(paths, key=lambda path: (int(path.stem), path.suffix), reverse=True)


def checkpoint_path(run_folder: Path, step: int, sharded: bool = False) -> Path:
    return run_folder / "checkpoints" / f"{step:07d}{'' if sharded else '.pt'}"


def save_checkpoint(state: dict, run_folder: Path, step: int, keep: int) -> Path:
    """Write ``<step>.pt`` whole, then move ``latest`` to it, then remove all but the newest ``keep`` (0 keeps all)."""
    path = checkpoint_path(run_folder, step)
    save_atomic(state, path)
    make_latest(path, keep)
    return path


def make_latest(path: Path, keep: int = 0) -> None:
    """Move ``latest`` to a new checkpoint that is whole, then remove all but the newest ``keep`` of its run."""
    _point_latest_to(path)
    paths = checkpoint_files(path.parent.parent)
    steps = sorted({int(path.stem) for path in paths}, reverse=True)  # of one step there may be a file and a folder
    for old in paths if keep else []:
        if int(old.stem) not in steps[:keep]:
            _remove(old)


def is_latest(path: Path) -> bool:
    latest = path.resolve().with_name(LATEST)
    return latest.exists() and latest.resolve() == path.resolve()


def _remove(path: Path) -> None:
    if path.is_dir():
        leaving = path.with_name(f".{path.name}.tmp")  # half a folder must not look like a checkpoint
        path.rename(leaving)
        shutil.rmtree(leaving)
    else:
        path.unlink()


def set_newer_aside(run_folder: Path, step: int) -> list[Path]:
    """Going on from an older checkpoint: later ones are renamed ``<step>.pt.set-aside``, so that they are neither continued
    from nor counted, and so are their snapshots; the log that belongs to them is copied. Returns the checkpoints. Snapshots
    later than the newest checkpoint, of steps that are made again, are removed."""
    newer = [path for path in checkpoint_files(run_folder) if int(path.stem) > step]
    for path in newer:
        path.rename(_free_name(path, ".set-aside"))
    if newer:
        _point_latest_to(checkpoint_files(run_folder)[0])
        log = run_folder / METRICS
        if log.exists():
            shutil.copyfile(log, _free_name(log, ".set-aside"))
    for path in [path for made, path in snapshot_files(run_folder) if made > step]:
        if newer:
            path.rename(_free_name(path, ".set-aside"))
        else:
            path.unlink()
    return newer


def _free_name(path: Path, ending: str) -> Path:
    """``<path><ending>``, or with a number where that is taken."""
    names = itertools.chain([""], (f".{i}" for i in itertools.count(1)))
    return next(free for name in names if not (free := path.with_name(f"{path.name}{ending}{name}")).exists())


def _point_latest_to(path: Path) -> None:
    link = path.with_name(f".{LATEST}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    try:
        os.replace(link, path.with_name(LATEST))
    except OSError:
        link.unlink()
        raise


def run_folder_of(resume: str, results_dir: str | os.PathLike, model_name: str) -> Path | None:
    """The run that ``--resume`` names: by one of its checkpoints, its folder, or "auto": the last run of this model in
    ``results_dir``, None if there is none. Raises ValueError for a path that is not of a run."""
    if resume == "auto":
        return last_run_folder(results_dir, model_name)
    path = Path(resume)
    if not path.exists():
        raise ValueError(f"--resume {path} does not exist")
    if path.is_dir() and not is_sharded(path):
        if not checkpoint_files(path):
            raise ValueError(f"--resume {path}: the folder holds no checkpoints/*.pt")
        return path.resolve()
    folder = path.resolve().parent
    if folder.name != "checkpoints":
        raise ValueError(
            f"--resume {path} does not lie in a run's checkpoints folder; start a new run from it with --init-from"
        )
    return folder.parent


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


def whole_checkpoint(resume: str, folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint of the run in ``folder`` to go on from, and what there is to say of others.

    resume: the file, where it names one other than ``latest``; otherwise the newest that is whole: newer ones that are damaged
    are then renamed ``<name>.damaged``. Raises ValueError where none is whole, the named one is damaged, or one that is whole
    holds no training state. One process calls this before others read.
    """
    is_folder = Path(resume).is_dir() and not is_sharded(Path(resume))
    if resume != "auto" and not is_folder and Path(resume).name != LATEST:
        check_whole(Path(resume).resolve())
        return Path(resume).resolve(), []
    damaged = []
    for path in checkpoint_files(folder):
        try:
            check_whole(path)
        except DamagedError as error:
            damaged.append((path, error))
            continue
        remarks = []
        for other, error in damaged:
            aside = other.rename(_free_name(other, ".damaged"))
            remarks.append(f"{error}; it is set aside as {aside.name}")
        if damaged:
            _point_latest_to(path)
        return path, remarks
    reasons = "; ".join(str(error) for _, error in damaged)
    raise ValueError(f"--resume {resume}: no checkpoint of {folder} is whole: {reasons}")


def check_whole(path: Path) -> None:
    """Raises DamagedError for a file whose bytes are not those that were written, ValueError for one that holds no training
    state."""
    try:
        _check_archive(path / SHARDED_FACTS if is_sharded(path) else path)
        if is_sharded(path):
            check_files(path)
        content = read_content(path)
    except ValueError as error:
        raise DamagedError(str(error)) from error
    missing = [key for key, kind in ENTRIES.items() if not isinstance(content.get(key), kind)]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: no run can be continued from it; start a new one with --init-from"
        )


def read_content(path: Path) -> dict:
    """Of a sharded checkpoint, all but the tensors in shards."""
    return read_facts(path) if is_sharded(path) else read_file(path)


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch itself does not look at the checksums
    except (OSError, *DAMAGE) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if broken:
        raise ValueError(f"{path} is damaged (the checksum of {broken} is wrong)")


def remove_leftovers(run_folder: Path) -> None:
    """What a killed process left half written. Only for the owner of the folder."""
    for folder in (run_folder, run_folder / FOLDER):
        remove_temporaries(folder)
    for path in (run_folder / "checkpoints").glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _file_name(model_name: str) -> str:
    return model_name.replace("/", "-")
