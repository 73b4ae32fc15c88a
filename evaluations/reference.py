"""Build a reference batch for evaluator.py from an image folder or from a latent store.

python evaluations/reference.py DATA_PATH REF.npz --image-size 256 --num-images 10000
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

try:
    from data.codec import load_codec
    from data.images import ImageFolder, load_image
    from data.npz import RowBlocks, write_npz
    from data.store import META, LatentStore
    from runtime import cli, draws
except ModuleNotFoundError as error:
    if error.name not in ("data", "runtime"):
        raise
    raise SystemExit("error: install the repository first: pip install -e .") from None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("data_path", metavar="DATA_PATH", help="DATA_PATH/<class>/<image>, or a folder of extract_features.py")
    parser.add_argument("ref", metavar="REF.npz", help="file to write: arr_0, uint8 (N, S, S, 3)")
    parser.add_argument(
        "--image-size", type=cli.positive_int, help="side in pixels of the centre crops; None: that of the latent store"
    )
    parser.add_argument("--num-images", type=cli.positive_int, help="how many, drawn without replacement; None: all")
    parser.add_argument("--seed", type=int, default=0, help="which --num-images images are drawn")
    parser.add_argument("--vae", help="codec that decodes a latent store: name, local folder or hub id; None: the store's own")
    parser.add_argument("--batch-size", type=cli.positive_int, default=64, help="images in memory at once")
    parser.add_argument(
        "--num-workers", type=cli.positive_int, default=min(8, os.cpu_count() or 1), help="threads that read images"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.ref.endswith(".npz"):
        raise ValueError(f"the output must be named *.npz, got {args.ref!r}: DATA_PATH comes first, REF.npz second")
    array = from_store(args) if is_store(args.data_path) else from_folder(args)
    write_npz(args.ref, {"arr_0": array})
    print(f"{args.ref}: {array.shape[0]} images of {array.shape[1]} x {array.shape[2]} pixels from {args.data_path}")


def is_store(path: str) -> bool:
    return Path(path, META).exists() or any(Path(path).glob("*_features/*.npy"))


def from_folder(args: argparse.Namespace) -> RowBlocks:
    """The centre crops of an image folder."""
    if args.image_size is None:
        raise ValueError(f"--image-size is needed: {args.data_path} is no latent store, which would know it")
    if args.vae is not None:
        raise ValueError(f"--vae {args.vae} decodes latent stores, and {args.data_path} is none: leave it out")
    paths = ImageFolder(args.data_path).paths
    chosen = choose(len(paths), args)

    def blocks() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(args.num_workers) as pool:
            for indices in batches(chosen, args.batch_size):
                yield np.stack(list(pool.map(lambda index: load_image(paths[index], args.image_size), indices)))

    return RowBlocks((len(chosen), args.image_size, args.image_size, 3), np.dtype(np.uint8), blocks())


def from_store(args: argparse.Namespace) -> RowBlocks:
    """The decoded latents of a store, mirrored ones left out; of stored moments the mean is decoded."""
    store = LatentStore.open(args.data_path, labels_required=False)
    size = store.meta["image_size"]
    if args.image_size not in (None, size):
        raise ValueError(f"--image-size {args.image_size}: {args.data_path} holds latents of {size}-pixel images, leave it out")
    chosen = choose(len(store), args)
    codec = load_codec(args.vae or store.codec, "cuda" if torch.cuda.is_available() else "cpu")
    if codec.latent_shape(size) != tuple(store.latent_shape):
        raise ValueError(
            f"codec {codec.name} has latents of {codec.latent_shape(size)}, {args.data_path} holds {tuple(store.latent_shape)} "
            f"of {store.codec}: pass the VAE it was made with as --vae"
        )

    def blocks() -> Iterator[np.ndarray]:
        for indices in batches(chosen, args.batch_size):
            noise = torch.zeros(len(indices), *store.latent_shape) if store.needs_noise else None
            latents = store.rows(indices, noise=noise)
            # The scale of the latents is the store's; the codec takes its own out again.
            yield codec.decode(latents * (codec.scale / store.scale)).cpu().numpy()

    return RowBlocks((len(chosen), size, size, 3), np.dtype(np.uint8), blocks())


def choose(available: int, args: argparse.Namespace) -> np.ndarray:
    """The positions, ascending, of the images to take."""
    if args.num_images is None:
        return np.arange(available)
    if args.num_images > available:
        raise ValueError(
            f"--num-images {args.num_images}: {args.data_path} holds only {available}, pass at most that or leave it out"
        )
    return np.sort(draws.generator(args.seed, draws.Purpose.METRIC_SUBSET).permutation(available)[: args.num_images])


def batches(positions: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


if __name__ == "__main__":
    cli.run(main)
