"""The two ``.npz`` files of an evaluation: what they must hold, and what is said when they do not.

A batch holds images ``arr_0``, uint8 (N, H, W, 3), and may hold labels ``arr_1`` (N,). A reference may also carry
statistics over more images than it holds: ``mu, sigma`` of the pooled features, ``mu_s, sigma_s`` of the spatial ones, and
``features``, which says whose they are. ADM's own files do not say: theirs are Inception's.
"""

import numpy as np

from data.npz import npz_keys, npz_shape, read_array, read_batches
from evaluations.features import INCEPTION
from runtime.distributed import note

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # layer -> keys of a reference batch
FEATURES_KEY = "features"
MOST_CLASSES = 10**6  # a label beyond it is a mistake, and would take memory
NEIGHBOUR = 3  # the k of precision and recall
LOOKED_AT = 64  # images whose values are looked at before the work begins

Statistics = dict[str, tuple[np.ndarray, np.ndarray]]  # layer -> mean (D,) and covariance (D, D)


def check_pair(ref: str, samples: str) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Shapes (N, H, W, 3) of the reference's images, None where it holds statistics only, and of the samples'.

    Raises ValueError, saying what is there and how to mend it, for anything but batches of uint8 NHWC images in this order.
    """
    ref_keys, samples_keys = set(npz_keys(ref)), set(npz_keys(samples))
    ref_shape = reference_shape(ref)
    if "arr_0" not in samples_keys and "mu" in samples_keys:
        raise ValueError(f"{samples} holds statistics and no images: are REF and SAMPLES swapped? The reference comes first")
    if "mu" in samples_keys and "mu" not in ref_keys:
        raise ValueError(
            f"{samples} carries the statistics of a reference and {ref} does not: REF and SAMPLES are swapped, the reference "
            "comes first. To measure a reference's own images, save its arr_0 alone"
        )
    samples_shape = _image_shape(samples)
    if "mu" in samples_keys and ref != samples:
        note(f"{samples} carries statistics like a reference batch; they are not used. REF comes first, SAMPLES second")
    if ref_shape and ref_shape[1:] != samples_shape[1:]:
        note(
            f"{ref} holds images of {ref_shape[1]} x {ref_shape[2]} pixels, {samples} of {samples_shape[1]} x "
            f"{samples_shape[2]}: published figures compare images of one size"
        )
    return ref_shape, samples_shape


def reference_shape(path: str) -> tuple[int, ...] | None:
    """Shape (N, H, W, 3) of a reference's images, None where it holds statistics only. Raises ValueError for another file."""
    keys = set(npz_keys(path))
    return None if "arr_0" not in keys and {"mu", "sigma"} <= keys else _image_shape(path)


def _image_shape(path: str) -> tuple[int, ...]:
    shape, dtype = npz_shape(path, "arr_0")
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise ValueError(f"{path}: arr_0 has shape {shape}, channels first: save arr_0.transpose(0, 2, 3, 1)")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{path}: arr_0 has shape {shape}, RGB images (N, H, W, 3) are needed")
    first = next(read_batches(path, "arr_0", LOOKED_AT))
    if dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {dtype}, images are uint8 from 0 to 255: {_mend(first)}")
    if first.max() <= 1:
        raise ValueError(
            f"{path}: no value of the first {len(first)} images is above 1: they are black, or images in [0, 1] were cast to "
            f"uint8; {_mend(first / 1.0)} before the cast"
        )
    if shape[0] <= NEIGHBOUR:
        raise ValueError(
            f"{path} holds {shape[0]} image(s): covariances need 2 and precision and recall need {NEIGHBOUR + 1}, use more"
        )
    return shape


def _mend(images: np.ndarray) -> str:
    """How values of this range become uint8."""
    if images.dtype.kind not in "biuf":
        return "save numbers"
    low, high = images.min(), images.max()
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite((low, high)).all():
        index = int((~np.isfinite(images)).any(axis=(1, 2, 3)).argmax())
        return f"image {index} is not even finite, generate it again"
    if low >= 0 and high <= 1:
        return "for these values in [0, 1] save (255 * arr_0).round().astype('uint8')"
    if -1.1 < low < 0 and high < 1.1:
        return "for these values in [-1, 1] save (127.5 * arr_0 + 128).clip(0, 255).astype('uint8')"
    return f"the values of the first images are from {low:.4g} to {high:.4g}, save arr_0.round().clip(0, 255).astype('uint8')"


def carried_statistics(path: str, statistics: str, has_images: bool) -> Statistics:
    """The statistics a reference carries, if they are those of an extractor whose ``statistics`` these are.

    Raises ValueError where they are another's and there are no images to compute them from, or where the shapes do not fit.
    """
    keys = npz_keys(path)
    carried = {}
    for layer, (mu_key, sigma_key) in STATISTICS.items():
        if mu_key in keys and sigma_key in keys:
            mu, sigma = read_array(path, mu_key), read_array(path, sigma_key)
            if mu.ndim != 1 or sigma.shape != mu.shape * 2:
                raise ValueError(f"{path}: {mu_key} is {mu.shape} and {sigma_key} {sigma.shape}, (D,) and (D, D) are needed")
            if mu.dtype.kind not in "iuf" or sigma.dtype.kind not in "iuf":
                raise ValueError(f"{path}: {mu_key} is {mu.dtype} and {sigma_key} {sigma.dtype}, numbers are needed")
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise ValueError(f"{path}: {mu_key} or {sigma_key} has a non-finite entry: compute them again")
            carried[layer] = mu, sigma
        elif mu_key in keys or sigma_key in keys:
            note(f"{path} has only one of {mu_key} and {sigma_key}: it is not used")
    owner = _owner(path) if FEATURES_KEY in keys else INCEPTION
    if not carried or owner == statistics:
        return carried
    if not has_images:
        raise ValueError(
            f"{path} carries statistics of --features {owner} and no images, they do not compare with {statistics}: "
            "choose the features the reference was made with, or a reference with images (arr_0)"
        )
    note(f"{path} carries statistics of --features {owner}: they are not used, those of {statistics} come from its images")
    return {}


def note_other_features(path: str, flag: str, asked: str) -> None:
    """A remark where a reference was made with others than Inception's features, before this is fetched, perhaps in vain."""
    if asked != INCEPTION or FEATURES_KEY not in npz_keys(path):
        return
    owner = _owner(path)
    if not owner.startswith(INCEPTION):
        note(f"{path} was made with --features {owner}, and {flag} is {asked}: {flag} {owner} compares by the same")


def _owner(path: str) -> str:
    """Whose statistics a reference carries: ``features``, a text."""
    owner = read_array(path, FEATURES_KEY)
    if owner.size != 1 or owner.dtype.kind != "U":
        raise ValueError(f"{path}: {FEATURES_KEY} is {owner.shape} {owner.dtype}, it is to be one text such as 'pixels'")
    return owner.item()


def read_labels(path: str, num_images: int, num_classes: int | None) -> np.ndarray:
    """Labels ``arr_1``, int64 (N,), of a batch of N images. Raises ValueError where there are none, or beyond num_classes."""
    if "arr_1" not in npz_keys(path):
        raise ValueError(f"{path} has no labels arr_1: --per-class and --class-balance need one for each image, leave them out")
    labels = read_array(path, "arr_1")
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise ValueError(
            f"{path}: arr_1 is {labels.shape} {labels.dtype}, class labels must be ({num_images},) integers from 0 to "
            f"{MOST_CLASSES - 1}"
        )
    if num_classes and labels.max() >= num_classes:
        raise ValueError(f"--num-classes {num_classes}: {path} has the label {labels.max()}, pass at least {labels.max() + 1}")
    return labels.astype(np.int64)
