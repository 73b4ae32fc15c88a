"""The Inception network that FID is defined by: the TensorFlow graph of 2015, in torch-fidelity's port to PyTorch."""

import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.hub
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, BasicConv2d, FeatureExtractorInceptionV3

from evaluations.features import Features
from models.checkpoints import read_file
from runtime.distributed import note
from runtime.files import file_sha256

WEIGHTS_VARIABLE = "INCEPTION_WEIGHTS"
PUBLISHED_SHA256 = URL_INCEPTION_V3.rsplit("-", 1)[1].removesuffix(".pth")  # its first digits, as torch hub names files
SPATIAL_CHANNELS = 7  # of mixed_6/conv; 7 * 17 * 17 = 2,023 features, about as many as pool_3 has


class Inception:
    """uint8 images (B, H, W, 3) -> pool_3 (B, 2048), mixed_6/conv (B, 2023) and class probabilities (B, 1008).

    The network resizes to 299 x 299 without half-pixel centres and scales by (x - 128) / 128, as TensorFlow 1 did. As in
    ADM's evaluation the probabilities leave out the last layer's bias, and of mixed_6/conv the first 7 channels are taken, in
    the order row, column, channel. Batch normalisation is folded into the convolutions, which moves features by about 1e-6.

    weights: the file of torch-fidelity; None: see :func:`find_weights`.
    """

    name = statistics = "inception"

    def __init__(self, device: torch.device, weights: str | os.PathLike | None = None):
        path = find_weights(weights)
        digest = file_sha256(path)
        if not digest.startswith(PUBLISHED_SHA256):
            note(f"{path} is not the published Inception: its numbers compare only with its own")
        self.fingerprint = f"inception:{digest}"
        self.device = device
        self._network = _load_network(path).to(device, memory_format=torch.channels_last)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images: np.ndarray) -> Features:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last in memory
        # TF32, cuDNN's default for convolutions, has 10 bits of mantissa: it would move FID in the fourth digit.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, logits = self._network(x)
            probs = logits.softmax(dim=1)
        return Features(*(values.cpu().numpy() for values in (pool, self._spatial, probs)))


def find_weights(path: str | os.PathLike | None = None) -> Path:
    """The weights file: ``path``, else $INCEPTION_WEIGHTS, else the torch hub cache, else downloaded there and verified.

    Raises ValueError when the file named is not there, or the download fails.
    """
    for source, name in (("--inception-weights", path), (WEIGHTS_VARIABLE, os.environ.get(WEIGHTS_VARIABLE))):
        if name:
            if not Path(name).is_file():
                raise ValueError(f"{source} {name}: there is no such file. It is {URL_INCEPTION_V3}")
            return Path(name)
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), hash_prefix=PUBLISHED_SHA256)
        except (OSError, RuntimeError) as error:  # no network; a wrong checksum
            raise ValueError(
                f"the Inception weights could not be downloaded ({error}): get {URL_INCEPTION_V3} elsewhere and pass it as "
                f"--inception-weights FILE or in ${WEIGHTS_VARIABLE}"
            ) from error
    return cached


def _load_network(path: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity unpickles whatever file it is given: it gets a copy, in memory, of what was read as tensors only."""
    state, copy = read_file(path), io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} does not fit the FID Inception ({str(error).splitlines()[-1].strip()}): it must be {URL_INCEPTION_V3}"
        ) from error
    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return network
