"""A network made ready to sample: its weights in the precision it works in and, if wanted, compiled as a whole."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MAX_GRAPHS = 16  # of one network: for each shape of its inputs, and with and without gradients


def prepare(
    model: nn.Module, dtype: torch.dtype = torch.float32, compile: bool = False, varying_batch: bool = False
) -> nn.Module:
    """The network itself, changed for good: gradients of its weights are wanted no more.

    dtype: of weights and activations; it takes and returns float32 all the same. compile: the forward becomes one graph, for
    each shape of the inputs, in which the weights and all that follows from them alone, as position biases, are constants: do
    not change the weights any more, which are kept a second time. On CUDA the graph is replayed without the host.
    varying_batch: one graph serves batches of any size above 1, at a small cost, and none is replayed.
    """
    model.requires_grad_(False).eval().to(dtype)
    forward = _compiled(model.forward, next(model.parameters()).device, varying_batch) if compile else model.forward
    model.forward = lambda x, t, y: forward(x, t, y).float()
    return model


def _compiled(forward: Callable[..., Tensor], device: torch.device, varying_batch: bool) -> Callable[..., Tensor]:
    replayed = device.type == "cuda" and not varying_batch
    options = {"freezing": True, "triton.cudagraphs": replayed}

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        with _onednn_products() if device.type == "cpu" else contextlib.nullcontext():
            return torch._inductor.compile(graph, inputs, options=options)

    compiled = torch.compile(
        forward,
        backend=backend,
        dynamic=None if varying_batch else False,
        fullgraph=True,
        recompile_limit=MAX_GRAPHS,
        isolate_recompiles=True,
    )

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=True):  # tracing asks for it, before the options hold
            if not replayed:
                return compiled(x, t, y)
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x, t, y).clone()  # the next replay writes to the same place

    return call


@contextlib.contextmanager
def _onednn_products() -> Iterator[None]:
    """While a graph is compiled: take oneDNN's float32 products on a CPU, which on AMD's are a sixth faster than MKL's.

    Inductor packs weights for them only where a lower precision is allowed. What is computed follows the setting at run time,
    which stays as it is.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before
