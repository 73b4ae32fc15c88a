"""The mathematics of diffusion, for any callable ``model(x, t, **kwargs)``: it imports no network."""

from diffusion.gaussian import GaussianDiffusion, create_diffusion

__all__ = ["GaussianDiffusion", "create_diffusion"]
