"""The parts of ``benchmarks.run`` that time a network against its plain formulation: forward, training step, optimizer."""

import copy
import dataclasses
import gc
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.compare import System
from benchmarks.networks import (
    LEARNING_RATE,
    batches_of,
    forward_call,
    fresh_accelerator,
    limits,
    prepared,
    random_inputs,
    randomized,
    training_batch,
    training_step,
)
from benchmarks.plain_loops import PlainAdan, PlainEMA, PlainStep
from benchmarks.products import Product, may_pack, record_products
from benchmarks.reference import plain_network
from benchmarks.rows import ALONE, AMM, OURS, PLAIN, Row, relative_error, row_of
from benchmarks.saved import saved_for_backward
from benchmarks.targets import TARGETS
from benchmarks.timing import MIN_ROUNDS, Case, measure
from models.macs import fresh_on_meta
from models.registry import build_network, default_amm
from training.data import Batch
from training.optim import set_lr
from training.step import Outcome, TrainingStep

SHARE_ROUNDS = 15
AMM_ROUNDS = 31  # of off and on: it costs less than a machine wavers
TARGET_ROUNDS = 7  # at least, of what a target is for
OPTIMIZER_LR = 1e-3  # large enough for a step to be seen in a weight's last digits
OPTIMIZER_PASSES = 13  # over numbers as many as the weights: of 6 states and the gradient read, 6 states written
COPIED_BYTES = 256e6


# The rows, and the call of each path
Measured = tuple[list[Row], dict[str, Callable[[], object]]]


def paths(args: Namespace) -> dict[str, torch.dtype]:
    """The names of what is compared with the plain formulation, and the precision of its products."""
    compiled = {"fp32 compiled": torch.float32, "bf16 compiled": torch.bfloat16} if args.compile else {}
    return {"fp32": torch.float32, **compiled}


# Forward


def forward_rows(args: Namespace, system: System, batch_size: int, device: torch.device) -> Measured:
    """As in sampling: in inference mode, with position biases cached."""
    network = randomized(build_network(system.config)).to(device).eval()
    inputs = random_inputs(system.config, batch_size, device)
    calls = {PLAIN: forward_call(plain_network(network).eval(), inputs)}
    expected = {"": calls[PLAIN]()}
    is_first = system.label == f"EDT-{args.size}/2"
    if is_first:
        modulated = build_network(system.config, default_amm(system.label)).to(device).eval()
        modulated.load_state_dict(network.state_dict())
        expected[AMM] = forward_call(plain_network(modulated).eval(), inputs)()
        calls["fp32" + AMM] = forward_call(modulated, inputs)
    calls["fp32"] = forward_call(network, inputs)
    if args.compile:
        # Each compilation takes a minute: one network alone is also compiled in fp32 and with AMM.
        if is_first:
            calls["fp32 compiled"] = forward_call(prepared(network, torch.float32), inputs)
            calls["bf16 compiled" + AMM] = forward_call(prepared(modulated, torch.bfloat16), inputs)
        calls["bf16 compiled"] = forward_call(prepared(network, torch.bfloat16), inputs)
    errors = {
        path: relative_error(call(), expected[AMM if path.endswith(AMM) else ""])
        for path, call in calls.items()
        if path != PLAIN
    }
    extra = {"error": errors, "amm_cost": amm_costs(calls, args.amm_rounds, device)}
    products = forward_products(system.config, batch_size)
    return _measured(args, "forward", system.label, calls, products, batch_size, device, extra), calls


def amm_costs(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The time that AMM adds, over the time without it: off and on take turns, nothing in between."""
    costs = {}
    for path, call in calls.items():
        if path.endswith(AMM):
            off = path.removesuffix(AMM)
            pair = [Case(off, calls[off]), Case(path, call, baseline=off)]
            costs[path] = measure(pair, device=device, repeats=rounds, warmup=1)[1].ratio - 1
    return costs


def forward_products(config: object, batch_size: int) -> Counter[Product]:
    """The matrix products of the plain formulation."""
    network, inputs = plain_network(fresh_on_meta(config)).eval(), random_inputs(config, batch_size, torch.device("meta"))
    return record_products(torch.no_grad()(lambda: network(*inputs)))


def in_dtype(products: Counter[Product], dtype: torch.dtype, *, packed: bool = False) -> Counter[Product]:
    """packed: those by a weight may use it packed."""
    return Counter(
        {product._replace(dtype=dtype, packed=packed and product.batch == 1): count for product, count in products.items()}
    )


def _measured(
    args: Namespace,
    work: str,
    label: str,
    calls: dict[str, Callable[[], object]],
    products: Counter[Product],
    batch_size: int,
    device: torch.device,
    extra: dict[str, dict[str, float]],
) -> list[Row]:
    """The calls take turns. extra: of a row's fields the values by path.

    The last path's share wants more rounds than the budget may allow: it is then measured once more beside its products, and
    has a row of that measurement too.
    """
    dtypes = {PLAIN: torch.float32, **paths(args)}
    cases = []
    for path, call in calls.items():
        dtype = dtypes[path.removesuffix(AMM)]
        # In a forward one product at a time is by a weight; in training a weight changes with each step.
        own = in_dtype(products, dtype, packed=work == "forward" and may_pack(dtype, device))
        cases.append(Case(path, call, batch_size, None if path == PLAIN else PLAIN, own))
    min_rounds = TARGET_ROUNDS if (work, label) in {(target.work, target.model) for target in TARGETS} else MIN_ROUNDS
    results = measure(cases, device=device, memory=True, min_rounds=min_rounds, **limits(args))
    plain = results[0]
    rows = [
        row_of(
            result,
            work,
            label,
            result.name,
            ceiling=plain.median / result.product_seconds,
            **{field: by_path.get(result.name) for field, by_path in extra.items()},
        )
        for result in results
    ]
    last = rows[-1]
    if work == "forward" and last.path != PLAIN and last.rounds < args.share_rounds:
        [again] = measure([dataclasses.replace(cases[-1], baseline=None)], device=device, repeats=args.share_rounds, warmup=1)
        rows.append(row_of(again, work, label, last.path + ALONE))
    return rows


# Training step


def training_rows(args: Namespace, system: System, batch_size: int, device: torch.device) -> Measured:
    """Drawing the batch is left out on both sides: see :func:`drawing_line`."""
    batch = training_batch(system.config, batch_size, masked=system.masked)
    network = randomized(build_network(system.config)).to(device)
    plain = PlainStep(plain_network(network), system.optimizer, **system.recipe)
    steps = {
        path: training_step(
            copy.deepcopy(network),
            batch_size,
            fresh_accelerator("bf16" if dtype == torch.bfloat16 else "fp32"),
            system.optimizer,
            compile=path.endswith("compiled"),
            **system.recipe,
        )
        for path, dtype in paths(args).items()
        if path != "fp32 compiled"  # what it would show, the forward shows
    }
    calls = {PLAIN: lambda: plain(batch), **{path: _call(step, batch) for path, step in steps.items()}}
    expected = calls[PLAIN]().sum()
    errors = {path: relative_error(calls[path]().sums[0], expected) for path in steps}
    networks = {PLAIN: plain.network, **{path: step.model for path, step in steps.items()}}
    saved = {path: saved_for_backward(call, networks[path]) / batch_size for path, call in calls.items()}
    products = step_products(system, batch_size)
    extra = {"error": errors, "saved_bytes": saved}
    return _measured(args, "training", system.label, calls, products, batch_size, device, extra), calls


def _call(step: TrainingStep, batch: Batch) -> Callable[[], Outcome]:
    return lambda: step(0, batch, LEARNING_RATE)


def drawing_line(system: System, batch_size: int) -> str:
    batches = batches_of(system.config, batch_size, masked=system.masked)
    batches(0)
    began = time.perf_counter()
    batches(1)
    taken = 1e3 * (time.perf_counter() - began) / batch_size
    return (
        f"- {system.label}: drawing a batch of {batch_size}, which is left out on both sides, takes {taken:.2f} ms/image, "
        "reading from files not included; training does it between the steps on a CPU, else in a thread, one step ahead"
    )


def step_products(system: System, batch_size: int) -> Counter[Product]:
    """The matrix products of the plain formulation, forward and back."""
    device = torch.device("meta")
    network = plain_network(fresh_on_meta(system.config)).train()
    batch = training_batch(system.config, batch_size, masked=system.masked).to(device)

    def passes() -> None:
        for y, kept in zip(batch.y, (None, batch.kept), strict=False):
            t = torch.empty(batch_size, device=device)
            out = network(batch.x0, t, y) if kept is None else network(batch.x0, t, y, kept)
            out.sum().backward()

    return record_products(passes)


# Optimizer


def optimizer_rows(args: Namespace, config: object, label: str, device: torch.device) -> tuple[list[Row], list[str]]:
    """Adan and the average of the weights; timed on gradients that stay the same."""
    network = build_network(config).to(device)
    start = [parameter.detach().clone() for parameter in _trained(network)]
    ours = training_step(
        copy.deepcopy(network), 1, fresh_accelerator("bf16" if args.compile else "fp32"), compile=args.compile
    )  # fmt: skip
    set_lr(ours.optimizer, OPTIMIZER_LR)
    plain, average = PlainAdan(_trained(network), OPTIMIZER_LR), PlainEMA(_trained(network))

    def run_plain() -> None:
        plain.step()
        average.update()

    def run_ours() -> None:
        ours.optimizer.step()
        ours.ema.update()

    for seed in (1, 2):  # the first step has no earlier gradient to look back to
        _give_gradients(ours.model, seed)
        _give_gradients(network, seed)
        run_plain()
        run_ours()
    error = _difference_of_moves(start, _trained(ours.model), _trained(network))
    source = torch.randn(int(COPIED_BYTES // 4), device=device)
    target = torch.empty_like(source)
    results = measure(
        [Case(PLAIN, run_plain), Case(OURS, run_ours, baseline=PLAIN), Case("copy", lambda: target.copy_(source))],
        device=device,
        memory=False,
        **limits(args),
    )
    numbers, rate = sum(tensor.numel() for tensor in start), 2 * source.numel() * 4 / results[-1].median
    floor = OPTIMIZER_PASSES * 4 * numbers / rate
    rows = [
        row_of(result, "optimizer", label, result.name, ceiling=results[0].median / floor, error=wrong)
        for result, wrong in zip(results[:2], (None, error), strict=True)
    ]
    line = (
        f"- {label}, optimizer: {numbers / 1e6:.1f} M weights; copying a tensor moves {rate / 1e9:.1f} GB/s, at which the "
        f"{OPTIMIZER_PASSES} numbers read and written for each weight take {1e3 * floor:.0f} ms"
    )
    return rows, [line]


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in _trained(network):
        parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(1e-3).to(parameter.device)


def _difference_of_moves(start: list[Tensor], found: list[nn.Parameter], expected: list[nn.Parameter]) -> float:
    """How far the weights came to lie from where they should, over how far they should have moved."""
    wrong = sum((a - b).detach().double().square().sum() for a, b in zip(found, expected, strict=True))
    moved = sum((b - a).detach().double().square().sum() for a, b in zip(start, expected, strict=True))
    return (wrong / moved).sqrt().item()


def release() -> None:
    """Before the next group: its networks take the place of this one's."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
