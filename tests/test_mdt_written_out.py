"""MDTv2 against the same network written out in plain loops: outputs, AMM, and the gradient of a masked training step."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.reference import with_plain_attention
from diffusion import create_diffusion
from tests.mdt_networks import inputs, random_model, some_tokens
from tests.shared import match
from tests.test_amm import plain_matrix
from tests.written_out_mdt import WrittenOut
from training.data import Batch
from training.step import TrainingStep


def written_out(model, state=None):
    return WrittenOut(state or dict(model.state_dict()), model.config.num_heads)


@pytest.mark.parametrize(
    "overrides", [{}, {"patch_size": 4, "depth": 4}, {"learn_sigma": False, "depth": 7, "decode_layer": 1}]
)
def test_the_network_is_the_written_out_one(overrides):
    """Two whole samples, then two masked ones."""
    model = random_model(**overrides).double()
    x, t, y = inputs(4)
    (place,) = model.config.mask_places
    kept = [place.kept(torch.rand(2, place.num_tokens, generator=torch.Generator().manual_seed(1)), 0.4)]
    with torch.no_grad():
        out, expected = model(x.double(), t, y, kept), written_out(model)(x.double(), t, y, kept)
    assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["exp", "cos"])
@pytest.mark.parametrize("block", range(6))
def test_amm_is_the_written_out_one(block, form):
    """Counted through encoder-in, encoder-out and decoder."""
    model, modulated = random_model(depth=6), random_model(depth=6, amm=f"{form}:{block}")
    reference = written_out(model.double())
    reference.amm = {block: plain_matrix(8, form)}
    x, t, y = inputs(1)
    with torch.no_grad():
        out, expected = modulated.double()(x.double(), t, y), reference(x.double(), t, y)
        scale = expected.std().item()
        assert_close(out, expected, rtol=1e-4, atol=1e-4 * scale)
        assert (out - model(x.double(), t, y)).abs().max() > 1e-2 * scale
        match(with_plain_attention(modulated.float())(x, t, y).double() / scale, expected / scale)


def test_training_gradient_is_the_written_out_one():
    """Of mean(w L_whole) + mean(w L_masked), each pass with its own noise and labels, against the network in plain loops."""
    model = random_model().double().train()
    b, draws = 3, torch.Generator().manual_seed(2)
    x0 = torch.randn(b, 4, 16, 16, generator=draws).double()
    noise = torch.randn(2, b, 4, 16, 16, generator=draws).double()
    batch = Batch(x0, torch.tensor([[1, 10, 3], [10, 2, 3]]), noise, [some_tokens(b)])
    t, weights = torch.tensor([17, 480, 903]), torch.tensor([0.5, 1.0, 2.0])
    diffusion = create_diffusion(min_snr_gamma=5)
    step = TrainingStep(None, model, None, None, diffusion, None, 0, b, range(b), b)
    per_sample, _ = step._losses(batch, t)
    (weights * per_sample).mean().backward()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    network = written_out(model, leaves)
    kwargs = [{"y": batch.y[0]}, {"y": batch.y[1], "kept": batch.kept}]
    passes = [diffusion.training_losses(network, x0, t, kwargs[i], noise=noise[i])["loss"] for i in (0, 1)]
    sum((weights * losses).mean() for losses in passes).backward()
    assert_close(per_sample, sum(passes), rtol=1e-6, atol=0)  # the losses are float32
    for name, parameter in model.named_parameters():
        expected = leaves[name].grad
        assert expected.abs().max() > 0, name
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name
    spare = model.en_inblocks[0].attn.rel_pos_bias.relative_position_bias_table.grad[-3:]
    assert not spare.any()


def test_the_masked_pass_through_plain_attention():
    model = random_model()
    with torch.no_grad():
        match(with_plain_attention(model)(*inputs(), [some_tokens(1)]), model(*inputs(), [some_tokens(1)]))
