"""The server that tests fork processes from. It has imported everything, so that a start costs no seconds."""

import multiprocessing

SCRIPTS = (
    "train_mask_adan",
    "extract_features",
    "sample_ddp",
    "attention_mediator.train",
    "attention_mediator.train_256to512",
    "attention_mediator.sample_ddp",
    "time_step_wise_adjusting.sample_ddp_three",
    "evaluations.evaluator",
    "evaluations.reference",
)
IMPORTED_LATE = ("matplotlib.figure", "torch.utils.tensorboard", "diffusers")  # by scripts, where they need them

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.kills", "tests.launch", *SCRIPTS, *IMPORTED_LATE])
