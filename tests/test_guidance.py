"""Guidance: what it computes, where it grows, where it is not, by which network, and which calls it makes."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffusion import create_diffusion
from diffusion.guidance import Autoguidance, ClassifierFreeGuidance, power_cosine, varies
from diffusion.transport import ODE, SDE, create_transport
from models import create_model
from models.stepwise import StepwiseNetwork, SwitchPolicy
from sampling.generate import Guidance
from sampling.samplers import FewStepsSampler, GaussianSampler, TransportSampler, gaussian_sampler
from sampling.solver_options import GAUSSIAN_SOLVERS
from tests.mdt_networks import TINY, random_model
from tests.shared import golden_network, match

Y = torch.tensor([1, 2, 3])
GAUSSIAN = (GaussianSampler, FewStepsSampler)
NULL = 10


class Network:
    """Labels shift what it predicts. calls: the times at which it was called, with the number of samples."""

    def __init__(self, variance: bool, coef: float = 0.5):
        self.variance, self.coef, self.calls = variance, coef, []

    def __call__(self, x, t, y):
        self.calls.append((t[0].item(), len(x)))
        out = self.coef * x + 0.1 * y.view(-1, 1, 1, 1) * (1 + t.view(-1, 1, 1, 1) / 1000)
        return torch.cat([out, 0.2 * out], dim=1) if self.variance else out


def transport(process, path="Linear", **options):
    return TransportSampler(process(create_transport(path), **options))


SAMPLERS = {
    **{name: gaussian_sampler(name, 11) for name in GAUSSIAN_SOLVERS},
    "euler": transport(ODE, sampling_method="euler", num_steps=11),
    "ode-heun": transport(ODE, sampling_method="heun", num_steps=11),
    "ab4": transport(ODE, sampling_method="ab4", num_steps=11),
    "midpoint": transport(ODE, sampling_method="midpoint", num_steps=6),
    "dopri5": transport(ODE, sampling_method="dopri5", num_steps=11),
    "sde": transport(SDE, diffusion_form="sigma", num_steps=11),
    "sde-heun": transport(SDE, "GVP", sampling_method="Heun", diffusion_form="sigma", num_steps=11),
    "vp": transport(SDE, "VP", diffusion_form="sigma", num_steps=11),
}


def noises(shape=(3, 2, 4, 4)):
    return lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(k))


def sample(sampler, scale=3.0, interval=None, power=0.0):
    """The finished latents, and the calls."""
    network = Network(variance=isinstance(sampler, GAUSSIAN))
    guided = ClassifierFreeGuidance(network, scale, NULL, None, interval, power)
    *_, out = sampler(guided, noises()(0), Y, noises())
    return out["sample"], network.calls


def level_of(sampler, t: float) -> float:
    """1 is pure noise whatever the network's time."""
    return t / 1000 if isinstance(sampler, GAUSSIAN) else 1 - t


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_levels_inside_are_guided(name):
    sampler = SAMPLERS[name]
    _, calls = sample(sampler, interval=(0.25, 0.65))
    assert {size for _, size in calls} == {3, 6}
    for t, size in calls:
        assert size == (6 if 0.25 <= level_of(sampler, t) <= 0.65 else 3), (t, size)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_whole_interval_is_plain_guidance(name):
    whole, calls = sample(SAMPLERS[name], interval=(0.0, 1.0))
    plain, plain_calls = sample(SAMPLERS[name])
    assert torch.equal(whole, plain) and calls == plain_calls
    assert {size for _, size in calls} == {6}


def test_the_ends_are_included():
    """1 - 0.8 is below 0.2, and 1 - 0.7 above 0.3."""
    assert 1 - 0.8 < 0.2 and 1 - 0.7 > 0.3
    sampler = transport(ODE, sampling_method="euler", num_steps=11)
    _, calls = sample(sampler, interval=(0.2, 0.3))
    assert [round(1 - t, 3) for t, size in calls if size == 6] == [0.3, 0.2]


def test_outside_a_step_is_the_conditional_one():
    """Against Euler's method written out."""
    sampler = transport(ODE, sampling_method="euler", num_steps=11)
    actual, _ = sample(sampler, interval=(0.25, 0.65))
    network, x = Network(variance=False), noises()(0)
    for k in range(10):
        t = torch.full((3,), k / 10)
        cond, uncond = network(x, t, Y), network(x, t, torch.full_like(Y, NULL))
        x = x + 0.1 * (uncond + 3 * (cond - uncond) if 4 <= k <= 7 else cond)
    assert_close(actual, x)
    assert (actual - sample(sampler)[0]).abs().max() > 0.1


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_what_is_no_interval(interval):
    with pytest.raises(ValueError, match="0 <= LOW < HIGH <= 1"):
        ClassifierFreeGuidance(Network(False), 2.0, NULL, interval=interval)


@pytest.mark.parametrize("settings", [{"interval": (0.1, 0.9)}, {"power": 2.0}])
def test_without_its_level_a_call_is_refused(settings):
    guided = ClassifierFreeGuidance(Network(False), 2.0, NULL, **settings)
    with pytest.raises(ValueError, match="depends on the noise level"):
        guided(torch.zeros(3, 2, 4, 4), torch.zeros(3), Y)
    assert varies(guided) and not varies(ClassifierFreeGuidance(Network(False), 1.0, NULL, **settings))


# Which channels


@pytest.mark.parametrize("channels, guided", [(1, 1), (2, 2), (3, 2), (None, 2)])
def test_the_variance_is_never_guided(channels, guided):
    """Of latents of two channels the third output is a variance: it was guided, by the protocol's three."""
    network, x, t = Network(True), noises()(0), torch.tensor([5, 6, 7])
    cond, uncond = network(x, t, Y), network(x, t, torch.full_like(Y, NULL))
    out = ClassifierFreeGuidance(network, 2.5, NULL, channels)(x, t, Y)
    assert torch.equal(out[:, :guided], (uncond + 2.5 * (cond - uncond))[:, :guided])
    assert torch.equal(out[:, guided:], cond[:, guided:])


# Growing as the noise falls


@pytest.mark.parametrize(
    "power, scales", [(0, [3, 3, 3, 3]), (1, [3, 2 + math.sqrt(0.5), 2, 1]), (4, [3, 1.454675, 1.019215, 1])]
)
def test_the_power_cosine(power, scales):
    """At noise levels 0, 1/4, 1/2 and 1, for a scale of 3: 2 - cos(81 pi / 256) and 2 - cos(pi / 16) among them."""
    assert [power_cosine(3.0, level, power) for level in (0, 0.25, 0.5, 1)] == pytest.approx(scales, abs=1e-6)
    guided = ClassifierFreeGuidance(Network(False), 3.0, NULL, power=power)
    assert [guided.scale_at(level) for level in (-1e-3, 0.25, 0.5, 1.001)] == pytest.approx(scales, abs=1e-6)


def test_power_0_is_the_scale_itself():
    """1 + (0.1 - 1) is not 0.1."""
    assert [power_cosine(0.1, level, 0) for level in (0, 0.3, 1)] == [0.1] * 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_power_calls_twice_wherever_the_scale_is_not_1(name):
    """It is 1 in float32 near pure noise, and outside the interval."""
    sampler, steep = SAMPLERS[name], 8.0
    _, calls = sample(sampler, interval=(0.15, 1.0), power=steep)
    for t, size in calls:
        level = level_of(sampler, t)
        is_one = torch.tensor(power_cosine(3.0, min(level, 1), steep)).item() == 1
        assert size == (3 if level < 0.15 or is_one else 6), (t, size)
    assert {size for level, size in ((level_of(sampler, t), size) for t, size in calls) if level > 0.9} == {3}


def test_a_power_with_euler_and_ddim_written_out():
    network, x = Network(False), noises()(0)
    null = torch.full_like(Y, NULL)
    actual, _ = sample(SAMPLERS["euler"], power=1.5)
    for k in range(10):
        t = torch.full((3,), k / 10)
        scale = 1 + 2 * (1 - math.cos(math.pi * (k / 10) ** 1.5)) / 2
        cond, uncond = network(x, t, Y), network(x, t, null)
        x = x + 0.1 * (uncond + scale * (cond - uncond))
    assert_close(actual, x)

    sampler, x = SAMPLERS["ddim"], noises()(0)
    actual, _ = sample(sampler, power=1.5)
    a = [1.0, *sampler.diffusion.alphas_cumprod]
    for k, t in reversed(list(enumerate(sampler.diffusion.timestep_map))):
        times = torch.full((3,), t)
        scale = 1 + 2 * (1 - math.cos(math.pi * (1 - t / 1000) ** 1.5)) / 2
        cond, uncond = network(x, times, Y), network(x, times, null)
        eps = uncond + scale * (cond - uncond)
        data = (x - math.sqrt(1 - a[k + 1]) * eps) / math.sqrt(a[k + 1])
        x = math.sqrt(a[k]) * data + math.sqrt(1 - a[k]) * eps
    assert_close(actual, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [-1.0, math.inf, math.nan])
def test_what_is_no_power(power):
    with pytest.raises(ValueError, match="the power of guidance must be at least 0 and finite"):
        ClassifierFreeGuidance(Network(False), 2.0, NULL, power=power)


# MDTv2, published with a power


def test_mdt_is_guided_as_published():
    """The golden numbers of its power-cosine, each sample at its own time, without a word about the power."""
    state, data = golden_network("mdtv2_tiny")
    model = create_model("MDTv2-S/2", **TINY).eval()
    model.load_state_dict(state)
    scale, x, t, y = data["cfg_scale"].item(), data["x"], data["t"], data["y"]
    guided, plain = Guidance(scale).around(model), Guidance(scale, power=0.0).around(model)
    with torch.no_grad():
        for i in range(len(x)):
            one, time = slice(i, i + 1), t[i].item()
            match(guided.at(time, time / 1000)(x[one], t[one], y[one]), data["out_cfg"][one])
            same = torch.allclose(plain(x[one], t[one], y[one]), data["out_cfg"][one], atol=1e-2)
            assert same == (power_cosine(scale, time / 1000, 4) > scale - 0.01)


def test_whose_power_it_is():
    model = random_model()
    stepwise = StepwiseNetwork([model, random_model(1)], SwitchPolicy(ratios=(0.5,)))
    assert Guidance(2.0).around(model).power == Guidance(2.0).around(stepwise).power == 4
    assert Guidance(2.0, power=0.0).around(model).power == Guidance(2.0, guide=random_model(2)).around(model).power == 0
    assert Guidance(2.0).around(create_model("DiT-Ti/2")).power == 0
    assert Guidance(2.0, power=3.0, guide=model).around(create_model("DiT-Ti/2")).power == 3


def test_mdt_is_called_once_where_its_scale_is_1():
    """At the beginning the power-cosine is 1 in float32. The samples are those of two calls each time, but for rounding."""
    model, sizes = random_model(), []
    model.x_embedder.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    sampler = GaussianSampler(create_diffusion("40"), ddim=True)
    noise, y = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    null = torch.full_like(y, 10)

    def doubled(x, t, y):
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), 4.0, None)[:2]

    with torch.inference_mode():
        *_, saved = sampler(ClassifierFreeGuidance(model, 4.0, 10, None), noise, y, None)
        times = torch.tensor(sampler.diffusion.timestep_map[::-1])
        ones = (model.guidance_scale(4.0, times).flatten() == 1).tolist()
        assert sizes == [2 if one else 4 for one in ones]
        assert 2 <= sum(ones) <= 5  # of 40: those above t = 910 or so
        *_, always = sampler(doubled, noise, y, None)
    assert sizes[40:] == [4] * 40
    assert_close(saved["sample"], always["sample"], rtol=1e-4, atol=1e-4)


# A weaker network as guide


def autoguided(sampler, scale, guide_coef=0.8, interval=None, power=0.0):
    """The finished latents, the calls, and the guide's."""
    variance = isinstance(sampler, GAUSSIAN)
    network, guide = Network(variance), Network(variance, guide_coef)
    guided = Autoguidance(network, guide, scale, None, interval, power)
    *_, out = sampler(guided, noises()(0), Y, noises())
    return out["sample"], network.calls, guide.calls


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.0])
@pytest.mark.parametrize("channels", [1, None])
def test_what_a_guide_does(scale, channels):
    """The same labels, and what is not guided comes from the model."""
    network, guide, x, t = Network(True), Network(True, 0.8), noises()(0), torch.tensor([5, 6, 7])
    out = Autoguidance(network, guide, scale, channels)(x, t, Y)
    assert network.calls == guide.calls == [(5, 3)]
    strong, weak, guided = network(x, t, Y), guide(x, t, Y), channels or 2
    expected = {0.0: weak, 0.5: (strong + weak) / 2, 2.0: 2 * strong - weak, 7.0: 7 * strong - 6 * weak}[scale]
    assert_close(out[:, :guided], expected[:, :guided])
    assert torch.equal(out[:, guided:], strong[:, guided:])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_that_guides_itself_is_unguided(name):
    plain, calls = sample(SAMPLERS[name], scale=1.0)
    same, *both = autoguided(SAMPLERS[name], 3.0, guide_coef=0.5)
    assert torch.equal(same, plain) and both == [calls, calls]
    assert not torch.allclose(autoguided(SAMPLERS[name], 3.0)[0], plain, atol=1e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_guide_is_asked_where_it_guides(name):
    """In batches of one size, both networks; outside the interval, and at a scale of 1, the model alone."""
    sampler = SAMPLERS[name]
    _, calls, guide_calls = autoguided(sampler, 3.0, interval=(0.25, 0.65), power=1.0)
    assert {size for _, size in calls + guide_calls} == {3}
    assert guide_calls == [(t, size) for t, size in calls if 0.25 <= level_of(sampler, t) <= 0.65] != []
    _, calls, guide_calls = autoguided(sampler, 1.0)
    assert calls and not guide_calls


def test_the_guide_may_return_other_channels():
    """A SiT returns no variance, a DiT does."""
    network, guide, x, t = Network(False), Network(True, 0.8), noises()(0), torch.zeros(3)
    out = Autoguidance(network, guide, 2.0, None)(x, t, Y)
    assert_close(out, 2 * network(x, t, Y) - guide(x, t, Y)[:, :2])


def test_bf16_predictions_are_combined_in_float32():
    """The difference of the two is small, and multiplied."""

    def network(x, t, y):
        return (x + 0.01 * y.view(-1, 1, 1, 1)).bfloat16()

    x, t = noises()(0), torch.zeros(3)
    out = ClassifierFreeGuidance(network, 3.0, NULL, None)(x, t, Y)
    cond, uncond = network(x, t, Y).double(), network(x, t, torch.full_like(Y, NULL)).double()
    assert out.dtype == torch.float32
    assert_close(out.double(), uncond + 3 * (cond - uncond), rtol=0, atol=1e-6)


# The host


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"midpoint", "dopri5"}))
@pytest.mark.parametrize("guide", [False, True])
def test_no_step_waits_for_the_device(name, guide):
    """Tensors of the meta device have no values: reading one, as waiting for a GPU would, is an error."""

    def network(x, t, y):
        return torch.cat([x, x], 1)

    others = (None, (0.2, 0.8), 2.0)
    guided = Autoguidance(network, network, 3.0, *others) if guide else ClassifierFreeGuidance(network, 3.0, NULL, *others)
    noise = torch.zeros(3, 2, 4, 4, device="meta")
    steps = list(SAMPLERS[name](guided, noise, Y.to("meta"), lambda k: torch.zeros_like(noise)))
    assert len(steps) == SAMPLERS[name].num_steps
    with pytest.raises(RuntimeError):
        steps[-1]["sample"].sum().item()
