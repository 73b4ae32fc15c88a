"""Build a reference batch for evaluator.py from an image folder or from a latent store.

    python evaluations/reference.py DATA_PATH REF.npz --image-size 256
    torchrun --nproc_per_node=8 evaluations/reference.py imagenet/train REF.npz --image-size 256

As ADM's own files it holds 10,000 images, for precision and recall, and the feature statistics of the whole data set, for FID.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

try:
    from data.codec import load_codec
    from data.images import ImageFolder, load_image
    from data.npz import RowBlocks, write_npz
    from data.store import META, LatentStore
    from evaluations.batches import FEATURES_KEY, STATISTICS
    from evaluations.extraction import extract_batches, note_small_set
    from evaluations.features import Extractor, add_features_arguments, load_extractor
    from evaluations.metrics import Moments
    from runtime import cli, draws
    from runtime.ahead import read_ahead
    from runtime.distributed import gather_rows, leave_group, my_share, note, start, together
    from runtime.files import check_writable
except ModuleNotFoundError as error:
    if error.name not in ("data", "evaluations", "runtime"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None


@dataclass(frozen=True)
class Images:
    """A data set of square images.

    labels: int64 (N,), None where unknown. read: positions -> uint8 (n, size, size, 3). name: what a message calls an image.
    """

    size: int
    count: int
    labels: np.ndarray | None
    read: Callable[[Sequence[int]], np.ndarray]
    name: Callable[[int], str]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("data_path", metavar="DATA_PATH", help="DATA_PATH/<class>/<image>, or a folder of extract_features.py")
    parser.add_argument("ref", metavar="REF.npz", help="file to write")
    parser.add_argument(
        "--image-size", type=cli.positive_int, help="side in pixels of the centre crops; None: that of the latent store"
    )
    parser.add_argument(
        "--num-images",
        type=cli.positive_int,
        default=10_000,
        help="images in the file, drawn without replacement; all where there are fewer",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="which --num-images images are drawn")
    parser.add_argument(
        "--statistics",
        action=cli.BooleanFlag,
        default=True,
        help="write mu, sigma, mu_s and sigma_s of the whole data set, whatever --num-images; without them the evaluator takes "
        "those of the file's images",
    )
    add_features_arguments(parser)
    parser.add_argument("--vae", help="codec that decodes a latent store: name, local folder or hub id; None: the store's own")
    parser.add_argument(
        "--num-workers", type=cli.positive_int, default=min(8, os.cpu_count() or 1), help="threads a process reads images with"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.ref.endswith(".npz"):
        raise ValueError(f"the output must be named *.npz, got {args.ref!r}: DATA_PATH comes first, REF.npz second")
    state = start()
    with ThreadPoolExecutor(args.num_workers) as pool:
        with together():
            images = from_store(args, state) if is_store(args.data_path) else from_folder(args, pool)
            if args.statistics and images.count < 2:
                raise ValueError(f"a covariance needs two images, there is {images.count}: use --no-statistics")
            if state.is_main_process:
                check_writable(args.ref)
        statistics = {}
        if args.statistics:
            statistics = measure(images, load_extractor(args, state), args.batch_size, state)
        leave_group()  # nobody should have to wait for the main process to write
        if state.is_main_process:
            write(args, images, statistics)


def write(args: argparse.Namespace, images: Images, statistics: dict[str, np.ndarray]) -> None:
    chosen = draws.subset(args.seed, images.count, args.num_images)
    rows = RowBlocks(
        (len(chosen), images.size, images.size, 3),
        np.dtype(np.uint8),
        (images.read(positions) for positions in batches(chosen, args.batch_size)),
    )
    arrays = {"arr_0": rows}
    if images.labels is not None:
        arrays["arr_1"] = images.labels[chosen]
    write_npz(args.ref, arrays | statistics)
    told = f", statistics of {images.count} ({args.features})" if statistics else ""
    print(f"{args.ref}: {len(chosen)} images of {images.size} x {images.size} pixels from {args.data_path}{told}")


def measure(images: Images, extractor: Extractor, batch_size: int, state: PartialState) -> dict[str, np.ndarray]:
    """The statistics of all images as a reference carries them, on the main process; empty elsewhere.

    Every process takes a slice of the data set; memory does not grow with it. Raises ValueError naming an image with a
    non-finite feature.
    """
    mine = my_share(range(images.count), state)
    moments, constant = {layer: Moments() for layer in STATISTICS}, []
    progress = tqdm(total=len(mine), unit=" images", disable=not state.is_main_process, file=sys.stderr)
    with together(), progress:
        read = read_ahead(images.read(positions) for positions in batches(mine, batch_size))
        for values, of_one_colour in extract_batches(read, mine, images.name, extractor, progress):
            for layer in moments.keys() & values.keys():
                moments[layer].update(values[layer])
            constant += map(images.name, of_one_colour)
    if constant := gather_object(constant):
        note(f"{len(constant)} image(s) of one colour throughout, the first is {constant[0]}")
    totals = {layer: merge_everywhere(known, state) for layer, known in moments.items()}
    if not state.is_main_process:
        return {}
    arrays = {FEATURES_KEY: np.array([extractor.statistics])}
    for layer, (mu_key, sigma_key) in STATISTICS.items():
        if totals[layer].count:
            arrays[mu_key], arrays[sigma_key] = totals[layer].mean_covariance()
    note_small_set("the data set", images.count, len(arrays["mu"]))
    return arrays


def merge_everywhere(moments: Moments, state: PartialState) -> Moments:
    """The moments of all processes together, on the main process; elsewhere of none."""
    parts = {key: gather_rows(value[None] if moments.count else None, state) for key, value in moments.state().items()}
    total = Moments()
    for process in range(0 if parts["count"] is None else len(parts["count"])):
        total.merge(Moments.from_state({key: values[process] for key, values in parts.items()}))
    return total


def is_store(path: str) -> bool:
    return Path(path, META).exists() or any(Path(path).glob("*_features/*.npy"))


def from_folder(args: argparse.Namespace, pool: ThreadPoolExecutor) -> Images:
    """The centre crops of an image folder."""
    if args.image_size is None:
        raise ValueError(f"--image-size is needed: {args.data_path} is no latent store, which would know it")
    if args.vae is not None:
        raise ValueError(f"--vae {args.vae} decodes latent stores, and {args.data_path} is none: leave it out")
    folder = ImageFolder(args.data_path)

    def read(positions: Sequence[int]) -> np.ndarray:
        return np.stack(list(pool.map(lambda index: load_image(folder.paths[index], args.image_size), positions)))

    return Images(args.image_size, len(folder), folder.labels, read, lambda position: folder.paths[position])


def from_store(args: argparse.Namespace, state: PartialState) -> Images:
    """The decoded latents of a store, mirrored ones left out; of stored moments the mean is decoded."""
    store = LatentStore.open(args.data_path, labels_required=False)
    size = store.meta["image_size"]
    if args.image_size not in (None, size):
        raise ValueError(f"--image-size {args.image_size}: {args.data_path} holds latents of {size}-pixel images, leave it out")
    codec = load_codec(args.vae or store.codec, state.device)
    if codec.latent_shape(size) != tuple(store.latent_shape):
        raise ValueError(
            f"codec {codec.name} has latents of {codec.latent_shape(size)}, {args.data_path} holds {tuple(store.latent_shape)} "
            f"of {store.codec}: pass the VAE it was made with as --vae"
        )

    def read(positions: Sequence[int]) -> np.ndarray:
        noise = torch.zeros(len(positions), *store.latent_shape) if store.needs_noise else None
        latents = store.rows(np.asarray(positions), noise=noise)
        bad = ~latents.isfinite().flatten(1).all(1)
        if bad.any():  # it would become a picture like any other
            raise ValueError(
                f"{args.data_path}: the latent of row {positions[int(bad.int().argmax())]} is not finite: extract it again"
            )
        # The scale of the latents is the store's; the codec takes its own out again.
        return codec.decode(latents * (codec.scale / store.scale)).cpu().numpy()

    return Images(size, len(store), store.labels, read, lambda position: f"{args.data_path}, row {position}")


def batches(positions: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


if __name__ == "__main__":
    cli.run(main)
