"""The FID Inception with random weights, and its plain formulation: torch-fidelity's network as it is."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Unloaded(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args, **kwargs) -> None:
        """Keep the values as they are."""


def save_random_inception(path: str | os.PathLike) -> None:
    """Write a weights file with random values, always the same, He-scaled: with others the features vanish."""
    torch.save({}, path)  # its constructor wants a file
    network = _Unloaded("unloaded", ["2048"], feature_extractor_weights_path=path)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draws)
            elif name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.8, 1.2, generator=draws)
            elif value.ndim == 1:
                value.normal_(0, 0.1, generator=draws)
    torch.save(network.state_dict(), path)


def plain_inception(path: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images (B, H, W, 3) -> pool_3 (B, 2048)."""
    network = FeatureExtractorInceptionV3("plain", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)

    @torch.inference_mode()
    def extract(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())[0].numpy()

    return extract
