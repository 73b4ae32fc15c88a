"""The benchmark harness: bookkeeping with a fake clock, products against closed forms. Nothing here depends on real speed."""

import contextlib
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report, timing
from benchmarks.networks import forward_call, random_inputs, randomized
from benchmarks.products import Product, product_calls, record_products, total_flops
from benchmarks.reference import with_plain_attention
from benchmarks.timing import Case, Result, measure, peak_memory, time_ratio
from models import create_model

FP32, BF16 = torch.float32, torch.bfloat16


class FakeMachine:
    """A clock that only its own cases move on; ``log`` holds the names of the cases in the order they ran."""

    def __init__(self):
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def case(self, name: str, seconds, **kwargs) -> Case:
        """seconds: of call number 0, 1, ..., a function or a constant."""

        def run() -> None:
            call = self.log.count(name)
            self.log.append(name)
            self.now += seconds(call) if callable(seconds) else seconds

        return Case(name, run, **kwargs)

    def measure(self, *cases: Case, **kwargs) -> list[Result]:
        return measure(cases, clock=self.clock, **kwargs)


# --- measure


def test_every_round_runs_each_case_once_in_changing_order():
    machine = FakeMachine()
    results = machine.measure(*(machine.case(name, 1.0) for name in "abc"), repeats=12, warmup=0)
    rounds = [tuple(machine.log[i : i + 3]) for i in range(0, 36, 3)]
    assert len(machine.log) == 36 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    assert [result.name for result in results] == ["a", "b", "c"]
    again = FakeMachine()
    again.measure(*(again.case(name, 1.0) for name in "abc"), repeats=12, warmup=0)
    assert again.log == machine.log


def test_warmup_is_not_counted():
    machine = FakeMachine()
    slow_start = machine.case("a", lambda call: 100.0 if call < 2 else 1.0)
    [result] = machine.measure(slow_start, repeats=5, warmup=2, budget_seconds=50.0)
    assert result.seconds == (1.0,) * 5 and len(machine.log) == 7


def test_statistics_of_a_result():
    machine = FakeMachine()
    [result] = machine.measure(machine.case("a", lambda call: [5.0, 1.0, 2.0, 4.0, 3.0][call], items=4), repeats=5, warmup=0)
    assert (result.median, result.min) == (3.0, 1.0)
    assert result.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert result.ms_per_item == pytest.approx(750.0)
    assert (result.ratio, result.flops, result.gflops_per_second, result.share_of_product_rate) == (None,) * 4


def test_ratio_is_the_median_of_the_rounds_ratios():
    """On a machine that halves its speed at every round the ratio stays 1/4 for twice the items in half the time."""
    machine = FakeMachine()
    plain = machine.case("plain", lambda call: 2.0 * 2.0**call)
    fast = machine.case("fast", lambda call: 1.0 * 2.0**call, items=2, baseline="plain")
    slow, reference = machine.measure(fast, plain, repeats=7, warmup=0)
    assert slow.ratio == time_ratio(slow, reference) == 0.25
    uneven = Result(name="uneven", items=1, seconds=(1.0, 6.0, 3.0))
    assert time_ratio(uneven, Result(name="one", items=1, seconds=(1.0, 2.0, 3.0))) == 1.0  # of 1, 3 and 1: not 3 over 2


def test_budget_stops_between_rounds():
    machine = FakeMachine()
    cases = [machine.case("a", 4.0), machine.case("b", 6.0)]
    first, second = machine.measure(*cases, repeats=100, warmup=1, budget_seconds=45.0)
    assert len(first.seconds) == len(second.seconds) == 5
    short = FakeMachine()
    [result] = short.measure(short.case("a", 4.0), repeats=100, warmup=0, budget_seconds=1.0)
    assert len(result.seconds) == timing.MIN_ROUNDS


def test_mistakes_are_named():
    machine = FakeMachine()
    with pytest.raises(ValueError, match="same name"):
        machine.measure(machine.case("a", 1.0), machine.case("a", 1.0))
    with pytest.raises(ValueError, match="baseline 'b' of 'a'"):
        machine.measure(machine.case("a", 1.0, baseline="b"))
    with pytest.raises(ValueError, match="at least 1"):
        machine.measure(machine.case("a", 1.0), repeats=0)


def test_product_rate_is_weighted_by_flops(monkeypatch):
    """Product X (1 GFLOP) takes 10 ms, Y (2 GFLOP) 50 ms; the work holds X three times and Y once in 160 ms."""
    machine = FakeMachine()
    x, y = Product(1, 500, 1000, 1000, FP32), Product(2, 500, 1000, 1000, FP32)
    loops = Counter()

    def fake_calls(products, device):
        def call(product, seconds):
            def run():
                loops[product] += 1
                machine.now += seconds

            return run

        assert set(products) == {x, y}
        return {x: call(x, 0.010), y: call(y, 0.050)}

    monkeypatch.setattr(timing, "product_calls", fake_calls)
    case = machine.case("work", 0.160, products=Counter({x: 3, y: 1}))
    [result] = machine.measure(case, repeats=4, warmup=1)
    assert result.flops == 5e9
    assert result.gflops_per_second == pytest.approx(5 / 0.160)
    assert result.product_gflops_per_second == pytest.approx(5 / 0.080)
    assert result.share_of_product_rate == pytest.approx(0.5)
    assert loops == {x: 1 + timing.MIN_PRODUCT_TIMINGS, y: 1 + timing.MIN_PRODUCT_TIMINGS}


def test_products_inside_cases_are_measured_for_real():
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    [result] = measure([Case("mm", lambda: a @ b, products=record_products(lambda: a @ b))], repeats=3, warmup=0)
    assert result.flops == 2 * 64 * 32 * 16 and result.product_seconds > 0


# --- record_products


def test_products_of_a_linear():
    linear, x = nn.Linear(12, 20), torch.randn(3, 5, 12)
    assert record_products(lambda: linear(x)) == {Product(1, 15, 12, 20, FP32): 1}
    forward_and_back = record_products(lambda: linear(x).sum().backward())  # x needs no gradient: the weight's only
    assert total_flops(forward_and_back) == 2 * (2 * 15 * 12 * 20)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_modes_of_autograd_do_not_hide_products(mode):
    """Under inference_mode linear and matmul reach a dispatch mode whole and were not seen."""
    linear, x, y = nn.Linear(12, 20, bias=False), torch.randn(3, 5, 12), torch.randn(3, 20, 4)
    with mode():
        found = record_products(lambda: linear(x) @ y)
    assert found == {Product(1, 15, 12, 20, FP32): 1, Product(3, 5, 20, 4, FP32): 1}


def test_products_have_the_dtype_they_run_in():
    linear, x = nn.Linear(12, 20), torch.randn(5, 12)
    with torch.autocast("cpu", BF16):
        assert record_products(lambda: linear(x)) == {Product(1, 5, 12, 20, BF16): 1}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_of_attention(device):
    """The CPU's fused kernel and the decomposition on meta: 2 products forward, and on the CPU 4 backward."""
    q, k, v = (torch.randn(2, 3, tokens, 8, device=device, requires_grad=True) for tokens in (16, 10, 10))
    forward = record_products(lambda: F.scaled_dot_product_attention(q, k, v))
    assert forward == {Product(6, 16, 8, 10, FP32): 1, Product(6, 16, 10, 8, FP32): 1}
    both = record_products(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert total_flops(both) == 3 * total_flops(forward)


@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_a_convolution(groups):
    convolution, x = nn.Conv2d(4, 6, 2, stride=2, groups=groups), torch.randn(3, 4, 8, 8, requires_grad=True)
    forward = record_products(lambda: convolution(x))
    assert forward == {Product(groups, 3 * 16, 16 // groups, 6 // groups, FP32): 1}
    assert total_flops(record_products(lambda: convolution(x).sum().backward())) == 3 * total_flops(forward)
    with pytest.raises(ValueError, match="transposed"):
        record_products(lambda: nn.ConvTranspose2d(4, 6, 2)(x))


def test_total_equals_torchs_counter_for_edt():
    """On meta, where torch's counter sees attention; and on the CPU with the fused kernel, which it would miss."""
    with torch.device("meta"):
        model = create_model("EDT-S/2").eval()
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
        on_meta = record_products(lambda: model(*inputs))
    assert total_flops(on_meta) == pytest.approx(counter.get_total_flops(), rel=0.01)
    model = create_model("EDT-S/2").eval()
    on_cpu = record_products(forward_call(model, random_inputs(model.config, 1, torch.device("cpu"))))
    assert total_flops(on_cpu) == total_flops(on_meta)


def test_product_calls_run_every_shape():
    products = [Product(1, 5, 6, 7, FP32), Product(4, 3, 2, 9, FP32), Product(2, 8, 8, 8, BF16)]
    products.append(Product(1, 3, 8, 5, FP32, packed=True))
    calls = product_calls(products, torch.device("cpu"))
    shapes = {product: tuple(call().shape) for product, call in calls.items()}
    assert shapes == dict(zip(products, [(5, 7), (4, 3, 9), (2, 8, 8), (3, 5)], strict=True))


# --- the plain formulation


@pytest.mark.parametrize("amm", [False, "exp:4", "cos:2,3"])
def test_plain_attention_gives_the_same_output(amm):
    model = randomized(create_model("EDT-Ti/2", amm=amm)).eval()
    with torch.no_grad():  # biases of every size, not the almost equal ones of a new network
        for block in model.blocks:
            block.attn.rel_pos_bias.relative_position_bias_table.normal_(generator=torch.Generator().manual_seed(1))
    inputs = random_inputs(model.config, 3, torch.device("cpu"))
    expected = forward_call(model, inputs)()
    found = forward_call(with_plain_attention(model), inputs)()
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plain_attention_leaves_the_original_alone_and_gives_the_same_gradients():
    model = randomized(create_model("EDT-Ti/2"))
    plain = with_plain_attention(model)
    for network in (model, plain):
        network(*random_inputs(model.config, 3, torch.device("cpu"))).square().mean().backward()
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if own.requires_grad:
            assert own is not other and own.grad is not other.grad
            torch.testing.assert_close(
                own.grad, other.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


# --- peak_memory


def test_peak_memory_sees_a_passing_allocation():
    def run() -> float:
        big = torch.ones(50_000_000)  # 200 MB, written to, and gone at the end
        return big[0].item()

    assert 180e6 < peak_memory(run) < 260e6


def test_peak_memory_does_not_count_what_was_there():
    held = torch.ones(50_000_000)
    assert peak_memory(lambda: held[0].item()) < 40e6


def test_a_failing_call_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        peak_memory(lambda: 1 / 0)
    assert threading.active_count() == before


# --- report


def test_table_is_aligned_and_leaves_out_empty_columns():
    results = [Result(name="plain", items=2, seconds=(0.2, 0.2)), Result(name="a longer name", items=2, seconds=(2.0,) * 3)]
    lines = report.table(results).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["case", "ms/image", "spread"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["plain", "100", "0 %"]


def test_a_section_is_replaced_and_others_are_kept(tmp_path):
    path = tmp_path / "RESULTS.md"
    report.write_section("EDT on A", "first\n\n### Details\n\nold", path)
    report.write_section("EDT on A, B", "second", path)
    report.write_section("EDT on A", "third", path)
    expected = [report.HEADER.strip(), "## EDT on A\n\nthird", "## EDT on A, B\n\nsecond"]
    assert path.read_text() == "\n\n".join(expected) + "\n"
    report.write_section("EDT on A", "third", path)
    assert path.read_text() == "\n\n".join(expected) + "\n"


def test_environment_names_the_machine():
    text = report.environment(torch.device("cpu"))
    assert torch.__version__ in text and f"{torch.get_num_threads()} threads" in text
    assert report.device_name(torch.device("cpu"))
