"""The worked examples of docs/change_one_idea.md: what each must agree with. test_docs_commands.py trains and samples them."""

import pytest
import torch
from torch.testing import assert_close

from diffusion.transport import Sampler, create_transport
from diffusion.transport.paths import PATHS
from examples.ideas import long_skips, run_script, shifted_path, window_attention
from models import create_model
from models.attention import Attention
from models.attention_maps import attention_maps
from models.checkpoints import build_model, describe, read_checkpoint
from models.registry import CONFIGS, FAMILIES
from tests.shared import perturb


@pytest.fixture(autouse=True)
def registered():
    tables = (CONFIGS, FAMILIES, PATHS)
    before = [dict(table) for table in tables]
    for idea in (window_attention, shifted_path, long_skips):
        idea.register()
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def inputs(batch: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    return x, torch.tensor([1.0, 700.0])[:batch], torch.tensor([3, 10])[:batch]


def test_one_window_is_plain_attention():
    ours, plain = window_attention.WindowAttention(12, 3, 6, window=6), Attention(12, 3, 6, position_bias=None, amm=None)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 36, 12)
    assert_close(ours(x, None), plain(x, None))


def test_a_window_does_not_see_another():
    attention, x = window_attention.WindowAttention(12, 3, 6, window=3), torch.randn(1, 36, 12)
    changed = x.clone()
    changed[0, 0] += 1  # row 0, column 0: its window is rows and columns 0 to 2
    differs = (attention(x, None) != attention(changed, None)).any(2)[0].view(6, 6)
    assert differs[:3, :3].all() and not differs[3:].any() and not differs[:, 3:].any()


def test_windows_that_do_not_fit():
    with pytest.raises(ValueError, match="window must divide the token grid's side 8, got 3"):
        create_model("DiT-Ti/2-window", window=3)


def test_long_skips_are_used():
    model = perturb(create_model("LongSkip-Ti/2"), 0.1).eval()
    out = model(*inputs())
    with torch.no_grad():
        model.blocks[-1].skip_linear.weight[:, 96:] = 0  # the half that reads the first block's output
    assert not torch.allclose(model(*inputs()), out)


@pytest.mark.parametrize("name", ["DiT-Ti/2-window", "LongSkip-Ti/2"])
def test_checkpoints_remember(name, tmp_path):
    model = perturb(create_model(name, num_classes=10), 0.1).eval()
    config = describe(name, model.config, codec={}, class_names=())
    torch.save({"ema": model.state_dict(), "config": config}, tmp_path / "weights.pt")
    checkpoint = read_checkpoint(tmp_path / "weights.pt")
    assert checkpoint.model == name
    assert_close(build_model(checkpoint)(*inputs()), model(*inputs()))


def test_the_shifted_path_is_the_linear_one_at_another_time():
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    path, linear = PATHS["Shifted"], PATHS["Linear"]
    time = t / (t + shifted_path.SHIFT * (1 - t))
    assert_close(path.alpha(t), linear.alpha(time))
    assert_close(path.sigma(t), linear.sigma(time))
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        assert_close(derivative(t), expected)


def test_its_ode_reaches_a_gaussian():
    """Data N(0, 0.25): the exact velocity leads z to z / 2."""
    transport = create_transport("Shifted")
    path = transport.path

    def velocity(x, t):
        alpha, sigma, d_alpha, d_sigma = (f(t[0]) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
        return (alpha * d_alpha / 4 + sigma * d_sigma) / (alpha**2 / 4 + sigma**2) * x

    z = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = Sampler(transport).sample_ode(sampling_method="heun", num_steps=100)(z, velocity)[-1]
    assert_close(x, z / 2, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["no_such.py", "", "docs", "README.md", "../main/inference.py"])
def test_what_is_no_script(name):
    with pytest.raises(ValueError, match="is no script of this repository"):
        run_script([name])


def test_modules_that_python_m_runs(capsys):
    run_script(["models", "--image-size", "64"])
    assert "EDT-S/2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        run_script(["models.show_amm", "--help"])
    assert "--queries" in capsys.readouterr().out


def test_an_attention_without_operands_has_no_map():
    model = create_model("DiT-Ti/2-window").eval()
    config = model.config
    x = torch.randn(1, config.in_channels, config.input_size, config.input_size)
    assert 1 in attention_maps(model, [1], x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"WindowAttention has no operands\(x, bias\)"):
        attention_maps(model, [0], x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
