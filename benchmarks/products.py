"""The matrix products inside a call, and how fast this machine does products of just those shapes.

A rate from one large square product flatters a machine: a network's products are narrow, small or batched. So the yardstick is
recorded from the network itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Product(NamedTuple):
    """``batch`` products of (m, k) by (k, n) in one call. packed: the right operand is a weight that stays, and may be brought
    into the CPU library's own layout beforehand; one product only."""

    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype
    packed: bool = False

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate, as torch counts."""
        return 2 * self.batch * self.m * self.k * self.n


def record_products(call: Callable[[], object]) -> Counter[Product]:
    """The matrix products of one call -> how often each occurs; autograd's too, where the call goes backward.

    Convolutions are counted as the product they are after unfolding, attention kernels as the products they cannot avoid: two
    forward, four backward (recomputed scores are left out). Works on every device, on meta without computing. The call must be
    eager: what a compiled graph runs is not seen.
    """
    recorder = _Recorder()
    with recorder:
        call()
    return recorder.products


def total_flops(products: Counter[Product]) -> int:
    return sum(count * product.flops for product, count in products.items())


def product_calls(products: Iterable[Product], device: torch.device) -> dict[Product, Callable[[], object]]:
    """For each product a call that does it once, into memory that is already there (a packed one's result is new memory).

    All share the same operands' memory, so that many shapes take no more of it than the largest, and mostly find it in cache.
    """
    products = list(products)
    buffers = {}
    for dtype in {product.dtype for product in products}:
        same = [(b * m * k, b * k * n, b * m * n) for b, m, k, n, other, _ in products if other == dtype]
        # Not zeros: some hardware is faster, or clocks higher, on them.
        buffers[dtype] = [torch.randn(max(sizes), device=device).to(dtype) for sizes in zip(*same, strict=True)]
    return {product: _product_call(product, *buffers[product.dtype]) for product in products}


def _product_call(product: Product, left: Tensor, right: Tensor, out: Tensor) -> Callable[[], object]:
    if product.packed:
        return _packed_call(product, left, right)
    shapes = [(product.m, product.k), (product.k, product.n), (product.m, product.n)]
    if product.batch > 1:
        shapes = [(product.batch, *shape) for shape in shapes]
    a, b, c = (buffer[: math.prod(shape)].view(shape) for buffer, shape in zip((left, right, out), shapes, strict=True))
    multiply = torch.mm if product.batch == 1 else torch.bmm
    return lambda: multiply(a, b, out=c)


def _packed_call(product: Product, left: Tensor, right: Tensor) -> Callable[[], object]:
    """oneDNN's linear, as compiled networks on a CPU call it; its weight lies as (n, k)."""
    x, weight = left[: product.m * product.k].view(-1, product.k), right[: product.n * product.k].view(-1, product.k)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, product.m)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def may_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this device has products with a packed right operand."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = RULES.get(func.overloadpacket)
        if rule is None:
            # Without autograd, linear and its like arrive whole: take them apart to see the products in them.
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.products.update(product for product in rule(out, *args) if product.flops)
        return out


def _matmul(a: Tensor, b: Tensor) -> list[Product]:
    """(M, K) by (K, N), or batched."""
    batch = a.shape[0] if a.ndim == 3 else 1
    return [Product(batch, *a.shape[-2:], b.shape[-1], a.dtype)]


def _convolution(out: Tensor, x: Tensor, weight: Tensor, bias, stride, padding, dilation, transposed, extra, groups):
    """Unfolded: output pixels by (input channels x kernel) by output channels, for each group."""
    if transposed:
        raise ValueError("a transposed convolution has no rule yet: its matrix product is not counted")
    pixels = out.numel() // out.shape[1]
    return [Product(groups, pixels, weight.numel() // weight.shape[0], weight.shape[0] // groups, x.dtype)]


def _convolution_backward(out, grad: Tensor, x: Tensor, weight: Tensor, bias_sizes, *settings):
    """The gradients of input and weight that are wanted: the same FLOPs each."""
    *settings, wanted = settings
    [(groups, pixels, k, n, dtype, _)] = _convolution(grad, x, weight, None, *settings)
    both = Product(groups, pixels, n, k, dtype), Product(groups, k, pixels, n, dtype)
    return [product for product, is_wanted in zip(both, wanted, strict=False) if is_wanted]


def _attention(out, q: Tensor, k: Tensor, v: Tensor, *_) -> list[Product]:
    """q (..., N, D), k (..., M, D), v (..., M, E): q k^T, then the probabilities by v."""
    batch, (n, d), (m, e) = q.shape[:-2].numel(), q.shape[-2:], v.shape[-2:]
    return [Product(batch, n, d, m, q.dtype), Product(batch, n, m, e, q.dtype)]


def _attention_backward(out, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> list[Product]:
    batch, (n, d), (m, e) = q.shape[:-2].numel(), q.shape[-2:], v.shape[-2:]
    # The gradients of the values, the probabilities, the queries and the keys.
    shapes = ((m, n, e), (n, e, m), (n, m, d), (m, n, d))
    return [Product(batch, *shape, q.dtype) for shape in shapes]


def _rules() -> dict:
    """Operator -> function of its output and arguments -> products. An attention kernel this torch lacks has no row."""
    aten = torch.ops.aten
    rules = {
        aten.mm: lambda out, a, b: _matmul(a, b),
        aten.bmm: lambda out, a, b: _matmul(a, b),
        aten.addmm: lambda out, added, a, b: _matmul(a, b),
        aten.baddbmm: lambda out, added, a, b: _matmul(a, b),
        aten.convolution: _convolution,
        aten.convolution_backward: _convolution_backward,
    }
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        name = f"_scaled_dot_product_{kernel}"
        # The CPU's kernel puts its suffix behind "backward" as well.
        backward = name + "_backward"
        for operator, rule in ((name, _attention), (backward, _attention_backward)):
            if hasattr(aten, operator):
                rules[getattr(aten, operator)] = rule
    return rules


RULES = _rules()
