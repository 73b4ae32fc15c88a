"""Codecs between images and what the diffusion model sees: a Stable Diffusion VAE, or plain pixels.

A codec is known by its name, which travels with its scale in every latent store and checkpoint.
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from runtime.cli import first_line
from runtime.redact import redact

PUBLISHED_ALIASES = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}  # as the SiT scripts say
HUB_NAMES = {"sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema", "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse"}
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # the range to which the VAE's posterior clamps its log-variance
SLICE_PIXELS = 16 * 256**2  # what a VAE works on at once: 16 images of 256 x 256, 4 of 512 x 512, 1 of 1024 x 1024
WEIGHTS = "diffusion_pytorch_model"


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]: u / 127.5 - 1. Float images are only cast to float32."""
    if images.dtype == torch.uint8:
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.float()


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3): clamp(127.5 x + 128, 0, 255), truncated.

    Of the image u / 127.5 - 1 this is u + 0.5 truncated: :func:`to_float` is inverted exactly, with half a grey level to spare.
    """
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mean + std * noise, unscaled, with the log-variance clamped as the VAE does."""
    return mean + torch.exp(0.5 * logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)) * noise


class Codec:
    """What both codecs offer.

    Images: uint8 (B, H, W, 3) or float (B, 3, H, W) in [-1, 1]; latents: float32 (B, C, S, S), S = H / downsample.
    name: what :func:`load_codec` takes. scale: latents are multiplied by it. stochastic: whether :meth:`encode` uses its noise.
    """

    name: str
    scale: float
    downsample: int
    latent_channels: int
    stochastic: bool
    device: torch.device

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, S, S). Raises ValueError when the image side does not divide."""
        if image_size % self.downsample:
            raise ValueError(
                f"--image-size {image_size} must be a multiple of {self.downsample}, the downsampling of codec {self.name}"
            )
        side = image_size // self.downsample
        return self.latent_channels, side, side

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each (B, C, S, S), unscaled."""
        raise NotImplementedError

    def encode(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents, scale * (mean + std * noise). noise: standard normal (B, C, S, S); None gives the mean."""
        mean, logvar = self.moments(images)
        return self.scale * (mean if noise is None else sample_posterior(mean, logvar, noise.to(mean)))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> uint8 (B, H, W, 3)."""
        raise NotImplementedError


class PixelCodec(Codec):
    """The identity: latents are the images in [-1, 1]. There is no posterior, so noise changes nothing."""

    name, scale, downsample, latent_channels, stochastic = "pixels", 1.0, 1, 3, False

    def __init__(self, device: torch.device):
        self.device = device

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = to_float(images.to(self.device))
        return mean, torch.full_like(mean, LOGVAR_MIN)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return to_float(images.to(self.device))

    def decode(self, latents: Tensor) -> Tensor:
        return to_uint8(latents.to(self.device).float())


class VAECodec(Codec):
    """A diffusers AutoencoderKL, frozen, in float32.

    It works in slices of at most ``slice_pixels`` image pixels (at least one image): its activations are far larger than
    images and latents, and grow with the pixels.
    """

    stochastic = True

    def __init__(self, name: str, vae, device: torch.device, slice_pixels: int = SLICE_PIXELS):
        config = vae.config
        self.name, self.device, self.slice_pixels = name, device, slice_pixels
        self.scale, self.latent_channels = float(config.scaling_factor), config.latent_channels
        self.downsample = 2 ** (len(config.block_out_channels) - 1)  # every block but the last halves the image
        vae = vae.float().to(device, memory_format=torch.channels_last)
        self.vae = vae.eval().requires_grad_(False)

    def _slices(self, batch: Tensor, pixels: int) -> tuple[Tensor, ...]:
        """The batch cut for images of so many pixels each."""
        return batch.split(max(1, self.slice_pixels // pixels))

    def _input(self, part: Tensor) -> Tensor:
        """On the device, channels last like the weights: what CUDA's convolutions work in; a CPU gains in encoding only."""
        return part.to(self.device).float().contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        slices = self._slices(images, images.shape[1:].numel() // 3)
        posteriors = [self.vae.encode(self._input(to_float(part.to(self.device)))).latent_dist for part in slices]
        return torch.cat([p.mean for p in posteriors]), torch.cat([p.logvar for p in posteriors])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        slices = self._slices(latents, latents.shape[2:].numel() * self.downsample**2)
        return torch.cat([to_uint8(self.vae.decode(self._input(part) / self.scale).sample) for part in slices])


def load_codec(name: str, device: str | torch.device = "cpu") -> Codec:
    """The codec of that name, ready to use on ``device``.

    name: ``pixels``; ``sd-vae-ft-ema`` or ``sd-vae-ft-mse``; the folder of a diffusers AutoencoderKL; or its id on
    the Hugging Face hub. A folder is never looked for on the network.
    Raises ValueError when there is no such codec or it does not fit.
    """
    device, name = torch.device(device), PUBLISHED_ALIASES.get(name, name)
    if name == "pixels":
        return PixelCodec(device)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return VAECodec(str(folder.resolve()), _load_folder(folder), device)
    hub_id = HUB_NAMES.get(name, name)
    if folder.exists():
        raise ValueError(f"--vae {name} is a file: pass the folder that holds config.json and {WEIGHTS}.safetensors")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", hub_id):
        raise ValueError(
            f"--vae {redact(name)}: the folder does not exist; "
            f"pass {', '.join(HUB_NAMES)}, pixels, an existing folder or a hub id (owner/name)"
        )
    names = {hub: alias for alias, hub in HUB_NAMES.items()}
    return VAECodec(names.get(hub_id, hub_id), _load_hub(name, hub_id), device)


def _load_folder(folder: Path):
    try:
        config = json.loads((folder / "config.json").read_text())
        is_vae = config.get("_class_name") == "AutoencoderKL"
    except (OSError, ValueError, AttributeError, RecursionError):
        is_vae = False
    if not is_vae:
        raise ValueError(
            f"--vae {folder} is not an AutoencoderKL folder: it needs a config.json with _class_name AutoencoderKL"
        )
    _check_config(config, folder)
    try:
        return _from_pretrained(folder, local_files_only=True, use_safetensors=any(folder.glob(f"{WEIGHTS}*.safetensors*")))
    except Exception as error:
        raise ValueError(f"--vae {folder}: cannot load its weights: {first_line(error)}; download the folder again") from error


def _load_hub(name: str, hub_id: str):
    try:
        vae = _from_pretrained(hub_id)
    except Exception as error:
        raise ValueError(
            f"--vae {name}: there is no folder of that name, and {hub_id} could not be fetched from the hub "
            f"({first_line(error)}): download it on a machine with network and pass the folder with --vae"
        ) from error
    _check_config(vae.config, hub_id)
    return vae


def _from_pretrained(source: str | Path, **kwargs):
    """diffusers prefers safetensors and never unpickles code, but it fills missing weights with random ones: refuse those."""
    from diffusers import AutoencoderKL  # importing diffusers takes seconds, which pixels should not pay

    vae, info = AutoencoderKL.from_pretrained(source, output_loading_info=True, **kwargs)
    if info["missing_keys"] or info.get("mismatched_keys"):
        absent = [*info["missing_keys"], *info.get("mismatched_keys", ())]
        raise ValueError(f"{len(absent)} weights are absent or of another shape, first {absent[0]}")
    return vae


def _check_config(config: dict, source: object) -> None:
    """A VAE that is not RGB, or that normalises its latents otherwise than by one factor, would be decoded wrongly."""
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != (3, 3):
        raise ValueError(
            f"--vae {source} maps {channels[0]} to {channels[1]} image channels: only RGB autoencoders (3 to 3) are supported"
        )
    for field in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(field):
            raise ValueError(
                f"--vae {source} has {field} {config[field]}: "
                "only autoencoders whose latents are scaled by one factor are supported"
            )
    scale = config.get("scaling_factor", 0.18215)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"--vae {source} has scaling_factor {scale!r:.100}: it must be above 0")
