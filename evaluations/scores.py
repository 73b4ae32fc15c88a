"""The numbers of an evaluation: ADM's five, and those asked for on top."""

import argparse

import numpy as np
import torch
from scipy.stats import chisquare

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
NORMAL_95 = 1.96
LOWEST_SHOWN = 5  # classes of lowest precision that are printed


def compute(
    ref: Side, samples: Side, labels: np.ndarray | None, args: argparse.Namespace, device: torch.device
) -> tuple[dict, dict[str, str]]:
    """All metrics by their key in --json, None where one is not defined, and for those why.

    labels: int64 (M,), where per-class numbers are asked for. device: of the products of features.
    """
    scores = dict.fromkeys(LINES)
    reasons = dict.fromkeys(LINES, "these features have no such layer")
    if samples.features.probs is not None:
        scores["inception_score"] = inception_score(samples.features.probs, args.split_size)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        if layer not in samples.statistics:
            continue
        if layer in ref.statistics:
            scores[key] = _frechet(ref, samples, layer)
        else:
            reasons[key] = "the reference has neither images nor " + " and ".join(STATISTICS[layer])
    if args.bootstrap:
        scores |= _fid_interval(ref, samples, scores["fid"], args)
    if ref.features is None:
        reasons |= dict.fromkeys(("precision", "recall"), "the reference holds statistics only, no images")
    else:
        scores |= _by_images(ref, samples, labels, args, device)
    if args.class_balance:
        scores["class_balance"] = class_balance(labels, args.num_classes)
    return scores, reasons


def _frechet(ref: Side, samples: Side, layer: str) -> float:
    theirs, ours = ref.statistics[layer], samples.statistics[layer]
    if theirs[0].shape != ours[0].shape:
        raise ValueError(
            f"{ref.path} carries {STATISTICS[layer][0]} of {len(theirs[0])} features, the samples have {len(ours[0])}: "
            "it was made with other features"
        )
    return frechet_distance(*theirs, *ours)


def _fid_interval(ref: Side, samples: Side, fid: float, args: argparse.Namespace) -> dict:
    """A resample repeats images, which biases its distance further upwards: only the spread of the resamples is used."""
    resampled = bootstrap_frechet(*ref.statistics["pool"], samples.features.pool, args.bootstrap, args.seed)
    error = float(np.std(resampled, ddof=1))
    return {"fid_standard_error": error, "fid_interval": [fid - NORMAL_95 * error, fid + NORMAL_95 * error]}


def _by_images(ref: Side, samples: Side, labels: np.ndarray | None, args: argparse.Namespace, device: torch.device) -> dict:
    """What compares single images with single images."""
    theirs, ours = (torch.from_numpy(side.features.pool).to(device) for side in (ref, samples))
    ours_inside, theirs_inside = membership(theirs, ours, k=NEIGHBOUR, half=args.pr_half)
    scores = {"precision": float(np.mean(ours_inside)), "recall": float(np.mean(theirs_inside))}
    if args.kid:
        scores["kid"], scores["kid_std"] = kernel_distance(theirs, ours, args.kid_subsets, args.kid_subset_size, args.seed)
    if args.density_coverage:
        scores["density"], scores["coverage"] = density_coverage(theirs, ours)
    if args.per_class:
        scores["precision_per_class"] = {str(label): float(ours_inside[labels == label].mean()) for label in np.unique(labels)}
    return scores


def class_balance(labels: np.ndarray, num_classes: int | None = None) -> dict:
    """How evenly ``labels`` (M,) cover their classes, with the probability of less even ones if all were equally likely.

    num_classes: None: largest label + 1. Raises ValueError for a label beyond it.
    """
    num_classes = num_classes or int(labels.max()) + 1
    if labels.max() >= num_classes:
        raise ValueError(f"--num-classes {num_classes}: there is a label {labels.max()}")
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
