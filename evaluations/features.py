"""Feature extractors, by the name ``--features`` gives them.

An extractor turns uint8 images (B, H, W, 3) into :class:`Features`; a new one is a branch of :func:`create_features`.
"""

import argparse
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState

from runtime import cli
from runtime.distributed import together

PIXELS_SIDE = 32  # a covariance of 32 * 32 * 3 pixels has 75 MB; of 256 * 256 * 3 it would have 309 GB
SPATIAL_CHANNELS = 7  # of mixed_6/conv, for sFID; 7 * 17 * 17 = 2,023 features, about as many as pool_3 has
INCEPTION = "inception"  # the published network, in either library
KINDS = "inception, inception-tf, pixels, timm:NAME or MODULE.pt"
TIMM, SCRIPT_SUFFIXES = "timm:", (".pt", ".pth", ".ts")


@dataclass(frozen=True)
class Features:
    """What an extractor knows of a batch of images, each float32 or None where it has no such layer."""

    pool: np.ndarray  # (B, D): FID, precision and recall
    spatial: np.ndarray | None = None  # (B, D_s): sFID
    probs: np.ndarray | None = None  # (B, classes), rows sum to 1: inception score


class Extractor(Protocol):
    name: str  # printed beside the numbers, which stand alone only where it is INCEPTION
    statistics: str  # whose mu and sigma these are, written into a reference; extractors of one network share it
    fingerprint: str  # equal only where the features of an image are equal: a cache's key

    def __call__(self, images: np.ndarray) -> Features: ...


def features_name(text: str) -> str:
    """The argparse type of ``--features``."""
    script = text.endswith(SCRIPT_SUFFIXES)
    if text in ("inception", "inception-tf", "pixels") or (text.startswith(TIMM) and text != TIMM) or script:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is unknown: pass {KINDS}")


def add_features_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        type=features_name,
        default="inception",
        help="what images are compared by. inception: the FID Inception of 2015, ADM's numbers; inception-tf: its original "
        "TensorFlow graph (evaluations/requirements-tf.txt); pixels: the images in [0, 1], averaged down to 32 x 32 where "
        "larger; timm:NAME: the pooled features of a timm model; MODULE.pt: a TorchScript module, uint8 (B, 3, H, W) -> "
        "(B, D); it is a program, which runs: pass only one you trust",
    )
    parser.add_argument(
        "--inception-weights",
        metavar="FILE",
        help="weights of inception (.pth of torch-fidelity) or graph of inception-tf (.pb of ADM); None: $INCEPTION_WEIGHTS or "
        "$INCEPTION_GRAPH, else the working directory or the torch hub cache, else downloaded there",
    )
    parser.add_argument(
        "--timm-weights", metavar="FILE", help="weights of timm:NAME, .safetensors or .pth; None: timm's own, from the hub"
    )
    parser.add_argument(
        "--batch-size", type=cli.positive_int, default=64, help="images per pass of the feature extractor, in each process"
    )


def create_features(
    name: str, device: str | torch.device = "cpu", inception_weights: str | None = None, timm_weights: str | None = None
) -> Extractor:
    """The extractor called ``name``. Raises ValueError for an unknown name, and for weights that are missing or do not fit."""
    device = torch.device(device)
    if inception_weights and not name.startswith("inception"):
        raise ValueError(f"--inception-weights {inception_weights}: --features {name} has no use for them, leave the flag out")
    if timm_weights and not name.startswith(TIMM):
        raise ValueError(f"--timm-weights {timm_weights}: --features {name} has no use for them, leave the flag out")
    if name == "inception":
        from evaluations.inception import Inception  # each brings a library that the others do without

        return Inception(device, inception_weights)
    if name == "inception-tf":
        from evaluations.inception_tf import InceptionTF, find_graph

        return InceptionTF(find_graph(inception_weights), device)
    if name == "pixels":
        return Pixels()
    if name.startswith(TIMM):
        from evaluations.backbones import TimmModel

        return TimmModel(name.removeprefix(TIMM), device, timm_weights)
    if name.endswith(SCRIPT_SUFFIXES):
        from evaluations.backbones import ScriptModule

        return ScriptModule(name, device)
    raise ValueError(f"--features {name!r} is unknown: pass {KINDS}")


def load_extractor(args: argparse.Namespace, state: PartialState) -> Extractor:
    """:func:`create_features` of the flags, on every process; one process of each machine goes first and downloads weights."""
    for goes_first in (True, False):
        with together():
            if state.is_local_main_process == goes_first:
                extractor = create_features(args.features, state.device, args.inception_weights, args.timm_weights)
    return extractor


class Pixels:
    """The pixels themselves, scaled to [0, 1]; images larger than 32 x 32 are averaged down to it.

    Needs no weights and no network: for small images and for checking a pipeline, not for comparing with published numbers.
    """

    name = statistics = "pixels"
    fingerprint = f"pixels:{PIXELS_SIDE}"

    def __call__(self, images: np.ndarray) -> Features:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        side = (min(x.shape[2], PIXELS_SIDE), min(x.shape[3], PIXELS_SIDE))
        return Features(pool=F.adaptive_avg_pool2d(x, side).flatten(1).numpy())
