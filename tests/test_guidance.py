"""Guidance at some noise levels only: which network calls it saves, and that the others are what they were."""

import pytest
import torch
from torch.testing import assert_close

from diffusion import create_diffusion
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.transport import ODE, SDE, create_transport
from runtime import cli
from sampling.options import add_sampling_arguments, read_guidance
from sampling.samplers import GaussianSampler, TransportSampler
from tests.mdt_networks import random_model

Y = torch.tensor([1, 2, 3])
NULL = 10


class Network:
    """Labels shift what it predicts. calls: the times at which it was called, with the number of samples."""

    def __init__(self, variance: bool):
        self.variance, self.calls = variance, []

    def __call__(self, x, t, y):
        self.calls.append((t[0].item(), len(x)))
        out = 0.5 * x + 0.1 * y.view(-1, 1, 1, 1) * (1 + t.view(-1, 1, 1, 1) / 1000)
        return torch.cat([out, 0 * out], dim=1) if self.variance else out

    def forward_with_cfg(self, x, t, y, scale, channels):
        cond, uncond = self(x, t, y).chunk(2)
        return torch.cat([uncond + scale * (cond - uncond)] * 2)


def gaussian(ddim=True):
    return GaussianSampler(create_diffusion("11"), ddim=ddim)


def transport(process, path="Linear", **options):
    return TransportSampler(process(create_transport(path), **options))


SAMPLERS = {
    "ddim": gaussian(),
    "ancestral": gaussian(ddim=False),
    "euler": transport(ODE, sampling_method="euler", num_steps=11),
    "heun": transport(ODE, sampling_method="heun", num_steps=11),
    "ab4": transport(ODE, sampling_method="ab4", num_steps=11),
    "midpoint": transport(ODE, sampling_method="midpoint", num_steps=6),
    "dopri5": transport(ODE, sampling_method="dopri5", num_steps=11),
    "sde": transport(SDE, diffusion_form="sigma", num_steps=11),
    "sde-heun": transport(SDE, "GVP", sampling_method="Heun", diffusion_form="sigma", num_steps=11),
    "vp": transport(SDE, "VP", diffusion_form="sigma", num_steps=11),
}


def noises(shape=(3, 2, 4, 4)):
    return lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(k))


def sample(sampler, scale=3.0, interval=None):
    """The finished latents, and the calls."""
    network = Network(variance=isinstance(sampler, GaussianSampler))
    guided = ClassifierFreeGuidance(network, scale, NULL, None, interval)
    *_, out = sampler(guided, noises()(0), Y, noises())
    return out["sample"], network.calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_levels_inside_are_guided(name):
    """1 is pure noise whatever the network's time: t/1000, or 1 - t."""
    sampler = SAMPLERS[name]
    _, calls = sample(sampler, interval=(0.25, 0.65))
    assert {size for _, size in calls} == {3, 6}
    for t, size in calls:
        level = t / 1000 if isinstance(sampler, GaussianSampler) else 1 - t
        assert size == (6 if 0.25 <= level <= 0.65 else 3), (t, size)


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


def test_without_its_level_a_call_is_refused():
    guided = ClassifierFreeGuidance(Network(False), 2.0, NULL, interval=(0.1, 0.9))
    with pytest.raises(ValueError, match="depends on the noise level"):
        guided(torch.zeros(3, 2, 4, 4), torch.zeros(3), Y)


def test_mdt_is_called_once_where_its_scale_is_1():
    """At the beginning the power-cosine is 1 in float32. The samples are those of two calls each time, but for rounding."""
    model, sizes = random_model(), []
    model.x_embedder.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    sampler = GaussianSampler(create_diffusion("40"), ddim=True)
    noise, y = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    guided = ClassifierFreeGuidance(model, 4.0, 10, None)
    with torch.inference_mode():
        *_, saved = sampler(guided, noise, y, None)
        times = torch.tensor(sampler.diffusion.timestep_map[::-1])
        ones = (model.guidance_scale(4.0, times).flatten() == 1).tolist()
        assert sizes == [2 if one else 4 for one in ones]
        assert 2 <= sum(ones) <= 5  # of 40: those above t = 910 or so
        *_, doubled = sampler(lambda x, t, y: guided(x, t, y), noise, y, None)
    assert sizes[40:] == [4] * 40
    assert_close(saved["sample"], doubled["sample"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"midpoint", "dopri5"}))
def test_no_step_waits_for_the_device(name):
    """Tensors of the meta device have no values: reading one, as waiting for a GPU would, is an error."""
    guided = ClassifierFreeGuidance(lambda x, t, y: torch.cat([x, x], 1), 3.0, NULL, None, (0.2, 0.8))
    guided.model.forward_with_cfg = lambda x, t, y, scale, channels: torch.cat([x, x], 1)
    noise = torch.zeros(3, 2, 4, 4, device="meta")
    steps = list(SAMPLERS[name](guided, noise, Y.to("meta"), lambda k: torch.zeros_like(noise)))
    assert len(steps) == SAMPLERS[name].num_steps
    with pytest.raises(RuntimeError):
        steps[-1]["sample"].sum().item()


# The flag


def parse(*argv: str):
    parser = cli.ArgumentParser("x")
    add_sampling_arguments(parser, ckpt=False)
    return parser.parse_args(list(argv))


def test_the_flag():
    args = parse("--guidance-interval", "0.2,0.8", "--cfg_scale=3")
    assert read_guidance(args).interval == (0.2, 0.8)
    assert read_guidance(parse("--cfg-scale", "3")).interval is None
    with pytest.raises(ValueError, match=r"--guidance-interval 0.2,0.8 means nothing to samples without guidance"):
        read_guidance(parse("--guidance-interval", "0.2,0.8"))


@pytest.mark.parametrize("text", ["0.5", "0.8,0.2", "0.5,0.5", "a,b", "0.1,0.2,0.3", "0,1.5", "nan,1", ""])
def test_a_flag_that_is_no_interval(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--guidance-interval", text)
    assert exit_.value.code == 2
    assert "--guidance-interval" in capsys.readouterr().err
