"""Compare generated images with a reference batch: inception score, FID, sFID, precision and recall, as ADM prints them.

python evaluations/evaluator.py REF.npz SAMPLES.npz --features pixels --json metrics.json
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

try:
    from data.npz import npz_keys, npz_shape, read_batches
    from evaluations.features import EXTRACTORS, Extractor, Features, create_features
    from evaluations.metrics import frechet_distance, inception_score, mean_covariance, precision_recall, require_finite
    from runtime import cli
    from runtime.files import write_json
except ModuleNotFoundError as error:
    if error.name not in ("data", "evaluations", "runtime"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None

NEIGHBOUR = 3  # the k of precision and recall
LINES = {  # as ADM prints them -> keys of --json
    "Inception Score": "inception_score",
    "FID": "fid",
    "sFID": "sfid",
    "Precision": "precision",
    "Recall": "recall",
}
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # layer -> keys of a reference batch


@dataclass(frozen=True)
class Side:
    """One of the two files: its features, where it has images, and the statistics it carries, where it is a reference."""

    path: str
    num_images: int
    features: Features | None
    carried: dict[str, np.ndarray]

    def statistics(self, layer: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and covariance of ``pool`` or ``spatial``: carried ones before computed ones; None where there are neither."""
        computed = getattr(self.features, layer) if self.features else None
        mu_key, sigma_key = STATISTICS[layer]
        if mu_key in self.carried and sigma_key in self.carried:
            mu, sigma = self.carried[mu_key], self.carried[sigma_key]
            if computed is None or mu.shape == computed.shape[1:]:
                return mu, sigma
            note(
                f"{self.path} carries {mu_key} of {mu.shape} features, these are {computed.shape[1:]}: "
                "it is not used, the statistics are computed from the images"
            )
        return None if computed is None else mean_covariance(computed)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument(
        "ref", metavar="REF.npz", help="reference batch: uint8 images arr_0 (N, H, W, 3) and/or mu, sigma, mu_s, sigma_s"
    )
    parser.add_argument("samples", metavar="SAMPLES.npz", help="generated images: uint8 arr_0 (M, H, W, 3)")
    parser.add_argument(
        "--features",
        choices=list(EXTRACTORS),
        default="pixels",
        help="what images are compared by; pixels: the images themselves in [0, 1], averaged down to 32 x 32 where larger",
    )
    parser.add_argument("--batch-size", type=cli.positive_int, default=64, help="images per pass of the feature extractor")
    parser.add_argument("--split-size", type=cli.positive_int, default=5000, help="images per split of the inception score")
    parser.add_argument(
        "--half",
        action=cli.BooleanFlag,
        help="precision and recall in ADM's float16 arithmetic instead of float64: shifts the third digit, "
        "for comparison with numbers of ADM's script",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the metrics to this file; null where one is not defined")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict:
    """Print the metrics; returns what ``--json`` writes."""
    args = parse_args(argv)
    extractor = create_features(args.features)
    ref_shape, samples_shape = image_shape(args.ref, is_reference=True), image_shape(args.samples, is_reference=False)
    if args.features == "pixels" and ref_shape and ref_shape[1:] != samples_shape[1:]:
        raise ValueError(
            f"{args.ref} holds images of (H, W, C) {ref_shape[1:]}, {args.samples} of {samples_shape[1:]}: "
            "--features pixels compares images of one size, make both alike"
        )
    ref = load_side(args.ref, ref_shape, extractor, args.batch_size, is_reference=True)
    samples = load_side(args.samples, samples_shape, extractor, args.batch_size, is_reference=False)
    for side in (ref, samples):
        if side.features and side.num_images <= side.features.pool.shape[1]:
            note(
                f"{side.path}: {side.num_images} images for {side.features.pool.shape[1]} features. FID is biased upwards; "
                "compare it only with FIDs of as many images"
            )
    metrics = compute(ref, samples, args.split_size, args.half)
    for name, key in LINES.items():
        value, reason = metrics[key]
        print(f"{name}: {'n/a (' + reason + ')' if value is None else f'{value} ({args.features})'}", flush=True)
    result = {key: value for key, (value, _) in metrics.items()} | {
        "features": args.features,
        "half": args.half,
        "split_size": args.split_size,
        "ref": args.ref,
        "samples": args.samples,
        "num_ref": ref.num_images,
        "num_samples": samples.num_images,
    }
    if args.json:
        write_json(result, args.json)
    return result


def compute(ref: Side, samples: Side, split_size: int, half: bool) -> dict[str, tuple[float | None, str]]:
    """Every metric as (value, ""), or as (None, why it is not defined)."""
    no_layer = "these features have no such layer"
    generated = samples.features
    metrics = dict.fromkeys(LINES.values(), (None, no_layer))
    if generated.probs is not None:
        metrics["inception_score"] = (inception_score(generated.probs, split_size), "")
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        if getattr(generated, layer) is None:
            continue
        ref_statistics = ref.statistics(layer)
        if ref_statistics is None:
            metrics[key] = (None, "the reference has neither images nor " + " and ".join(STATISTICS[layer]))
            continue
        dimensions = getattr(generated, layer).shape[1]
        if ref_statistics[0].shape != (dimensions,):
            raise ValueError(
                f"{ref.path} carries statistics of {ref_statistics[0].shape} features and no images, these features are "
                f"({dimensions},): choose the --features the reference was made with, or a reference with images (arr_0)"
            )
        metrics[key] = (frechet_distance(*ref_statistics, *samples.statistics(layer)), "")
    if ref.features is None:
        metrics["precision"] = metrics["recall"] = (None, "the reference holds statistics only, no images")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pools = (torch.from_numpy(side.features.pool).to(device) for side in (ref, samples))
        precision, recall = precision_recall(*pools, k=NEIGHBOUR, half=half)
        metrics["precision"], metrics["recall"] = (precision, ""), (recall, "")
    return metrics


def image_shape(path: str, is_reference: bool) -> tuple[int, ...] | None:
    """Shape (N, H, W, 3) of the images in ``path``; None for a reference that holds statistics only.

    Raises ValueError, saying what is there and how to mend it, for everything that is not a batch of uint8 NHWC images.
    """
    keys = npz_keys(path)
    if "arr_0" not in keys and {"mu", "sigma"} <= set(keys):
        if is_reference:
            return None
        raise ValueError(f"{path} holds statistics and no images: are REF and SAMPLES swapped? The reference comes first")
    shape, dtype = npz_shape(path, "arr_0")
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise ValueError(f"{path}: arr_0 has shape {shape}, channels first: save arr_0.transpose(0, 2, 3, 1)")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{path}: arr_0 has shape {shape}, RGB images (N, H, W, 3) are needed")
    if dtype != np.uint8:
        raise ValueError(
            f"{path}: arr_0 is {dtype}, images are uint8 from 0 to 255: "
            "for values in [0, 1] save (255 * arr_0).round().astype('uint8')"
        )
    if shape[0] <= NEIGHBOUR:
        raise ValueError(
            f"{path} holds {shape[0]} image(s): covariances need 2 and precision and recall need {NEIGHBOUR + 1}, use more"
        )
    if not is_reference and "mu" in keys:
        note(f"{path} carries statistics like a reference batch; they are not used. REF comes first, SAMPLES second")
    return shape


def load_side(path: str, shape: tuple[int, ...] | None, extractor: Extractor, batch_size: int, is_reference: bool) -> Side:
    features = None if shape is None else extract(path, shape[0], extractor, batch_size)
    carried = {}
    if is_reference:
        present = set(npz_keys(path)) & {key for pair in STATISTICS.values() for key in pair}
        carried = {key: load_array(path, key) for key in present}
    return Side(path, shape[0] if shape else 0, features, carried)


def load_array(path: str, key: str) -> np.ndarray:
    return np.concatenate(list(read_batches(path, key, batch_size=4096)))


def extract(path: str, num_images: int, extractor: Extractor, batch_size: int) -> Features:
    """The features of all images in ``path``, read ``batch_size`` at a time.

    Raises ValueError naming the file and the first image with a non-finite feature.
    """
    layers: dict[str, np.ndarray] = {}
    done = 0
    for images in read_batches(path, "arr_0", batch_size):
        for layer, values in vars(extractor(images)).items():
            if values is None:
                continue
            try:
                require_finite(values, f"{layer} feature", first_image=done)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if layer not in layers:
                layers[layer] = np.empty((num_images, *values.shape[1:]), np.float32)
            layers[layer][done : done + len(values)] = values
        done += len(images)
    return Features(**layers)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
