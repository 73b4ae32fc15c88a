"""One process of a measurement of benchmarks.scaling, under torchrun: the first prints the times as a line of JSON."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.networks import LEARNING_RATE, randomized, training_batch, training_step
from benchmarks.timing import synchronize
from models import create_model, model_names
from runtime import cli
from runtime.distributed import start_training


def parse(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--model", choices=model_names(), required=True)
    parser.add_argument("--batch-size", type=cli.positive_int, required=True, help="of each process")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=cli.positive_int, default=5)
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="of each process, on a CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    accelerator = start_training(args.precision)
    b, rank, processes = args.batch_size, accelerator.process_index, accelerator.num_processes
    network = randomized(create_model(args.model))
    batch = training_batch(network.config, b, masked=hasattr(network.config, "mask_places"))
    step = dataclasses.replace(
        training_step(network, b, accelerator), global_batch_size=b * processes, share=range(rank * b, (rank + 1) * b)
    )
    gradient = torch.zeros(sum(p.numel() for p in network.parameters() if p.requires_grad), device=accelerator.device)

    def exchange() -> None:
        if processes > 1:
            torch.distributed.all_reduce(gradient)

    times = {
        "step": _median_seconds(lambda: step(0, batch, LEARNING_RATE), args.repeats, accelerator),
        "exchange": _median_seconds(exchange, args.repeats, accelerator) if processes > 1 else 0.0,
        "gradient_bytes": gradient.numel() * gradient.element_size(),
    }
    if accelerator.is_main_process:
        print(json.dumps(times))


def _median_seconds(call: Callable[[], object], repeats: int, accelerator) -> float:
    """All processes begin together."""
    call()
    seconds = []
    for _ in range(repeats):
        accelerator.wait_for_everyone()
        synchronize(accelerator.device)
        began = time.perf_counter()
        call()
        synchronize(accelerator.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    cli.run(main)
