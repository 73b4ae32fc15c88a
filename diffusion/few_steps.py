"""Gaussian diffusion in few steps: DPM-Solver++, UniPC and Heun, by the coefficients of diffusers' schedulers.

A scheduler's step is linear in the sample, the network's outputs and the noise. So each is run once, on unit vectors, and what
it returns tells how much of each tensor makes the next sample. Sampling sums tensors by these numbers: it waits for no device,
batches and threads share no state, and the noise levels are those of our process, in float64. The factors are as exact as
the scheduler is, and DPM-Solver++'s works on samples and noise in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, Model, StepNoise
from diffusion.schedule import linear_betas, respace_betas, trailing_timesteps


@dataclass(frozen=True)
class Scheme:
    """scheduler: a class of diffusers, and its options.

    fewest: with fewer steps none is of its order. power: of the timesteps, see :func:`diffusion.schedule.trailing_timesteps`.
    stochastic: noise is added in each step but the last. two_calls: a step asks the network twice, but for the last.
    variance_exploding: the scheduler's samples are x / sqrt(a).
    """

    scheduler: str
    options: dict
    fewest: int
    power: float = 1.5
    stochastic: bool = False
    two_calls: bool = False
    variance_exploding: bool = False


# The last step leads to no noise at all, which only one of first order can: it takes the prediction of x_0. Its error grows
# with the square of the noise that it starts from, so timesteps crowd towards 0. Even in log-SNR, the best for a Gaussian
# target, they would leave too few in the middle, where a network's images take shape. Heun's error sits at the noisiest end:
# there they are even in time.
MULTISTEP = {"solver_order": 2, "final_sigmas_type": "zero", "lower_order_final": True}
SCHEMES = {
    # Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models"
    "dpm++2m": Scheme("DPMSolverMultistepScheduler", {**MULTISTEP, "algorithm_type": "dpmsolver++"}, fewest=3),
    "dpm++sde2m": Scheme(
        "DPMSolverMultistepScheduler", {**MULTISTEP, "algorithm_type": "sde-dpmsolver++"}, fewest=3, stochastic=True
    ),
    # Zhao et al. 2023, "UniPC: a unified predictor-corrector framework for fast sampling of diffusion models"
    "unipc": Scheme("UniPCMultistepScheduler", MULTISTEP, fewest=2),
    # Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", algorithm 1
    "heun": Scheme("HeunDiscreteScheduler", {}, fewest=2, power=1.0, two_calls=True, variance_exploding=True),
}

# What later states are made of: of the last calls the state x each was made at, the noise it predicted, the noise then added,
# and x as UniPC corrected it. Methods of second order reach back over three calls, the present one included.
X, EPS, NOISE, CORRECTED = range(4)
KINDS, REACH = 4, 3

Terms = tuple[tuple[int, float], ...]  # (tensor: KINDS * (call % REACH) + its kind, factor)


@dataclass(frozen=True)
class Call:
    """A network call at timestep t of the respaced process.

    state: where the next call is made, or the sample; where ends_step, what a solver step gives. corrected: of the call's own
    state, for later calls; nothing where the solver does not correct. draws: whether noise is added.
    """

    t: int
    state: Terms
    corrected: Terms
    draws: bool
    ends_step: bool


def create_few_steps(solver: str, num_steps: int) -> "FewSteps":
    """A solver of :data:`SCHEMES` over so many of the linear 1000-step process's timesteps.

    Raises ValueError for another solver, and for a number of steps that it cannot take.
    """
    scheme = _scheme(solver)
    kept = trailing_timesteps(num_steps, scheme.power)
    return FewSteps(GaussianDiffusion(respace_betas(linear_betas(), kept), kept), solver)


@dataclass(frozen=True)
class FewSteps:
    """A solver's steps over the timesteps of a respaced process, the noisiest first. solver: a key of :data:`SCHEMES`.

    Raises ValueError for another one, and for too few timesteps.
    """

    diffusion: GaussianDiffusion
    solver: str
    calls: list[Call] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        scheme = _scheme(self.solver)
        if self.num_steps < scheme.fewest:
            raise ValueError(
                f"{self.solver} takes at least {scheme.fewest} steps, got {self.num_steps}: with so few, take ddim"
            )
        object.__setattr__(self, "calls", _calls(scheme, self.diffusion))

    @property
    def num_steps(self) -> int:
        return self.diffusion.num_timesteps

    def steps(
        self, model: Model, noise: Tensor, *, step_noise: StepNoise | None = None, model_kwargs: dict | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the sample after every step and the prediction of x_0 that the step started from (pred_xstart).

        model: as in :class:`GaussianDiffusion`; its variance is not used. step_noise(k): as there.
        """
        x, held, pred_xstart, k = noise, [None] * (KINDS * REACH), None, 1
        for i, call in enumerate(self.calls):
            mine = KINDS * (i % REACH)
            t = torch.full((len(x),), call.t, device=x.device)
            eps = self.diffusion.call(self.diffusion.network_at(model, call.t), x, t, model_kwargs).chunk(2, dim=1)[0]
            held[mine + X], held[mine + EPS] = x, eps
            if pred_xstart is None:
                pred_xstart = self.diffusion.predict_x0(x, t, eps)
            if call.draws:
                held[mine + NOISE] = step_noise(k).to(x.device) if step_noise else torch.randn_like(x)
            if call.corrected:
                held[mine + CORRECTED] = _sum(call.corrected, held)
            x = _sum(call.state, held)
            if call.ends_step:
                yield {"sample": x, "pred_xstart": pred_xstart}
                pred_xstart, k = None, k + 1


def _scheme(solver: str) -> Scheme:
    if solver not in SCHEMES:
        raise ValueError(f"solver must be one of {', '.join(SCHEMES)}; got {solver!r}")
    return SCHEMES[solver]


def _sum(terms: Terms, held: list[Tensor]) -> Tensor:
    return sum(factor * held[which] for which, factor in terms)


def _calls(scheme: Scheme, diffusion: GaussianDiffusion) -> list[Call]:
    """What the scheduler makes of unit vectors."""
    t = torch.arange(diffusion.num_timesteps).flip(0)
    if scheme.two_calls:
        t = torch.cat([t[:1], t[1:].repeat_interleave(2)])
    a = torch.from_numpy(diffusion.alphas_cumprod)[t]
    sigmas = torch.cat([((1 - a) / a).sqrt(), a.new_zeros(1)])
    scales = (1 + sigmas**2).sqrt() if scheme.variance_exploding else torch.ones_like(sigmas)
    scheduler = _scheduler(scheme, diffusion.num_timesteps, sigmas)
    units, calls = torch.eye(KINDS * REACH, dtype=torch.float64).unsqueeze(1), []  # each (1, ...), a batch of one
    for i, call_t in enumerate(t.tolist()):
        mine = KINDS * (i % REACH)
        last = i == len(t) - 1
        draws = scheme.stochastic and not last
        added = {"variance_noise": units[mine + NOISE]} if scheme.stochastic else {}
        state = scheduler.step(units[mine + EPS], call_t, scales[i] * units[mine + X], **added).prev_sample / scales[i + 1]
        corrected = ()
        if getattr(scheduler, "last_sample", None) is not None:
            corrected, scheduler.last_sample = _terms(scheduler.last_sample), units[mine + CORRECTED]
        calls.append(Call(call_t, _terms(state), corrected, draws, ends_step=last or not scheme.two_calls or i % 2 == 1))
    return calls


def _scheduler(scheme: Scheme, num_steps: int, sigmas: Tensor):
    """sigmas: sqrt((1 - a) / a) at each call, and the 0 that the last one leads to, in place of the scheduler's own."""
    import diffusers  # takes seconds, which other solvers should not pay

    scheduler = getattr(diffusers, scheme.scheduler)(**scheme.options)
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    return scheduler


def _terms(vector: Tensor) -> Terms:
    return tuple((which, factor) for which, factor in enumerate(vector[0].tolist()) if factor)
