"""Encode a folder of images into a latent store that training reads (data/store.py says what is in it).

    torchrun --nnodes=1 --nproc_per_node=8 extract_features.py --data-path imagenet/train --features-path store/features

Run the same command again after an interruption to go on. The number of processes does not change the store.
"""

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from data.codec import Codec, load_codec
from data.images import ImageFolder, load_image
from data.store_writer import StoreWriter, describe
from runtime import cli, distributed
from runtime.ahead import read_ahead
from runtime.draws import Purpose, normals
from runtime.files import SharedRows, batches_to_do
from runtime.locks import folder_lock

POLL_SECONDS = 0.5


def parse_args(argv: Sequence[str] | None):
    parser = cli.ArgumentParser("Encode images into a store of latents. Restartable; any number of processes.")
    parser.add_argument("--data-path", required=True, help="image folder with one sub-folder per class")
    parser.add_argument("--features-path", required=True, help="folder of the latent store: new, or one to go on with")
    parser.add_argument(
        "--vae",
        default="sd-vae-ft-ema",
        help="sd-vae-ft-ema, sd-vae-ft-mse, a folder with an AutoencoderKL, a hub id, or pixels (no encoding)",
    )
    parser.add_argument("--image-size", type=cli.positive_int, default=256, help="side of the square centre crop, in pixels")
    parser.add_argument("--batch-size", type=cli.positive_int, default=32, help="images per batch and process")
    parser.add_argument(
        "--num-workers",
        type=cli.number(int, 0, 1024),
        default=min(4, os.cpu_count() or 1),
        help="threads that read images, in each process; 0: none, images are read between encodings",
    )
    parser.add_argument(
        "--store",
        choices=("latents", "moments"),
        default="latents",
        help="latents: one posterior sample an image; moments: mean and log-variance, sampled in training",
    )
    parser.add_argument("--flip", action=cli.BooleanFlag, help="encode the mirrored images as well, for flips in training")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="number format on disk")
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the posterior samples")
    parser.add_argument("--skip-bad", action=cli.BooleanFlag, help="leave unreadable images out instead of stopping")
    return parser.parse_args(argv)


Item = tuple[int, np.ndarray | None, str | None]  # row, uint8 (size, size, 3), or why there is none


def read_batches(images: ImageFolder, batches: Sequence[list[int]], size: int, num_workers: int) -> Iterator[list[Item]]:
    """The images of ``batches`` of rows. Threads read one batch while the caller works on the one before; 0: the caller reads.

    An unreadable image is a value, for only the caller knows whether it is missed.
    """

    def read(row: int) -> Item:
        try:
            return row, load_image(images.paths[row], size), None
        except ValueError as error:
            return row, None, str(error)

    if not num_workers:
        yield from (list(map(read, rows)) for rows in batches)
        return
    # Threads, which end with their process however that ends; Pillow lets go of the interpreter's lock as it decodes.
    with ThreadPoolExecutor(num_workers, thread_name_prefix="images") as pool:
        yield from read_ahead(list(pool.map(read, rows)) for rows in batches)


def encode(codec: Codec, images: torch.Tensor, rows: list[int], *, kind: str, seed: int, view: int) -> np.ndarray:
    """uint8 (B, H, W, 3) -> what the store holds, (B, C or 2C, S, S). view: 0 the images, 1 their mirror images."""
    if kind == "moments":
        return torch.cat(codec.moments(images), dim=1).cpu().numpy()
    noise = normals(seed, Purpose.LATENT, rows, view, codec.latent_shape(images.shape[1])) if codec.stochastic else None
    return codec.encode(images, noise).cpu().numpy()


def extract(
    batches: Iterable[list[Item]], codec: Codec, writer: StoreWriter, missing: np.ndarray, bar: tqdm, *, skip_bad: bool
) -> None:
    """Encode ``batches`` and write those of their rows that are ``missing``, bool (N,).

    Raises ValueError naming an unreadable image, unless skip_bad.
    """
    meta, shown = writer.meta, time.monotonic()
    for batch in batches:
        for row, image, reason in batch:
            if image is not None or not missing[row]:
                continue
            if not skip_bad:
                raise ValueError(f"{reason}, or leave such images out with --skip-bad")
            writer.leave_out(row)
        readable = [(row, image) for row, image, _ in batch if image is not None]
        if readable:
            rows = [row for row, _ in readable]
            images = torch.from_numpy(np.stack([image for _, image in readable]))  # (B, H, W, 3)
            views = [images, images.flip(2)] if meta["flip"] else [images]
            encoded = [encode(codec, v, rows, kind=meta["store"], seed=meta["seed"], view=k) for k, v in enumerate(views)]
            for row, *values in zip(rows, *encoded, strict=True):
                if missing[row]:
                    writer.write(row, values)
        if time.monotonic() - shown > POLL_SECONDS and not bar.disable:
            show(bar, writer)
            shown = time.monotonic()


def show(bar: tqdm, writer: StoreWriter) -> int:
    """Move the bar to what all processes together have done; how many rows are missing."""
    missing = int((writer.progress() == SharedRows.MISSING).sum())
    bar.update(bar.total - missing - bar.n)
    return missing


def summarise(writer: StoreWriter, images: ImageFolder, left_out: np.ndarray, seconds: float, num_new: int) -> None:
    for row in left_out:
        print(f"left out: {images.paths[row]}")
    print(
        f"{writer.path}: {len(images) - len(left_out)} images, {len(left_out)} left out, {len(images.class_names)} classes, "
        f"{writer.meta['store']} {tuple(writer.meta['shape'][1:])} {writer.meta['dtype']}, codec {writer.meta['codec']}; "
        f"{num_new} new in {seconds:.1f} s ({num_new / max(seconds, 1e-9):.0f} images/s)",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    state = distributed.start()
    with distributed.together():
        images = ImageFolder(args.data_path)
    codec = load_codec(args.vae, state.device)
    meta = describe(images, codec, args.image_size, kind=args.store, dtype=args.dtype, flip=args.flip, seed=args.seed)
    writer = StoreWriter(args.features_path, meta)
    with contextlib.ExitStack() as held:
        with distributed.together():
            if state.is_main_process and not writer.complete():
                held.enter_context(folder_lock(writer.path))
                writer.prepare(images.labels)
        state.wait_for_everyone()
        if not writer.complete():
            fill(writer, images, codec, state, args)
        elif state.is_main_process:
            print(f"{writer.path} is complete already: {len(images)} images, nothing to do")


def fill(writer: StoreWriter, images: ImageFolder, codec: Codec, state: PartialState, args: Namespace) -> None:
    """Make every missing row, this process its share; the main process waits for all and declares the store complete."""
    progress = writer.progress()
    state.wait_for_everyone()  # all have seen the same progress before anyone adds to it, so their shares do not overlap
    share = distributed.my_share(batches_to_do(progress, args.batch_size), state)
    batches = read_batches(images, share, args.image_size, args.num_workers)
    missing = progress == SharedRows.MISSING
    num_missing, start = int(missing.sum()), time.monotonic()
    bar = tqdm(
        total=len(images),
        initial=len(images) - num_missing,
        unit=" images",
        disable=not state.is_main_process,
        mininterval=1.0,
        file=sys.stderr,
    )
    with bar:
        if share:  # without one, the main process may have finished the store, and removed the map, before it is opened here
            with writer:
                extract(batches, codec, writer, missing, bar, skip_bad=args.skip_bad)
        # No barrier: a slow process may lag behind by more than its timeout. If one fails, all end (runtime.watch).
        while state.is_main_process and show(bar, writer):
            time.sleep(POLL_SECONDS)
    if state.is_main_process:
        summarise(writer, images, writer.finish(), time.monotonic() - start, num_missing)


if __name__ == "__main__":
    cli.run(main)
