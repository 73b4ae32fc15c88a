"""Damaged checkpoints: one small network in every format, its bytes or its entries changed."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from hypothesis import strategies as st

from models import create_model
from models.checkpoints import describe
from models.checkpoints.__main__ import main as convert_main
from tests.fuzz_damage import ODD, damage, damages, set_entry, set_json
from tests.fuzz_images import make_images
from tests.fuzzing import HERE
from tests.shared import perturb

ODD_TENSORS = {
    "scalar": torch.tensor(1.0),
    "nothing": torch.zeros(0),
    "long": torch.zeros(3, dtype=torch.int64),
    "complex": torch.zeros(2, 2, dtype=torch.complex64),
    "half": torch.zeros(4, 4, dtype=torch.float16),
    "nan": torch.full((2, 2), float("nan")),
    "deep": torch.zeros(1, 1, 1, 1, 1, 1),
    "sparse": torch.eye(3).to_sparse(),
    "expanded": torch.zeros(1).expand(10**6, 10**6),
    "bytes": torch.zeros(2, dtype=torch.uint8),
}
SMALL = {"input_size": 8, "in_channels": 3, "num_classes": 3}


def make_checkpoints(folder: Path) -> None:
    """The same DiT in every format, and the pipeline's folder that diffusers would write around one."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = perturb(create_model("DiT-Ti/2", **SMALL), 0.05)
    state = model.state_dict()
    codec = {"name": "pixels", "scale": 1.0, "image_size": 8}
    config = describe("DiT-Ti/2", model.config, codec=codec, class_names=("a", "b", "c"))
    ours = {"model": state, "ema": state, "config": config, "step": 3, "args": {"model": "DiT-Ti/2", "seed": 0}}
    torch.save(ours, folder / "zip.pt")
    torch.save(ours, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"ema": state, "args": argparse.Namespace(model="DiT-Ti/2")}, folder / "published.pt")
    torch.save(state, folder / "dit-bare.pt")
    convert_main(["convert", str(folder / "zip.pt"), str(folder / "st.safetensors")])
    _save_pipeline(folder / "pipeline")
    make_images(folder / "images")


def _save_pipeline(folder: Path) -> None:
    from tests.test_diffusers import NAMES, diffusers_dit, save_pipeline

    save_pipeline(folder, diffusers_dit(), index={"id2label": NAMES})
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, sample_size=16)
    vae.save_pretrained(folder / "vae")


CHECKPOINTS = ("zip.pt", "legacy.pt", "published.pt", "dit-bare.pt", "st.safetensors", "pipeline")
PIPELINE_FILES = (
    "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "model_index.json", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip
READ_CHECKPOINT = {
    "inspect": ("models.checkpoints.__main__", f"inspect {HERE}/files/NAME"),
    "convert": ("models.checkpoints.__main__", f"convert {HERE}/files/NAME {HERE}/new.safetensors"),
    "infer": (
        "inference",
        f"--ckpt {HERE}/files/NAME --vae pixels --classes 0 --per-class 1 --num-sampling-steps 2 --out {HERE}/new.png",
    ),
    "encode": (
        "extract_features",
        f"--data-path {HERE}/files/images --vae {HERE}/files/pipeline/vae --features-path {HERE}/new --image-size 8 "
        "--num-workers 0",
    ),
    "start": (
        "train_mask_adan",
        f"--init-from {HERE}/files/NAME --model DiT-Ti/2 --dummy --vae pixels --image-size 8 --num-classes 3 --max-steps 1 "
        f"--global-batch-size 2 --results-dir {HERE}/new",
    ),
}
TENSORS = (
    "pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight",
    "blocks.7.attn.qkv.weight", "final_layer.linear.bias", "t_embedder.mlp.0.weight", "surplus",
)  # fmt: skip
FIELDS = (
    "depth",
    "width",
    "num_heads",
    "input_size",
    "num_classes",
    "patch_size",
    "in_channels",
    "mlp_ratio",
    "learn_sigma",
    "surplus",
)
ENTRIES = (
    ("step",), ("args",), ("args", "model"), ("ema",), ("model",), ("config",), ("config", "model"), ("config", "family"),
    ("config", "model_config"), ("config", "codec"), ("config", "codec", "name"), ("config", "codec", "scale"),
    ("config", "codec", "image_size"), ("config", "class_names"), ("config", "objective"), ("config", "objective", "name"),
    *(("config", "model_config", name) for name in FIELDS),
    *(("ema", name) for name in TENSORS),
)  # fmt: skip
SETTINGS = {
    "transformer/config.json": (
        "num_attention_heads", "attention_head_dim", "num_layers", "sample_size", "num_embeds_ada_norm", "norm_type",
        "out_channels",
    ),
    "model_index.json": ("id2label", "_class_name"),
    "vae/config.json": (
        "scaling_factor", "_class_name", "latent_channels", "in_channels", "block_out_channels", "shift_factor", "act_fn",
    ),
}  # fmt: skip


@st.composite
def checkpoint_cases(draw_) -> dict:
    name = draw_(st.sampled_from(CHECKPOINTS))
    case = {"name": name, "read": draw_(st.sampled_from(("inspect", "convert", "infer", "start")))}
    if name == "pipeline":
        file = draw_(st.sampled_from(PIPELINE_FILES))
        case["read"] = "encode" if file.startswith("vae/") and draw_(st.booleans()) else case["read"]
        if file in SETTINGS and draw_(st.booleans()):
            return case | {
                "file": file,
                "json": (draw_(st.sampled_from(SETTINGS[file])),),
                "value": draw_(st.sampled_from(ODD)),
            }
        return case | {"file": file, "bytes": draw_(damages())}
    if name == "zip.pt" and draw_(st.booleans()):
        entry = draw_(st.sampled_from(ENTRIES))
        return case | {"entry": entry, "value": draw_(st.sampled_from((*ODD, *ODD_TENSORS)))}
    return case | {"bytes": draw_(damages())}


def spoil_checkpoint(case: dict, folder: Path) -> None:
    path = folder / "files" / case["name"]
    if "entry" in case:
        content = torch.load(path, weights_only=True)
        set_entry(content, case["entry"], ODD_TENSORS.get(str(case["value"]), case["value"]))
        path.unlink()
        torch.save(content, path)
    elif "json" in case:
        set_json(path / case["file"], case["json"], case["value"])
    else:
        damage(path / case["file"] if "file" in case else path, case["bytes"])
