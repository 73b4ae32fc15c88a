"""Gaussian diffusion: the published numbers, closed forms, and diffusers' schedulers as an independent reference."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion import create_diffusion
from diffusion.gaussian import discretized_gaussian_log_likelihood
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.schedule import linear_betas, space_timesteps
from diffusion.timesteps import SAMPLERS, LossSecondMomentSampler, UniformSampler
from tests.shared import golden_arrays, match


@pytest.fixture(scope="module")
def golden():
    return golden_arrays("gaussian_diffusion")


def network(x, t):
    """The golden data's: noise and variance of x at the original timestep."""
    s = t.view(-1, 1, 1, 1) / 1000
    return torch.cat([0.7 * x + 0.1 * (3 * x).sin() + 0.2 * s, (x - s).tanh()], dim=1)


def zero_noise(shape):
    return lambda k: torch.zeros(shape)


# The published numbers


def test_golden_betas(golden):
    assert_close(create_diffusion("").betas, golden["betas_linear_1000"].numpy(), rtol=1e-12, atol=0)


def test_golden_q_sample(golden):
    match(create_diffusion("").q_sample(golden["x_start"], golden["t"], golden["noise"]), golden["q_sample"])


@pytest.mark.parametrize("loss, gamma", [("edt_loss", 5), ("adm_loss", None)])
def test_golden_losses(golden, loss, gamma):
    diffusion = create_diffusion("", min_snr_gamma=gamma)
    terms = diffusion.training_losses(network, golden["x_start"], golden["t"], noise=golden["noise"])
    assert terms.keys() == {"loss", "mse", "vb"}
    for name, value in terms.items():
        match(value, golden[f"{loss}/{name}"])


def test_golden_p_mean_variance(golden):
    diffusion = create_diffusion("")
    x = diffusion.q_sample(golden["x_start"], golden["t"], golden["noise"])
    terms = diffusion.p_mean_variance(network, x, golden["t"], clip_denoised=False)
    assert terms.keys() == {"mean", "variance", "log_variance", "pred_xstart"}
    for name, value in terms.items():
        match(value, golden[f"p_mean_variance/{name}"])


@pytest.mark.parametrize("respacing", ["250", "10", "10,15,20", "ddim50"])
def test_golden_timestep_maps(golden, respacing):
    diffusion = create_diffusion(respacing)
    assert diffusion.timestep_map == golden[f"timestep_map/{respacing}"].tolist()
    assert diffusion.num_timesteps == len(diffusion.betas) == len(diffusion.timestep_map)


@pytest.mark.parametrize("t", [9, 0])
def test_golden_p_sample(golden, t):
    x = golden["noise"]
    out = create_diffusion("10").p_sample(network, x, torch.full((4,), t), golden["noise2"])
    match(out["sample"], golden[f"p_sample_10_t{t}"])


def test_golden_loops(golden):
    diffusion, noise = create_diffusion("10"), golden["noise"]
    ancestral = diffusion.p_sample_loop(network, noise.shape, noise, step_noise=zero_noise(noise.shape))
    match(ancestral, golden["p_sample_loop_10_zero_noise"])
    match(diffusion.ddim_sample_loop(network, noise.shape, noise), golden["ddim_sample_loop_10"])


def test_golden_second_moment_weights(golden):
    sampler = LossSecondMomentSampler(history_per_term=golden["second_moment/history_per_term"].item())
    for t, losses in zip(golden["second_moment/ts"].numpy(), golden["second_moment/losses"].numpy(), strict=True):
        sampler.update(t, losses)
    assert_close(sampler.probabilities(), golden["second_moment/weights"].numpy(), rtol=1e-10, atol=0)


# Independent references

SETTINGS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def noisy():
    draws = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=draws)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_agrees_with_diffusers(noisy, eta, clip):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SETTINGS, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    diffusion = create_diffusion("ddim50")
    assert scheduler.timesteps.tolist() == diffusion.timestep_map[::-1]
    added = torch.randn(51, *noisy.shape, generator=torch.Generator().manual_seed(1))
    steps = diffusion.ddim_sample_loop_progressive(network, noisy, clip, step_noise=lambda k: added[k], eta=eta)
    x = noisy
    for k, (t, step) in enumerate(zip(diffusion.timestep_map[::-1], steps, strict=True), start=1):
        eps = network(x, torch.full((3,), t)).chunk(2, dim=1)[0]
        x = scheduler.step(eps, t, x, eta=eta, use_clipped_model_output=clip, variance_noise=added[k]).prev_sample
        match(step["sample"], x)


@pytest.mark.parametrize("respacing", ["", "50"])
@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_steps_agree_with_diffusers(noisy, monkeypatch, respacing, clip):
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    added = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: added)
    scheduler = DDPMScheduler(**SETTINGS, clip_sample=clip, variance_type="learned_range")
    diffusion = create_diffusion(respacing)
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    T = diffusion.num_timesteps
    for i in (T - 1, T // 2, 2, 1, 0):  # diffusers' variance of step 0 differs, but no noise is added there
        t = diffusion.timestep_map[i]
        expected = scheduler.step(network(noisy, torch.full((3,), t)), t, noisy)
        actual = diffusion.p_sample(network, noisy, torch.full((3,), i), added, clip_denoised=clip)
        match(actual["sample"], expected.prev_sample)
        assert_close(actual["pred_xstart"], expected.pred_original_sample, rtol=1e-3, atol=1e-4)  # x / sqrt(a) at t = 999


# Closed forms

MEAN, STD = 0.8, 0.5


def optimal(v):
    """E[noise | x_t] for x_0 ~ N(MEAN, STD^2); v sets the variance between the posterior's (-1) and beta (1)."""
    a_of = torch.from_numpy(create_diffusion("").alphas_cumprod)

    def model(x, t):
        a = a_of[t].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x.double() - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        return torch.cat([eps, torch.full_like(eps, v)], dim=1)

    return model


def linear_recursion(diffusion, v, eta):
    """Mean and variance of x_0 when each step is x -> A x + B + C noise, in float64; eta None: ancestral sampling."""
    a, betas = diffusion.alphas_cumprod, diffusion.betas
    a_prev = np.append(1.0, a[:-1])
    mean, variance = 0.0, 1.0
    for i in reversed(range(diffusion.num_timesteps)):
        slope = math.sqrt(1 - a[i]) / (a[i] * STD**2 + 1 - a[i])  # eps = slope * (x - sqrt(a) MEAN)
        x0 = (1 - math.sqrt(1 - a[i]) * slope) / math.sqrt(a[i]), slope * math.sqrt(1 - a[i]) * MEAN  # (times x, constant)
        if eta is None:
            to_x0, to_x = betas[i] * math.sqrt(a_prev[i]) / (1 - a[i]), (1 - a_prev[i]) * math.sqrt(1 - betas[i]) / (1 - a[i])
            scale, shift = to_x0 * x0[0] + to_x, to_x0 * x0[1]
            low = betas[max(i, 1)] * (1 - a_prev[max(i, 1)]) / (1 - a[max(i, 1)])
            noise = math.exp((v + 1) / 2 * math.log(betas[i]) + (1 - v) / 2 * math.log(low)) if i else 0.0
        else:
            noise = eta**2 * (1 - a_prev[i]) / (1 - a[i]) * (1 - a[i] / a_prev[i])
            to_eps = math.sqrt(1 - a_prev[i] - noise)
            scale = math.sqrt(a_prev[i]) * x0[0] + to_eps * slope
            shift = math.sqrt(a_prev[i]) * x0[1] - to_eps * slope * math.sqrt(a[i]) * MEAN
        mean, variance = scale * mean + shift, scale**2 * variance + noise
    return mean, variance


@pytest.mark.parametrize(
    "respacing, v, eta", [("", 0.0, None), ("", 0.0, 0.0), ("50", 1.0, None), ("50", -1.0, None), ("50", 0.0, 0.5)]
)
def test_optimal_network_samples_the_data_distribution(respacing, v, eta):
    """10,000 samples of Gaussian data: within 4 standard errors of the exact recursion; over the full chain, that is the data's
    own mean and variance within 1 %."""
    diffusion = create_diffusion(respacing)
    mean, variance = linear_recursion(diffusion, v, eta)
    if not respacing:
        assert mean == pytest.approx(MEAN, rel=0.01)
        assert variance == pytest.approx(STD**2, rel=0.01)
    draws = torch.Generator().manual_seed(0)
    n, shape = 10_000, (10, 1, 25, 40)
    noise, added = torch.randn(shape, generator=draws), {"step_noise": lambda k: torch.randn(shape, generator=draws)}
    loop = diffusion.p_sample_loop if eta is None else diffusion.ddim_sample_loop
    x = loop(optimal(v), shape, noise, **added, **({} if eta is None else {"eta": eta}))
    assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert x.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_sample_moments(t):
    """40,000 draws, 4 standard errors."""
    draws = torch.Generator().manual_seed(t)
    n = 40_000
    diffusion = create_diffusion("")
    x = diffusion.q_sample(torch.full((1, 1, n), 2.0), torch.tensor([t]), torch.randn(1, 1, n, generator=draws))
    a = diffusion.alphas_cumprod[t]
    assert x.mean().item() == pytest.approx(2 * math.sqrt(a), abs=4 * math.sqrt((1 - a) / n))
    assert x.var().item() == pytest.approx(1 - a, rel=4 * math.sqrt(2 / n))


def test_the_bound_of_the_true_posterior_is_zero():
    """When the network returns the noise itself and v = -1, p equals q: no KL for t > 0."""
    draws = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=draws)
    t = torch.tensor([1, 10, 100, 500, 999])
    perfect = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    terms = create_diffusion("").training_losses(lambda x, t: perfect, x0, t, noise=noise)
    assert_close(terms["vb"], torch.zeros(5), rtol=0, atol=1e-5)
    assert_close(terms["mse"], torch.zeros(5), rtol=0, atol=0)


def test_the_bound_trains_the_variance_only():
    draws = torch.Generator().manual_seed(0)
    out = torch.randn(2, 8, 4, 4, generator=draws, requires_grad=True)
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=draws)
    terms = create_diffusion("").training_losses(lambda x, t: out, x0, torch.tensor([0, 500]), noise=noise)
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), out)
    assert gradient[:, :4].abs().max() == 0
    assert (gradient[:, 4:].abs().amax((1, 2, 3)) > 0).all()


def test_likelihood_bins_sum_to_one():
    """256 grey levels at the centres of their bins; the outermost bins reach to infinity."""
    levels = torch.arange(256.0) / 127.5 - 1
    for mean, log_std in [(0.1, -2.0), (-0.98, -3.0), (1.5, 0.0)]:
        log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_std))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)


# Schedule and respacing


def test_betas_of_other_lengths_end_at_the_same_noise():
    assert np.cumprod(1 - linear_betas(500))[-1] == pytest.approx(np.cumprod(1 - linear_betas(1000))[-1], rel=0.5)
    assert linear_betas(500)[[0, -1]].tolist() == pytest.approx([2e-4, 0.04])


@pytest.mark.parametrize("respacing", ["250", "10,15,20", "ddim50", "1"])
def test_respacing_keeps_the_noise_levels(respacing):
    diffusion, full = create_diffusion(respacing), create_diffusion("")
    assert_close(diffusion.alphas_cumprod, full.alphas_cumprod[diffusion.timestep_map], rtol=1e-10, atol=0)


def test_the_network_sees_original_timesteps():
    seen = []
    diffusion = create_diffusion("10")
    x = torch.zeros(2, 4, 2, 2)
    diffusion.ddim_sample_loop(lambda x, t: seen.append(t.tolist()) or network(x, t), x.shape, x)
    assert seen == [[t, t] for t in range(999, -1, -111)]


@pytest.mark.parametrize("respacing", ["0", "1001", "-5", "a", "10,", "10,334,10", "ddim", "ddim0", "ddim300", "ddimx", "2.5"])
def test_respacing_errors(respacing):
    with pytest.raises(ValueError, match="respacing"):
        create_diffusion(respacing)


@pytest.mark.parametrize("respacing", ["1", "2", "1000", "1,1", "334,333,333", "ddim1000", "ddim1", "999"])
def test_timesteps_are_distinct_and_in_range(respacing):
    kept = space_timesteps(respacing)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] <= 999
    assert len(kept) == sum(int(count) for count in respacing.removeprefix("ddim").split(","))


def test_one_step_samples():
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    out = create_diffusion("1").p_sample_loop(network, x.shape, x)
    assert out.isfinite().all()


# Loops


def test_each_sample_has_its_own_noise(noisy):
    """A batch of 3 is three batches of 1, and the noise after solver step k = 1, 2, ..., T is asked for once."""
    diffusion = create_diffusion("10")
    added = torch.randn(11, *noisy.shape, generator=torch.Generator().manual_seed(1))
    asked = []
    together = diffusion.p_sample_loop(network, noisy.shape, noisy, step_noise=lambda k: asked.append(k) or added[k])
    assert asked == list(range(1, 11))
    for i in range(3):
        row = slice(i, i + 1)
        alone = diffusion.p_sample_loop(network, noisy[row].shape, noisy[row], step_noise=lambda k, row=row: added[k, row])
        assert_close(alone, together[row], rtol=1e-5, atol=1e-5)


def test_mixed_timesteps_are_separate(noisy):
    """The last step adds no noise to the samples that are there, and only to those."""
    diffusion = create_diffusion("10")
    t, added = torch.tensor([0, 9, 0]), torch.ones_like(noisy)
    together = diffusion.p_sample(network, noisy, t, added)["sample"]
    for i in range(3):
        alone = diffusion.p_sample(network, noisy[i : i + 1], t[i : i + 1], added[i : i + 1])["sample"]
        assert_close(alone, together[i : i + 1], rtol=1e-6, atol=1e-6)
    silent = diffusion.p_sample(network, noisy, t, 0 * added)["sample"]
    assert (together - silent).abs().amax((1, 2, 3)).gt(0).tolist() == [False, True, False]


def test_ddim_draws_only_with_eta(noisy):
    diffusion = create_diffusion("10")
    asked = []
    state = torch.get_rng_state()

    def step_noise(k):
        asked.append(k)
        return torch.zeros_like(noisy)

    still = diffusion.ddim_sample_loop(network, noisy.shape, noisy, step_noise=step_noise)
    assert torch.equal(diffusion.ddim_sample_loop(network, noisy.shape, noisy), still)
    assert asked == []
    assert torch.equal(torch.get_rng_state(), state)
    diffusion.ddim_sample_loop(network, noisy.shape, noisy, step_noise=step_noise, eta=1.0)
    assert asked == list(range(1, 11))


def test_progressive_yields_every_step(noisy):
    diffusion = create_diffusion("10")
    steps = list(diffusion.p_sample_loop_progressive(network, noisy, step_noise=zero_noise(noisy.shape)))
    assert len(steps) == 10
    assert torch.equal(
        steps[-1]["sample"], diffusion.p_sample_loop(network, noisy.shape, noisy, step_noise=zero_noise(noisy.shape))
    )


@pytest.mark.parametrize("method", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_clipping(noisy, method):
    """Also DDIM's noise then belongs to the clipped x_0: with x_0 at the border the sample stays finite and near."""
    steps = list(getattr(create_diffusion("10"), method)(network, 5 * noisy, clip_denoised=True))
    assert all(step["pred_xstart"].abs().max() <= 1 for step in steps)
    assert any(step["pred_xstart"].abs().max() == 1 for step in steps)
    assert steps[-1]["sample"].abs().max() <= 1 + 1e-5


def test_model_kwargs_reach_the_network(noisy):
    seen = []

    def model(x, t, y):
        seen.append(y)
        return network(x, t)

    diffusion, y = create_diffusion("2"), object()
    diffusion.p_sample_loop(model, noisy.shape, noisy, model_kwargs={"y": y})
    diffusion.ddim_sample_loop(model, noisy.shape, noisy, model_kwargs={"y": y})
    diffusion.training_losses(model, noisy, torch.tensor([0, 1, 1]), model_kwargs={"y": y})
    assert seen == [y] * 5


def test_network_without_variance(noisy):
    with pytest.raises(ValueError, match="must return 8 channels"):
        create_diffusion("10").p_mean_variance(lambda x, t: x, noisy, torch.zeros(3, dtype=torch.long))


def test_bf16_network_is_sampled_in_fp32(noisy):
    out = create_diffusion("10").ddim_sample_loop(lambda x, t: network(x, t).bfloat16(), noisy.shape, noisy)
    assert out.dtype == torch.float32


# Timestep samplers


def filled(num_timesteps=20, history=3, seed=0):
    sampler = LossSecondMomentSampler(num_timesteps, history_per_term=history)
    rng = np.random.default_rng(seed)
    for _ in range(history):
        sampler.update(rng.permutation(num_timesteps), rng.random(num_timesteps) + 0.1)
    return sampler


def test_uniform_until_every_timestep_is_full():
    sampler = LossSecondMomentSampler(5, history_per_term=2)
    uniform = np.full(5, 0.2)
    for t in (0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0):
        sampler.update(np.array([t]), np.array([1.0 + t]))
        np.testing.assert_array_equal(sampler.probabilities(), uniform)
    sampler.update(np.array([4]), np.array([5.0]))
    np.testing.assert_allclose(sampler.probabilities(), 0.999 * np.arange(1, 6) / 15 + 0.001 / 5)


def test_the_last_losses_count():
    sampler = LossSecondMomentSampler(2, history_per_term=3)
    sampler.update(np.zeros(10, np.int64), np.arange(10.0))  # leaves 7, 8, 9
    sampler.update(np.ones(3, np.int64), np.array([1.0, 2.0, 2.0]))
    roots = np.sqrt([(49 + 64 + 81) / 3, 3])
    np.testing.assert_allclose(sampler.probabilities(), 0.999 * roots / roots.sum() + 0.0005)


@pytest.mark.parametrize("sampler", [UniformSampler(20), filled()])
def test_importance_weights_average_to_one(sampler):
    p = sampler.probabilities()
    assert p.sum() == pytest.approx(1)
    t, weights = sampler.sample((np.arange(10**5) + 0.5) / 10**5)  # every quantile: an integral over p
    assert t.dtype == np.int64
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, 1 / (20 * p[t]), rtol=1e-6)
    np.testing.assert_allclose(np.bincount(t, minlength=20) / 10**5, p, atol=2e-5)
    assert weights.mean(dtype=np.float64) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("sampler", [UniformSampler(4), UniformSampler(1000), filled(), filled(1000)])
def test_inverse_cdf_at_its_edges(sampler):
    """The largest float32 below 1, and 1 itself, are the last timestep; a boundary belongs to the timestep above it."""
    last = sampler.num_timesteps - 1
    below = np.nextafter(np.float32(1), np.float32(0))
    assert sampler.sample(np.array([0.0, below, 1.0], np.float32))[0].tolist() == [0, last, last]
    if sampler.num_timesteps == 4 and type(sampler) is UniformSampler:
        assert sampler.sample(np.array([0.25, 0.2499, 0.5, 0.75]))[0].tolist() == [1, 0, 2, 3]


def test_sampling_is_a_pure_function():
    sampler = filled()
    before, u = sampler.state_dict(), np.random.default_rng(0).random(50)
    first, second = sampler.sample(u), sampler.sample(u)
    np.testing.assert_array_equal(first, second)
    assert sampler.state_dict() == before
    np.testing.assert_array_equal(sampler.sample(u[::-1])[0], first[0][::-1])


def test_state_round_trip():
    """The restored sampler also goes on in the same way."""
    sampler, restored = filled(), LossSecondMomentSampler(20, history_per_term=3)
    restored.load_state_dict(sampler.state_dict())
    for either in (sampler, restored):
        either.update(np.array([3, 3, 7]), np.array([5.0, 6.0, 7.0]))
    np.testing.assert_array_equal(restored.probabilities(), sampler.probabilities())
    assert restored.state_dict() == sampler.state_dict()


def test_state_of_another_size():
    with pytest.raises(ValueError, match=r"shape \(20, 3\), expected \(20, 10\)"):
        LossSecondMomentSampler(20).load_state_dict(filled().state_dict())


def test_samplers_by_name():
    assert SAMPLERS["uniform"]().probabilities().shape == SAMPLERS["loss-second-moment"]().probabilities().shape == (1000,)
    assert (SAMPLERS["uniform"].learns, SAMPLERS["loss-second-moment"].learns) == (False, True)


# Guidance


class FakeNetwork:
    """y shifts the output; records how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((len(x), y.tolist()))
        return torch.cat([x + y.view(-1, 1, 1, 1), x], dim=1)


@pytest.mark.parametrize("channels", [3, None])
def test_guidance_returns_the_guided_half(noisy, channels):
    fake = FakeNetwork()
    y, t = torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7])
    out = ClassifierFreeGuidance(fake, 2.5, null_label=10, channels=channels)(noisy, t, y)
    assert fake.calls == [(6, [1, 2, 3, 10, 10, 10])]
    cond, uncond = fake(noisy, t, y), fake(noisy, t, torch.full_like(y, 10))
    expected = uncond + 2.5 * (cond - uncond)
    assert out.shape == (3, 8, 8, 8)
    guided = channels or 4  # of 8: the others are the variance's
    assert_close(out[:, :guided], expected[:, :guided])
    assert torch.equal(out[:, guided:], cond[:, guided:])


def test_guidance_of_scale_1_calls_the_network_once(noisy):
    fake = FakeNetwork()
    y = torch.tensor([1, 2, 3])
    out = ClassifierFreeGuidance(fake, 1.0, null_label=10)(noisy, y, y)
    assert fake.calls == [(3, [1, 2, 3])]
    assert torch.equal(out, fake(noisy, y, y))


def test_guidance_of_scale_0_is_unconditional(noisy):
    fake = FakeNetwork()
    y = torch.tensor([1, 2, 3])
    out = ClassifierFreeGuidance(fake, 0.0, null_label=10, channels=None)(noisy, y, y)
    assert_close(out[:, :4], fake(noisy, y, torch.full_like(y, 10))[:, :4])


@pytest.mark.parametrize("scale", [-0.1, -2])
def test_negative_guidance(scale):
    with pytest.raises(ValueError, match="must not be negative"):
        ClassifierFreeGuidance(FakeNetwork(), scale, null_label=10)


def test_second_moment_sampler_survives_losses_that_are_not_finite():
    """One NaN made every probability NaN from then on."""
    sampler = LossSecondMomentSampler(4, history_per_term=1)
    sampler.update(np.arange(4), np.array([1.0, np.nan, 1.0, 1.0]))
    assert np.array_equal(sampler.probabilities(), np.full(4, 0.25))  # timestep 1 still has no loss
    sampler.update(np.array([1]), np.array([2.0]))
    assert np.isfinite(sampler.probabilities()).all() and sampler.probabilities()[1] == pytest.approx(0.4, rel=1e-2)
    sampler.update(np.arange(4), np.zeros(4))
    assert np.array_equal(sampler.probabilities(), np.full(4, 0.25))
