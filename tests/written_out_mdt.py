"""MDTv2 from its description, one sample and one head at a time, on nothing but a state dict: a reference for tests."""

import math

import torch
from torch import Tensor


class WrittenOut:
    """``predict`` is the network. state: its weights. amm: {block, counted from the first: matrix (N, N)}."""

    def __init__(self, state: dict[str, Tensor], num_heads: int, amm: dict[int, Tensor] | None = None):
        self.state, self.num_heads, self.amm = state, num_heads, amm or {}
        self.grid = math.isqrt(state["pos_embed"].shape[1])
        self.depths = [
            len({key.split(".")[1] for key in state if key.startswith(f"{group}.")})
            for group in ("en_inblocks", "en_outblocks", "de_blocks")
        ]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """As the network is called: the masked samples are the last."""
        tokens = [None] * len(x)
        if kept is not None:
            tokens[len(x) - len(kept[0]) :] = kept[0].tolist()
        return torch.stack([self.predict(*sample) for sample in zip(x, t, y, tokens, strict=True)])

    def predict(self, x: Tensor, t: Tensor, y: Tensor, kept: list[int] | None) -> Tensor:
        """One sample, x (C, S, S); kept: the tokens that the encoder sees."""
        goes_in, goes_out, decodes = self.depths
        c = self.condition(t, y)
        patches = self.patches(x) + self.state["pos_embed"][0]
        every = list(range(self.grid**2))
        tokens = every if kept is None else kept
        x, skips = patches[tokens], []
        for k in range(goes_in):
            x = self.block(f"en_inblocks.{k}", x, c, tokens, self.amm.get(k))
            skips.append(x)
        for k in range(goes_out):
            x = self.join(f"en_outblocks.{k}", x, skips[-1 - k])
            x = self.block(f"en_outblocks.{k}", x, c, tokens, self.amm.get(goes_in + k))
        if kept is not None:
            x = self.fill(x, kept, c)
        else:
            x = x + self.state["decoder_pos_embed"][0]
        for k in range(decodes):
            x = self.join(f"de_blocks.{k}", x, patches)
            x = self.block(f"de_blocks.{k}", x, c, every, self.amm.get(goes_in + goes_out + k))
        return self.last(x, c)

    def fill(self, x: Tensor, kept: list[int], c: Tensor) -> Tensor:
        """(K, D) of the kept tokens -> (N, D)."""
        rows = [x[kept.index(i)] if i in kept else self.state["mask_token"][0, 0] for i in range(self.grid**2)]
        filled = torch.stack(rows) + self.state["decoder_pos_embed"][0]
        predicted = self.block("sideblocks.0", filled, c, list(range(self.grid**2)), None)
        return torch.stack([filled[i] if i in kept else predicted[i] for i in range(self.grid**2)])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        # In float32, as published: of t up to 1000 that shows in the fifth digit.
        angles = t.float() * torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32))
        sinusoid = torch.cat([angles.cos(), angles.sin()]).to(self.state["pos_embed"].dtype)
        embedded = self.linear("t_embedder.mlp.2", silu(self.linear("t_embedder.mlp.0", sinusoid)))
        return embedded + self.state["y_embedder.embedding_table.weight"][y]

    def patches(self, x: Tensor) -> Tensor:
        kernel = self.state["x_embedder.proj.weight"]
        p = kernel.shape[-1]
        cuts = [
            x[:, row * p : row * p + p, column * p : column * p + p] for row in range(self.grid) for column in range(self.grid)
        ]
        return torch.stack([(kernel * cut).sum((1, 2, 3)) for cut in cuts]) + self.state["x_embedder.proj.bias"]

    def join(self, name: str, x: Tensor, skip: Tensor) -> Tensor:
        return self.linear(f"{name}.skip_linear", torch.cat([x, skip], dim=1))

    def block(self, name: str, x: Tensor, c: Tensor, tokens: list[int], matrix: Tensor | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.linear(f"{name}.adaLN_modulation.1", silu(c)).split(len(c))
        x = x + gate_a * self.attention(f"{name}.attn", norm(x) * (1 + scale_a) + shift_a, tokens, matrix)
        hidden = self.linear(f"{name}.mlp.fc1", norm(x) * (1 + scale_m) + shift_m)
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        return x + gate_m * self.linear(f"{name}.mlp.fc2", hidden)

    def attention(self, name: str, x: Tensor, tokens: list[int], matrix: Tensor | None) -> Tensor:
        width, size = x.shape[1], x.shape[1] // self.num_heads
        qkv, side = self.linear(f"{name}.qkv", x), 2 * self.grid - 1
        table = self.state[f"{name}.rel_pos_bias.relative_position_bias_table"]
        rows = [[self.offset(i, j, side) for j in tokens] for i in tokens]
        heads = []
        for head in range(self.num_heads):
            q, k, v = (qkv[:, start + head * size : start + head * size + size] for start in (0, width, 2 * width))
            weights = torch.exp(q @ k.T / math.sqrt(size) + table[:, head][torch.tensor(rows)])
            weights = weights / weights.sum(1, keepdim=True)
            heads.append((weights if matrix is None else weights * matrix) @ v)
        return self.linear(f"{name}.proj", torch.cat(heads, dim=1))

    def offset(self, i: int, j: int, side: int) -> int:
        down, right = i // self.grid - j // self.grid, i % self.grid - j % self.grid
        return (down + self.grid - 1) * side + right + self.grid - 1

    def last(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.linear("final_layer.adaLN_modulation.1", silu(c)).split(len(c))
        x = self.linear("final_layer.linear", norm(x) * (1 + scale) + shift)
        p = self.state["x_embedder.proj.weight"].shape[-1]
        tiles = [row.reshape(p, p, -1).permute(2, 0, 1) for row in x]  # (row, column, channel) -> (C, p, p)
        lines = [torch.cat(tiles[start : start + self.grid], dim=2) for start in range(0, len(tiles), self.grid)]
        return torch.cat(lines, dim=1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)
