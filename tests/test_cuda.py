"""What only a GPU can show. Skipped without one, and where tests are kept off it: run with ``make test-cuda``.

The CPU's results are the reference: they are held to the published numbers elsewhere.
"""

import os

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample_ddp
import train_mask_adan
from data.npz import read_batches
from diffusion.few_steps import SCHEMES
from evaluations.metrics import precision_recall
from models import create_model
from models.checkpoints import read_checkpoint
from models.flex import flex_attention_with, flex_available
from models.inference import prepare
from models.layers import compile_blocks
from sampling.samplers import gaussian_sampler
from tests.shared import grey_levels, perturb
from tests.test_flex import written_out

if os.environ.get("REQUIRE_CUDA") and not torch.cuda.is_available():
    raise RuntimeError("REQUIRE_CUDA is set, but torch sees no GPU")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-cuda")

CUDA = torch.device("cuda")
NETWORKS = [
    ("EDT-S/2", {}),  # heads 52 wide, which fused kernels do not take as they are
    ("EDT-S/2", {"amm": "exp:7,10"}),
    ("DiT-S/2", {"depth": 4}),
    ("DiT-S/2", {"depth": 4, "amm": "cos:1,2"}),
    ("MDTv2-S/2", {}),
    ("MDTv2-S/2", {"amm": "exp:8"}),
    ("SiT-S/2", {"depth": 4, "mediator_num": 4}),
    ("SiT-S/2", {"depth": 4, "mediator_num": 9, "mediator_layers": 2}),
]


@pytest.fixture(autouse=True)
def exact_float32():
    """By default cuDNN's convolutions round to TF32."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def network(name, settings):
    torch.manual_seed(0)
    return perturb(create_model(name, **settings), 0.02)


def inputs(config, batch=4):
    draws = torch.Generator().manual_seed(0)
    side, channels = config.input_size, config.in_channels
    x, y = torch.randn(batch, channels, side, side, generator=draws), torch.randint(0, config.num_classes, (batch,))
    return x, torch.linspace(1, 999, batch), y


def masks(config, batch):
    draws = torch.Generator().manual_seed(1)
    return [place.kept(torch.rand(batch, place.num_tokens, generator=draws), place.high) for place in config.mask_places]


def close(actual, expected, tolerance):
    """In the norm: a sum of many products has no bound for its worst element."""
    difference = (actual.float().cpu() - expected).norm() / expected.norm()
    assert difference < tolerance, difference


@pytest.mark.parametrize("name, settings", NETWORKS)
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
def test_forward_is_the_cpus(name, settings, dtype, tolerance):
    model = network(name, settings).eval()
    values = inputs(model.config)
    with torch.inference_mode():
        expected = model(*values)
        model, values = model.to(CUDA), [value.to(CUDA) for value in values]
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            close(model(*values), expected, tolerance)
            close(model(*values), expected, tolerance)  # from the cached bias


@pytest.mark.parametrize("name, settings", NETWORKS)
def test_a_fused_kernel_is_used(name, settings):
    """Where none takes the inputs, PyTorch raises instead of falling back on the formula written out."""
    model = network(name, settings).to(CUDA)
    values = [value.to(CUDA) for value in inputs(model.config)]
    masked = {"kept": [mask.to(CUDA) for mask in masks(model.config, 2)]} if hasattr(model.config, "mask_places") else {}
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused), torch.autocast("cuda", torch.bfloat16):
        with torch.inference_mode():
            model.eval()(*values)
        model.train()(*values, **masked).float().square().mean().backward()


@pytest.mark.parametrize("name", ["EDT-S/2", "MDTv2-S/2"])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_masked_pass_are_the_cpus(name, compiled):
    model = network(name, {})
    values, kept = inputs(model.config), masks(model.config, 2)
    model(*values, kept=kept).square().mean().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    model.to(CUDA)
    if compiled:
        compile_blocks(model)
    model(*(value.to(CUDA) for value in values), kept=[mask.to(CUDA) for mask in kept]).square().mean().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, expected[key], 1e-3)


@pytest.mark.parametrize("name, settings", [NETWORKS[1], NETWORKS[3], NETWORKS[5], NETWORKS[6]])
def test_compiled_forward(name, settings):
    model = network(name, settings).eval()
    values = inputs(model.config)
    with torch.inference_mode():
        expected = model(*values)
    model.to(CUDA)
    compile_blocks(model)
    with torch.no_grad():
        close(model(*(value.to(CUDA) for value in values)), expected, 1e-4)


def biased_scores(grid, head_dim, dtype, bias_samples=1):
    """q, k, v as a network slices them from one product, and a bias: on the CPU, with values that dtype holds."""
    draws = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, grid**2, 3, 6, head_dim, generator=draws).to(dtype).double().permute(2, 0, 3, 1, 4).unbind(0)
    bias = torch.randn(bias_samples, 6, grid**2, grid**2, generator=draws).to(dtype).double()
    return *qkv, bias


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("grid, head_dim, bias_samples", [(16, 52, 1), (16, 64, 0), (16, 64, 2), (12, 52, 1), (32, 52, 1)])
@pytest.mark.parametrize("amm", [None, "exp", "cos"])
@torch.no_grad()
def test_flex_attention_is_the_formula(grid, head_dim, bias_samples, amm, dtype, tolerance):
    """144 tokens are no multiple of the kernel's tiles."""
    *qkv, bias = biased_scores(grid, head_dim, dtype, max(bias_samples, 1))
    bias = bias if bias_samples else None
    expected = written_out(*qkv, bias, grid, amm)
    values = [None if value is None else value.to(CUDA, dtype) for value in (*qkv, bias)]
    torch._dynamo.reset()
    actual = torch.compile(flex_attention_with, fullgraph=True, dynamic=False)(*values, grid, amm)
    assert actual.dtype == dtype
    close(actual, expected.float(), tolerance)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("amm", [None, "exp"])
@torch.no_grad()
def test_flex_attention_in_a_compiled_block(amm, mode):
    """It is chosen only there; one graph serves all calls, also as a CUDA graph."""

    def block(q, k, v, bias):
        out = flex_attention_with(q, k, v, bias, 16, amm)
        return out if flex_available(q, needs_grad=False) else torch.zeros_like(out)

    values = biased_scores(16, 52, torch.bfloat16)
    assert not flex_available(values[0].to(CUDA, torch.bfloat16), needs_grad=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, dynamic=False, mode=mode)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1, -1, 0.5, 2):  # a CUDA graph is recorded at the second call
            scaled = [value * scale for value in values]
            actual = compiled(*(value.to(CUDA, torch.bfloat16) for value in scaled))
            close(actual, written_out(*scaled, 16, amm).float(), 3e-2)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("name, settings", NETWORKS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_prepared_network_is_the_cpus(name, settings, dtype, tolerance, compiled):
    """From CUDA graphs where it is compiled: a later call must not write over an earlier one's result."""
    model = network(name, settings).eval()
    x, t, y = inputs(model.config)
    with torch.inference_mode():
        expected = [model(x * scale, t, y) for scale in (1, 0.5, -1, 2)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepared = prepare(model.to(CUDA), dtype=dtype, compile=compiled)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        results = [prepared((x * scale).to(CUDA), t.to(CUDA), y.to(CUDA)) for scale in (1, 0.5, -1, 2)]
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        close(result, reference, tolerance)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_prepared_networks_take_turns():
    """Two whose CUDA graphs share a pool, in two batch sizes, guided and not."""
    models = [network("EDT-S/2", settings).eval() for settings in ({}, {"amm": "exp:7,10"})]
    x, t, y = inputs(models[0].config)
    with torch.inference_mode():
        expected = [(model.forward_with_cfg(x, t, y, 1.5), model(x[:3], t[:3], y[:3])) for model in models]
        torch._dynamo.reset()
        models = [prepare(model.to(CUDA), dtype=torch.bfloat16, compile=True) for model in models]
        x, t, y = x.to(CUDA), t.to(CUDA), y.to(CUDA)
        for _ in range(4):
            actual = [(model.forward_with_cfg(x, t, y, 1.5), model(x[:3], t[:3], y[:3])) for model in models]
        for results, references in zip(actual, expected, strict=True):
            for result, reference in zip(results, references, strict=True):
                close(result, reference, 5e-2)


@pytest.mark.parametrize("solver", SCHEMES)
@pytest.mark.parametrize("compiled", [False, True])
def test_few_steps_are_the_cpus(solver, compiled):
    """They hold outputs of the network over three calls, which a CUDA graph's replays must not write over."""
    model = network("EDT-S/2", {}).eval()
    noise, _, y = inputs(model.config)

    def draw(k):
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(k))

    @torch.inference_mode()
    def steps(network, device):  # six, since a CUDA graph is recorded at the second call
        x, labels = noise.clone().to(device), y.clone().to(device)  # tensors of inference mode, as the later states
        return list(gaussian_sampler(solver, 6)(network, x, labels, draw))

    expected = steps(model, torch.device("cpu"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepared = prepare(model.to(CUDA), compile=compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = steps(prepared, CUDA)
    for out, reference in zip(actual, expected, strict=True):
        for name in ("sample", "pred_xstart"):
            close(out[name], reference[name], 1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def train(latent_store, runs, *argv):
    train_mask_adan.main(
        ["--feature-path", str(latent_store), "--results-dir", str(runs), "--global-batch-size", "8", "--epochs", "100"]
        + ["--ckpt-every", "2", "--log-every", "2", *argv]
    )
    return next(runs.iterdir()) / "checkpoints"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["EDT-Ti/2", "DiT-Ti/2", "MDTv2-Ti/2", "SiT-Ti/2"])
def test_a_resumed_run_goes_on(latent_store, tmp_path, fresh_accelerate_state, model, precision):
    """Two steps and two more are four: up to the order of a GPU's sums, which is little beside what the last two changed."""
    flags = ("--model", model, "--precision", precision)
    whole = train(latent_store, tmp_path / "whole", *flags, "--max-steps", "4")
    fresh_accelerate_state()
    train(latent_store, tmp_path / "parts", *flags, "--max-steps", "2")
    fresh_accelerate_state()
    parts = train(latent_store, tmp_path / "parts", *flags, "--max-steps", "4", "--resume", "auto")
    a, b = (read_checkpoint(path / "0000004.pt", "model").state for path in (whole, parts))
    start = read_checkpoint(whole / "0000002.pt", "model").state

    def distance(x, y):
        return torch.stack([(x[key].float() - y[key].float()).norm() for key in x]).norm()

    assert distance(a, start) > 0
    assert distance(a, b) < 0.05 * distance(a, start)


@pytest.mark.parametrize("model", ["EDT-Ti/2", "MDTv2-Ti/2", "SiT-Ti/2"])
def test_samples_do_not_depend_on_the_batch(latent_store, tmp_path, fresh_accelerate_state, model):
    ckpt = train(latent_store, tmp_path / "runs", "--model", model, "--max-steps", "4") / "latest"
    images = []
    for batch in (2, 5):
        fresh_accelerate_state()
        folder = tmp_path / str(batch)
        sample_ddp.main(
            ["--ckpt", str(ckpt), "--num-fid-samples", "5", "--num-sampling-steps", "5", "--sample-dir", str(folder)]
            + ["--per-proc-batch-size", str(batch), "--cfg-scale", "1.5"]
        )
        images.append(np.concatenate(list(read_batches(next(folder.glob("*.npz")), "arr_0", 5))))
    assert grey_levels(*images) <= 1


def test_neighbours_are_the_cpus(rng):
    """Distances are decided exactly, so the shares are equal, not near."""
    a, b = (torch.from_numpy(rng.normal(size=(500, 64)).astype(np.float32)) for _ in range(2))
    assert precision_recall(a.to(CUDA), b.to(CUDA)) == precision_recall(a, b)
