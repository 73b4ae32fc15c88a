"""Make one ``.pt`` of a sharded checkpoint, which training with ``--fsdp`` writes: for sampling, and to go on without it.

    python -m training.consolidate RUN/checkpoints/0400000 OUT.pt

One process; it needs memory for all of the result. Written as RUN/checkpoints/0400000.pt, the run resumes from it, samples are
made from checkpoints/latest, and it is removed with the folder when newer ones take their place.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime import cli
from runtime.files import check_writable, save_atomic
from training.checkpoint import check_whole, is_latest, make_latest
from training.shards import is_sharded, read_whole


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a run's checkpoints/<step>, or checkpoints/latest")
    parser.add_argument("out", type=Path, help="a .pt to write")
    parser.add_argument("--force", action=cli.BooleanFlag, help="replace an existing file")
    args = parser.parse_args(argv)
    if args.out.suffix != ".pt":
        parser.error(f"{args.out} must end in .pt: that is what is written")
    if args.out.is_file() and not args.force:
        parser.error(f"{args.out} exists: choose another name, or replace it with --force")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if not is_sharded(args.folder):
        raise ValueError(f"{args.folder} is no sharded checkpoint: name the folder <step> in a run's checkpoints folder")
    check_writable(args.out)
    check_whole(args.folder)
    state = read_whole(args.folder)
    save_atomic(state, args.out)
    if args.out.resolve() == args.folder.resolve().with_suffix(".pt") and is_latest(args.folder):
        make_latest(args.out.resolve())
    print(f"{args.out}: {state['config']['model']} after step {state['step']}")


if __name__ == "__main__":
    cli.run(main)
