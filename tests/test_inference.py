"""models.inference: networks made ready to sample give what they gave before, in their precision, compiled or not."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from diffusion.guidance import ClassifierFreeGuidance
from models import create_model
from models.amm import amm_matrix, parse_amm
from models.attention import written_out_attention
from models.inference import prepare
from tests.shared import perturb

NETWORKS = {
    "EDT-Ti/2": {},
    "DiT-Ti/2": {},
    "SiT-Ti/2": {"mediator_num": 4},
    "MDTv2-Ti/2": {},
}


def network(name: str = "EDT-Ti/2", scale: float = 0.02, **settings):
    torch.manual_seed(0)
    return perturb(create_model(name, **NETWORKS[name], **settings), scale).eval()


def inputs(model, batch: int) -> tuple[torch.Tensor, ...]:
    config, generator = model.config, torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % config.num_classes


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_within_two_percent(name):
    model = network(name)
    x, t, y = inputs(model, 3)
    with torch.no_grad():
        expected = model(x, t, y)
    assert_close(prepare(copy.deepcopy(model))(x, t, y), expected, rtol=0, atol=0)
    half = prepare(copy.deepcopy(model), torch.bfloat16)
    out = half(x, t, y)
    assert out.dtype == torch.float32 and {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert 1e-4 < distance(out, expected) < 2e-2


def test_amm_in_half_precision():
    """Written out on a CPU in bf16, with doubled keys in fp32: the same modulation."""
    model = network(scale=0.1, amm=parse_amm("exp:0,1,4,5"))
    x, t, y = inputs(model, 2)
    with torch.no_grad():
        expected, plain = model(x, t, y), network(scale=0.1)(x, t, y)
    assert 2 * distance(prepare(model, torch.bfloat16)(x, t, y), expected) < 5e-2 < distance(plain, expected)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance", "settings"),
    [
        ("DiT-Ti/2", torch.float32, 2e-6, {}),
        ("EDT-Ti/2", torch.bfloat16, 2e-2, {"amm": parse_amm("exp:4")}),
    ],
)
def test_a_compiled_network_is_the_network(monkeypatch, name, dtype, tolerance, settings):
    """Called alone or through guidance, it is one graph; the settings of products stay as they are."""
    model, graphs, inductor = network(name, **settings), [], torch._inductor.compile
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *a, **k: graphs.append(graph) or inductor(graph, *a, **k))
    before = torch.backends.mkldnn.matmul.fp32_precision
    fast = prepare(copy.deepcopy(model), dtype, compile=True)
    with torch.inference_mode():  # it is guarded whether inputs were made in it
        x, t, y = inputs(model, 4)
        expected = model(x, t, y)
        assert distance(fast(x, t, y), expected) < tolerance
        guided = (ClassifierFreeGuidance(m, 1.5, 10)(x[:2], t[:2], y[:2]) for m in (fast, model))
        assert distance(*guided) < 2 * tolerance
    [graph] = graphs
    assert len(graph.graph.find_nodes(op="placeholder")) == 3  # x, t and y; the weights are constants
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_one_graph_serves_varying_batches():
    model = network("SiT-Ti/2")
    fast = prepare(copy.deepcopy(model), torch.bfloat16, compile=True, varying_batch=True)
    with torch.inference_mode():
        graphs = [counters["stats"]["unique_graphs"]]
        for batch in (5, 3, 2, 4, 6):
            assert distance(fast(*inputs(model, batch)), model(*inputs(model, batch))) < 2e-2
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] > graphs[0] and graphs[-1] <= graphs[0] + 2  # one for the first size, one for all others


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_input_pass_through(compiled):
    """As the likelihood of an ODE wants them."""
    model = network("DiT-Ti/2")
    x, t, y = inputs(model, 2)
    x.requires_grad_()
    [expected] = torch.autograd.grad(model(x, t, y).square().sum(), x)
    [actual] = torch.autograd.grad(prepare(model, compile=compiled)(x, t, y).square().sum(), x)
    assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amm", [None, "exp"])
def test_large_scores_in_half_precision(amm):
    """Written out, scores are rounded before the softmax; the fused kernel rounds its probabilities. Neither is far better."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 52) for _ in range(3))
    q, bias = 4 * q, torch.randn(1, 4, 64, 64)  # scores up to 20
    factor = None if amm is None else amm_matrix(8, amm)
    expected = written_out_attention(q, k, v, bias.clone(), factor)
    half = [tensor.bfloat16() for tensor in (q, k, v, bias)]
    rounded = written_out_attention(*(tensor.float() for tensor in half), factor)
    actual = written_out_attention(*half, None if factor is None else factor.bfloat16()).float()
    assert distance(rounded, expected) < 1e-2  # of the inputs alone
    assert distance(actual, expected) < 2e-2
