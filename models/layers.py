"""Building blocks of the DiT family: embeddings, modulation, MLP, output layer (Peebles & Xie 2023, "Scalable Diffusion Models
with Transformers").

Shapes: B batch, N tokens, D width, C channels, S side of the latent, p side of a patch, n = S/p side of the token grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import BiasedAttention


def sincos_table(width: int, grid: int) -> Tensor:
    """The fixed 2-D position table, (1, grid*grid, width): half of the channels encode the column, half the row.

    Each half holds sines, then cosines, of position / 10000^(i / (width/4)). Raises ValueError unless 4 divides width.
    """
    if width % 4:
        raise ValueError(f"the width of a 2-D sin-cos position table must be divisible by 4, got {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (n, D/4)
    along_one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, D/2)
    columns = along_one_axis[None, :, :].expand(grid, grid, -1)
    rows = along_one_axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, width).float()


def fixed_table(width: int, grid: int) -> nn.Parameter:
    """:func:`sincos_table` as the published state dicts hold it: a parameter that is not trained."""
    return nn.Parameter(sincos_table(width, grid), requires_grad=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x. x (B, N, D), shift and scale (B, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def normalize(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, 0.5 x (1 + tanh u) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # Fused with its neighbours, a sigmoid takes less than half the time of a tanh, and so does its derivative.
        h = x.float()
        return (h * torch.sigmoid(2 * math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h.square()))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class PatchEmbed(nn.Module):
    """(B, C, S, S) -> (B, N, D): a p x p convolution with stride p, tokens in row-major order."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: the residual stream keeps the layout it starts with, and every norm would copy a transposed one.
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """t (B,), of any real type, -> (B, D)."""

    SINUSOID = 256
    MAX_PERIOD = 10000.0

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SINUSOID, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.SINUSOID // 2
        frequencies = torch.exp(-math.log(self.MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (B,) int64 -> (B, D). The last row, ``null_class``, stands for "no label" in classifier-free guidance.

    Which labels are dropped in training is decided by the caller, who passes ``null_class`` for them.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class AdaLN(nn.Sequential):
    """The conditioning c (B, D_c) -> ``chunks`` vectors of (B, width): SiLU, Linear."""

    def __init__(self, cond_width: int, width: int, chunks: int):
        super().__init__(nn.SiLU(), nn.Linear(cond_width, chunks * width))
        self.chunks = chunks

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return super().forward(c).chunk(self.chunks, dim=1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning: x (B, N, D), c (B, D_c) -> (B, N, D).

    The modulation is in the order shift, scale, gate of the attention, then of the MLP. recompute: see
    :func:`recompute_blocks`.
    """

    recompute = False

    def __init__(self, width: int, cond_width: int, attention: BiasedAttention, mlp_ratio: float = 4.0):
        super().__init__()
        self.attn = attention
        self.mlp = Mlp(width, round(width * mlp_ratio))
        self.adaLN_modulation = AdaLN(cond_width, width, 6)

    def forward(self, x: Tensor, c: Tensor, bias: Tensor | tuple[Tensor, ...] | None, *more: Tensor) -> Tensor:
        """bias: what ``attn.score_bias()`` returned. more: what a subclass's :meth:`compute` takes."""
        if self.recompute:
            return checkpoint(self.compute, x, c, bias, *more, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, c, bias, *more)

    def compute(self, x: Tensor, c: Tensor, bias: Tensor | tuple[Tensor, ...] | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attn(modulate(normalize(x), shift_a, scale_a), bias))
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulate(normalize(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, C_out, S, S): LayerNorm, modulation, Linear to patches in (row, column, channel) order, unpatchify."""

    def __init__(self, width: int, cond_width: int, patch_size: int, out_channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = AdaLN(cond_width, width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        x = self.linear(modulate(normalize(x), shift, scale))  # (B, N, p*p*C)
        p, n = self.patch_size, math.isqrt(x.shape[1])
        x = x.view(x.shape[0], n, n, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, n * p, n * p)


def guide(out: Tensor, scale: float | Tensor, channels: int | None = 3) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on a doubled batch: uncond + scale * (cond - uncond), in both halves.

    out: (2B, C, S, S), the conditional half first. channels: how many of the first channels are guided; 3 is the published
    protocol, None guides all. The other channels keep each half's own output.
    """
    channels = out.shape[1] if channels is None else channels
    cond, uncond = out[:, :channels].chunk(2)
    guided = uncond + scale * (cond - uncond)
    return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


class GuidedNetwork(nn.Module):
    """A network with a config and ``forward(x, t, y)``, under classifier-free guidance.

    tokens_vary: whether its blocks meet another number of tokens at each training step.
    """

    tokens_vary = False

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, channels: int | None = 3) -> Tensor:
        """x: (2B, ...), of which the first half is used twice; y: B labels, then B null labels.

        channels: guide the first 3 (as published) or, with None, all channels; never the variance, which is no prediction of
        the noise. Returns (2B, C_out, S, S), guided in both halves. This is guidance as published, for callers of their own;
        the samplers' is :mod:`diffusion.guidance`, for any network and schedule.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        scale = self.guidance_scale(cfg_scale, t[: len(half)])
        return guide(out.float(), scale, self.config.in_channels if channels is None else channels)

    def guidance_scale(self, cfg_scale: float, t: Tensor) -> float | Tensor:
        """What each sample, at time t (B,), is guided by: a number, or (B, 1, 1, 1)."""
        return cfg_scale


def check_latents(x: Tensor, config) -> None:
    """Raises ValueError unless x is (B, C, S, S) with the config's in_channels and input_size."""
    expected = (config.in_channels, config.input_size, config.input_size)
    if x.shape[1:] != expected:
        raise ValueError(f"the model takes latents of shape {expected}, got {tuple(x.shape[1:])}")


def sizes_from_state(state: dict[str, Tensor], first_block: str = "blocks.0") -> dict[str, int | float | bool]:
    """Fields of a config that the embeddings, the output layer and the first block's MLP tell: width, input_size, patch_size,
    in_channels, num_classes, learn_sigma, mlp_ratio. Raises ValueError for missing or misshapen weights."""
    dimensions = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.bias": 1,
        f"{first_block}.mlp.fc1.bias": 1,
    }
    missing = [key for key in dimensions if key not in state]
    if missing:
        raise ValueError(f"its weights lack {', '.join(missing)}")
    shapes = {key: tuple(state[key].shape) for key in dimensions}
    for key, number in dimensions.items():
        if len(shapes[key]) != number:
            raise ValueError(f"{key} has the shape {shapes[key]}")
    width, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    return {
        "width": width,
        "input_size": math.isqrt(shapes["pos_embed"][1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": shapes["final_layer.linear.bias"][0] == 2 * in_channels * patch_size**2,
        "mlp_ratio": shapes[f"{first_block}.mlp.fc1.bias"][0] / width,
    }


def transformer_blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each transformer block: one compilation for each shape, since blocks of one shape share theirs."""
    # Stages, AMM, train and eval, and a smaller last batch each add a graph.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer_blocks(model):
        block.compile(dynamic=None if model.tokens_vary else False, fullgraph=True)


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing: a transformer block keeps only its inputs for backward, and is computed again there."""
    for block in transformer_blocks(model):
        block.recompute = block.attn.expands_inside = True  # a bias that is expanded outside would be one of the inputs


def init_weights(model: nn.Module, label_std: float = 0.02) -> None:
    """The DiT initialisation, for any model with x_embedder, t_embedder, y_embedder and final_layer.

    Linears are Xavier-uniform with zero bias, the patch convolution like a Linear, the label table N(0, label_std), the
    timestep MLP N(0, 0.02), and the final layer zero: the network starts by predicting 0. Blocks zero their own adaLN.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.x_embedder.proj.weight.shape[0], -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=label_std)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    for module in model.modules():
        if isinstance(module, Block):
            _zero(module.adaLN_modulation[1])
    _zero(model.final_layer.adaLN_modulation[1])
    _zero(model.final_layer.linear)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
