"""Computing blocks again in backward: the same gradients, less kept."""

import copy

import pytest
import torch
from torch import Tensor, nn

import train_mask_adan
from models import create_model
from models.layers import compile_blocks, recompute_blocks, transformer_blocks
from tests.runs import assert_same_run, train_argv
from tests.shared import perturb

CASES = {
    "EDT": ("EDT-Ti/2", {}, False),
    "EDT masked": ("EDT-Ti/2", {}, True),
    "DiT": ("DiT-Ti/2", {}, False),
    "MDTv2 masked": ("MDTv2-Ti/2", {}, True),
    "SiT": ("SiT-Ti/2", {}, False),
    "SiT with mediators in some blocks": ("SiT-Ti/2", {"mediator_num": 16, "mediator_layers": 2}, False),
}


def network(case: str) -> nn.Module:
    name, settings, _ = CASES[case]
    torch.manual_seed(0)
    return perturb(create_model(name, **settings), 0.05).train()


def go_both_ways(model: nn.Module, masked: bool, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients, and the bytes kept in between; parameters count as well. bf16: under autocast, as in training."""
    generator, config = torch.Generator().manual_seed(1), model.config
    x = torch.randn(4, config.in_channels, config.input_size, config.input_size, generator=generator)
    t, y = torch.rand(4, generator=generator) * 900, torch.tensor([0, 3, 9, 10])
    places = config.mask_places if masked else ()
    kept = [place.kept(torch.rand(2, place.num_tokens, generator=generator), 0.4) for place in places]
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(x, t, y, **({"kept": kept} if masked else {}))
        total = sum(sizes)
        out.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return out.detach(), gradients, total


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_same_gradients_bitwise_from_less_that_is_kept(case, bf16):
    masked = CASES[case][2]
    model = network(case)
    thrifty = copy.deepcopy(model)
    recompute_blocks(thrifty)
    assert thrifty.state_dict().keys() == model.state_dict().keys()
    out, gradients, kept = go_both_ways(model, masked, bf16)
    same_out, same_gradients, less = go_both_ways(thrifty, masked, bf16)
    assert torch.equal(out, same_out) and gradients.keys() == same_gradients.keys()
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())
    assert less < kept / 2.5


def test_a_block_is_computed_twice_in_training_and_once_without_gradients(monkeypatch):
    model = network("EDT")
    recompute_blocks(model)
    kind, calls = type(transformer_blocks(model)[0]), []
    compute = kind.compute
    monkeypatch.setattr(kind, "compute", lambda self, *inputs: calls.append(self) or compute(self, *inputs))
    go_both_ways(model, masked=False)
    blocks = transformer_blocks(model)
    assert len(calls) == 2 * len(blocks)
    assert calls[len(blocks) :] == blocks[::-1]
    calls.clear()
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert calls == blocks


def test_compiled_blocks_recompute_without_a_graph_break(monkeypatch):
    """With the compiler's first half only; the second takes a minute. A forward replaced from outside once was not compiled."""
    model = network("DiT")
    thrifty = copy.deepcopy(model)
    recompute_blocks(thrifty)
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compile_(self, backend="aot_eager", **kwargs))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(thrifty)
    out, gradients, _ = go_both_ways(model, masked=False)
    same_out, same_gradients, _ = go_both_ways(thrifty, masked=False)
    torch.testing.assert_close(same_out, out)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_run_with_it_is_bitwise_the_run_without(latent_store, tmp_path, fresh_accelerate_state):
    for name, extra in (("plain", ()), ("thrifty", ("--gradient-checkpointing",))):
        fresh_accelerate_state()
        train_mask_adan.main(train_argv(latent_store, tmp_path / name, "--max-steps", "3", *extra))
    assert_same_run(tmp_path / "plain", tmp_path / "thrifty")
