"""Checkpoint files: every published layout is read, every damaged or hostile one is refused with a message."""

import argparse
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from models import create_model, load_checkpoint
from models.amm import AMM
from models.checkpoints import Checkpoint, build_model, describe, load_weights, read_checkpoint, read_file, warm_start
from models.registry import model_config, resolve_amm

TINY = {"widths": (16, 24, 32, 24, 16), "num_heads": 2, "input_size": 16, "num_classes": 10}
CODEC = {"name": "sd-vae-ft-ema", "scale": 0.18215}


def tiny(name="EDT-S/2", **overrides):
    return create_model(name, **{**TINY, **overrides})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def weights():
    """Two state dicts of one model: the trained weights and their average."""
    torch.manual_seed(0)
    return tiny().state_dict(), tiny().state_dict()


def saved(content, path):
    torch.save(content, path)
    return path


# Layouts


def published(model, ema):
    args = argparse.Namespace(model="EDT-S/2", lr=1e-3, results_dir="results")
    return {"model": model, "ema": ema, "opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "args": args}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_published_training_checkpoint(tmp_path, weights, prefix, zipped):
    model, ema = ({prefix + key: value for key, value in state.items()} for state in weights)
    path = tmp_path / "0400000.pt"
    torch.save(published(model, ema), path, _use_new_zipfile_serialization=zipped)
    assert same(load_checkpoint(path), weights[1])
    assert same(load_checkpoint(path, "ema"), weights[1])
    assert same(load_checkpoint(path, "model"), weights[0])
    assert read_file(path)["args"].lr == 1e-3


@pytest.mark.parametrize("which", ["ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bare_state_dict(tmp_path, weights, suffix, prefix, which):
    state = {prefix + key: value for key, value in weights[0].items()}
    path = tmp_path / f"a{suffix}"
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same(load_checkpoint(path, which), weights[0])
    checkpoint = read_checkpoint(path, which)
    assert (checkpoint.model, checkpoint.codec, checkpoint.class_names, checkpoint.step) == (None, {}, (), None)
    assert same(build_model(checkpoint).state_dict(), weights[0])


def test_our_checkpoint(tmp_path, weights):
    """What the file states is used, also what keys and shapes do not tell: here stages of one width."""
    overrides = {"widths": (16,) * 5, "early_mask_block": 1, "label_std": 0.5}
    model = tiny(**overrides)
    config = describe("EDT-S/2", model.config, codec=CODEC, class_names=("cat", "dog"))
    path = saved({"ema": model.state_dict(), "model": model.state_dict(), "config": config, "step": 7}, tmp_path / "a.pt")
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == model.config
    assert (checkpoint.model, checkpoint.step, checkpoint.codec, checkpoint.class_names) == (
        "EDT-S/2",
        7,
        CODEC,
        ("cat", "dog"),
    )
    built = build_model(checkpoint, name="EDT-S/2", amm="exp:7")
    assert not built.training
    assert built.blocks[7].attn.amm == "exp"
    assert same(built.state_dict(), model.state_dict())


# SiT, and what a checkpoint was trained for

SIT = {"width": 16, "num_heads": 2, "input_size": 16, "num_classes": 10, "depth": 3}


def tiny_sit(**overrides):
    return create_model("SiT-S/2", **{**SIT, **overrides})


@pytest.mark.parametrize("mediator_layers", [2, None])
def test_published_mediator_checkpoint(tmp_path, mediator_layers):
    model = tiny_sit(mediator_num=4, mediator_layers=mediator_layers)
    args = argparse.Namespace(model="SiT-S/2", mediator_num=4, path_type="GVP", prediction="noise", train_eps=None, epochs=80)
    content = {"model": tiny_sit(mediator_num=4).state_dict(), "ema": model.state_dict(), "opt": {}, "args": args}
    checkpoint = read_checkpoint(saved(content, tmp_path / "a.pt"))
    assert (checkpoint.model, checkpoint.config) == (None, model.config)
    assert checkpoint.objective == {"name": "transport", "path_type": "GVP", "prediction": "noise", "train_eps": None}
    assert same(build_model(checkpoint).state_dict(), model.state_dict())


@pytest.mark.parametrize("settings", [{}, {"mediator_num": 4, "mediator_layers": 2, "keep_sigma": True}])
def test_our_sit_checkpoint(tmp_path, settings):
    """What the file states is used, also what keys and shapes do not tell: heads of plain attention, keep_sigma."""
    model = tiny_sit(**settings)
    objective = {"name": "transport", "path_type": "VP", "prediction": "score"}
    config = describe("SiT-S/2", model.config, codec=CODEC, class_names=(), objective=objective)
    checkpoint = read_checkpoint(saved({"ema": model.state_dict(), "config": config}, tmp_path / "a.pt"))
    assert (checkpoint.model, checkpoint.config, checkpoint.objective) == ("SiT-S/2", model.config, objective)
    assert same(build_model(checkpoint, name="SiT-S/2").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="holds SiT-S/2, not SiT-B/2"):
        build_model(checkpoint, name="SiT-B/2")
    with pytest.raises(ValueError, match="holds SiT-S/2, not EDT-S/2"):
        build_model(checkpoint, name="EDT-S/2")


def test_objective_that_a_file_states_or_implies(tmp_path, weights):
    config = describe("EDT-S/2", tiny().config, codec=CODEC, class_names=())
    assert config["objective"] == {"name": "gaussian"}
    old = {**config, "objective": "gaussian"}  # as files were written before transports
    silent = {key: value for key, value in config.items() if key != "objective"}
    files = [{"ema": weights[1], "config": stated} for stated in (config, old, silent)]
    for i, content in enumerate([*files, weights[0], published(*weights)]):
        assert read_checkpoint(saved(content, tmp_path / f"{i}.pt")).objective == {"name": "gaussian"}


# Building


def test_wrong_name(tmp_path, weights):
    checkpoint = read_checkpoint(saved(weights[0], tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"a\.pt holds a model of widths \(16, 24, 32, 24, 16\), not EDT-S/2"):
        build_model(checkpoint, name="EDT-S/2")
    with pytest.raises(ValueError, match="unknown model 'EDT-Q/2'"):
        build_model(checkpoint, name="EDT-Q/2")
    named = Checkpoint(path=checkpoint.path, state={}, model="EDT-S/2", config=model_config("EDT-S/2"))
    with pytest.raises(ValueError, match="holds EDT-S/2, not EDT-XL/2"):
        build_model(named, name="EDT-XL/2")


@pytest.mark.parametrize("cfg_scale, blocks", [(1.5, [7, 10]), (2.0, [8])])
def test_published_amm_is_chosen_by_guidance(tmp_path, weights, cfg_scale, blocks):
    config = describe("EDT-S/2", tiny().config, codec=CODEC, class_names=())
    checkpoint = read_checkpoint(saved({"ema": weights[1], "config": config}, tmp_path / "a.pt"))
    for amm, expected in [(True, blocks), (False, []), (None, []), (AMM(form="cos", blocks=(3,)), [3])]:
        model = build_model(checkpoint, amm=amm, cfg_scale=cfg_scale)
        assert [i for i, block in enumerate(model.blocks) if block.attn.amm] == expected


def test_amm_of_a_model_without_a_name(tmp_path, weights):
    with pytest.raises(ValueError, match="no AMM placement is published for this model"):
        build_model(read_checkpoint(saved(weights[0], tmp_path / "a.pt")), amm=True)
    with pytest.raises(ValueError, match="no AMM placement is published for this model"):
        resolve_amm(None, True)


def test_weights_that_do_not_fit(weights):
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = dict(weights[0], extra=torch.zeros(1))
    del state["final_layer.linear.bias"]
    state["x_embedder.proj.bias"] = torch.zeros(5)
    message = (
        r"a\.pt does not fit the model: final_layer\.linear\.bias is missing; extra is not a weight of this model; "
        r"x_embedder\.proj\.bias has shape \(5,\), the model's is \(16,\)$"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(model, state, "a.pt")
    assert same(model.state_dict(), before)
    with pytest.raises(ValueError, match=r", and \d+ more differences$"):
        load_weights(model, {}, "a.pt")
    load_weights(model, weights[0], "a.pt")
    assert same(model.state_dict(), weights[0])


@pytest.mark.parametrize("num_classes, kept", [(10, True), (3, False)])
def test_warm_start(tmp_path, weights, num_classes, kept):
    key = "y_embedder.embedding_table.weight"
    model = tiny(num_classes=num_classes)
    fresh = model.state_dict()[key].clone()
    checkpoint = read_checkpoint(saved({"ema": weights[1]}, tmp_path / "a.pt"))
    assert warm_start(model, checkpoint) is kept
    assert same(model.state_dict(), {**weights[1], key: weights[1][key] if kept else fresh})
    assert checkpoint.state.keys() == weights[1].keys()
    assert torch.equal(checkpoint.state[key], weights[1][key])


def test_warm_start_of_another_architecture(tmp_path, weights):
    checkpoint = read_checkpoint(saved({"ema": weights[1]}, tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"a\.pt does not fit the model: "):
        warm_start(tiny(depths=(2, 2, 2, 3, 4)), checkpoint)


# Files that are refused


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        load_checkpoint(tmp_path)


def test_missing_average(tmp_path, weights):
    path = saved({"model": weights[0]}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt holds model, but no ema weights: take the others with --weights model"):
        load_checkpoint(path)
    assert same(load_checkpoint(path, "model"), weights[0])
    with pytest.raises(ValueError, match="which must be one of"):
        load_checkpoint(path, "best")


@pytest.mark.parametrize("content", [{}, {"ema": {}}, {"step": 3, "args": argparse.Namespace()}, {"ema": {"a": 1}}])
def test_file_without_weights(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.pt holds no state dict"):
        load_checkpoint(saved(content, tmp_path / "a.pt"))


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)]])
def test_file_that_holds_no_dict(tmp_path, content):
    with pytest.raises(ValueError, match=f"holds a {type(content).__name__}, not a checkpoint"):
        load_checkpoint(saved(content, tmp_path / "a.pt"))


def damaged(path):
    return pytest.raises(ValueError, match=rf"{path.name} is damaged or no checkpoint")


@pytest.mark.parametrize("layout", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.0005, 0.03, 0.3, 0.9, 0.9999])
def test_truncated_file(tmp_path, weights, layout, share):
    """A zip file cut to a few hundred bytes was "[Errno 22] Invalid argument"."""
    path = tmp_path / ("a.safetensors" if layout == "safetensors" else "a.pt")
    if layout == "safetensors":
        safetensors.torch.save_file(weights[0], path)
    else:
        torch.save(published(*weights), path, _use_new_zipfile_serialization=layout == "zip")
    os.truncate(path, int(share * path.stat().st_size))
    with damaged(path):
        load_checkpoint(path)


NOISE = np.random.default_rng(0).bytes(4000)
NO_PICKLE = [b"a", b".", b"0", b"(", b"J12", b"\x80\x02.", b"s", b"hello world", b"<!DOCTYPE html><html></html>", NOISE]


@pytest.mark.parametrize("content", NO_PICKLE, ids=range(10))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_arbitrary_bytes(tmp_path, suffix, content):
    """torch's restricted unpickler raises IndexError, struct.error and AssertionError as well; and a file of noise is no file
    with code in it."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with damaged(path) as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # torch's advice


class Attack:
    """Unpickled without care, makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("layout", ["zip", "old", "pickle"])
@pytest.mark.parametrize("place", ["model", "args", "all"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, weights, layout, place):
    path, made = tmp_path / "a.pt", tmp_path / "made"
    content = Attack(made) if place == "all" else {**published(*weights), place: Attack(made)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(ValueError, match=r"a\.pt holds pickled objects other than tensors, which could run code: refused"):
        read_checkpoint(path)
    assert not made.exists()
    if layout == "pickle" and place == "all":  # the attack is a real one
        pickle.loads(path.read_bytes())
        assert made.exists()


def test_any_object_is_refused(tmp_path, weights):
    """Harmless classes too: none but argparse.Namespace is let in."""
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(saved({"ema": weights[0], "args": AMM(form="exp", blocks=(1,))}, tmp_path / "a.pt"))


# What a config entry says


def our_config(**changes):
    config = describe("EDT-S/2", tiny().config, codec=CODEC, class_names=("cat",))
    fields = {**config["model_config"], **changes.pop("fields", {})}
    return {**config, "model_config": fields, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_config": None}, "no model_config"),
        ({"fields": {"hidden": 3}}, "EDT-S/2 has no setting hidden"),
        ({"codec": ["pixels"]}, r"the codec \['pixels'\]"),
        ({"codec": {"name": 3}}, "the codec {'name': 3}"),
        ({"codec": {"name": "pixels", "scale": "1"}}, "the codec"),
        ({"class_names": [1, 2]}, "class_names that are no list of strings"),
        ({"class_names": "cat"}, "class_names that are no list of strings"),
        ({"objective": {"name": "flow"}}, "the objective {'name': 'flow'}; they are gaussian and transport"),
        ({"objective": ["gaussian"]}, "the objective"),
        ({"objective": {"name": []}}, "the objective"),
        ({"fields": {"patch_size": 2.0}}, "a model_config with patch_size 2.0"),
        ({"fields": {"num_classes": "10"}}, "a model_config that no model has"),
        ({"fields": {"num_classes": True}}, "a model_config with num_classes True"),
        ({"fields": {"mlp_ratio": float("inf")}}, "a model_config with mlp_ratio inf"),
        ({"fields": {"label_std": "x"}}, "a model_config with label_std 'x'"),
        ({"fields": {"depths": None}}, "a model_config that no model has"),
        ({"fields": {"depths": (10**9, 2, 2, 3, 3)}}, r"states 1000000010 blocks in its config entry, but holds only \d+"),
    ],
)
def test_config_entry_of_wrong_types(tmp_path, weights, changes, message):
    """They came out later, as errors of Python."""
    path = saved({"ema": weights[0], "config": our_config(**changes)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt.*{message}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"input_size": 8192}, r"position tables of latents 16 wide .* the model's are 8192 wide"),
        ({"num_classes": 10**12}, r"embedding_table\.weight has shape \(11, 16\), the model's is \(1000000000001, 16\)"),
        ({"num_classes": 10**18}, "a.pt: no network has the sizes that it states"),
    ],
)
def test_stated_sizes_take_no_memory(tmp_path, weights, fields, message):
    """A position table of hundreds of gigabytes was allocated first."""
    checkpoint = read_checkpoint(saved({"ema": weights[0], "config": our_config(fields=fields)}, tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=message):
        build_model(checkpoint)


def test_family_without_a_model(tmp_path, weights):
    config = our_config(family="EDT")
    del config["model"]
    checkpoint = read_checkpoint(saved({"ema": weights[0], "config": config}, tmp_path / "a.pt"))
    assert (checkpoint.model, checkpoint.config, checkpoint.codec) == (None, tiny().config, CODEC)


# Kinds of tensors


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "change, kind",
    [
        (lambda value: value.to_sparse(), "sparse float32"),
        (lambda value: value.to("meta"), "meta float32"),
        (lambda value: value.to(torch.complex64), "complex64"),
        (lambda value: value.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda value: value.to(torch.int8), "int8"),
        (lambda value: value > 0, "bool"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, weights, change, kind):
    state = dict(weights[0])
    state["final_layer.linear.bias"] = change(state["final_layer.linear.bias"])
    with pytest.raises(ValueError, match=rf"a\.pt: final_layer\.linear\.bias is {kind}; weights are dense"):
        read_checkpoint(saved({"ema": state}, tmp_path / "a.pt"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_precision_of_weights(weights, dtype):
    """Whole numbers were loaded as weights."""
    key, model = "final_layer.linear.bias", tiny()
    state = {**weights[0], key: torch.arange(32).to(dtype)}
    if dtype is torch.int64:
        with pytest.raises(ValueError, match=rf"{key} is int64, the model's is float32"):
            load_weights(model, state, "a.pt")
    else:
        load_weights(model, state, "a.pt")
        assert torch.equal(model.state_dict()[key], torch.arange(32).float())
