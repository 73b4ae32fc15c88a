"""What a run reports: a line on the console, ``metrics.jsonl``, TensorBoard, W&B, and ``loss.png`` redrawn as it goes."""

import contextlib
import json
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from tqdm import tqdm

from runtime.cli import first_line
from runtime.files import append_line, atomic_file
from runtime.redact import redact_values
from training.checkpoint import METRICS

SMOOTHED_POINTS = 50  # of the moving average drawn over the raw curve


def open_trackers(accelerator: Accelerator, folder: Path, args: Namespace, resumed_at: int | None = None) -> None:
    """TensorBoard always, Weights & Biases with ``--wandb``. resumed_at: the step after which a resumed run goes on, which is
    where what TensorBoard was told before ends. Raises ValueError where W&B refuses."""
    purge = {} if resumed_at is None else {"purge_step": resumed_at + 1}
    accelerator.trackers = [TensorBoardTracker("tensorboard", folder, **purge)]
    if args.wandb:
        project = args.wandb_project or "efficient-diffusion-transformers"
        name = args.wandb_name or folder.name
        known = {"id": _wandb_id(folder), "resume": "allow"} if accelerator.is_main_process else {}
        accelerator.trackers.append(
            WandBTracker(
                project, entity=args.wandb_entity, name=name, dir=str(folder), config=redact_values(vars(args)), **known
            )
        )
    threading.excepthook = _all_but_disk_errors
    for tracker in accelerator.trackers:
        try:
            tracker.start()
        except Exception as error:  # wandb raises errors of its own kinds, for a wrong key or an absent network
            if tracker.name != "wandb" and isinstance(error, OSError):
                raise OSError(f"cannot write {folder / tracker.name}: {error.strerror or error}") from error
            if tracker.name != "wandb":
                raise
            raise ValueError(
                f"--wandb could not be started: {first_line(error)}; check the key and the network, or set WANDB_MODE=offline"
            ) from error


def _all_but_disk_errors(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, whose error it raises again in the next call: no need for its traceback."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _wandb_id(folder: Path) -> str:
    """W&B's name for the run in this folder, so that a resumed run goes on under it."""
    path = folder / "wandb_id"
    if not path.exists():
        with atomic_file(path) as file:
            file.write(uuid.uuid4().hex[:8].encode())
    return path.read_text()


class RunLog:
    """Only the main process writes.

    ``metrics.jsonl`` holds nothing but functions of (seed, step), so that a resumed run's file equals an uninterrupted one's;
    speed and times go to the console and to the trackers.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, first_step: int, last_step: int):
        self.accelerator, self.folder = accelerator, folder
        self.history: list[dict] = []
        if accelerator.is_main_process:
            self.history = _keep_until(folder / METRICS, first_step)
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file gets a line now and then
        )
        self._began, self._images = time.perf_counter(), 0

    def step_done(self, num_images: int) -> None:
        """num_images: of all processes together."""
        self._images += num_images
        self.bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: means since the last call, read from the device, so that the clock is read after it has done its work."""
        images_per_second = self._images / max(time.perf_counter() - self._began, 1e-9)
        self._began, self._images = time.perf_counter(), 0
        if not self.accelerator.is_main_process:
            return
        record = {"step": step, **metrics}
        self.history.append(record)
        append_line(self.folder / METRICS, json.dumps(record))
        self._tell_trackers(step, {**metrics, "images_per_second": images_per_second})
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.bar.set_postfix_str(f"{images_per_second:.0f} images/s")
        self.message(f"step {step:7d}  {values}  {images_per_second:.0f} images/s")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is none of the training's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def evaluated(self, step: int, scores: dict[str, float], settings: dict[str, float | str], seconds: float) -> None:
        """scores: by the evaluator's keys. settings: what they depend on besides the network; ``features`` is one of them.
        Redraws ``evaluation.png``, of the evaluations with these settings."""
        if not self.accelerator.is_main_process:
            return
        named, settings = ({f"eval/{name}": value for name, value in part.items()} for part in (scores, settings))
        record = {"step": step, **named, **settings}
        self.history.append(record)
        append_line(self.folder / METRICS, json.dumps(record))
        self._tell_trackers(step, {**named, "eval/seconds": seconds})
        values = "  ".join(f"{name} {value:.4g}" for name, value in named.items())
        self.message(f"step {step:7d}  {values}  ({settings['eval/features']}, {seconds:.0f} s)")
        comparable = [record for record in self.history if settings.items() <= record.items()]
        draw_evaluations(comparable, self.folder / "evaluation.png")

    def has_evaluation(self, step: int) -> bool:
        """Known on the main process only."""
        return any(record["step"] == step and "eval/features" in record for record in self.history)

    def _tell_trackers(self, step: int, values: dict[str, float]) -> None:
        """One that its disk refuses is given up: its lines are in ``metrics.jsonl`` as well."""
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(values, step=step)
            except OSError as error:
                self.accelerator.trackers.remove(tracker)
                self.message(
                    f"{tracker.name} is given up from step {step} on, its log cannot be written: {error.strerror or error}"
                )

    def message(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def draw(self) -> None:
        """Write ``loss.png``."""
        if self.accelerator.is_main_process and self.history:
            draw_loss(self.history, self.folder / "loss.png")

    def close(self) -> None:
        self.bar.close()


def _keep_until(path: Path, step: int) -> list[dict]:
    """The records of a log up to a step; later ones, and a line cut by a kill, are removed from the file."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] > step:
                break
            records.append(record)
        with atomic_file(path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    return records


def draw_evaluations(records: list[dict], path: Path) -> None:
    """The Frechet distance of evaluations against the step, logarithmic."""
    from matplotlib.figure import Figure

    records = [record for record in records if record.get("eval/fid", 0) > 0]
    if not records:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([record["step"] for record in records], [record["eval/fid"] for record in records], marker=".")
    axes.set(xlabel="step", ylabel=f"Frechet distance ({records[-1]['eval/features']})", yscale="log")
    axes.grid(alpha=0.3, which="both")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_loss(history: list[dict], path: Path) -> None:
    """The training curve: every part of the loss against the step, logarithmic, with the total's moving average."""
    from matplotlib.figure import Figure  # imported here: it costs half a second that most processes do not need to spend

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in ("loss", "loss_plain", "loss_masked"):
        points = [(record["step"], record[name]) for record in history if name in record]
        if points:
            steps, values = zip(*points, strict=True)
            (line,) = axes.plot(steps, values, alpha=0.35, linewidth=1)
            axes.plot(steps, _moving_average(values), color=line.get_color(), label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _moving_average(values: list[float]) -> list[float]:
    window = max(1, len(values) // SMOOTHED_POINTS)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
