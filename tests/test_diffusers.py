"""DiTs saved by diffusers: the same network under our keys, against diffusers' own model; what their folder says; refusals."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

import inference
from models import load_checkpoint
from models.checkpoints import build_model, read_checkpoint
from models.checkpoints.__main__ import main

diffusers = pytest.importorskip("diffusers")

SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 10}
NAMES = {str(i): f"name {i}" for i in range(10)}


def diffusers_dit(*, seed=0, scale=0.2, **settings):
    """A random network as published ones are: one embedder, of which every block has a copy. diffusers' sinusoid has other
    frequencies than DiT's (exponents over 127, not 128), which is undone here."""
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(**{**SIZES, "out_channels": 8, **settings}).eval()
    first = model.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first.state_dict())
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def save_pipeline(folder, model, vae=None, index=None):
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **(index or {})}))
    if vae:
        shutil.copytree(vae, folder / "vae")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tiny_vae):
    return save_pipeline(tmp_path_factory.mktemp("saved") / "tiny", diffusers_dit(), tiny_vae, {"id2label": NAMES})


def edited(pipeline, folder, **settings):
    """A copy with other settings in config.json; None removes one."""
    shutil.copytree(pipeline, folder)
    path = folder / "transformer" / "config.json"
    stated = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
    return folder


def rewritten(pipeline, folder, change):
    """A copy whose state dict went through ``change``."""
    shutil.copytree(pipeline, folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_size": 4},
        {"num_attention_heads": 4, "attention_head_dim": 4},
        {"sample_size": 16, "in_channels": 3, "out_channels": 3, "num_embeds_ada_norm": 5},
    ],
)
def test_outputs_are_diffusers_own(tmp_path, settings):
    theirs = diffusers_dit(**settings)
    theirs.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    ours, config = build_model(checkpoint), checkpoint.config
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size)
    t, y = torch.tensor([0, 371, 999]), torch.tensor([0, 1, config.num_classes])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        assert_close(ours(x, t, y), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5
    assert config.num_heads == theirs.config.num_attention_heads
    assert checkpoint.objective == {"name": "gaussian"}


def test_what_the_pipeline_says(pipeline, tiny_vae):
    checkpoint = read_checkpoint(pipeline)
    assert checkpoint.path == pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    assert checkpoint.codec == {"name": str((pipeline / "vae").resolve()), "scale": 0.18215}
    assert checkpoint.class_names == tuple(NAMES.values())
    assert checkpoint.recognised_by == "diffusers' keys"
    for place in (pipeline / "transformer", checkpoint.path):
        again = read_checkpoint(place)
        assert (again.config, again.codec, again.class_names) == (checkpoint.config, checkpoint.codec, checkpoint.class_names)
    state = load_checkpoint(pipeline)
    assert state.keys() == build_model(checkpoint).state_dict().keys()


def test_a_vae_of_another_scale(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.5}))
    assert read_checkpoint(folder).codec["scale"] == 0.5
    shutil.rmtree(folder / "vae")
    (folder / "model_index.json").unlink()
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.codec, checkpoint.class_names) == ({}, ())


def test_conversion_keeps_it_all(pipeline, tmp_path):
    """Also the heads, which the weights do not tell; not where this machine has the VAE."""
    main(["convert", str(pipeline), str(tmp_path / "a.safetensors")])
    before, after = read_checkpoint(pipeline), read_checkpoint(tmp_path / "a.safetensors")
    assert (after.model, after.config, after.codec) == (None, before.config, {"scale": before.codec["scale"]})
    assert (after.class_names, after.objective) == (before.class_names, before.objective)
    assert all(torch.equal(value, before.state[key]) for key, value in after.state.items())


def test_sampling(pipeline, tmp_path):
    out = tmp_path / "grid.png"
    inference.main(
        ["--ckpt", str(pipeline), "--classes", "1,3", "--per-class", "1", "--num-sampling-steps", "2", "--out", str(out)]
    )
    assert Image.open(out).size[0] >= 64


def test_a_file_without_its_settings(pipeline, tmp_path):
    """The heads are guessed as of any DiT, the resolution cannot be."""
    theirs = diffusers_dit(num_attention_heads=6, attention_head_dim=64, num_layers=1)
    state = dict(theirs.state_dict())
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"a\.safetensors: neither it nor a config.json beside it tells the resolution"):
        read_checkpoint(path)
    table = theirs.pos_embed.pos_embed
    safetensors.torch.save_file({**state, "pos_embed.pos_embed": table.contiguous()}, path)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.config.num_heads, checkpoint.config.input_size) == (6, 8)
    assert torch.equal(checkpoint.state["pos_embed"], table)


def test_copies_of_the_embedder_that_differ(pipeline, tmp_path):
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"

    def change(state):
        state[key][3] += 1e-3

    with pytest.raises(ValueError, match=rf"{key} differs from block 0's"):
        read_checkpoint(rewritten(pipeline, tmp_path / "copy", change))


@pytest.mark.parametrize(
    "key, message",
    [
        ("transformer_blocks.1.attn1.to_k.bias", r"lacks transformer_blocks\.1\.attn1\.to_k\.bias"),
        ("caption_projection.weight", r"holds caption_projection\.weight, which no DiT has"),
    ],
)
def test_keys_of_another_network(pipeline, tmp_path, key, message):
    def change(state):
        state[key] = torch.zeros(3)
        if "lacks" in message:
            del state[key]

    with pytest.raises(ValueError, match=message):
        read_checkpoint(rewritten(pipeline, tmp_path / "copy", change))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm_type": "ada_norm_single"}, "its config.json has norm_type ada_norm_single, a DiT has ada_norm_zero"),
        ({"activation_fn": "gelu"}, "its config.json has activation_fn gelu"),
        ({"num_layers": 4}, "its config.json says num_layers 4, its weights have 3"),
        ({"num_attention_heads": 4}, "its config.json says attention_head_dim 8, its weights have 4"),
        ({"num_attention_heads": "two"}, "weights or settings of another kind"),
        ({"num_attention_heads": None}, "its weights do not tell the number of heads"),
        ({"sample_size": 7}, "input_size must be divisible by the patch side 2, got 7"),
    ],
)
def test_settings_of_another_network(pipeline, tmp_path, settings, message):
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.safetensors.*{message}"):
        read_checkpoint(edited(pipeline, tmp_path / "copy", **settings))


def test_misshapen_weights(pipeline, tmp_path):
    def change(state):
        state["pos_embed.proj.weight"] = torch.zeros(3)

    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: "):
        read_checkpoint(rewritten(pipeline, tmp_path / "copy", change))


def test_damaged_settings(pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        read_checkpoint(folder)


def test_pickled_weights(pipeline, tmp_path):
    """As older repositories hold them."""
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(file), file.with_suffix(".bin"))
    assert read_checkpoint(folder).path == file
    file.unlink()
    checkpoint, expected = read_checkpoint(folder), read_checkpoint(pipeline)
    assert (checkpoint.path, checkpoint.config) == (file.with_suffix(".bin"), expected.config)
    assert all(torch.equal(value, expected.state[key]) for key, value in checkpoint.state.items())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.json"])
def test_other_weight_files(pipeline, tmp_path, name):
    folder = shutil.copytree(pipeline, tmp_path / "copy")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name(name))
    for place in (folder, folder / "transformer"):
        with pytest.raises(ValueError, match=rf"transformer holds {name}, not diffusion_pytorch_model\.safetensors"):
            read_checkpoint(place)
    file.with_name(name).unlink()
    with pytest.raises(ValueError, match=r"transformer holds no weights"):
        read_checkpoint(folder)
