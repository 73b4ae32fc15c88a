"""Step-wise switching: the published numbers, a one-sample reference, and a batch that changes nothing for its samples."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion.guidance import ClassifierFreeGuidance
from diffusion.transport import Sampler, create_transport
from models import create_model
from models.stepwise import StageTracker, StepwiseNetwork, SwitchPolicy

SETTINGS = [("0.9", "0.6", "3"), ("0.7", "0.4", "3"), ("0.8", "0.5", "10"), ("2.0", "0.5", "3")]


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "stepwise_switch.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


class Network(nn.Module):
    """The golden data's, with labels that it ignores unless told otherwise. sizes: the sizes of the batches it was given."""

    def __init__(self, coef, label_weight=0.0, **overrides):
        super().__init__()
        self.coef, self.label_weight, self.sizes = coef, label_weight, []
        self.config = SimpleNamespace(**{"input_size": 8, "in_channels": 4, "num_classes": 10, "out_channels": 4, **overrides})

    def forward(self, x, t, y):
        self.sizes.append(len(x))
        t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
        return self.coef * (0.5 * x.sin() - x) + 0.1 * t + self.label_weight * y * x.cos()


def stepwise_network(ratios, first_several_num=3, distance="mae", coefs=(0.6, 0.5, 0.4), **settings):
    policy = SwitchPolicy(ratios=ratios, first_several_num=first_several_num, distance=distance)
    return StepwiseNetwork([Network(coef, **settings) for coef in coefs], policy)


def sde_steps(predict, z, noise, num_steps=40, last_step_size=0.04):
    """Euler for velocity prediction on the linear path with diffusion form sigma: the state after each solver step, then the
    result of a last Mean step.

    alpha = t and sigma = 1 - t, so w s = sigma (t v - x) / sigma = t v - x.
    """
    times = torch.linspace(0, 1 - last_step_size, num_steps)
    x, dt = z, times[1] - times[0]

    def drift(x, t):
        v = predict(x, t.expand(len(x)))
        return v + t * v - x

    for t, eps in zip(times[:-1], noise, strict=True):
        x = x + drift(x, t) * dt + (2 * (1 - t) * dt).sqrt() * eps
        yield x
    yield x + drift(x, times[-1]) * last_step_size


def ode_steps(predict, z, method, num_steps=30):
    """The probability flow from t = 0 to 1: the state after each step."""
    x, dt = z, 1 / num_steps
    for k in range(num_steps):
        t = torch.full((len(x),), k * dt)
        slope = predict(x, t)
        if method == "heun":
            slope = (slope + predict(x + slope * dt, t + dt)) / 2
        x = x + slope * dt
        yield x


def sample(network, steps, batch_size, *, last_step=True):
    """The result of a sampler; the output of a last step is no state to observe."""
    network.begin(batch_size)
    states = []
    for x in steps:
        states.append(x)
        if not (last_step and len(states) == 40):
            network.observe(x)
    return states[-1]


def one_sample_switches(states, policy):
    """The rule of the specification for states x_1, x_2, ... of one sample, one number at a time."""
    distances, stage, switches = [], 0, [-1] * len(policy.ratios)
    for step in range(2, len(states) + 1):
        difference = states[step - 1].astype(np.float64) - states[step - 2]
        distances.append(np.abs(difference).mean() if policy.distance == "mae" else (difference**2).mean())
        if len(distances) <= policy.first_several_num:
            continue
        reference = sum(distances[: policy.first_several_num]) / policy.first_several_num
        while stage < len(policy.ratios) and distances[-1] < policy.ratios[stage] * reference:
            switches[stage] = step
            stage += 1
    return switches


def switches_of(states, policy):
    """The same from the tracker. states: (steps, B, ...)."""
    tracker = StageTracker(policy)
    tracker.begin(states.shape[1])
    for x in states:
        tracker.observe(x)
    return tracker.switch_steps


# The published numbers


def golden_run(golden, setting, distance, rows):
    ratio1, ratio2, first_several_num = setting
    network = stepwise_network((float(ratio1), float(ratio2)), int(first_several_num), distance, golden["coef"].tolist())
    z, noise = golden["z"][rows], golden["noise_per_step"][:, rows]
    labels = torch.zeros(len(z), dtype=torch.long)
    return network, sample(network, sde_steps(lambda x, t: network(x, t, labels), z, noise), len(z))


@pytest.mark.parametrize("distance", ["mae", "mse"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_golden(golden, setting, distance):
    """39 solver steps and the last step are 40 drift evaluations. The published code calls the network twice in each."""
    key = "/".join((distance, *setting))
    network, x = golden_run(golden, setting, distance, slice(None))
    assert_close(x, golden[f"{key}/x_final"], rtol=1e-4, atol=1e-4)
    assert torch.equal(2 * network.calls, golden[f"{key}/network_calls_per_model_upstream"])
    assert torch.equal(network.calls.sum(dim=1), torch.full((4,), 40))
    assert torch.equal(network.evaluations, network.calls)
    # A switch after step s: s drift evaluations were made before it.
    assert torch.equal(network.switch_steps, network.calls.cumsum(dim=1)[:, :2])


@pytest.mark.parametrize("distance", ["mae", "mse"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_one_by_one(golden, setting, distance):
    key = "/".join((distance, *setting))
    together, x_together = golden_run(golden, setting, distance, slice(None))
    assert len(together.switch_steps.unique(dim=0)) > 1
    for k in range(4):
        network, x = golden_run(golden, setting, distance, slice(k, k + 1))
        assert_close(x[0], golden[f"{key}/x_final"][k], rtol=1e-4, atol=1e-4)
        assert_close(x[0], x_together[k], rtol=1e-5, atol=1e-6)
        assert torch.equal(2 * network.calls[0], golden[f"{key}/network_calls_per_model_upstream"][k])
        assert torch.equal(network.switch_steps[0], together.switch_steps[k])


@pytest.mark.parametrize("distance", ["mae", "mse"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_golden_with_the_sampler(golden, setting, distance):
    key = "/".join((distance, *setting))
    network = stepwise_network((float(setting[0]), float(setting[1])), int(setting[2]), distance, golden["coef"].tolist())
    steps = Sampler(create_transport()).sde_steps(
        network,
        golden["z"],
        step_noise=lambda k: golden["noise_per_step"][k - 1],
        model_kwargs={"y": torch.zeros(4, dtype=torch.long)},
        diffusion_form="sigma",
        num_steps=40,
    )
    x = sample(network, (out["sample"] for out in steps), 4)
    assert_close(x, golden[f"{key}/x_final"], rtol=1e-4, atol=1e-4)
    assert torch.equal(2 * network.calls, golden[f"{key}/network_calls_per_model_upstream"])


# The rule


@pytest.mark.parametrize("distance", ["mae", "mse"])
@pytest.mark.parametrize("seed", range(12))
def test_random_trajectories(seed, distance):
    """Sums of shrinking random moves against the rule written down for one sample."""
    rng = np.random.default_rng(seed)
    num_steps, num_switches = int(rng.integers(4, 30)), int(rng.integers(0, 5))
    ratios = tuple(np.sort(rng.uniform(0.05, 1.5, num_switches))[::-1])
    policy = SwitchPolicy(ratios=ratios, first_several_num=int(rng.integers(1, 7)), distance=distance)
    shape = (num_steps, 6, *rng.integers(1, 6, 3))
    shrinking = np.exp(-rng.uniform(0, 0.3, (6, 1, 1, 1)) * np.arange(num_steps).reshape(-1, 1, 1, 1, 1))
    states = np.cumsum(rng.standard_normal(shape) * shrinking, axis=0).astype(np.float32)
    expected = [one_sample_switches(states[:, k], policy) for k in range(6)]
    assert switches_of(torch.from_numpy(states), policy).tolist() == expected


def test_random_trajectories_reach_every_case():
    """The trajectories above would show nothing if none of them ever switched, or all did everything at once."""
    seen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        states = np.cumsum(rng.standard_normal((20, 2, 3)) * np.exp(-0.15 * np.arange(20).reshape(-1, 1, 1)), axis=0)
        policy = SwitchPolicy(ratios=(0.8, 0.4, 0.05), first_several_num=3)
        for first, second, third in switches_of(torch.from_numpy(states), policy).tolist():
            seen |= {"together" if first == second > 0 else "apart", "never" if third < 0 else "all"}
    assert seen == {"together", "apart", "never", "all"}


def moves(*lengths):
    """One sample of one number: x_1 = 0 and then moves of these lengths."""
    return torch.tensor([0.0, *lengths]).cumsum(dim=0).view(-1, 1, 1)


@pytest.mark.parametrize(
    "lengths, ratios, first, expected",
    [
        ((8, 8, 8, 3), (0.5,), 3, [5]),  # K = 3: decided first after solver step K + 2
        ((8, 2, 8, 3.1), (0.5,), 3, [-1]),  # a small move among the first K only lowers the reference, to 6
        ((8, 8, 8, 4), (0.5,), 3, [-1]),  # strictly smaller
        ((8, 8, 8, 4, 3.5), (0.5,), 3, [6]),
        ((8, 1), (0.5,), 1, [3]),
        ((8, 1), (0.5, 0.25), 1, [3, 3]),  # both after one step
        ((8, 1), (0.5, 0.5, 0.25, 0.125), 1, [3, 3, 3, -1]),
        ((8, 3, 8, 1), (0.5, 0.25), 1, [3, 5]),  # a switch is never taken back
        ((8, -3), (0.5,), 1, [3]),
        ((8, 8), (2.0, 0.5), 1, [3, -1]),  # a ratio above 1 switches at once
        ((0, 0, 0), (2.0,), 1, [-1]),  # nothing is below zero
        ((8, float("nan"), 1), (0.5,), 1, [-1]),  # NaN is never below
    ],
)
def test_when_it_switches(lengths, ratios, first, expected):
    policy = SwitchPolicy(ratios=ratios, first_several_num=first)
    assert switches_of(moves(*lengths), policy).tolist() == [expected]


@pytest.mark.parametrize("first_several_num", [1, 3, 7, 10, 49])
@pytest.mark.parametrize("distance", ["mae", "mse"])
def test_equal_moves_never_fall_below_their_mean(first_several_num, distance):
    """A reference summed in float32 lies a rounding above moves of 0.1, and a ratio of 1 would switch."""
    policy = SwitchPolicy(ratios=(1.0,), first_several_num=first_several_num, distance=distance)
    states = torch.tensor([0.0, 0.1] * 40).view(-1, 1, 1).expand(-1, 2, 5)
    assert (switches_of(states, policy) == -1).all()


def test_the_first_step_does_not_count():
    """x_0 is not even asked for; a huge first move would otherwise raise the reference."""
    policy = SwitchPolicy(ratios=(0.5,), first_several_num=2)
    states = moves(8, 8, 8, 3) + 1000
    assert switches_of(states, policy).tolist() == [[5]]


@pytest.mark.parametrize("shape", [(3,), (4, 8, 8), (4, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("distance", ["mae", "mse"])
def test_distances_are_bitwise_the_same_in_any_batch(shape, distance):
    draws = torch.Generator().manual_seed(0)
    states = torch.randn(2, 33, *shape, generator=draws)

    def distances(rows):
        tracker = StageTracker(SwitchPolicy(ratios=(0.5,), first_several_num=3, distance=distance))
        tracker.begin(len(range(33)[rows]))
        for x in states:
            tracker.observe(x[rows])
        return tracker._pending[0]

    together = distances(slice(None))
    difference = (states[1] - states[0]).double().flatten(1)
    exact = difference.abs().mean(1) if distance == "mae" else difference.square().mean(1)
    assert_close(together.double(), exact, rtol=1e-6, atol=0)
    for size in (1, 2, 8):
        for start in range(0, 32, size):
            assert torch.equal(distances(slice(start, start + size)), together[start : start + size])


def test_the_device_waits_only_to_decide(monkeypatch):
    """One transfer a step: none for the first K distances, none once every sample is at the last network."""
    transfers = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(tracker.num_steps) or cpu(self))
    tracker = StageTracker(SwitchPolicy(ratios=(0.5,), first_several_num=3))
    tracker.begin(1)
    for x in moves(8, 8, 8, 5, 5, 3, 3, 3):
        tracker.observe(x)
    assert transfers == [5, 6, 7]
    assert tracker.switch_steps.tolist() == [[7]]


def test_states_may_be_changed_in_place():
    policy = SwitchPolicy(ratios=(0.5,), first_several_num=3)
    tracker, x = StageTracker(policy), torch.zeros(1, 1)
    tracker.begin(1)
    for length in (0, 8, 8, 8, 3):
        x += length
        tracker.observe(x)
    assert tracker.switch_steps.tolist() == [[5]]


# The network


def test_one_call_of_a_network_a_step():
    """Each network is called once with all its samples, and not at all where there is none."""
    network = stepwise_network((0.9, 0.9, 0.5), coefs=(0.6, 0.5, 0.4, 0.3))
    network.begin(5)
    network.tracker.switch_steps = torch.tensor([[-1, -1, -1], [5, 5, 7], [5, 5, -1], [-1, -1, -1], [5, 5, 9]])
    assert network.stages.tolist() == [0, 3, 2, 0, 3]
    x, t, y = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.rand(5), torch.arange(5)
    out = network(x, t, y)
    assert [model.sizes for model in network.models] == [[2], [], [1], [2]]
    for k, stage in enumerate([0, 3, 2, 0, 3]):
        assert_close(out[k], network.models[stage](x[k : k + 1], t[k : k + 1], y[k : k + 1])[0])
    assert network.calls.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_no_copy_at_one_stage():
    network, seen = stepwise_network((0.9, 0.5)), []
    for model in network.models:
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    x, t, y = torch.zeros(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.long)
    network.begin(3)
    network(x, t, y)
    assert all(ours is given for ours, given in zip(seen[0], (x, t, y), strict=True))


@pytest.mark.parametrize("num_models", [1, 2, 4])
def test_any_number_of_networks(golden, num_models):
    coefs = (0.6, 0.5, 0.4, 0.3)[:num_models]
    ratios = (0.9, 0.6, 0.4)[: num_models - 1]
    labels = torch.zeros(4, dtype=torch.long)

    def run(rows):
        network = stepwise_network(ratios, coefs=coefs)
        steps = sde_steps(lambda x, t: network(x, t, labels[rows]), golden["z"][rows], golden["noise_per_step"][:, rows])
        return network, sample(network, steps, len(labels[rows]))

    together, x = run(slice(None))
    assert (together.calls > 0).all()
    assert together.stages.tolist() == [num_models - 1] * 4
    for k in range(4):
        alone, x_alone = run(slice(k, k + 1))
        assert torch.equal(alone.switch_steps[0], together.switch_steps[k])
        assert torch.equal(alone.calls[0], together.calls[k])
        assert_close(x_alone[0], x[k], rtol=1e-5, atol=1e-6)
    if num_models == 1:
        plain = [*sde_steps(lambda x, t: together.models[0](x, t, labels), golden["z"], golden["noise_per_step"])]
        assert torch.equal(x, plain[-1])


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_any_solver(golden, method):
    labels = torch.zeros(4, dtype=torch.long)

    def run(rows):
        network = stepwise_network((0.8, 0.5), coefs=(2.0, 1.5, 1.0))
        z = golden["z"][rows] * torch.tensor([0.5, 1.0, 4.0, 8.0])[rows].view(-1, 1, 1, 1)
        steps = ode_steps(lambda x, t: network(x, t, labels[rows]), z, method)
        return network, sample(network, steps, len(z), last_step=False)

    together, x = run(slice(None))
    calls_per_step = 2 if method == "heun" else 1
    assert len(together.switch_steps.unique(dim=0)) > 1
    assert torch.equal(together.switch_steps * calls_per_step, together.calls.cumsum(dim=1)[:, :2])
    assert (together.calls.sum(dim=1) == 30 * calls_per_step).all()
    for k in range(4):
        alone, x_alone = run(slice(k, k + 1))
        assert torch.equal(alone.switch_steps[0], together.switch_steps[k])
        assert_close(x_alone[0], x[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("doubled_state", [False, True])
@pytest.mark.parametrize("channels", [3, None])
def test_guidance_equals_each_sample_alone(golden, doubled_state, channels):
    """Both halves follow the conditional one, whether the sampler's states are doubled or only its calls."""

    def run(rows, doubled_state=False):
        network = stepwise_network((0.9, 0.6), label_weight=0.1)
        z, noise = golden["z"][rows], golden["noise_per_step"][:, rows]
        labels = torch.tensor([1, 3, 5, 7])[rows]
        guided = ClassifierFreeGuidance(network, 1.5, 10, channels)

        def predict(x, t):
            out = guided(x[: len(labels)], t[: len(labels)], labels)
            return torch.cat([out, out]) if doubled_state else out

        if doubled_state:  # the unconditional half strays; it must not decide
            z, noise = torch.cat([z, 3 * z]), torch.cat([noise, noise.flip(0)], dim=1)
        return network, sample(network, sde_steps(predict, z, noise), len(labels))[: len(labels)]

    together, x = run(slice(None), doubled_state)
    assert len(together.switch_steps.unique(dim=0)) > 1
    assert (together.calls.sum(dim=1) == 40).all()
    assert torch.equal(together.evaluations, 2 * together.calls)
    for k in range(4):
        alone, x_alone = run(slice(k, k + 1))
        assert torch.equal(alone.switch_steps[0], together.switch_steps[k])
        assert torch.equal(alone.calls[0], together.calls[k])
        assert_close(x_alone[0], x[k], rtol=1e-5, atol=1e-6)


def test_real_networks_in_one_batch():
    """EDTs of three depths: grouped by stage, with and without guidance, against each sample's own network."""
    tiny = {"widths": (16, 24, 32, 24, 16), "num_heads": 2, "input_size": 16, "num_classes": 10}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [create_model("EDT-S/2", depths=(depth, 1, 1, 1, 1), **tiny).eval() for depth in (1, 2, 3)]
        for parameter in (parameter for model in models for parameter in model.parameters() if parameter.requires_grad):
            nn.init.normal_(parameter, std=0.1)
        x, t, y = torch.randn(5, 4, 16, 16), torch.rand(5) * 1000, torch.arange(5)
    network = StepwiseNetwork(models, SwitchPolicy(ratios=(0.9, 0.5)))
    assert network.config is models[0].config
    network.begin(5)
    network.tracker.switch_steps = torch.tensor([[5, 6], [-1, -1], [5, -1], [-1, -1], [5, 5]])
    null = torch.full_like(y, 10)
    with torch.no_grad():
        out = network(x, t, y)
        guided = ClassifierFreeGuidance(network, 2.5, 10, None)(x, t, y)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        assert guided.shape == out.shape == (5, 8, 16, 16) and both.shape == (10, 8, 16, 16)
        for k, stage in enumerate([2, 0, 1, 0, 2]):
            one = slice(k, k + 1)
            pair = torch.cat([x[one], x[one]]), torch.cat([t[one], t[one]]), torch.cat([y[one], null[one]])
            assert_close(out[one], models[stage](x[one], t[one], y[one]), rtol=1e-5, atol=1e-5)
            expected = models[stage].forward_with_cfg(*pair, 2.5, None)
            assert_close(guided[one], expected[:1], rtol=1e-5, atol=1e-5)
            assert_close(both[[k, k + 5]], models[stage](*pair), rtol=1e-5, atol=1e-5)
    assert network.calls.sum(dim=1).tolist() == [3] * 5
    assert network.evaluations.sum(dim=1).tolist() == [5] * 5


def test_a_new_batch_starts_afresh(golden):
    network = stepwise_network((0.9, 0.6))
    results = []
    for _ in range(2):
        labels = torch.zeros(4, dtype=torch.long)
        steps = sde_steps(lambda x, t: network(x, t, labels), golden["z"], golden["noise_per_step"])  # noqa: B023
        results.append((sample(network, steps, 4), network.switch_steps, network.calls))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# Mistakes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ratios": (0.5, 0.8)}, r"\(0.5, 0.8\) are in the wrong order.*did you mean \(0.8, 0.5\)"),
        ({"ratios": (0.9, 0.5, 0.7)}, r"did you mean \(0.9, 0.7, 0.5\)"),
        ({"ratios": (0.5, 0.0)}, "positive and finite"),
        ({"ratios": (0.5, -1)}, r"\(0.5, -1.0\)"),
        ({"ratios": (float("inf"), 0.5)}, "positive and finite"),
        ({"ratios": (float("nan"),)}, "positive and finite"),
        ({"ratios": (0.5,), "first_several_num": 0}, "first_several_num must be a whole number of at least 1, got 0"),
        ({"ratios": (0.5,), "first_several_num": 2.5}, "got 2.5"),
        ({"ratios": (0.5,), "distance": "rmse"}, "distance must be one of mae, mse, got 'rmse'"),
    ],
)
def test_policy_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SwitchPolicy(**settings)


def test_policy():
    policy = SwitchPolicy(ratios=[2, 0.5, 0.5])
    assert policy.ratios == (2.0, 0.5, 0.5)
    assert (policy.num_stages, policy.first_several_num) == (4, 3)
    assert SwitchPolicy(ratios=()).num_stages == 1


@pytest.mark.parametrize("coefs", [(), (0.5,), (0.5, 0.4), (0.5, 0.4, 0.3, 0.2)])
def test_number_of_models(coefs):
    with pytest.raises(ValueError, match=rf"{len(coefs)} models need .* got \(0.9, 0.5\)"):
        stepwise_network((0.9, 0.5), coefs=coefs)


@pytest.mark.parametrize("name", ["input_size", "in_channels", "num_classes", "out_channels"])
def test_models_that_do_not_fit(name):
    with pytest.raises(ValueError, match=rf"agree in {name}, got \[{getattr(Network(1).config, name)}, 3\]"):
        StepwiseNetwork([Network(0.6), Network(0.5, **{name: 3})], SwitchPolicy(ratios=(0.5,)))


@pytest.mark.parametrize("begun, given", [(None, 4), (4, 3), (4, 5), (4, 12), (2, 1), (4, 0)])
def test_another_batch_size_than_begun(begun, given):
    network = stepwise_network((0.9, 0.5))
    if begun:
        network.begin(begun)
    x, t, y = torch.zeros(given, 4, 8, 8), torch.zeros(given), torch.zeros(given, dtype=torch.long)
    for use in (lambda: network(x, t, y), lambda: network.observe(x)):
        with pytest.raises(ValueError, match=r"call begin\(batch_size\)"):
            use()
    assert network.calls.sum() == 0


@pytest.mark.parametrize("given", [1, 3, 5, 8])
def test_guidance_of_another_batch_size_than_begun(given):
    network = stepwise_network((0.9, 0.5))
    network.begin(4)
    guided = ClassifierFreeGuidance(network, 2.0, 10)
    with pytest.raises(ValueError, match=rf"{2 * given} samples in a batch of 4: call begin\(batch_size\)"):
        guided(torch.zeros(given, 4, 8, 8), torch.zeros(given), torch.zeros(given, dtype=torch.long))


def test_guidance_of_half_a_batch_is_found_out_by_its_state():
    """Doubled it is as long as the batch."""
    network = stepwise_network((0.9, 0.5))
    network.begin(4)
    x = ClassifierFreeGuidance(network, 2.0, 10)(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a state of 2 samples in a batch of 4: call begin\(batch_size\)"):
        network.observe(x)
