"""The Inception network that FID is defined by: the TensorFlow graph of 2015, in torch-fidelity's port to PyTorch."""

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, BasicConv2d, FeatureExtractorInceptionV3

from evaluations.features import INCEPTION, SPATIAL_CHANNELS, Features
from evaluations.weights import find_file
from models.checkpoints import read_file
from runtime.distributed import note
from runtime.files import file_sha256

PUBLISHED_SHA256 = URL_INCEPTION_V3.rsplit("-", 1)[1].removesuffix(".pth")  # its first digits, as torch hub names files


class Inception:
    """uint8 images (B, H, W, 3) -> pool_3 (B, 2048), mixed_6/conv (B, 2023) and class probabilities (B, 1008).

    The network resizes to 299 x 299 without half-pixel centres and scales by (x - 128) / 128, as TensorFlow 1 did. As in
    ADM's evaluation the probabilities leave out the last layer's bias, and of mixed_6/conv the first 7 channels are taken, in
    the order row, column, channel. Batch normalisation is folded into the convolutions, which moves features by about 1e-6.

    weights: the file of torch-fidelity; None: see :func:`find_weights`. Raises ValueError for a file that is no such network.
    """

    def __init__(self, device: torch.device, weights: str | os.PathLike | None = None):
        path = find_weights(weights)
        digest = file_sha256(path)
        self.fingerprint = f"inception:{digest}"
        if digest.startswith(PUBLISHED_SHA256):
            self.name = self.statistics = INCEPTION
        else:
            self.name, self.statistics = f"inception of {path.name}", self.fingerprint
            note(f"{path} is not the published Inception: its numbers compare only with its own")
        self.device = device
        self._network = _load_network(path).to(device, memory_format=torch.channels_last)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images: np.ndarray) -> Features:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last in memory
        # TF32, cuDNN's default for convolutions, has 10 bits of mantissa: too few for numbers that are to be reproduced.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, logits = self._network(x)
            probs = logits.softmax(dim=1)
        return Features(*(values.cpu().numpy() for values in (pool, self._spatial, probs)))


def find_weights(path: str | os.PathLike | None = None) -> Path:
    """The file of :class:`Inception`: see :func:`find_file`."""
    return find_file(path, "INCEPTION_WEIGHTS", URL_INCEPTION_V3, hash_prefix=PUBLISHED_SHA256)


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
