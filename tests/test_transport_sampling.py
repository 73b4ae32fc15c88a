"""Sampling along a transport: the published numbers, and Gaussian data, of which everything is known."""

import itertools
import math

import pytest
import torch
import torchdiffeq
from torch.testing import assert_close

from diffusion.solvers import METHODS
from diffusion.transport import Sampler, create_transport
from diffusion.transport.ode import ADAPTIVE_METHODS, GRID_METHODS
from diffusion.transport.paths import DIFFUSION_FORMS, PATHS
from diffusion.transport.sde import LAST_STEPS
from diffusion.transport.transport import PREDICTIONS
from tests.shared import golden_arrays
from tests.transport_networks import exact_network, marginal, network

EVERY_PREDICTION = list(itertools.product(PATHS, PREDICTIONS))
MEAN, STD = 0.7, 0.4  # of the Gaussian data


@pytest.fixture(scope="module")
def golden():
    return golden_arrays("transport")


@pytest.fixture
def noise():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def no_noise(shape):
    return lambda k: torch.zeros(shape)


def counting(model):
    """The model, and the list of times it was called at."""
    calls = []
    return (lambda x, t, **kwargs: calls.append(t[0].item()) or model(x, t, **kwargs)), calls


# The published numbers


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
@pytest.mark.parametrize("method", ["euler", "heun2", "dopri5"])
def test_golden_ode(golden, path, prediction, method):
    sample = Sampler(create_transport(path, prediction)).sample_ode(sampling_method=method, num_steps=11, atol=1e-6, rtol=1e-5)
    key = f"{path}/{prediction}/None/ode_{method}"
    if key in golden:
        assert_close(sample(golden["x_noise"], network)[-1], golden[key], rtol=1e-4, atol=1e-4)
    else:  # the published solver fails: it tries times beyond t = 1, where sigma is no number
        assert (path, prediction, method) == ("VP", "noise", "dopri5")
        fine = Sampler(create_transport(path, prediction)).sample_ode(sampling_method="ab4", num_steps=500)
        expected = fine(golden["x_noise"], network)[-1]
        assert_close(sample(golden["x_noise"], network)[-1], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
@pytest.mark.parametrize("method", ["Euler", "Heun"])
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_golden_sde(golden, path, prediction, method, last_step):
    options = {"sampling_method": method, "diffusion_form": "sigma", "last_step": last_step, "num_steps": 12}
    sampler, key = Sampler(create_transport(path, prediction)), f"{path}/{prediction}/None/sde_{method}_{last_step}_zero_noise"
    if key in golden:
        x = golden["x_noise"]
        final = sampler.sample_sde(**options, step_noise=no_noise(x.shape))(x, network)[-1]
        assert_close(final, golden[key], rtol=1e-4, atol=1e-4)
    else:  # 0/0 at t = 1
        assert (path, prediction, method, last_step) == ("Linear", "velocity", "Heun", None)
        with pytest.raises(ValueError, match=r"infinite at t = 1 .* give a last_step \(Mean\), or sample_eps 1e-3"):
            sampler.sample_sde(**options)


# ODE


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
@pytest.mark.parametrize("method, num_steps, rtol", [("heun", 300, 2e-3), ("dopri5", 2, 3e-4)])
def test_ode_is_the_transport_map_of_a_gaussian(noise, path, prediction, method, num_steps, rtol):
    """x keeps its standard score: the flow of Gaussians is affine."""
    transport = create_transport(path, prediction)
    model = exact_network(transport, MEAN, STD)
    sampler = Sampler(transport)
    (m0, s0), (m1, s1) = (
        marginal(transport, t, MEAN, STD)
        for t in transport.check_interval(transport.train_eps, transport.sample_eps, eval=True)
    )
    x = m0 + s0 * noise
    final = sampler.sample_ode(sampling_method=method, num_steps=num_steps, rtol=1e-6)(x, model)[-1]
    assert_close(final, m1 + s1 * noise, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
@pytest.mark.parametrize("method", ["ab4", "dopri5"])
def test_reverse_undoes_forward(noise, path, prediction, method):
    transport = create_transport(path, prediction)
    sampler, model = Sampler(transport), exact_network(transport, MEAN, STD)
    options = {"sampling_method": method, "num_steps": 300, "rtol": 1e-6}
    data = sampler.sample_ode(**options)(noise, model)[-1]
    assert (data - noise).abs().max() > 0.5
    assert_close(sampler.sample_ode(**options, reverse=True)(data, model)[-1], noise, rtol=5e-3, atol=5e-3)


def test_every_method_of_torchdiffeq_is_known():
    from torchdiffeq._impl.odeint import SOLVERS

    assert {*ADAPTIVE_METHODS, *GRID_METHODS, "euler", "heun2"} == set(SOLVERS)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods_meet_their_tolerance(noise, method):
    transport = create_transport()
    sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=2, rtol=1e-5)
    assert_close(sample(noise, exact_network(transport, MEAN, STD))[-1], MEAN + STD * noise, rtol=1e-3, atol=1e-3)


def test_a_tolerance_that_cannot_be_met():
    with pytest.raises(ValueError, match=r"dopri5 found no step that meets .* take a fixed-step method"):
        Sampler(create_transport()).sample_ode()(torch.ones(2, 2), lambda x, t: x * torch.nan)


@pytest.mark.parametrize("method", GRID_METHODS)
@pytest.mark.parametrize("reverse", [False, True])
def test_grid_methods_step_on_the_whole_grid(noise, method, reverse):
    """Only the last state is stored, yet the steps are those of the grid."""
    drift = create_transport().get_drift()
    grid = torch.linspace(1, 0, 8) if reverse else torch.linspace(0, 1, 8)
    expected = torchdiffeq.odeint(
        lambda t, x: drift(x, t.expand(len(x)), network), noise, grid, method=method, rtol=1e-3, atol=1e-6
    )
    options = {"sampling_method": method, "num_steps": 8, "reverse": reverse}
    sampler = Sampler(create_transport())
    assert_close(sampler.sample_ode(**options)(noise, network)[-1], expected[-1], rtol=1e-5, atol=1e-5)
    every = sampler.sample_ode(**options, keep="all")(noise, network)
    assert_close(torch.stack(every), expected, rtol=1e-5, atol=1e-5)


def test_samples_solved_on_their_own(noise):
    """Together, one hard sample sets the steps of all; on its own, each is what a batch of one gives, bit for bit."""
    y = torch.tensor([0.0, 3.0, 30.0])

    def model(x, t, y, scale):
        return scale * (y.view(-1, 1, 1, 1) * x).cos()

    def solve(z, y, **options):
        return Sampler(create_transport()).sample_ode(rtol=1e-2, **options)(z, model, y=y, scale=2.0)[-1]

    own = solve(noise, y, per_sample=True)
    alone = [solve(noise[i : i + 1], y[i : i + 1]) for i in range(3)]
    assert torch.equal(own, torch.cat(alone))
    assert not torch.equal(own, solve(noise, y))


# SDE


@pytest.mark.parametrize("path, method", [("Linear", "Euler"), ("GVP", "Euler"), ("VP", "Euler"), ("GVP", "Heun")])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_sde_marginals_of_a_gaussian(path, form, method):
    """Whatever the diffusion, x_t is N(alpha mean, alpha^2 std^2 + sigma^2): at the end of the grid, and on the way."""
    transport = create_transport(path)
    sde = Sampler(transport).sde(sampling_method=method, diffusion_form=form, num_steps=200)
    num_samples = 20000
    generator = torch.Generator().manual_seed(0)
    z, draw = torch.randn(num_samples, 1, generator=generator), lambda k: torch.randn(num_samples, 1, generator=generator)
    model = exact_network(transport, MEAN, STD)
    for k, out in enumerate(sde.steps(model, z, step_noise=draw), start=1):
        if k in (130, 199):
            mean, std = marginal(transport, sde.times[k], MEAN, STD)
            standard = (out["sample"] - mean) / std
            # 4 standard errors, and 0.01 (0.02) for the steps' size.
            assert abs(standard.mean().item()) < 4 / num_samples**0.5 + 0.01
            assert abs(standard.var().item() - 1) < 4 * (2 / num_samples) ** 0.5 + 0.02


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
def test_last_steps_in_closed_form(noise, path, prediction):
    transport = create_transport(path, prediction)
    model, form, h = exact_network(transport, MEAN, STD), "sigma", 0.1
    for last_step in ("Mean", "Euler", "Tweedie"):
        sample = Sampler(transport).sample_sde(
            diffusion_form=form, last_step=last_step, last_step_size=h, num_steps=5, keep={4}
        )
        before, after = sample(noise, model)
        t = torch.tensor(1 - h, dtype=torch.float64)
        p = transport.predict(before, t, model)
        moved = {
            "Mean": before + h * (p.velocity + transport.path.sigma(t) * p.score),
            "Euler": before + h * p.velocity,
            "Tweedie": (before + transport.path.sigma(t) ** 2 * p.score) / transport.path.alpha(t),
        }
        assert_close(after, moved[last_step].float(), rtol=1e-4, atol=1e-4)


def test_no_diffusion_is_the_ode(noise):
    """Norm 0 leaves the velocity: Euler's steps of both are the same."""
    sampler = Sampler(create_transport())
    sde = sampler.sample_sde(diffusion_form="constant", diffusion_norm=0.0, last_step=None, num_steps=9)(noise, network)[-1]
    assert_close(sde, sampler.sample_ode(sampling_method="euler", num_steps=9)(noise, network)[-1], rtol=1e-6, atol=1e-6)


def test_sbdm_starts_at_a_safe_time():
    """The published default, SBDM with velocity prediction, was NaN at t = 0 on Linear and GVP."""
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for path, start in (("Linear", 1e-3), ("GVP", 1e-3), ("VP", 0)):
        transport = create_transport(path)
        assert Sampler(transport).sde().times[0].item() == start
        assert Sampler(transport).sample_sde(num_steps=20)(z, exact_network(transport, MEAN, STD))[-1].isfinite().all()
    assert Sampler(create_transport(sample_eps=0.02)).sde().times[0].item() == 0.02


@pytest.mark.parametrize("path, form", [("Linear", "sigma"), ("Linear", "linear"), ("GVP", "constant"), ("GVP", "linear")])
def test_a_pole_that_would_be_met(path, form):
    """Heun without a last step calls the network at t = 1, where the score is infinite."""
    options = {"sampling_method": "Heun", "diffusion_form": form, "last_step": None, "num_steps": 5}
    with pytest.raises(ValueError, match="infinite at t = 1"):
        Sampler(create_transport(path)).sde(**options)
    transport = create_transport(path, sample_eps=1e-3)
    final = Sampler(transport).sample_sde(**options)(torch.ones(2, 2), exact_network(transport, MEAN, STD))[-1]
    assert final.isfinite().all()


def test_each_sample_has_its_own_noise(noise):
    """A batch of 3 is three batches of 1, and the noise of solver step k = 1, 2, ... is asked for once."""
    added = torch.randn(10, *noise.shape, generator=torch.Generator().manual_seed(1))
    for method in ("Euler", "Heun"):
        sampler, asked = Sampler(create_transport()), []

        def sample(rows, method=method, sampler=sampler, asked=asked):
            draw = lambda k: asked.append(k) or added[k, rows]  # noqa: E731
            return sampler.sample_sde(sampling_method=method, num_steps=10, step_noise=draw)(noise[rows], network)[-1]

        together = sample(slice(0, 3))
        assert asked == list(range(1, 10))
        assert_close(torch.cat([sample(slice(i, i + 1)) for i in range(3)]), together, rtol=1e-6, atol=1e-6)


# Cost, and what is yielded


@pytest.mark.parametrize("method, calls_per_step", [("Euler", 1), ("Heun", 2)])
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_sde_network_calls(noise, method, calls_per_step, last_step):
    """The published code calls the network twice as often: for the velocity, and for the score."""
    model, calls = counting(network)
    sde = Sampler(create_transport("VP")).sde(sampling_method=method, last_step=last_step, num_steps=6)
    assert len(list(sde.steps(model, noise))) == sde.num_yields == 5 + (last_step is not None)
    assert len(calls) == 5 * calls_per_step + (last_step is not None)


@pytest.mark.parametrize("method, num_calls", [("euler", 8), ("heun", 16), ("ab2", 9), ("ab3", 9), ("ab4", 9)])
def test_ode_network_calls(noise, method, num_calls):
    model, calls = counting(network)
    ode = Sampler(create_transport()).ode(sampling_method=method, num_steps=9)
    assert len(list(ode.steps(model, noise))) == ode.num_yields == 8
    assert len(calls) == num_calls


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
def test_steps_tell_the_prediction_they_started_from(noise, path, prediction):
    transport = create_transport(path, prediction)
    sampler = Sampler(transport)
    still = {"step_noise": no_noise(noise.shape), "diffusion_form": "sigma", "num_steps": 6}
    runs = [(sampler.ode(sampling_method=method, num_steps=6), {}) for method in METHODS]
    runs += [(sampler.sde(sampling_method=m, diffusion_form="sigma", num_steps=6), still) for m in ("Euler", "Heun")]
    for run, options in runs:
        x = noise
        outs = list(run.steps(network, noise, **({"step_noise": options["step_noise"]} if options else {})))
        for t, out in zip(run.times, outs, strict=False):
            assert_close(out["pred_xstart"], transport.predict(x, t, network).data, rtol=1e-3, atol=1e-3)
            x = out["sample"]


def test_torchdiffeq_yields_once(noise):
    sampler = Sampler(create_transport())
    [out] = sampler.ode_steps(network, noise, sampling_method="dopri5")
    assert torch.equal(out["sample"], sampler.sample_ode(sampling_method="dopri5")(noise, network)[-1])
    assert torch.equal(out["pred_xstart"], out["sample"])
    assert sampler.ode(sampling_method="dopri5").num_yields == 1


@pytest.mark.parametrize("kind, method", [("sde", "Euler"), ("sde", "Heun"), *(("ode", method) for method in METHODS)])
def test_the_model_can_change_between_steps(noise, kind, method):
    """Nothing is computed ahead: step k sees the factor k, at each of its network calls."""
    factor, seen = 0, []

    def model(x, t):
        seen.append(factor)
        return x * factor

    steps = getattr(Sampler(create_transport()), f"{kind}_steps")(model, noise, sampling_method=method, num_steps=6)
    assert seen == []
    for k in range(1, 6):
        factor = k
        next(steps)
        assert set(seen) == {k}
        seen.clear()


def test_kept_states(noise):
    sampler = Sampler(create_transport())
    sde = {"num_steps": 6, "step_noise": no_noise(noise.shape)}
    every = sampler.sample_sde(**sde, keep="all")(noise, network)
    assert len(every) == 6  # as published: the solver's steps and the last step
    some = sampler.sample_sde(**sde, keep={2, 5})(noise, network)
    assert all(torch.equal(a, b) for a, b in zip(some, (every[1], every[4], every[5]), strict=True))
    [only] = sampler.sample_sde(**sde)(noise, network)
    assert torch.equal(only, every[-1])
    for method in ("heun", "midpoint", "dopri5"):
        ode = {"num_steps": 6, "sampling_method": method}
        every = sampler.sample_ode(**ode, keep="all")(noise, network)
        assert len(every) == 6  # as published: the grid's points
        assert torch.equal(every[0], noise)
        some = sampler.sample_ode(**ode, keep=[0, 3])(noise, network)
        for a, b in zip(some, (every[0], every[3], every[5]), strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-6)


# Likelihood


@pytest.mark.parametrize(
    "path, prediction, method, num_steps",
    [(*both, "dopri5", 2) for both in EVERY_PREDICTION] + [(path, "velocity", "heun", 300) for path in PATHS],
)
def test_likelihood_of_a_gaussian(path, prediction, method, num_steps):
    """The flow is affine from x at t1 to z at t0, and any Rademacher probe is exact for its diagonal Jacobian."""
    transport = create_transport(path, prediction)
    x = MEAN + STD * torch.randn(16, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    likelihood = Sampler(transport).sample_ode_likelihood(sampling_method=method, num_steps=num_steps, rtol=1e-5)
    logp, z = likelihood(x, exact_network(transport, MEAN, STD))
    t0, t1 = transport.check_interval(transport.train_eps, transport.sample_eps, eval=True)
    (m0, s0), (m1, s1) = marginal(transport, t0, MEAN, STD), marginal(transport, t1, MEAN, STD)
    expected_z = m0 + s0 / s1 * (x - m1)
    expected = torch.distributions.Normal(0, 1).log_prob(expected_z).sum((1, 2, 3)) + 9 * math.log(s0 / s1)
    assert_close(z, expected_z, rtol=2e-3, atol=2e-3)
    assert_close(logp, expected, rtol=2e-3, atol=2e-3)
    if (path, prediction) in (("Linear", "velocity"), ("GVP", "velocity")):  # their flow reaches the data and N(0, 1) itself
        assert_close(logp, torch.distributions.Normal(MEAN, STD).log_prob(x).sum((1, 2, 3)), rtol=2e-3, atol=2e-3)


def correlated(x, t):
    """The exact velocity of data N(0, [[1, 0.6], [0.6, 0.5]]) on the Linear path: (t C - (1 - t)) (t^2 C + (1 - t)^2)^-1 x."""
    c, one, t = torch.tensor([[1.0, 0.6], [0.6, 0.5]]), torch.eye(2), t.view(-1, 1, 1)
    velocity = (t * c - (1 - t) * one) @ torch.linalg.inv(t**2 * c + (1 - t) ** 2 * one)
    return (velocity @ x.unsqueeze(-1)).squeeze(-1)


def test_likelihood_is_unbiased_over_probes():
    """The mean over all Rademacher probes is the trace, also where dimensions are correlated."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    sampler, logps = Sampler(create_transport()), []
    for signs in itertools.product([-1.0, 1.0], repeat=2):
        probe = torch.tensor([signs]).expand(5, 2)
        logps.append(sampler.sample_ode_likelihood(probe=probe, rtol=1e-5)(x, correlated)[0])
    assert not torch.allclose(logps[0], logps[1], atol=0.1)
    data = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))
    assert_close(torch.stack(logps).mean(0), data.log_prob(x), rtol=1e-3, atol=1e-3)


def test_probes_belong_to_samples():
    """A callable sees the batch; with per_sample each sample is what a batch of one gives."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    likelihood = Sampler(create_transport()).sample_ode_likelihood(probe=lambda x: (x > 0) * 2.0 - 1, per_sample=True)
    together = likelihood(x, correlated)
    for i in range(4):
        for a, b in zip(likelihood(x[i : i + 1], correlated), together, strict=True):
            assert torch.equal(a, b[i : i + 1])


class LabelledNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.labels, self.time, self.out = torch.nn.Embedding(5, 2), torch.nn.Linear(1, 2), torch.nn.Linear(2, 2)

    def forward(self, x, t, y):
        return self.out((x + self.labels(y) + self.time(t[:, None])).tanh())


@pytest.mark.parametrize("method", ["dopri5", "heun"])
def test_likelihood_where_gradients_are_off(method):
    """Autograd refuses tensors made in inference mode, as are the data, the labels, the times and the probe here."""
    torch.manual_seed(0)
    model, probe = LabelledNetwork(), torch.tensor([[1.0, -1.0]]).expand(3, 2)
    data, labels = torch.randn(3, 2), torch.tensor([0, 4, 2])
    expected = Sampler(create_transport()).sample_ode_likelihood(sampling_method=method, probe=probe)(data, model, y=labels)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            likelihood = Sampler(create_transport()).sample_ode_likelihood(sampling_method=method, probe=probe.clone())
            out = likelihood(data.clone(), model, y=labels.clone())
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert not any(tensor.requires_grad for tensor in expected)
    assert all(parameter.grad is None for parameter in model.parameters())


# Options


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("sde", {"sampling_method": "rk4"}, "sampling_method must be one of Euler, Heun; got 'rk4'"),
        ("sde", {"diffusion_form": "cubic"}, "diffusion_form must be one of constant, SBDM, sigma"),
        ("sde", {"diffusion_norm": -1}, "diffusion_norm must be a number, at least 0 and finite; got -1"),
        ("sde", {"last_step": "mode"}, "last_step must be one of None, Mean, Euler, Tweedie; got 'mode'"),
        ("sde", {"last_step_size": 0}, "last_step_size must be above 0"),
        ("sde", {"last_step_size": 1.0}, "last_step_size must be a number"),
        ("sde", {"num_steps": 1}, "num_steps counts the points of the time grid: a whole number, at least 2; got 1"),
        ("ode", {"sampling_method": "ab5"}, "sampling_method must be one of euler, heun2, ab2, ab3, ab4, heun, dopri5"),
        ("ode", {"num_steps": 2.5}, "num_steps counts"),
        *(
            ("ode", {"sampling_method": f"AB{k}", "num_steps": k}, f"ab{k} takes at least {k + 1} points in time, got {k}")
            for k in (2, 3, 4)
        ),
        ("ode", {"atol": -1e-6}, "atol must be a number"),
        ("ode", {"atol": 0, "rtol": 0}, "atol and rtol must not both be 0"),
    ],
)
def test_bad_options_fail_before_sampling(noise, kind, options, message):
    sampler = Sampler(create_transport())
    for make in (getattr(sampler, f"sample_{kind}"), lambda **o: getattr(sampler, f"{kind}_steps")(network, noise, **o)):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_singular_times_fail_before_sampling():
    for path, prediction in (("Linear", "noise"), ("GVP", "score"), ("VP", "noise")):
        sampler = Sampler(create_transport(path, prediction, sample_eps=0))
        with pytest.raises(ValueError, match=r"velocity is infinite at an end .* give sample_eps 1e-3"):
            sampler.sample_ode()


@pytest.mark.parametrize("keep", ["some", {0}, {-1}, {251}])
def test_bad_keep(keep):
    with pytest.raises(ValueError, match='keep must be None, "all", or step numbers from 1 to 250'):
        Sampler(create_transport()).sample_sde(keep=keep)


def test_noise_and_probes_of_another_shape(noise):
    """They would broadcast: every sample would get the same draws."""
    with pytest.raises(ValueError, match=r"step_noise\(1\) must have the sample's shape"):
        Sampler(create_transport()).sample_sde(step_noise=lambda k: noise[:1])(noise, network)
    with pytest.raises(ValueError, match="probe must have the data's shape"):
        Sampler(create_transport()).sample_ode_likelihood(probe=noise[:1])(noise, network)


def test_names_in_any_case():
    sampler = Sampler(create_transport())
    assert sampler.sde(sampling_method="heun", diffusion_form="sbdm", last_step="MEAN") == sampler.sde(sampling_method="Heun")
    assert sampler.sde(last_step="none") == sampler.sde(last_step=None)
    assert sampler.sde(diffusion_form="inccreasing-decreasing") == sampler.sde(diffusion_form="increasing-decreasing")
    assert sampler.ode(sampling_method="Heun") == sampler.ode(sampling_method="heun2")
