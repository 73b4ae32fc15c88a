"""Networks in closed form, for tests of the transport."""

import math

import torch


def network(x, t):
    """The golden data's."""
    return 0.6 * x - 0.3 * (2 * x).cos() + 0.5 * t.view(-1, *[1] * (x.ndim - 1))


def exact_network(transport, mean, std):
    """What a perfect network outputs for data N(mean, std^2): in closed form, as (x_t, x_data, x_noise) is Gaussian."""

    def model(x, t):
        # Adaptive solvers try times a little outside [0, 1], where VP's sigma is no number.
        t = t.to(x.dtype).clamp(0, 1 - 1e-5).view(-1, *[1] * (x.ndim - 1))
        alpha, sigma = transport.path.alpha(t), transport.path.sigma(t)
        per_variance = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        data, noise = mean + alpha * std**2 * per_variance, sigma * per_variance
        if transport.prediction == "velocity":
            return transport.path.d_alpha(t) * data + transport.path.d_sigma(t) * noise
        return noise if transport.prediction == "noise" else -per_variance

    return model


def marginal(transport, t, mean, std):
    """Mean and standard deviation of x_t for data N(mean, std^2), as numbers."""
    t = torch.as_tensor(t, dtype=torch.float64)
    alpha, sigma = transport.path.alpha(t).item(), transport.path.sigma(t).item()
    return alpha * mean, math.hypot(alpha * std, sigma)
