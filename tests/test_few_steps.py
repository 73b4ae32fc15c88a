"""DPM-Solver++, UniPC and Heun: diffusers' own loops, closed forms on a Gaussian, and what the network is asked."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data.codec import load_codec
from diffusion import GaussianDiffusion, create_diffusion, few_steps
from diffusion.few_steps import MULTISTEP, SCHEMES, FewSteps, Scheme, create_few_steps
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.schedule import linear_betas, respace_betas, trailing_timesteps
from sampling.generate import generate
from sampling.samplers import GAUSSIAN_SOLVERS, GaussianSampler, gaussian_sampler
from tests.edt_checkpoints import random_edt
from tests.shared import grey_levels

DETERMINISTIC = tuple(name for name, scheme in SCHEMES.items() if not scheme.stochastic)
SHAPE = (3, 4, 8, 8)


def network(x, t, variance=0.0):
    eps = 0.7 * x + 0.2 * (3 * x).sin() + (t / 1000 - 0.4).view(-1, 1, 1, 1)
    return torch.cat([eps, torch.full_like(x, variance)], dim=1)


def draw(k):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))


def respaced(kept):
    return GaussianDiffusion(respace_betas(linear_betas(), kept), kept)


def last(steps):
    *_, out = steps
    return out["sample"]


# diffusers


def diffusers_loop(name: str, num_steps: int):
    """The sample of diffusers' own loop, as its pipelines write it, and its timesteps."""
    import diffusers

    scheme = SCHEMES[name]
    betas = linear_betas()
    scheduler = getattr(diffusers, scheme.scheduler)(trained_betas=betas, timestep_spacing="trailing", **scheme.options)
    scheduler.set_timesteps(num_steps)
    x = draw(0)
    if name == "heun":
        x = x * (1 + scheduler.sigmas[0] ** 2).sqrt()
    for k, t in enumerate(scheduler.timesteps, start=1):
        eps = network(scheduler.scale_model_input(x, t), t.float().expand(len(x))).chunk(2, dim=1)[0]
        added = {"variance_noise": draw(k)} if scheme.stochastic else {}
        x = scheduler.step(eps, t, x, **added).prev_sample
    return x, list(dict.fromkeys(scheduler.timesteps.int().tolist()))


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("name", SCHEMES)
def test_diffusers_own_loop_agrees(name, num_steps):
    expected, timesteps = diffusers_loop(name, num_steps)
    kept = trailing_timesteps(num_steps)
    assert kept == timesteps[::-1]
    actual = last(FewSteps(respaced(kept), name).steps(network, draw(0), step_noise=draw))
    assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


@pytest.mark.parametrize("steps", ["7", "ddim50"])
def test_ddim_through_diffusers_is_our_ddim(monkeypatch, steps):
    """DPM-Solver++ of first order is DDIM."""
    options = {**MULTISTEP, "solver_order": 1, "algorithm_type": "dpmsolver++"}
    monkeypatch.setitem(few_steps.SCHEMES, "ddim", Scheme("DPMSolverMultistepScheduler", options, fewest=1))
    diffusion = create_diffusion(steps)
    ours = list(diffusion.ddim_sample_loop_progressive(network, draw(0)))
    theirs = list(FewSteps(diffusion, "ddim").steps(network, draw(0)))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a["sample"], b["sample"], rtol=1e-4, atol=1e-4)
        assert_close(a["pred_xstart"], b["pred_xstart"], rtol=1e-4, atol=1e-3)


# A Gaussian target: the network, and the path of the probability-flow ODE, in closed form

MEAN, STD = torch.tensor([0.8, -0.3]).double().view(2, 1, 1), torch.tensor([0.5, 1.2]).double().view(2, 1, 1)


def optimal(diffusion):
    """E[noise | x_t] for x_0 ~ N(MEAN, STD^2), at the process's own timesteps."""
    a_of = dict(zip(diffusion.timestep_map, diffusion.alphas_cumprod, strict=True))

    def model(x, t):
        a = a_of[t[0].item()]
        eps = math.sqrt(1 - a) * (x.double() - math.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    return model


def flow(x, a, a_end):
    """The ODE's map from x at a to a_end: what lies so many deviations from the marginal's mean stays there."""
    widths = [(level * STD**2 + 1 - level).sqrt() if level < 1 else STD for level in (a, a_end)]
    return math.sqrt(a_end) * MEAN + widths[1] / widths[0] * (x - math.sqrt(a) * MEAN)


def even_in_log_snr(num_steps):
    """A process that needs no whole timesteps, from sqrt(a / (1 - a)) = e^-2 to e^3."""
    a = torch.linspace(3, -2, num_steps, dtype=torch.float64).mul(2).sigmoid().numpy()
    return GaussianDiffusion(1 - a / np.append(1.0, a[:-1]), list(range(num_steps)))


def solve(name, diffusion, x):
    if name == "ddim":
        return last(diffusion.ddim_sample_loop_progressive(optimal(diffusion), x))
    return last(FewSteps(diffusion, name).steps(optimal(diffusion), x))


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm++2m", 2), ("unipc", 3), ("heun", 2)])
def test_order_of_convergence(name, order):
    """But for the last step, to no noise at all, which takes the prediction of x_0: here of the exact state. UniPC's corrector
    raises the order of its predictor by one."""
    x = torch.linspace(-2, 2, 32).double().view(4, 2, 2, 2)
    errors = []
    for num_steps in (40, 80):
        diffusion = even_in_log_snr(num_steps)
        a = diffusion.alphas_cumprod
        end = flow(x, a[-1], a[0])
        eps = optimal(diffusion)(end, torch.zeros(4))[:, :2]
        expected = (end - math.sqrt(1 - a[0]) * eps) / math.sqrt(a[0])
        errors.append((solve(name, diffusion, x) - expected).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name, bound", [("ddim", 0.3), ("dpm++2m", 0.03), ("unipc", 0.06), ("heun", 0.4)])
def test_ten_calls_come_near_the_exact_solution(name, bound):
    """Over the timesteps that a user gets; in deviations of the data."""
    sampler = gaussian_sampler(name, 10 if name != "heun" else 5)
    diffusion = sampler.diffusion if name == "ddim" else sampler.process.diffusion
    x = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    error = ((solve(name, diffusion, x) - flow(x, diffusion.alphas_cumprod[-1], 1.0)) / STD).square().mean().sqrt()
    assert bound / 4 < error < bound


def test_the_sde_meets_mean_and_variance():
    """The more steps, the nearer."""
    errors = []
    for num_steps in (20, 100):
        process = create_few_steps("dpm++sde2m", num_steps)
        draws = torch.Generator().manual_seed(0)

        def noise(k, draws=draws):
            return torch.randn(20_000, 2, 1, 1, generator=draws)

        samples = last(process.steps(optimal(process.diffusion), noise(0), step_noise=noise))
        errors.append(((samples.mean(0) - MEAN) / STD).abs().max() + (samples.std(0) / STD - 1).abs().max())
    assert errors[1] < 0.03 and errors[1] < errors[0] / 2


# What the network is asked


@pytest.mark.parametrize("num_steps", [3, 10, 250])
@pytest.mark.parametrize("name", GAUSSIAN_SOLVERS)
def test_calls(name, num_steps):
    """As many as promised, at whole timesteps from 999 down, one yield a step; the prediction comes from the step's start."""
    asked = []

    def model(x, t, y):
        asked.append((x, t[0].item()))
        return network(x, t)

    sampler = gaussian_sampler(name, num_steps)
    outs = list(sampler(model, draw(0), torch.zeros(3).long(), draw))
    assert len(outs) == sampler.num_steps == num_steps
    assert len(asked) == sampler.num_evaluations == (2 * num_steps - 1 if name == "heun" else num_steps)
    timesteps = [t for _, t in asked]
    assert timesteps[0] == 999 and timesteps == sorted(timesteps, reverse=True) and len(set(timesteps)) == num_steps
    if name != "heun":
        assert all(torch.equal(x, out["sample"]) for (x, _), out in zip(asked[1:], outs, strict=False))
    x, t = asked[0]
    a = np.cumprod(1 - linear_betas())[t]
    expected = (x - math.sqrt(1 - a) * network(x, torch.tensor([t]))[:, :4]) / math.sqrt(a)
    assert_close(outs[0]["pred_xstart"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_learned_variance_is_dropped(name):
    process = create_few_steps(name, 6)
    a, b = (last(process.steps(network, draw(0), step_noise=draw, model_kwargs={"variance": variance})) for variance in (0, 9))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", SCHEMES)
def test_guidance_in_an_interval_is_asked_there_only(name):
    asked = []

    def model(x, t, y):
        asked.append((t[0].item(), len(x)))
        return network(x, t)

    guided = ClassifierFreeGuidance(model, 2.0, 10, None, (0.3, 0.7))
    last(gaussian_sampler(name, 10)(guided, draw(0), torch.zeros(3).long(), draw))
    assert {size for _, size in asked} == {3, 6}
    assert all(size == (6 if 300 <= t <= 700 else 3) for t, size in asked)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_sampler_has_no_state(name):
    """Two runs of one sampler that take turns are the runs one after the other."""
    sampler = gaussian_sampler(name, 5)
    runs = [(lambda x, t, y, c=c: network(x, t) * c, draw(20 + c), None, draw) for c in (1, 2)]
    alone = [last(sampler(*run)) for run in runs]
    together = list(zip(*(sampler(*run) for run in runs), strict=True))[-1]
    assert all(torch.equal(a, b["sample"]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", SCHEMES)
def test_no_value_of_a_tensor_is_read(name):
    """So that nothing waits for the device: a tensor on "meta" has none."""

    def model(x, t):
        return torch.cat([x, x], dim=1)

    *_, out = create_few_steps(name, 5).steps(model, draw(0).to("meta"), step_noise=draw)
    assert out["sample"].shape == out["pred_xstart"].shape == SHAPE


@pytest.mark.parametrize("name", SCHEMES)
def test_batch_size_and_filling_change_nothing(name):
    """Image i is a function of (seed, i): whatever it is drawn with, in whatever order, beside copies or not."""
    model, sampler, codec = random_edt(), gaussian_sampler(name, 4), load_codec("pixels")

    def images(ids, **options):
        batches = generate(model, sampler, codec, ids, labels=lambda i: i % 10, seed=3, **options)
        return np.concatenate([batch.images.numpy() for batch in batches])

    whole = images(range(5), batch_size=5)
    assert whole.std() > 10
    assert grey_levels(images(range(5), batch_size=2), whole) <= 1
    assert grey_levels(images(range(5), batch_size=2, pad_last=True), whole) <= 1
    assert grey_levels(images([4, 2, 0], batch_size=3), whole[[4, 2, 0]]) <= 1


# Timesteps and errors


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("count", [1, 2, 10, 250, 997, 1000])
def test_trailing_timesteps(count, power):
    kept = trailing_timesteps(count, power)
    assert len(kept) == count and kept[-1] == 999 and kept[0] >= 0
    assert all(a < b for a, b in pairwise(kept))


def test_powers_crowd_timesteps_at_low_noise():
    assert trailing_timesteps(5) == [199, 399, 599, 799, 999]
    assert trailing_timesteps(4, 1.5) == [124, 353, 649, 999]


@pytest.mark.parametrize(
    "name, num_steps, message",
    [
        ("euler", 10, "solver must be one of ancestral, ddim, dpm.+2m, dpm.+sde2m, unipc, heun; got 'euler'"),
        ("dpm++2m", 2, "takes at least 3 steps, got 2"),
        ("heun", 1, "heun takes at least 2 steps, got 1: with so few, take ddim"),
        ("unipc", 1001, "1001 steps cannot be taken over 1000 timesteps: take 1 to 1000"),
    ],
)
def test_errors(name, num_steps, message):
    with pytest.raises(ValueError, match=message):
        gaussian_sampler(name, num_steps)


def test_the_two_plain_loops_are_ours():
    for name in ("ancestral", "ddim"):
        assert isinstance(gaussian_sampler(name, 5), GaussianSampler)
        assert gaussian_sampler(name, 5).settings["solver"] == name
