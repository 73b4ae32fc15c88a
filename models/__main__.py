"""List the models: parameters and multiply-accumulates of a forward pass, beside the published figures.

python -m models [--image-size 256]
"""

from collections.abc import Iterator, Sequence

from models.macs import multiply_accumulates, trained_parameters
from models.registry import PUBLISHED, VAE_DOWNSAMPLE, VARIANTS, model_config, model_names
from runtime import cli


def rows() -> Iterator[tuple[str, str, dict]]:
    """(label, model, settings): every model, each followed by its variants."""
    for name in model_names():
        yield name, name, {}
        for label, (model, settings) in VARIANTS.items():
            if model == name:
                yield label, model, settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument(
        "--image-size", type=cli.number(int, 1, 2**14), help="pixels, with a VAE of 8 (default: each model's own latents)"
    )
    args = parser.parse_args(argv)
    if args.image_size and args.image_size % VAE_DOWNSAMPLE:
        parser.error(f"--image-size {args.image_size} is not divisible by {VAE_DOWNSAMPLE}, the downsampling of the VAE")
    size = {"input_size": args.image_size // VAE_DOWNSAMPLE} if args.image_size else {}
    print(f"{'':14}{'latents':>9}{'params M':>10}{'GMAC':>9}   published: {'params M':>8}{'GMAC':>8}{'FID-50K':>9}  source")
    for label, name, settings in rows():
        try:
            config = model_config(name, **settings, **size)
        except ValueError as error:
            print(f"{label:14}{error}")
            continue
        millions, gmac = trained_parameters(config) / 1e6, multiply_accumulates(config) / 1e9
        row = f"{label:14}{config.input_size:>6}^2 {millions:10.2f}{gmac:9.3f}"
        known = PUBLISHED.get(label)
        if known:
            row += (
                f"{'':14}{known.params_millions or '-':>8}{known.gmac or '-':>8}{known.fid50k_400k or '-':>9}  {known.source}"
            )
        print(row)
    print("M: mediators. Published figures are for 256x256 images (latents 32^2), FID after 400k steps of batch 256, unguided.")


if __name__ == "__main__":
    cli.run(main)
