"""Transport between noise (t = 0) and data (t = 1) along an interpolant, the mathematics of SiT.

Sources: SiT is Ma et al. 2024, "Exploring flow and diffusion-based generative models with scalable interpolant transformers";
stochastic interpolants, Albergo et al. 2023.
"""

from diffusion.transport.ode import ODE
from diffusion.transport.sampler import Sampler
from diffusion.transport.sde import SDE
from diffusion.transport.transport import Transport, create_transport

__all__ = ["ODE", "SDE", "Sampler", "Transport", "create_transport"]
