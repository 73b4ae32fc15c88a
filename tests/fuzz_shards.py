"""Damaged sharded checkpoints: the bytes of a file, with checksums that tell or that do not, or an entry of the facts."""

from pathlib import Path
from unittest import mock

import torch
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from models import create_model
from models.checkpoints import describe
from runtime.files import file_sha256
from tests.fuzz_checkpoints import ODD_TENSORS, SMALL
from tests.fuzz_damage import ODD, damage, damages, set_entry
from tests.fuzzing import HERE
from training import shards

FOLDER = "runs/000-DiT-Ti-2/checkpoints/0000001"
WEIGHTS = {"pos_embed": (1, 16, 6), "blocks.0.attn.qkv.weight": (18, 6), "blocks.0.attn.qkv.bias": (18,)}


def make_shards(folder: Path) -> None:
    write_in_shards(folder / FOLDER)


def write_in_shards(path: Path) -> None:
    """What training with ``--fsdp`` would write after its first step: some small tensors of a DiT, in three files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.manual_seed(0)
        model, ema, *moments = (
            {name: distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for name, shape in WEIGHTS.items()} for _ in range(4)
        )
        state = {i: {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v} for i, (m, v) in _numbered(moments)}
        config = describe("DiT-Ti/2", create_model("DiT-Ti/2", **SMALL).config, codec={"name": "pixels"}, class_names=())
        facts = {
            "opt": {"state": state, "param_groups": [{"lr": 1e-4, "params": list(state)}]}, "sampler": {"name": "uniform"},
            "scaler": None, "sums": torch.zeros(6), "summed_steps": 0, "skipped": 0, "skipped_in_a_row": 0, "step": 1,
            "config": config, "args": {"model": "DiT-Ti/2", "seed": 0}, "data": {"num_images": 3, "image_size": 8},
        }  # fmt: skip
        with mock.patch.object(shards, "FILE_BYTES", 1200):
            shards.write({"model": model, "ema": ema, **facts}, path)
    finally:
        torch.distributed.destroy_process_group()


def _numbered(moments: list[dict]) -> enumerate:
    return enumerate(zip(*(moment.values() for moment in moments), strict=True))


READ_SHARDS = {
    "consolidate": ("training.consolidate", f"{HERE}/files/{FOLDER} {HERE}/new.pt"),
    "inspect": ("models.checkpoints.__main__", f"inspect {HERE}/files/{FOLDER}"),
    "resume": (
        "train_mask_adan",
        f"--resume {HERE}/files/{FOLDER} --model DiT-Ti/2 --dummy --vae pixels --image-size 8 --num-classes 3 --max-steps 2 "
        "--global-batch-size 2",
    ),
    "resume auto": (
        "train_mask_adan",
        f"--resume auto --results-dir {HERE}/files/runs --model DiT-Ti/2 --dummy --vae pixels --image-size 8 --num-classes 3 "
        "--max-steps 2 --global-batch-size 2",
    ),
}
ENTRIES = (
    ("step",), ("skipped",), ("args",), ("config",), ("config", "model"), ("data",), ("sampler",), ("opt",), ("opt", "state"),
    ("opt", "state", 0), ("opt", "state", 0, "exp_avg"), ("model",), ("model", "pos_embed"), ("ema",), ("sums",),
    ("files",), ("files", "../a"), ("files", "shard-00001-model-00001-of-00003.safetensors"), ("surplus",),
)  # fmt: skip


@st.composite
def shards_cases(draw_) -> dict:
    """read: "consolidate" in half of them, for it reads everything. file: the number of one. blind: its checksum is mended."""
    case = {"read": draw_(st.sampled_from((*READ_SHARDS, "consolidate", "consolidate")))}
    kind = draw_(st.sampled_from(("facts", "bytes", "bytes", "bytes", "missing")))
    if kind == "facts":
        return case | {"entry": draw_(st.sampled_from(ENTRIES)), "value": draw_(st.sampled_from((*ODD, *ODD_TENSORS)))}
    case |= {"file": draw_(st.integers(0, 3)), "blind": draw_(st.booleans())}
    return case | {"bytes": draw_(damages())} if kind == "bytes" else case


def spoil_shards(case: dict, folder: Path) -> None:
    place = folder / "files" / FOLDER
    facts = torch.load(place / "facts.pt", weights_only=True)
    if "entry" in case:
        set_entry(facts, case["entry"], ODD_TENSORS.get(str(case["value"]), case["value"]))
        return _replace_facts(facts, place)
    path = sorted(place.iterdir())[case["file"]]
    if "bytes" in case:
        damage(path, case["bytes"])
    else:
        path.unlink()
    if case["blind"] and path.suffix == ".safetensors":
        facts["files"] |= {path.name: file_sha256(path)} if path.exists() else {}
        if not path.exists():
            del facts["files"][path.name]
        _replace_facts(facts, place)


def _replace_facts(facts: dict, place: Path) -> None:
    (place / "facts.pt").unlink()  # linked to the template's
    torch.save(facts, place / "facts.pt")
