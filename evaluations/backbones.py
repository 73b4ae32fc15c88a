"""Feature extractors of the user's choice: timm's models, and any network saved as TorchScript."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evaluations.features import Features
from models.checkpoints import read_file
from runtime.cli import first_line
from runtime.files import file_sha256


class TimmModel:
    """A timm model's pooled features, of images resized bicubically (antialiased) to its input size and normalised its way.

    weights: a local file; None: timm's pretrained ones, which come from the hub. Raises ValueError for an unknown model, for
    weights that cannot be had or do not fit.
    """

    def __init__(self, model: str, device: torch.device, weights: str | None = None):
        import timm

        try:
            self._network = timm.create_model(model, pretrained=weights is None, num_classes=0)
        except Exception as error:  # unknown names, names without weights and hub failures raise many kinds of error
            raise ValueError(f"--features timm:{model}: {first_line(error)}; pass weights as --timm-weights FILE") from error
        if weights is not None:
            self._load(weights)
        self._network.to(device).eval().requires_grad_(False)
        self.device = device
        config = timm.data.resolve_model_data_config(self._network)  # of which size, mean and std are what is used
        self._size = config["input_size"][1:]
        self._mean, self._std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))
        self.name = f"timm:{model}"
        transform = [config[key] for key in ("input_size", "mean", "std")]
        self.fingerprint = self.statistics = f"{self.name}:{_digest(self._network)}:{transform}"

    def _load(self, path: str) -> None:
        state = read_file(path)
        wanted = self._network.state_dict()
        classifier = tuple(f"{part}." for part in np.atleast_1d(self._network.default_cfg.get("classifier") or ()))
        surplus = [key for key in state if key not in wanted and not key.startswith(classifier)]
        missing = [key for key in wanted if key not in state]
        if surplus or missing:
            raise ValueError(
                f"--timm-weights {path} does not fit: {len(missing)} weights are missing ({', '.join(missing[:2])}), "
                f"{len(surplus)} are of another model ({', '.join(surplus[:2])})"
            )
        try:
            self._network.load_state_dict({key: state[key] for key in wanted})
        except RuntimeError as error:
            raise ValueError(f"--timm-weights {path} does not fit: {str(error).splitlines()[-1].strip()}") from error

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255  # (B, 3, H, W)
        if x.shape[2:] != self._size:
            x = F.interpolate(x, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        return Features(pool=self._network((x - self._mean) / self._std).float().cpu().numpy())


class ScriptModule:
    """A TorchScript module that takes uint8 (B, 3, H, W) and returns features (B, D). Raises ValueError where it does not.

    TorchScript is a program: the one file here that is run, which ``--help`` says.
    """

    def __init__(self, path: str, device: torch.device):
        if not Path(path).is_file():
            raise ValueError(f"--features {path}: there is no such file")
        try:
            self._module = torch.jit.load(path, map_location=device).eval()
        except Exception as error:  # RuntimeError and worse for files that are no TorchScript
            raise ValueError(
                f"--features {path} is no TorchScript module ({first_line(error)}): save it with torch.jit.save"
            ) from error
        self.name, self.device = os.path.basename(path), device
        self.fingerprint = self.statistics = f"torchscript:{file_sha256(path)}"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).contiguous()
        try:
            pool = self._module(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, torch.jit.Error) as error:  # the latter for what the module itself asserts
            raise ValueError(
                f"--features {self.name} fails on uint8 images {tuple(x.shape)}: {str(error).strip().splitlines()[-1]}"
            ) from error
        if not isinstance(pool, torch.Tensor) or pool.ndim != 2 or len(pool) != len(x) or not pool.shape[1]:
            shape = tuple(pool.shape) if isinstance(pool, torch.Tensor) else type(pool).__name__
            raise ValueError(
                f"--features {self.name} must return features ({len(x)}, D) for {len(x)} images, it returned {shape}"
            )
        return Features(pool=pool.float().cpu().numpy())


def _digest(network: nn.Module) -> str:
    """A fingerprint of all weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
