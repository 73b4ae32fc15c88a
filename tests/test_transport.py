"""Transport: the published numbers, and closed forms of paths, losses and predictions."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion.timesteps import ContinuousSampler
from diffusion.transport import create_transport
from diffusion.transport.paths import DIFFUSION_FORMS, PATHS
from diffusion.transport.transport import LOSS_WEIGHTS, PREDICTIONS
from tests.shared import golden_arrays, match
from tests.transport_networks import exact_network, network


@pytest.fixture(scope="module")
def golden():
    return golden_arrays("transport")


EVERY_PREDICTION = list(itertools.product(PATHS, PREDICTIONS))
# Velocity prediction ignores the weight: the golden file has it without one.
EVERY_LOSS = [p for p in itertools.product(PATHS, PREDICTIONS, LOSS_WEIGHTS) if p[1] != "velocity" or p[2] is None]


# The published numbers


@pytest.mark.parametrize("path, prediction, weight", EVERY_LOSS)
def test_golden_intervals_and_losses(golden, path, prediction, weight):
    transport, key = create_transport(path, prediction, weight), f"{path}/{prediction}/{weight}"
    eps = transport.train_eps, transport.sample_eps
    assert transport.interval == pytest.approx(golden[f"{key}/interval_train"].tolist(), abs=1e-12)
    sde = transport.check_interval(*eps, sde=True, eval=True, last_step_size=0.04)
    assert sde == pytest.approx(golden[f"{key}/interval_sde"].tolist(), abs=1e-12)
    assert transport.check_interval(*eps, eval=True) == pytest.approx(golden[f"{key}/interval_ode"].tolist(), abs=1e-12)
    terms = transport.training_losses(network, golden["x_data"], t=golden["t"], noise=golden["x_noise"])
    match(terms["loss"], golden[f"{key}/loss"])


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
def test_golden_predictions(golden, path, prediction):
    transport, key, t = create_transport(path, prediction), f"{path}/{prediction}/None", golden["t"]
    x_t, u_t = transport.interpolate(t, golden["x_data"], golden["x_noise"])
    match(x_t, golden[f"{key}/x_t"])
    match(u_t, golden[f"{key}/u_t"])
    match(transport.get_drift()(x_t, t, network), golden[f"{key}/drift"])
    match(transport.get_score()(x_t, t, network), golden[f"{key}/score"])


@pytest.mark.parametrize("path, form", itertools.product(PATHS, DIFFUSION_FORMS))
def test_golden_diffusion_forms(golden, path, form):
    published = {"increasing-decreasing": "inccreasing-decreasing"}.get(form, form)
    expected = golden[f"{path}/diffusion_form/{published}"].expand(3, 1, 1, 1).flatten()
    match(DIFFUSION_FORMS[form](PATHS[path], golden["t"], 1.5), expected)


# Paths


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(function(t).sum(), t)
        assert_close(derivative(t), expected, rtol=1e-10, atol=1e-12)
    (expected,) = torch.autograd.grad(path.alpha(t).log().sum(), t)
    assert_close(path.d_log_alpha(t), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derived_coefficients_follow_their_definitions(path):
    """VP simplifies them by alpha^2 + sigma^2 = 1."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    assert_close(path.score_weight(t), d_alpha / alpha * sigma**2 - sigma * d_sigma, rtol=1e-10, atol=0)
    assert_close(path.determinant(t), d_alpha * sigma - alpha * d_sigma, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_the_ends_are_noise_and_data(name):
    path, ends = PATHS[name], torch.tensor([0.0, 1.0], dtype=torch.float64)
    start = math.exp(-(0.1 + 20) / 4) if name == "VP" else 0  # exp(-1/2 integral of beta), Song et al. 2021
    assert_close(path.alpha(ends), torch.tensor([start, 1], dtype=torch.float64), rtol=1e-12, atol=1e-15)
    sigma = torch.tensor([math.sqrt(1 - start**2), 0], dtype=torch.float64)
    assert_close(path.sigma(ends), sigma, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["GVP", "VP"])
def test_variance_is_preserved(name):
    t = torch.linspace(0, 1, 100, dtype=torch.float64)
    assert_close(PATHS[name].alpha(t) ** 2 + PATHS[name].sigma(t) ** 2, torch.ones_like(t), rtol=1e-12, atol=0)


# Predictions


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
def test_score_velocity_and_data_of_a_gaussian(path, prediction):
    """Whatever is predicted: the score is that of N(alpha mean, alpha^2 std^2 + sigma^2), and so on."""
    transport, calls = create_transport(path, prediction), []
    mean, std = 0.7, 0.4
    exact = exact_network(transport, mean, std)
    t = torch.tensor([0.125, 0.5, 0.75, 0.9375], dtype=torch.float64)  # exact in float32
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = transport.predict(x, t, lambda *args: calls.append(args) or exact(*args))
    alpha, sigma = (f(t).view(-1, 1, 1) for f in (transport.path.alpha, transport.path.sigma))
    d_alpha, d_sigma = (f(t).view(-1, 1, 1) for f in (transport.path.d_alpha, transport.path.d_sigma))
    score = -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
    data = mean - alpha * std**2 * score
    assert_close(p.score, score, rtol=1e-10, atol=1e-10)
    assert_close(p.data, data, rtol=1e-10, atol=1e-10)
    assert_close(p.velocity, d_alpha * data - d_sigma * sigma * score, rtol=1e-10, atol=1e-10)
    assert_close(transport.data_from_velocity(x, t, p.velocity), data, rtol=1e-10, atol=1e-10)
    assert len(calls) == 1


@pytest.mark.parametrize("path, prediction", EVERY_PREDICTION)
def test_scalar_times_are_times_of_every_sample(golden, path, prediction):
    transport, x = create_transport(path, prediction), golden["x_data"]
    scalar, batch = (transport.predict(x, t, network) for t in (torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3)))
    for name in ("velocity", "score", "data"):
        assert_close(getattr(scalar, name), getattr(batch, name), rtol=1e-5, atol=1e-5)


def test_networks_see_float32_times_and_their_arguments(golden):
    seen = []

    def model(x, t, y):
        seen.append((t.dtype, t.shape, y))
        return x

    transport, y = create_transport(), object()
    transport.training_losses(model, golden["x_data"], {"y": y})
    transport.get_score()(golden["x_data"], golden["t"].double(), model, y=y)
    transport.get_drift()(golden["x_data"], torch.tensor(0.5, dtype=torch.float64), model, y=y)
    assert seen == [(torch.float32, (3,), y)] * 3


def test_the_variance_half_is_ignored_and_the_precision_raised(golden):
    transport, x, t = create_transport(), golden["x_data"], golden["t"]
    plain = transport.training_losses(network, x, t=t, noise=golden["x_noise"])
    doubled = transport.training_losses(lambda x, t: torch.cat([network(x, t), x], 1), x, t=t, noise=golden["x_noise"])
    assert torch.equal(doubled["loss"], plain["loss"])
    assert torch.equal(doubled["pred"], plain["pred"])
    half = transport.training_losses(lambda x, t: network(x, t).bfloat16(), x, t=t, noise=golden["x_noise"])
    assert half["pred"].dtype == half["loss"].dtype == torch.float32
    assert_close(half["loss"], plain["loss"], rtol=0.02, atol=0)


# Losses


@pytest.mark.parametrize("path, prediction, weight", EVERY_LOSS)
def test_a_perfect_network_of_a_point_has_no_loss(path, prediction, weight):
    """Data that is one point leaves nothing to guess."""
    transport = create_transport(path, prediction, weight)
    point = torch.full((64, 2, 2), 0.5, dtype=torch.float64)
    t = torch.arange(1, 65) / 66  # float32, as networks see it
    terms = transport.training_losses(exact_network(transport, 0.5, 0.0), point, t=t.double(), noise=torch.randn_like(point))
    assert terms["loss"].max() < 1e-9


def test_losses_draw_times_of_the_interval():
    transport, seen = create_transport("GVP", "noise", train_eps=0.2), []
    torch.manual_seed(0)
    transport.training_losses(lambda x, t: seen.append(t) or x, torch.zeros(4000, 1))
    assert 0.2 <= seen[0].min() < 0.201 and 0.799 < seen[0].max() <= 0.8
    assert seen[0].mean().item() == pytest.approx(0.5, abs=0.01)  # standard error 0.003


def test_prior_logp():
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2))
    assert_close(create_transport().prior_logp(z), expected)


# Options


@pytest.mark.parametrize("path, prediction, weight", EVERY_LOSS)
def test_describe_round_trip(path, prediction, weight):
    for eps in ({}, {"train_eps": 0.01, "sample_eps": 0.02}):
        transport = create_transport(path, prediction, weight, **eps)
        assert create_transport(**transport.describe()) == transport
        assert all(value is None or type(value) in (str, float) for value in transport.describe().values())


def test_the_reverse_interval_swaps_the_times():
    for path, prediction in EVERY_PREDICTION:
        transport = create_transport(path, prediction)
        for eval_ in (False, True):
            there = transport.check_interval(1e-4, 1e-2, eval=eval_)
            assert transport.check_interval(1e-4, 1e-2, eval=eval_, reverse=True) == there[::-1]


def test_no_loss_weight_has_two_spellings():
    assert create_transport(loss_weight="none") == create_transport()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path_type": "cubic"}, "path_type must be one of Linear, GVP, VP; got 'cubic'"),
        ({"prediction": "data"}, "prediction must be one of velocity, noise, score; got 'data'"),
        ({"loss_weight": "snr"}, "loss_weight must be one of None, velocity, likelihood; got 'snr'"),
        ({"train_eps": -1e-3}, "train_eps must be a number, at least 0 and below 0.5; got -0.001"),
        ({"sample_eps": 0.5}, "sample_eps must be a number"),
        ({"train_eps": math.nan}, "train_eps must be a number"),
        ({"prediction": "noise", "loss_weight": "velocity", "train_eps": 0}, "train_eps must be above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_transport(**options)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 4, 4, 4), (1, 4, 8, 8)])
def test_networks_of_another_shape(golden, shape):
    with pytest.raises(ValueError, match="must return at least 4 channels"):
        create_transport().training_losses(lambda x, t: torch.zeros(shape), golden["x_data"])


def test_one_time_for_a_batch(golden):
    """It would broadcast: every sample would train on the same time."""
    with pytest.raises(ValueError, match="one time a sample"):
        create_transport().training_losses(network, golden["x_data"], t=torch.tensor([0.5]))


def test_continuous_times():
    sampler = ContinuousSampler(0.1, 0.9)
    uniforms = np.array([0, 0.25, 1], np.float32)
    t, weights = sampler.sample(uniforms)
    assert t.dtype == weights.dtype == np.float32
    np.testing.assert_allclose(t, [0.1, 0.3, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(weights, 1)
    sampler.update(t, weights)
    assert (sampler.learns, sampler.state_dict()) == (False, {})
    sampler.load_state_dict({})
    np.testing.assert_array_equal(sampler.sample(uniforms)[0], t)
