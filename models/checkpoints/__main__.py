"""Look into a checkpoint, or write its weights with its config as one ``.safetensors``.

python -m models.checkpoints inspect FILE [--model NAME]
python -m models.checkpoints convert FILE OUT.safetensors [--weights ema|model] [--model NAME] [--force]

FILE: a checkpoint of training or a published one, a folder of diffusers, an URL or a hub id.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from accelerate import init_empty_weights

from models.checkpoints.build import check_fit, check_index_buffers, check_name
from models.checkpoints.diffusers_dit import is_diffusers_state
from models.checkpoints.files import WEIGHT_KEYS, held, is_safetensors, read_file, weights_file, write_safetensors
from models.checkpoints.read import Checkpoint, describe, from_content
from models.macs import trained_parameters
from models.registry import FAMILIES, VAE_DOWNSAMPLE, build_network, model_names
from runtime import cli
from runtime.fetch import fetch
from runtime.files import atomic_file, check_writable

SHOWN_FIRST = ("input_size", "patch_size", "in_channels", "num_classes")  # they have their own lines


def check_loads(checkpoint: Checkpoint) -> None:
    """Raises ValueError where loading the weights would."""
    check_fit(checkpoint)
    if any(not value.is_floating_point() for value in checkpoint.state.values()):
        with init_empty_weights():  # buffers have values, weights none
            check_index_buffers(build_network(checkpoint.config), checkpoint.state, checkpoint.path)


def file_kind(path: Path, content: dict) -> str:
    form = "safetensors" if is_safetensors(path) else "PyTorch file"
    if is_diffusers_state(content):
        return f"diffusers DiT ({form})"
    if isinstance(content.get("config"), dict):
        return f"{form} with a config entry"
    return f"{form}, training checkpoint" if held(content) else f"{form}, bare state dict"


def report(path: Path, model: str | None) -> dict[str, object]:
    """What the file holds: label -> value."""
    file = weights_file(path)
    content = read_file(file)
    names = held(content)
    which = next((name for name in WEIGHT_KEYS if name in names), "ema")
    checkpoint = from_content(content, file, which, model)
    check_name(checkpoint, model)
    check_fit(checkpoint)
    config, codec = checkpoint.config, checkpoint.codec
    return {
        "file": file,
        "kind": file_kind(file, content),
        "family": FAMILIES[type(config)].network.__name__,
        "model": checkpoint.model or "none of the registered sizes",
        "recognised by": checkpoint.recognised_by,
        "latents": f"{config.in_channels} x {config.input_size} x {config.input_size}",
        "image size": _image_size(checkpoint),
        "patch size": config.patch_size,
        "channels": f"{config.in_channels} in, {config.out_channels} out",
        "classes": config.num_classes,
        **_other_fields(config),
        "parameters": f"{trained_parameters(config) / 1e6:.2f} M trained",
        "weights": ", ".join(names) or "one set, unnamed",
        "step": "not stated" if checkpoint.step is None else checkpoint.step,
        "objective": ", ".join(
            f"{value}" if key == "name" else f"{key} {value}" for key, value in checkpoint.objective.items()
        ),
        "codec": f"{codec['name']}, scale {codec.get('scale')}" if codec.get("name") else "not stated",
        "class names": len(checkpoint.class_names) or "not stated",
    }


def _image_size(checkpoint: Checkpoint) -> str:
    stated = checkpoint.codec.get("image_size")
    if stated:
        return f"{stated} pixels"
    return f"{VAE_DOWNSAMPLE * checkpoint.config.input_size} pixels, with a VAE of {VAE_DOWNSAMPLE}"


def _other_fields(config: object) -> dict[str, object]:
    """Sizes, mediators, stage depths, decoder blocks and so on, as the config calls them."""
    fields = [field.name for field in dataclasses.fields(config) if field.name not in SHOWN_FIRST]
    return {name.replace("_", " "): _shown(getattr(config, name)) for name in fields}


def _shown(value: object) -> object:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else value


def inspect(args: argparse.Namespace) -> None:
    rows = report(fetch(args.file), args.model)
    width = max(map(len, rows)) + 2
    for label, value in rows.items():
        print(f"{label:{width}}{value}")


def convert(args: argparse.Namespace) -> None:
    """Raises ValueError for weights that do not fit their model, before anything is written."""
    file = weights_file(fetch(args.file))
    content = read_file(file)
    checkpoint = from_content(content, file, args.weights, args.model)
    check_name(checkpoint, args.model)
    check_loads(checkpoint)
    which, called = (args.weights, args.weights) if held(content) else (WEIGHT_KEYS[0], "unnamed")
    codec = _portable(checkpoint.codec)
    config = describe(
        args.model or checkpoint.model,
        checkpoint.config,
        codec=codec,
        class_names=checkpoint.class_names,
        objective=checkpoint.objective,
    )
    with atomic_file(args.out) as target:
        write_safetensors(checkpoint.state, target.name, which=which, config=config, step=checkpoint.step)
    print(f"{args.out}: {called} weights of {config['model'] or config['family']} ({len(checkpoint.state)} tensors)")
    if codec != checkpoint.codec:
        print(f"{args.out} does not name its codec, {checkpoint.codec['name']}, a folder here: give --vae when sampling it")


def _portable(codec: dict) -> dict:
    """Without a folder's name, which another machine does not have."""
    name = codec.get("name")
    local = name is not None and (Path(name).is_absolute() or Path(name).is_dir())
    return {key: value for key, value in codec.items() if key != "name" or not local}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.ArgumentParser)
    look = commands.add_parser("inspect", description="Print what a checkpoint holds.")
    write = commands.add_parser("convert", description="Write a checkpoint's weights, with its config in the header.")
    for command in (look, write):
        command.add_argument("file", help="a checkpoint, a folder of diffusers, an URL or a hub id")
        command.add_argument(
            "--model", choices=model_names(), help="what it is believed to hold, for files that fit several; checked"
        )
    write.add_argument("out", type=Path, help="a .safetensors to write")
    write.add_argument("--weights", choices=WEIGHT_KEYS, default="ema", help="of a file that names its weights")
    write.add_argument("--force", action=cli.BooleanFlag, help="replace an existing file")
    args = parser.parse_args(argv)
    if args.command == "convert":
        if args.out.suffix != ".safetensors":
            parser.error(f"{args.out} must end in .safetensors: that is what is written")
        if args.out.is_file() and not args.force:
            parser.error(f"{args.out} exists: choose another name, or replace it with --force")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "convert":
        check_writable(args.out)
        convert(args)
    else:
        inspect(args)


if __name__ == "__main__":
    cli.run(main)
