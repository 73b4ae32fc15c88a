"""The demo's data and its verdict: scikit-learn's handwritten digits, 1,797 real images.

python examples/digits.py prepare FOLDER     write them as image folders, FOLDER/train and FOLDER/held_out
python examples/digits.py report ...         measure samples against them; prints a table, writes metrics.json
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from data.images import ImageFolder, load_image
from data.npz import read_batches
from evaluations.metrics import frechet_distance, mean_covariance
from runtime import cli
from runtime.files import write_json

IMAGE_SIZE = 16
HELD_OUT = 359  # of 1,797: 20 %
NUM_REAL_PAIRS = 20


def prepare(folder: Path) -> None:
    """Write the images, every pixel of the 8x8 doubled, as <class>/<index>.png, of which a random 20 % are held out."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for split, indices in (("held_out", order[:HELD_OUT]), ("train", order[HELD_OUT:])):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST).save(path)
    print(f"{folder}: {len(order) - HELD_OUT} training and {HELD_OUT} held-out images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels")


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Flattened images in [0, 1], (N, 768), and labels."""
    images = ImageFolder(folder)
    pixels = np.stack([load_image(path, IMAGE_SIZE) for path in images.paths])
    return flatten(pixels), images.labels


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = np.concatenate(list(read_batches(path, "arr_0", 1000)))
    return flatten(images), np.concatenate(list(read_batches(path, "arr_1", 1000)))


def flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(*mean_covariance(a), *mean_covariance(b))


def to_nearest(images: np.ndarray, training: np.ndarray) -> float:
    """The median Euclidean distance to the nearest training image."""
    squared = (images**2).sum(1)[:, None] - 2 * images @ training.T + (training**2).sum(1)
    return float(np.median(np.sqrt(squared.clip(min=0).min(1))))


class Judge:
    """Measures samples against the digits. of_real: the same figures of the real images, where they make sense."""

    def __init__(self, data: Path):
        (self.train, train_labels), (self.held_out, held_out_labels) = (
            read_folder(data / "train"),
            read_folder(data / "held_out"),
        )
        self.classifier = SVC(C=10).fit(self.train, train_labels)
        rng = np.random.default_rng(0)
        draws = [self.train[rng.permutation(len(self.train))[:HELD_OUT]] for _ in range(NUM_REAL_PAIRS)]
        self.of_real = {
            "classifier_accuracy_on_held_out": float((self.classifier.predict(self.held_out) == held_out_labels).mean()),
            "frechet_of_real_images": float(np.mean([distance(drawn, self.held_out) for drawn in draws])),
            "median_distance_of_held_out_to_training": to_nearest(self.held_out, self.train),
        }

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """images: flattened, (N, 768) in [0, 1]; the Frechet distance is that of the first 359."""
        frechet = distance(images[:HELD_OUT], self.held_out)
        return {
            "label_agreement": float((self.classifier.predict(images) == labels).mean()),
            "frechet": frechet,
            "frechet_ratio": frechet / self.of_real["frechet_of_real_images"],
            "median_distance_to_training": to_nearest(images, self.train),
        }


def measure(data: Path, samples: dict[str, Path]) -> dict:
    """Figures of the real images, and of each file of samples under its name."""
    judge = Judge(data)
    return judge.of_real | {name: judge(*read_samples(path)) for name, path in samples.items()}


def quality_rows(figures: dict, first: str, second: str, agreement: str, frechet: str) -> list[tuple[str, float, float, str]]:
    """Rows of a report's table: a title, both figures, and what is wanted of the first."""
    floor = figures["median_distance_of_held_out_to_training"]
    titles = (
        ("samples the classifier reads as their label", "label_agreement", agreement),
        ("Frechet distance / that of real images", "frechet_ratio", frechet),
        ("median distance to nearest training image", "median_distance_to_training", f">= {floor:.2f}"),
    )
    return [(title, figures[first][key], figures[second][key], wanted) for title, key, wanted in titles]


def print_table(figures: dict, columns: tuple[str, str], rows: list[tuple[str, float, float, str]]) -> None:
    print(f"\nclassifier on held-out real digits: {figures['classifier_accuracy_on_held_out']:.3f}\n")
    print(f"{'':45}{columns[0]:>10}{columns[1]:>10}   wanted of {columns[0]}")
    for title, a, b, wanted in rows:
        print(f"{title:45}{a:#10.4g}{b:#10.4g}   {wanted}".rstrip())


def report(args: argparse.Namespace) -> None:
    figures = measure(args.data, {"plain": args.samples, "amm": args.samples_amm})
    write_json(figures, args.out / "metrics.json")
    shutil.copyfile(args.run / "loss.png", args.out / "training_curve.png")
    print_table(figures, ("plain", "AMM"), quality_rows(figures, "plain", "amm", ">= 0.95", "<= 1.6"))
    print(f"\n{args.out}: samples.png, samples_amm.png, training_curve.png, metrics.json")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    make = commands.add_parser("prepare", description="write the digits as image folders")
    make.add_argument("folder", type=Path)
    judge = commands.add_parser("report", description="measure samples against the held-out digits")
    judge.add_argument("--data", type=Path, required=True, help="the folder of prepare")
    judge.add_argument("--samples", type=Path, required=True, help=".npz made without AMM")
    judge.add_argument("--samples-amm", type=Path, required=True, help=".npz made with AMM")
    judge.add_argument("--run", type=Path, required=True, help="the training run's folder")
    judge.add_argument("--out", type=Path, required=True, help="where metrics.json and training_curve.png go")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        prepare(args.folder)
    else:
        report(args)


if __name__ == "__main__":
    cli.run(main)
