"""``--fsdp``: weights, average, gradients and optimizer state in shards, one on each process (FSDP2; Zhao et al. 2023, "PyTorch
FSDP").

Each transformer block is gathered when it is needed; the rest of the network stays gathered through a step. A sharded tensor
is a DTensor: it has the shape of the whole, and ``to_local()`` is this process's part.
"""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.checkpoints.build import check_shapes
from models.layers import transformer_blocks
from runtime.distributed import working_dtype


class ShardedModel(nn.Module):
    """A network spread over all processes; called as accelerate's DDP is: computes in the run's precision, returns fp32.

    module: the network, whose parameters are now DTensors on the accelerator's device. It must be the same in every process.
    """

    def __init__(self, module: nn.Module, accelerator: Accelerator, precision: str):
        super().__init__()
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        # bf16: a block's weights are rounded before they are sent, as autocast would round them after.
        rounded = MixedPrecisionPolicy(working_dtype(precision), torch.float32, cast_forward_inputs=False)
        for block in transformer_blocks(module):
            block.attn.expands_inside = True  # elsewhere its tables are not gathered
            fully_shard(block, mesh=mesh, mp_policy=rounded)
        self.module = fully_shard(module, mesh=mesh)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes an output in place
        self._predict = convert_outputs_to_fp32(accelerator.autocast()(self.module.__call__))

    def forward(self, *args, **kwargs) -> Tensor:
        return self._predict(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """What is within adds to each process's own gradient; the next backward outside exchanges it all."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)


class ShardedEMA:
    """:class:`training.ema.EMA` of a sharded network: each process averages its part."""

    model = None  # no process has a network that could be sampled

    def __init__(self, source: nn.Module, decay: float):
        self.source, self._average = source, get_ema_multi_avg_fn(decay)
        self.averages = {name: parameter.detach().clone() for name, parameter in source.named_parameters()}
        trained = {name: parameter for name, parameter in source.named_parameters() if parameter.requires_grad}
        self._pairs = [self.averages[name] for name in trained], list(trained.values())

    @torch.no_grad()
    def update(self) -> None:
        self._average(*map(local, self._pairs), None)

    def state_dict(self) -> dict[str, Tensor]:
        return self.source.state_dict() | self.averages

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], path: str | os.PathLike) -> None:
        """state: whole tensors or sharded ones. Raises ValueError, naming ``path``, for weights that do not fit."""
        check_shapes(self.source, state, path)
        for name, average in self.averages.items():
            average.copy_(shard_like(state[name], average))


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor; all of one that is not sharded."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's, or a sharded sum's, value in every process, which all must ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_state_like(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state dict with whole tensors -> sharded as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value: object, like: DTensor) -> object:
        return shard_like(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    entries = {i: {key: shard(value, parameters[i]) for key, value in held.items()} for i, held in state["state"].items()}
    return {**state, "state": entries}


def shard_like(value: Tensor, like: DTensor) -> DTensor:
    """value: sharded already, or a whole tensor that every process has."""
    if isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
