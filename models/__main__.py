"""List the models: parameters and multiply-accumulates of a forward pass, beside the published figures.

python -m models [--image-size 256]
"""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.registry import PUBLISHED, create_model, model_config, model_names
from runtime import cli

VAE_DOWNSAMPLE = 8


def count(name: str, input_size: int | None) -> tuple[float, float, int]:
    """(million trainable parameters, GMAC of one image, latent side), on the meta device: nothing is computed.

    input_size None: the model's own. torch counts FLOPs as two for each multiply-accumulate.
    """
    overrides = {} if input_size is None else {"input_size": input_size}
    config = model_config(name, **overrides)
    with torch.device("meta"):
        model = create_model(name, **overrides).eval()
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        t, y = torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(x, t, y)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return parameters / 1e6, counter.get_total_flops() / 2e9, config.input_size


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument(
        "--image-size", type=cli.positive_int, help="pixels, with a VAE of 8 (default: each model's own latents)"
    )
    args = parser.parse_args(argv)
    if args.image_size and args.image_size % VAE_DOWNSAMPLE:
        parser.error(f"--image-size {args.image_size} is not divisible by {VAE_DOWNSAMPLE}, the downsampling of the VAE")
    input_size = args.image_size // VAE_DOWNSAMPLE if args.image_size else None
    print(f"{'':12}{'latents':>9}{'params M':>10}{'GMAC':>9}   published: {'params M':>8}{'GMAC':>8}{'FID-50K':>9}  source")
    for name in model_names():
        parameters, gmac, side = count(name, input_size)
        known = PUBLISHED.get(name)
        row = f"{name:12}{side:>6}^2 {parameters:10.2f}{gmac:9.3f}"
        if known:
            row += (
                f"{'':14}{known.params_millions or '-':>8}{known.gmac or '-':>8}{known.fid50k_400k or '-':>9}  {known.source}"
            )
        print(row)
    print("Published figures are for 256x256 images (latents 32^2), FID after 400k steps of batch 256 without guidance.")


if __name__ == "__main__":
    cli.run(main)
