"""The numbers of an evaluation: ADM's five, and those asked for on top."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState

from evaluations.batches import NEIGHBOUR, STATISTICS
from evaluations.extraction import Side
from evaluations.metrics import (
    bootstrap_frechet,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    membership,
)

LINES = {  # keys of --json -> as ADM prints them
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
DENSITY_NEIGHBOUR = 5  # as its authors choose
NORMAL_95 = 1.96
LOWEST_SHOWN = 5  # classes of lowest precision that are printed


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What is to be computed, and how; the names are the evaluator's flags."""

    split_size: int = 5000
    pr_half: bool = False
    kid: bool = False
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    density_coverage: bool = False
    bootstrap: int = 0  # resamples; 0: no interval
    per_class: bool = False
    class_balance: bool = False
    num_classes: int | None = None
    seed: int = 0


def products_device(state: PartialState) -> torch.device:
    """Where :func:`compute` is to multiply: MPS has no float64."""
    return state.device if state.device.type == "cuda" else torch.device("cpu")


def compute(
    ref: Side, samples: Side, labels: np.ndarray | None, requests: Requests, device: torch.device
) -> tuple[dict, dict[str, str]]:
    """All metrics by their key in --json, None where one is not defined, and for those why.

    labels: int64 (M,), where per-class numbers are asked for. device: of the products of features.
    """
    scores = dict.fromkeys(LINES)
    reasons = dict.fromkeys(LINES, "these features have no such layer")
    if samples.features.probs is not None:
        scores["inception_score"] = inception_score(samples.features.probs, requests.split_size)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        if layer not in samples.statistics:
            continue
        if layer in ref.statistics:
            scores[key] = _frechet(ref, samples, layer)
        else:
            reasons[key] = "the reference has neither images nor " + " and ".join(STATISTICS[layer])
    if requests.bootstrap:
        scores |= _fid_interval(ref, samples, scores["fid"], requests)
    if ref.features is None:
        reasons |= dict.fromkeys(("precision", "recall"), "the reference holds statistics only, no images")
    else:
        scores |= _by_images(ref, samples, labels, requests, device)
    if requests.class_balance:
        scores["class_balance"] = class_balance(labels, requests.num_classes)
    return scores, reasons


def _frechet(ref: Side, samples: Side, layer: str) -> float:
    theirs, ours = ref.statistics[layer], samples.statistics[layer]
    if theirs[0].shape != ours[0].shape:
        raise ValueError(
            f"{ref.path} carries {STATISTICS[layer][0]} of {len(theirs[0])} features, the samples have {len(ours[0])}: "
            "it was made with other features"
        )
    return frechet_distance(*theirs, *ours)


def _fid_interval(ref: Side, samples: Side, fid: float, requests: Requests) -> dict:
    """A resample repeats images, which biases its distance further upwards: only the spread of the resamples is used."""
    resampled = bootstrap_frechet(*ref.statistics["pool"], samples.features.pool, requests.bootstrap, requests.seed)
    error = float(np.std(resampled, ddof=1))
    return {"fid_standard_error": error, "fid_interval": [fid - NORMAL_95 * error, fid + NORMAL_95 * error]}


def _by_images(ref: Side, samples: Side, labels: np.ndarray | None, requests: Requests, device: torch.device) -> dict:
    """What compares single images with single images."""
    theirs, ours = (torch.from_numpy(side.features.pool).to(device) for side in (ref, samples))
    ours_inside, theirs_inside = membership(theirs, ours, k=NEIGHBOUR, half=requests.pr_half)
    scores = {"precision": float(np.mean(ours_inside)), "recall": float(np.mean(theirs_inside))}
    if requests.kid:
        subsets = requests.kid_subsets, requests.kid_subset_size, requests.seed
        scores["kid"], scores["kid_std"] = kernel_distance(theirs, ours, *subsets)
    if requests.density_coverage:
        scores["density"], scores["coverage"] = density_coverage(theirs, ours, k=DENSITY_NEIGHBOUR)
    if requests.per_class:
        scores["precision_per_class"] = {str(label): float(ours_inside[labels == label].mean()) for label in np.unique(labels)}
    return scores


def class_balance(labels: np.ndarray, num_classes: int | None = None) -> dict:
    """How evenly ``labels`` (M,) cover their classes, with the probability of less even ones if all were equally likely.

    num_classes: more than the largest label; None: that + 1.
    """
    from scipy.stats import chisquare  # imported here: it takes a second, which trainings need not spend

    num_classes = num_classes or int(labels.max()) + 1
    counts = np.bincount(labels, minlength=num_classes)
    return {
        "num_classes": num_classes,
        "fewest": int(counts.min()),
        "most": int(counts.max()),
        "absent": np.flatnonzero(counts == 0).tolist(),
        "p_value": float(chisquare(counts).pvalue) if num_classes > 1 else 1.0,
    }


def lines(scores: dict, reasons: dict[str, str], suffix: str) -> list[str]:
    """What is printed: ADM's five lines, then the others. suffix: follows every number that depends on the features."""
    shown = []
    for key, title in LINES.items():
        shown.append(f"{title}: {scores[key]}{suffix}" if scores[key] is not None else f"{title}: n/a ({reasons[key]})")
    if "fid_interval" in scores:
        low, high = scores["fid_interval"]
        shown.append(f"FID 95 % interval: {low} to {high} (standard error {scores['fid_standard_error']}){suffix}")
    if "kid" in scores:
        shown.append(f"KID: {scores['kid']} +- {scores['kid_std']}{suffix}")
    if "density" in scores:
        shown += [f"Density: {scores['density']}{suffix}", f"Coverage: {scores['coverage']}{suffix}"]
    if "precision_per_class" in scores:
        lowest = sorted(scores["precision_per_class"].items(), key=lambda item: item[1])[:LOWEST_SHOWN]
        shown.append("Lowest precision per class: " + ", ".join(f"{value} (class {label})" for label, value in lowest) + suffix)
    if "class_balance" in scores:
        balance = scores["class_balance"]
        shown.append(
            f"Class balance: {balance['fewest']} to {balance['most']} images in each of {balance['num_classes']} classes, "
            f"{len(balance['absent'])} classes absent, p = {balance['p_value']:.3g} if all were equally likely"
        )
    return shown
