"""How the model lies on the processes: whole in each of them, or in shards (``--fsdp``)."""

from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from models.layers import compile_blocks, recompute_blocks
from runtime.distributed import together
from training.checkpoint import checkpoint_path, make_latest, save_checkpoint
from training.ema import EMA
from training.optim import create_optimizer
from training.sharding import ShardedEMA, ShardedModel, shard_state_like
from training.shards import is_sharded, read_into, write


class Replicated:
    """The whole in every process: DistributedDataParallel, or one process alone.

    network: as its builder made it, on any device. model: what is called for a training step. Both, ema and optimizer belong
    together.
    """

    def __init__(self, args: Namespace, network: nn.Module, accelerator: Accelerator):
        self.network, self.accelerator = network, accelerator
        self.ema = EMA(network.to(accelerator.device), args.ema_decay)
        _adapt_blocks(args, network)
        compile_with = self.ema if args.compile else None
        optimizer = create_optimizer(args.optimizer, network.parameters(), args.init_lr, args.weight_decay, compile_with)
        self.model, self.optimizer = accelerator.prepare(network.train(), optimizer)

    def load(self, state: dict, path: Path) -> dict:
        """state: of the checkpoint at ``path``, with the network's weights loaded already. Loads the average's, and returns a
        state whose rest fits here. Raises ValueError for weights that do not fit."""
        self.ema.load(state["ema"], path)
        return state

    def save(self, state: dict, run_folder: Path, step: int, keep: int) -> None:
        """Called by all processes; see :func:`training.checkpoint.save_checkpoint`."""
        if self.accelerator.is_main_process:
            save_checkpoint(state, run_folder, step, keep)


class Sharded:
    """A part in every process; as :class:`Replicated` otherwise."""

    def __init__(self, args: Namespace, network: nn.Module, accelerator: Accelerator):
        self.network, self.accelerator = network, accelerator
        _adapt_blocks(args, network)
        self.model = ShardedModel(network.train(), accelerator, args.precision)
        self.ema = ShardedEMA(network, args.ema_decay)
        self.optimizer = create_optimizer(args.optimizer, network.parameters(), args.init_lr, args.weight_decay)

    def load(self, state: dict, path: Path) -> dict:
        """As above; of a sharded checkpoint, also loads the network's weights."""
        if is_sharded(path):
            return read_into(path, state, self.network.state_dict(), self.ema.state_dict(), self.optimizer)
        self.ema.load(state["ema"], path)
        return {**state, "opt": shard_state_like(state["opt"], self.optimizer)}

    def save(self, state: dict, run_folder: Path, step: int, keep: int) -> None:
        """As above; the checkpoint is a folder that every process writes into."""
        path = checkpoint_path(run_folder, step, sharded=True)
        write(state, path)
        with together():
            if self.accelerator.is_main_process:
                make_latest(path, keep)


def _adapt_blocks(args: Namespace, network: nn.Module) -> None:
    if args.gradient_checkpointing:
        recompute_blocks(network)
    if args.compile:
        compile_blocks(network)
