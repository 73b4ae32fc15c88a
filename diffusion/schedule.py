"""The noise schedule, and its respacing to fewer steps (Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic
Models")."""

import numpy as np

NUM_TIMESTEPS = 1000


def linear_betas(num_timesteps: int = NUM_TIMESTEPS) -> np.ndarray:
    """betas from 1e-4 to 0.02 for 1000 steps (Ho et al. 2020), scaled so that other counts end at the same noise. float64
    (T,)."""
    scale = 1000 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)


def space_timesteps(respacing: str, num_timesteps: int = NUM_TIMESTEPS) -> list[int]:
    """Which of the original timesteps are kept, in increasing order.

    respacing: "" keeps all; "250" keeps 250, first and last included; "10,15,20" cuts the range in three equal sections and
    keeps so many of each; "ddim50" keeps every num_timesteps/50-th, starting at 0. Raises ValueError for anything else.
    """
    if not respacing:
        return list(range(num_timesteps))
    if respacing.startswith("ddim"):
        return _strided(respacing, num_timesteps)
    try:
        counts = [int(part) for part in respacing.split(",")]
    except ValueError:
        raise ValueError(f"respacing {respacing!r} is not understood: use 250, 10,15,20 or ddim50") from None
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"respacing {respacing!r}: a section of {size} timesteps cannot hold {count} steps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(stride * k) for k in range(count)]
        start += size
    return kept


def _strided(respacing: str, num_timesteps: int) -> list[int]:
    digits = respacing.removeprefix("ddim")
    if digits.isdecimal():
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == int(digits):
                return list(range(0, num_timesteps, stride))
    raise ValueError(
        f"respacing {respacing!r}: no whole stride takes that many of {num_timesteps} timesteps; try ddim50 or {digits or 50}"
    )


def trailing_timesteps(count: int, power: float = 1.0) -> list[int]:
    """So many timesteps in increasing order, from the noisiest one towards, but not to, the data.

    They are 1000 u^power - 1 for evenly spaced u from 1/count to 1, moved where two would be the same. Power 1 is
    the "trailing" of Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed"; above it they crowd at
    low noise. Raises ValueError for more than there are.
    """
    if not 1 <= count <= NUM_TIMESTEPS:
        raise ValueError(f"{count} steps cannot be taken over {NUM_TIMESTEPS} timesteps: take 1 to {NUM_TIMESTEPS}")
    kept = []
    for i in range(1, count + 1):
        wanted = round(NUM_TIMESTEPS * (i / count) ** power) - 1
        kept.append(min(max(wanted, kept[-1] + 1 if kept else 0), NUM_TIMESTEPS - 1 - (count - i)))
    return kept


def respace_betas(betas: np.ndarray, kept: list[int]) -> np.ndarray:
    """The betas under which the kept timesteps have the same cumulative products as before."""
    cumulative = np.cumprod(1.0 - betas)[kept]
    return 1.0 - cumulative / np.append(1.0, cumulative[:-1])
