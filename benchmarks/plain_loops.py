"""Training step, optimizer and sampling in their plain formulations: one tensor, one pass, one network call after another."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.networks import EMA_DECAY, LEARNING_RATE, SEED
from benchmarks.reference import PlainNetwork
from diffusion.transport import SDE
from models.registry import FAMILIES
from runtime.draws import Purpose, uniforms
from training.data import Batch
from training.objective import DEFAULTS, create_objective

ADAN_BETAS, ADAN_EPS = (0.98, 0.92, 0.99), 1e-8

# Training


class PlainAdan:
    """Adan (Xie et al. 2022, algorithm 1 without restarts and weight decay), tensor by tensor. Its betas are the complements of
    the paper's."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float, float] = ADAN_BETAS):
        self.parameters, self.lr, self.betas, self.steps = list(parameters), lr, betas, 0
        self.moments = [[torch.zeros_like(parameter) for _ in range(3)] for parameter in self.parameters]
        self.last_gradients: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        gradients = [parameter.grad for parameter in self.parameters]
        if not self.last_gradients:
            self.last_gradients = [g.clone() for g in gradients]
        b1, b2, b3 = self.betas
        c1, c2, c3 = (1 - beta**self.steps for beta in self.betas)
        states = zip(self.parameters, gradients, self.last_gradients, self.moments, strict=True)
        for parameter, g, g_before, (m, v, n) in states:
            difference = g - g_before
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).add_(difference, alpha=1 - b2)
            ahead = difference.mul_(b2).add_(g)
            n.mul_(b3).addcmul_(ahead, ahead, value=1 - b3)
            size = (n / c3).sqrt_().add_(ADAN_EPS)
            parameter.addcdiv_(m, size, value=-self.lr / c1).addcdiv_(v, size, value=-self.lr * b2 / c2)
            g_before.copy_(g)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class PlainEMA:
    """average <- decay * average + (1 - decay) * weights, tensor by tensor."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float = EMA_DECAY):
        self.parameters, self.decay = list(parameters), decay
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)


class PlainStep:
    """A training step in fp32: each pass of the masked pair goes forward and back on its own, then optimizer and average.

    recipe: of the objective, in place of the training scripts' defaults for the network's. The timesteps are those that a new
    :class:`training.step.TrainingStep` draws, so that the losses can be compared.
    """

    def __init__(self, network: PlainNetwork, optimizer: str, **recipe: str | float):
        self.network = network.train()
        name = FAMILIES[type(network.config)].objective
        objective = create_objective(Namespace(objective=name, **DEFAULTS[name] | recipe))
        self.mathematics, self.timestep_sampler = objective.mathematics, objective.timestep_sampler
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if optimizer == "adan":
            self.optimizer = PlainAdan(parameters, LEARNING_RATE)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
        self.ema = PlainEMA(parameters)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of each sample (b,), summed over its passes."""
        loss = self.forward_and_back(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        return loss

    def forward_and_back(self, batch: Batch) -> Tensor:
        device = next(self.network.parameters()).device
        draws = uniforms(SEED, Purpose.TIMESTEP, [0], 0, (len(batch.x0),))[0].numpy()
        t, weights = (torch.from_numpy(values).to(device) for values in self.timestep_sampler.sample(draws))
        batch, total = batch.to(device), 0.0
        for y, noise, kept in zip(batch.y, batch.noise, (None, batch.kept), strict=False):
            kwargs = {"y": y} if kept is None else {"y": y, "kept": kept}
            loss = self.mathematics.training_losses(self.network, batch.x0, t=t, model_kwargs=kwargs, noise=noise)["loss"]
            (weights * loss).mean().backward()
            total = total + loss.detach()
        return total


# Sampling


@torch.no_grad()
def plain_ddim(network: Callable[..., Tensor], noise: Tensor, y: Tensor, timesteps: Sequence[int]) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12) with eta = 0 through increasing timesteps of the linear 1000-step schedule."""
    cumulative = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    levels = [1.0, *(cumulative[i] for i in timesteps)]
    x = noise
    for i, (before, level) in reversed(list(zip(timesteps, pairwise(levels), strict=True))):
        t = torch.full((len(x),), i, device=x.device)
        eps = network(x, t, y)[:, : x.shape[1]]
        x0 = (x - float(1 - level) ** 0.5 * eps) / float(level) ** 0.5
        x = float(before) ** 0.5 * x0 + float(1 - before) ** 0.5 * eps
    return x


@torch.no_grad()
def plain_images(vae: nn.Module, latents: Tensor) -> np.ndarray:
    """uint8 (B, H, W, 3): the whole batch is decoded at once, as it lies in memory."""
    images = vae.decode(latents / vae.config.scaling_factor).sample
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def plain_write(images: np.ndarray, folder: Path, first: int) -> None:
    """PNGs, one after the other, of images number ``first`` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images, start=first):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


def plain_pack(folder: Path, number: int, path: Path) -> None:
    """The .npz, from the PNGs, all held in memory."""
    images = [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(number)]
    np.savez(path, arr_0=np.stack(images))


def sample_with_two_calls(sde: SDE, x: Tensor, model: Callable[..., Tensor], **model_kwargs) -> Tensor:
    """SDE Euler as published, without noise: the velocity and the score each call the network."""
    velocity, score = sde.transport.get_drift(), sde.transport.get_score()

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t, model, **model_kwargs) + sde.diffusion(t).item() * score(x, t, model, **model_kwargs)

    for t, t_next in pairwise(sde.times):
        x = x + (t_next - t).item() * drift(x, t)
    return x + sde.last_step_size * drift(x, sde.times[-1])
