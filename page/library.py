"""The checkpoints of a page: read once, their networks kept ready."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.codec import Codec
from models.amm import AMM, default_amm
from models.checkpoints import Checkpoint, build_model, read_checkpoint
from models.macs import multiply_accumulates
from models.registry import build_network
from models.stepwise import StepwiseNetwork, SwitchPolicy
from page.settings import start_solver
from runtime.distributed import check_precision
from runtime.fetch import fetch
from sampling.alike import COMMON, require_common
from sampling.guidance_options import read_guidance
from sampling.options import find_codec, make_ready
from sampling.switching import SHARED

MAX_MODULATED = 8  # networks with AMM that are kept; they share the plain one's weights


@dataclass
class Work:
    """What the networks did since they were loaded: evaluations of an image, and their multiply-accumulates in 1e9."""

    evaluations: int = 0
    gmac: float = 0.0


class Library:
    """Checkpoints, numbered from 0 in the order given, and their networks on the device.

    args: the flags of :func:`page.settings.parse`. Raises ValueError for files that cannot be used, or of different
    classes, and for flags of a solver or guidance that do not fit the first.
    """

    def __init__(self, args: Namespace, device: torch.device):
        check_precision(args.precision, device)
        self.args, self.device, self.work = args, device, Work()
        self.checkpoints: list[Checkpoint] = []
        self.codecs: list[Codec] = []
        self._plain: list[nn.Module] = []
        self._modulated: dict[tuple[int, str], nn.Module] = {}
        for path in args.ckpt:
            self._add(read_checkpoint(fetch(path), args.weights, args.model))
        start_solver(args, self.checkpoints[0])
        read_guidance(args, self.checkpoints[0].objective)

    def _add(self, checkpoint: Checkpoint) -> None:
        same = {"num_classes": COMMON["num_classes"]}
        require_common((self.checkpoints or [checkpoint])[0], checkpoint, "the checkpoints of a page", same)
        network = self._ready(build_model(checkpoint, name=self.args.model))
        self._plain.append(network)
        self.codecs.append(self._codec(checkpoint))
        # The network holds the weights; and visitors, who read the path in messages, need not know the folder.
        self.checkpoints.append(replace(checkpoint, state={}, path=Path(checkpoint.path.name)))

    def _codec(self, checkpoint: Checkpoint) -> Codec:
        """One for all checkpoints that name the same."""
        asks = (checkpoint.codec.get("name"), checkpoint.codec.get("scale"), checkpoint.config.in_channels)
        for other, codec in zip(self.checkpoints, self.codecs, strict=True):
            if asks == (other.codec.get("name"), other.codec.get("scale"), other.config.in_channels):
                return codec
        return find_codec(self.args.vae, checkpoint, self.device)

    def _ready(self, network: nn.Module) -> nn.Module:
        """On the device, in its precision; it counts what it does, and has done so once, so that no picture's time holds the
        start-up of libraries."""
        network = make_ready(network.eval().to(self.device), self.args, varying_batch=True)
        forward, gmac = network.forward, multiply_accumulates(network.config) / 1e9

        def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.work.evaluations += len(x)
            self.work.gmac += len(x) * gmac
            return forward(x, t, y)

        network.forward = counted
        config = network.config
        with torch.inference_mode():
            for count in (1, 2):  # if compiled, of one image and of several
                noise = torch.zeros(count, config.in_channels, config.input_size, config.input_size, device=self.device)
                network(noise, torch.ones(count, device=self.device), noise.new_zeros(count, dtype=torch.long))
        return network

    @property
    def num_classes(self) -> int:
        return self.checkpoints[0].config.num_classes

    @property
    def class_names(self) -> list[str]:
        """By label; a number where no checkpoint has a name."""
        named = max((checkpoint.class_names for checkpoint in self.checkpoints), key=len)
        return [named[label] if label < len(named) else str(label) for label in range(self.num_classes)]

    def title(self, index: int) -> str:
        """Of a checkpoint, for people; no two are the same."""
        checkpoint = self.checkpoints[index]
        mediators = getattr(checkpoint.config, "mediator_num", None)
        parts = [checkpoint.model or type(checkpoint.config).__name__.removesuffix("Config")]
        parts += [f"{mediators} mediator{'s' * (mediators > 1)}"] if mediators else []
        parts += [f"step {checkpoint.step:,}"] if checkpoint.step is not None else []
        return f"{index + 1}: {', '.join(parts)}"

    def can_take_turns(self) -> bool:
        """Whether the checkpoints are fit for step-wise switching."""
        try:
            for other in self.checkpoints[1:]:
                require_common(self.checkpoints[0], other, "models that take turns", SHARED)
        except ValueError:
            return False
        return len(self.checkpoints) > 1 and self.checkpoints[0].objective["name"] == "transport"

    def placement(self, index: int, cfg_scale: float = 1.0) -> AMM | None:
        """Where AMM is published for the checkpoint's model; None: nowhere."""
        checkpoint = self.checkpoints[index]
        try:
            return default_amm(self.args.model or checkpoint.model or "", cfg_scale, checkpoint.config.input_size)
        except ValueError:
            return None

    def network(self, index: int, amm: AMM | None = None) -> nn.Module:
        """Raises ValueError for an AMM that the network cannot have."""
        if amm is None:
            return self._plain[index]
        key = (index, str(amm))
        if key not in self._modulated:
            network = build_network(self.checkpoints[index].config, amm)
            network.load_state_dict(self._plain[index].state_dict(), assign=True)
            network = self._ready(network)
            while len(self._modulated) >= MAX_MODULATED:
                self._modulated.pop(next(iter(self._modulated)))
            self._modulated[key] = network
        return self._modulated[key]

    def stepwise(self, ratios: Sequence[float], first_several_num: int) -> StepwiseNetwork:
        """All networks, taking turns. Raises ValueError for ratios that are none, or too many or few."""
        return StepwiseNetwork(self._plain, SwitchPolicy(ratios=tuple(ratios), first_several_num=first_several_num)).eval()
