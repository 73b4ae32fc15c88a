"""Which network weights are of: from keys and shapes, and between DiT and SiT, whose keys are the same, by what names them."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import inference
from models import create_model, load_checkpoint
from models.checkpoints import build_model, describe, differences, load_weights, read_checkpoint
from models.checkpoints.__main__ import convert, main
from models.checkpoints.recognise import recognise
from models.edt import config_from_state
from models.macs import fresh_on_meta
from models.registry import FAMILIES, name_of
from sampling import calibrate_switch
from tests.shared import GOLDEN, perturb
from training.setup import start_weights

TINY = {"widths": (16, 24, 32, 24, 16), "num_heads": 2, "input_size": 16, "num_classes": 10}
PUBLISHED_KEYS = {
    row: keys
    for family in ("dit", "edt", "mdt", "sit")
    for row, keys in json.loads((GOLDEN / f"{family}_state_dict_keys.json").read_text()).items()
}


def tiny(name="EDT-S/2", **overrides):
    return create_model(name, **{**TINY, **overrides})


def saved(content, path):
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture
def folder(tmp_path_factory):
    """Whose name, other than a test's, names no network."""
    return tmp_path_factory.mktemp("files")


# Published weights


@pytest.mark.parametrize("row", PUBLISHED_KEYS)
def test_published_keys(row):
    """Every published state dict, at its size, is taken for what it is, and fits the network made for it."""
    name, _, mediators = row.partition(" mediators=")
    kinds = {True: torch.int64, False: torch.float32}
    state = {
        key: torch.empty(shape, device="meta", dtype=kinds[key.endswith("_index")])
        for key, shape in PUBLISHED_KEYS[row].items()
    }
    config, how = recognise(state, Path("a.pt"), model=name)
    assert name_of(config) == name
    assert getattr(config, "mediator_num", None) == (int(mediators) if mediators else None)
    assert (config.input_size, config.in_channels, config.num_classes, config.learn_sigma) == (32, 4, 1000, True)
    assert how == ("--model" if not mediators and name[:3] in ("DiT", "SiT") else "keys and shapes")
    assert not differences(fresh_on_meta(config).state_dict(), state)


@pytest.mark.parametrize("name, settings", [("SiT-B/4", {}), ("SiT-S/2", {"mediator_num": 16}), ("DiT-XL/8", {})])
def test_another_resolution(name, settings):
    """Has the registered name as well; the heads of plain attention come from the registered model."""
    with torch.device("meta"):
        model = create_model(name, **settings, input_size=64)
    config, _ = recognise(model.state_dict(), Path("a.pt"), model=name)
    assert (name_of(config), config) == (name, model.config)


# A DiT or a SiT


def trained(name, steps=2, **overrides):
    """As AdamW leaves it after a few steps on what it returns: a SiT returns the first half of the channels."""
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    size = model.config.input_size
    for _ in range(steps):
        x, y = torch.randn(2, model.config.in_channels, size, size), torch.tensor([1, 2])
        out = model(x, torch.rand(2), y)
        (out - torch.randn_like(out)).square().mean().backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def networks():
    return {name: trained(name) for name in ("DiT-Ti/2", "SiT-Ti/2")}


@pytest.mark.parametrize("name", ["DiT-Ti/2", "SiT-Ti/2"])
def test_weights_tell(folder, networks, name):
    checkpoint = read_checkpoint(saved(networks[name].state_dict(), folder / "a.pt"))
    assert checkpoint.model == name
    # Which standard deviation the label table began with is the one thing that weights do not tell.
    assert dataclasses.replace(checkpoint.config, label_std=1.0) == networks[name].config
    assert checkpoint.recognised_by == "its unused channels"
    assert checkpoint.objective == {"name": "gaussian" if name == "DiT-Ti/2" else "transport"}
    build_model(checkpoint, name=name)
    other = {"DiT-Ti/2": "SiT-Ti/2", "SiT-Ti/2": "DiT-Ti/2"}[name]
    with pytest.raises(ValueError, match=f"holds {name}, not {other}"):
        build_model(checkpoint, name=other)


@pytest.mark.parametrize("key", ["final_layer.linear.weight", "final_layer.linear.bias"])
@pytest.mark.parametrize("row", range(24))
def test_each_unused_row_tells(networks, row, key):
    """Rows are (2, 2, 6): of each pixel's six channels the last three are unused."""
    state = {**networks["SiT-Ti/2"].state_dict()}
    state[key] = state[key].clone()
    state[key][row] += 1e-6
    config, _ = recognise(state, Path("/x/y/a.pt"))
    assert name_of(config) == ("SiT-Ti/2" if row % 6 < 3 else "DiT-Ti/2")


@pytest.mark.parametrize("settings", [{"steps": 0}, {"learn_sigma": False}])
def test_nothing_tells(folder, settings):
    """Fresh weights are zero in all channels, and without learn_sigma there are no unused ones."""
    path = saved(trained("SiT-Ti/2", **settings).state_dict(), folder / "a.pt")
    message = r"a\.pt: its keys fit both DiT and SiT, and .*: say which with --model DiT-Ti/2 or --model SiT-Ti/2$"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)
    for name in ("DiT-Ti/2", "SiT-Ti/2"):
        checkpoint = read_checkpoint(path, model=name)
        assert (checkpoint.model, checkpoint.recognised_by) == (name, "--model")


def test_order_of_the_signs(folder, networks):
    """What the file states, the caller, the args, the weights: the first that tells."""
    sit, dit = networks["SiT-Ti/2"], networks["DiT-Ti/2"]
    state = {"ema": sit.state_dict()}
    args = argparse.Namespace(model="DiT-Ti/2", path_type="VP")
    config = describe("SiT-Ti/2", sit.config, codec={}, class_names=(), objective={"name": "transport"})

    def read(content, path, model=None):
        checkpoint = read_checkpoint(saved(content, folder / path), model=model)
        return type(checkpoint.config).__name__.removesuffix("Config"), checkpoint.recognised_by

    assert read({**state, "config": config, "args": args}, "dit.pt", "DiT-Ti/2") == ("SiT", "its config entry")
    assert read({"ema": dit.state_dict(), "args": args}, "dit.pt", "SiT-Ti/2") == ("SiT", "--model")
    assert read({**state, "args": args}, "sit.pt") == ("DiT", "its args")
    assert read({**state, "args": args}, "sit.pt", "EDT-S/2") == ("DiT", "its args")
    assert read({**state, "args": {"model": "DiT-Ti/2"}}, "sit.pt") == ("DiT", "its args")
    assert read(state, "edition/dit-or-sit.pt") == ("SiT", "its unused channels")
    assert read(state, "000-SiT/sit.pt") == ("SiT", "its unused channels")


def test_names_do_not_override_the_weights(folder, networks):
    """A SiT in a folder named after DiT was sampled as a DiT, to noise."""
    mend = "say which with --model DiT-Ti/2 or --model SiT-Ti/2"
    for name, path, message in [
        ("SiT-Ti/2", "000-SiT/DiT-XL-2-256x256.pt", r"is a DiT by its file name, a SiT by its unused channels"),
        ("DiT-Ti/2", "000-SiT-S-2/0400000.pt", r"is a SiT by its folder's name, a DiT by its unused channels"),
    ]:
        path = saved({"ema": networks[name].state_dict(), "args": argparse.Namespace(lr=1)}, folder / path)
        with pytest.raises(ValueError, match=f"{path.name} {message}: {mend}"):
            read_checkpoint(path)
        assert read_checkpoint(path, model=name).model == name
    fresh = create_model("SiT-Ti/2").state_dict()
    assert recognise(fresh, Path("/x/000-SiT-S-2/0400000.pt"))[1] == "its folder's name"


def test_mend_for_sizes_that_have_no_name():
    with torch.device("meta"):
        state = create_model("SiT-S/2", learn_sigma=False, width=128, num_heads=2).state_dict()
    with pytest.raises(ValueError, match=r"rename the file so that its own name says DiT or SiT$"):
        recognise(state, Path("/x/y/a.pt"))
    assert name_of(recognise(state, Path("/x/y/sit.pt"))[0]) is None


@pytest.mark.parametrize(
    "file_name, family",
    [("SIT_xl.pt", "SiT"), ("FastDiT.pt", "DiT"), ("my dit.pt", "DiT"), ("transition.pt", None), ("edit.pt", None)],
)
def test_names_of_files(file_name, family):
    with torch.device("meta"):
        state = create_model("SiT-S/2", learn_sigma=False).state_dict()
    if family is None:
        with pytest.raises(ValueError, match="fit both"):
            recognise(state, Path("/x/y") / file_name)
    else:
        config, how = recognise(state, Path("/x/y") / file_name)
        assert (FAMILIES[type(config)].network.__name__, how) == (family, "its file name")


def test_scripts_pass_the_name_on(folder, fails):
    """--model of sampling, of training and of switching decides where nothing else tells."""
    model = perturb(create_model("SiT-Ti/2", learn_sigma=False), 0.05)
    path = saved({"ema": model.state_dict()}, folder / "a.pt")
    out = folder / "grid.png"
    argv = ["--ckpt", path, "--vae", "pixels", "--classes", "1", "--num-sampling-steps", "3", "--out", out]
    assert "fit both DiT and SiT" in fails(inference.main, *argv)
    inference.main([*map(str, argv), "--model", "SiT-Ti/2"])
    assert out.is_file()

    fresh = create_model("SiT-Ti/2", learn_sigma=False)
    args = argparse.Namespace(init_from=str(path), model="SiT-Ti/2", mediator_num=None)
    start_weights(args, fresh, None, SimpleNamespace(facts={"name": "transport"}), required=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in fresh.state_dict().items())

    common = ["SDE", "--ckpts", path, path, "--budget-gmac", "1", "--num-sampling-steps", "8", "--num-samples", "1"]
    assert "fit both DiT and SiT" in fails(calibrate_switch.main, *common)
    assert "--budget-gmac 1.0 is out of reach" in fails(calibrate_switch.main, *common, "--model", "SiT-Ti/2")


@pytest.mark.parametrize(
    "held, asked, settings, message",
    [
        ("MDTv2-S/2", "MDTv2-S/2", {"decode_layer": 6}, r"--decode-layer 4: .*a\.pt has 6; give the same"),
        ("SiT-Ti/2", "SiT-Ti/2", {"mediator_num": 4}, r"--mediator-num \(none\): .*a\.pt has 4; give the same"),
        ("SiT-Ti/2", "SiT-Ti/2 M=4", {"mediator_num": 4, "mediator_layers": 2}, r"--mediator-layers 4: .*a\.pt has 2; give"),
        ("SiT-Ti/2", "SiT-Ti/2 M=4", {"mediator_num": 4, "mediator_layers": 4}, None),
        ("DiT-S/8", "DiT-S/4", {}, r"a\.pt holds DiT-S/8, not DiT-S/4"),
    ],
)
def test_a_warm_start_from_another_model(folder, held, asked, settings, message):
    """Ended with the differences of keys and shapes."""
    asked, _, number = asked.partition(" M=")
    fresh = create_model(asked, **({"mediator_num": int(number)} if number else {}))
    content = {"ema": create_model(held, **settings).state_dict(), "args": argparse.Namespace(model=held)}
    path = saved(content, folder / "a.pt")
    args = argparse.Namespace(init_from=str(path), model=asked)
    facts = SimpleNamespace(facts={"name": "gaussian"})
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        start_weights(args, fresh, None, facts, required=False)


def test_wrong_name_of_an_unnamed_sit(folder):
    model = create_model("SiT-Ti/2", width=16, num_heads=2, mediator_num=4)
    checkpoint = read_checkpoint(saved(model.state_dict(), folder / "a.pt"))
    assert (checkpoint.model, checkpoint.recognised_by) == (None, "keys and shapes")
    with pytest.raises(ValueError, match="holds a model of depth 4 and width 16 and patch_size 2, not SiT-S/2"):
        build_model(checkpoint, name="SiT-S/2")


def test_published_arguments_of_a_dit_are_no_transport(folder, networks):
    args = argparse.Namespace(model="DiT-Ti/2", path_type="VP")
    path = saved({"ema": networks["DiT-Ti/2"].state_dict(), "args": args}, folder / "a.pt")
    assert read_checkpoint(path).objective == {"name": "gaussian"}


@pytest.mark.parametrize("form", [dict, lambda **flags: argparse.Namespace(**flags)])
def test_published_arguments_of_a_sit(folder, networks, form):
    args = form(model="SiT-Ti/2", path_type="GVP", lr=1)
    path = saved({"ema": networks["SiT-Ti/2"].state_dict(), "args": args}, folder / "a.pt")
    assert read_checkpoint(path).objective == {"name": "transport", "path_type": "GVP"}


@pytest.mark.parametrize(
    "stated",
    [
        {"codec": 5, "class_names": 7, "objective": {"name": "flow"}},
        {"model": "resnet", "codec": {"name": "jpeg"}},
        {"family": ["EDT"], "class_names": ["cat"]},
        "EDT-S/2",
    ],
)
def test_another_programs_config_entry_says_nothing(folder, stated):
    checkpoint = read_checkpoint(saved({"ema": tiny().state_dict(), "config": stated}, folder / "a.pt"))
    assert (checkpoint.config, checkpoint.recognised_by) == (tiny().config, "keys and shapes")
    assert (checkpoint.codec, checkpoint.class_names, checkpoint.objective) == ({}, (), {"name": "gaussian"})


# EDT's stages


@pytest.mark.parametrize("depths", [(6, 4, 4, 7, 7), (6, 5, 4, 7, 6)])
@pytest.mark.parametrize("overrides", [{}, {**TINY, "early_mask_block": None}])
def test_both_published_depths_of_xl(depths, overrides):
    with torch.device("meta"):
        model = create_model("EDT-XL/2", **overrides, depths=depths)
    assert config_from_state(model.state_dict()) == model.config


def test_early_mask_of_an_xl_too_shallow_for_it():
    with torch.device("meta"):
        model = create_model("EDT-XL/2", depths=(4, 4, 4, 7, 7), early_mask_block=None)
    assert config_from_state(model.state_dict()) == model.config


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_classes": 1000},
        {"num_classes": 1},
        {"patch_size": 4},
        {"input_size": 32},
        {"input_size": 64, "patch_size": 4},
        {"in_channels": 3},
        {"learn_sigma": False},
        {"mlp_ratio": 2.0},
        {"num_heads": (2, 4, 8, 4, 2)},
        {"depths": (1, 2, 3, 4, 5)},
    ],
)
def test_config_is_inferred(overrides):
    model = tiny(**overrides)
    assert config_from_state(model.state_dict()) == model.config


def test_stages_that_cannot_be_told_apart(folder):
    path = saved(tiny(widths=(16,) * 5).state_dict(), folder / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: the blocks have 1 different widths in a row, an EDT has 5 stages"):
        read_checkpoint(path)


# Weights of no network


def test_weights_of_a_foreign_model(folder):
    state = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)).state_dict()
    path = saved({f"layer1.{key}": value for key, value in state.items()}, folder / "resnet.pt")
    assert len(load_checkpoint(path)) == len(state)
    with pytest.raises(
        ValueError, match=r"no model known here, as layer1.0.weight, layer1.0.bias, layer1.1.weight: the models are EDT"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("EDT-Ti/2", "x_embedder.proj.weight", None, "its weights lack x_embedder.proj.weight"),
        ("EDT-Ti/2", "blocks.0.attn.rel_pos_bias.relative_position_bias_table", None, "its weights lack the table"),
        ("EDT-Ti/2", "blocks.0.attn.rel_pos_bias.relative_position_bias_table", (5,), "a model like EDT, but .* other shapes"),
        ("EDT-Ti/2", "blocks.1.attn.qkv.weight", (), "a model like EDT, but .* other shapes"),
        ("MDTv2-Ti/2", "pos_embed", (3,), r"pos_embed has the shape \(3,\)"),
        ("MDTv2-Ti/2", "x_embedder.proj.weight", (0, 0, 0, 0), "a model like MDT, but .* other shapes"),
        ("DiT-Ti/2", "y_embedder.embedding_table.weight", (1, 96), "num_classes must be positive, got 0"),
        ("DiT-Ti/2", "x_embedder.proj.weight", (97, 3, 2, 2), "its weights do not tell the number of heads"),
    ],
)
def test_shapes_of_no_network(folder, name, key, value, message):
    """KeyErrors, IndexErrors and the like reached the user."""
    state = dict(create_model(name).state_dict())
    state.pop(key)
    if value is not None:
        state[key] = torch.zeros(value)
    with pytest.raises(ValueError, match=rf"a\.pt.*{message}"):
        read_checkpoint(saved(state, folder / "a.pt"), model=name)


def test_output_layer_of_another_size(folder, networks):
    state = {**networks["SiT-Ti/2"].state_dict(), "final_layer.linear.weight": torch.ones(23, 96)}
    checkpoint = read_checkpoint(saved(state, folder / "sit.pt"))
    with pytest.raises(ValueError, match=r"sit\.pt does not fit the model: final_layer\.linear\.weight has shape \(23, 96\)"):
        build_model(checkpoint)
    with pytest.raises(ValueError, match="fit both"):
        read_checkpoint(saved({**state, "final_layer.linear.bias": torch.zeros(24)}, folder / "a.pt"))


def test_an_index_buffer_of_other_values(folder):
    """They were loaded over the network's own, which reads its position table by them."""
    model = create_model("MDTv2-Ti/2")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, state, "a.pt")
    [key] = [key for key in state if key.startswith("de_blocks.1") and key.endswith("relative_position_index")]
    main(["convert", str(saved(state, folder / "a.pt")), str(folder / "good.safetensors")])
    state[key][0, 1] += 1
    with pytest.raises(ValueError, match=rf"b\.pt does not fit the model: {key} holds other values"):
        convert(argparse.Namespace(file=saved(state, folder / "b.pt"), out=None, weights="ema", model=None))
    with pytest.raises(ValueError, match=rf"a\.pt does not fit the model: {key} holds other values"):
        load_weights(model, state, "a.pt")
