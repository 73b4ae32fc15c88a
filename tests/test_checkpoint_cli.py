"""python -m models.checkpoints: what a file holds, and the file that holds its weights with their config."""

import argparse
import dataclasses
import json
import runpy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models import create_model, load_checkpoint
from models.checkpoints import build_model, describe, read_checkpoint
from models.checkpoints.__main__ import main
from models.checkpoints.files import write_safetensors
from tests.shared import perturb

CODEC = {"name": "sd-vae-ft-ema", "scale": 0.18215, "image_size": 16}  # as the pixels' codec would say
NAMES = tuple(f"name {i}" for i in range(10))


def random_state(name, **settings):
    torch.manual_seed(0)
    model = perturb(create_model(name, **settings), 0.05)
    return model.state_dict(), model.config


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def ours(folder):
    """A checkpoint of training."""
    ema, config = random_state("SiT-Ti/2", mediator_num=4, mediator_layers=2)
    model = {key: value + 1 for key, value in ema.items()}
    objective = {"name": "transport", "path_type": "GVP", "prediction": "velocity"}
    stated = describe("SiT-Ti/2", config, codec=CODEC, class_names=NAMES, objective=objective)
    torch.save({"model": model, "ema": ema, "opt": {}, "args": {}, "step": 12, "config": stated}, folder / "ours.pt")
    return folder / "ours.pt"


def printed(capsys, *argv) -> dict[str, str]:
    """The lines of inspect, by their labels."""
    main(list(map(str, argv)))
    return {line[:15].strip(): line[15:].strip() for line in capsys.readouterr().out.splitlines()}


# inspect


def test_inspect_our_checkpoint(ours, capsys):
    found = printed(capsys, "inspect", ours)
    expected = {
        "file": str(ours),
        "kind": "PyTorch file with a config entry",
        "family": "SiT",
        "model": "SiT-Ti/2",
        "recognised by": "its config entry",
        "latents": "3 x 16 x 16",
        "image size": "16 pixels",
        "patch size": "2",
        "channels": "3 in, 3 out",
        "classes": "10",
        "depth": "4",
        "width": "96",
        "mediator num": "4",
        "mediator layers": "2",
        "weights": "ema, model",
        "step": "12",
        "objective": "transport, path_type GVP, prediction velocity",
        "codec": "sd-vae-ft-ema, scale 0.18215",
        "class names": "10",
    }
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("EDT-XL/2", {"depths": "6, 4, 4, 7, 7", "parameters": "698.52 M trained"}),
        ("MDTv2-S/2", {"decode layer": "4", "depth": "12"}),
    ],
)
def test_inspect_published_weights(folder, capsys, name, expected):
    """In a file whose tensors take no room: every number is the same one."""
    with torch.device("meta"):
        state = create_model(name).state_dict()
    state = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    torch.save(state, folder / "a.pt")
    found = printed(capsys, "inspect", folder / "a.pt")
    expected |= {
        "kind": "PyTorch file, bare state dict",
        "model": name,
        "recognised by": "keys and shapes",
        "latents": "4 x 32 x 32",
        "image size": "256 pixels, with a VAE of 8",
        "weights": "one set, unnamed",
        "step": "not stated",
        "objective": "gaussian",
        "codec": "not stated",
        "class names": "not stated",
    }
    assert {key: found.get(key) for key in expected} == expected


def test_inspect_shows_the_weights_that_are_there(folder, capsys):
    torch.save({"model": random_state("EDT-Ti/2")[0], "args": argparse.Namespace(lr=1)}, folder / "a.pt")
    found = printed(capsys, "inspect", folder / "a.pt")
    assert (found["weights"], found["kind"]) == ("model", "PyTorch file, training checkpoint")


def test_a_file_that_does_not_fit(folder, fails):
    state, _ = random_state("EDT-Ti/2")
    state["extra"] = torch.zeros(1)
    torch.save(state, folder / "a.pt")
    assert "a.pt does not fit the model: extra is not a weight of this model" in fails(main, "inspect", folder / "a.pt")
    out = folder / "out.safetensors"
    assert "extra is not a weight of this model" in fails(main, "convert", folder / "a.pt", out)
    assert not out.exists()
    assert "absent.pt does not exist" in fails(main, "inspect", folder / "absent.pt")
    torch.save(random_state("DiT-Ti/2", learn_sigma=False)[0], folder / "b.pt")
    assert "fit both DiT and SiT" in fails(main, "inspect", folder / "b.pt")
    assert "holds SiT-Ti/2, not SiT-S/2" in fails(main, "inspect", folder / "b.pt", "--model", "SiT-S/2")


# convert


@pytest.mark.parametrize("which", ["ema", "model"])
def test_round_trip(ours, folder, capsys, which):
    out = folder / "new" / "out.safetensors"
    main(["convert", str(ours), str(out), "--weights", which])
    before, after = read_checkpoint(ours, which), read_checkpoint(out, which)
    assert same(after.state, before.state)
    for field in ("model", "config", "codec", "class_names", "objective", "step"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.recognised_by == "its config entry"
    build_model(after, name="SiT-Ti/2")
    other = {"ema": "model", "model": "ema"}[which]
    with pytest.raises(ValueError, match=rf"out\.safetensors holds {which}, but no {other} weights"):
        load_checkpoint(out, other)
    assert [path.name for path in out.parent.iterdir()] == ["out.safetensors"]
    assert printed(capsys, "inspect", out)["kind"] == "safetensors with a config entry"
    again = folder / "again.safetensors"
    main(["convert", str(out), str(again), "--weights", which])
    assert same(load_checkpoint(again, which), before.state)


def test_header_is_readable_by_others(ours, folder):
    main(["convert", str(ours), str(folder / "out.safetensors")])
    with safe_open(folder / "out.safetensors", framework="numpy") as file:
        header = file.metadata()
        assert header["format"] == "pt"
        assert json.loads(header["config"])["model_config"]["mediator_num"] == 4
        assert set(file.keys()) == load_checkpoint(ours).keys()


@pytest.mark.parametrize(
    "name, settings", [("EDT-Ti/2", {"widths": (16, 24, 32, 24, 16)}), ("MDTv2-Ti/2", {"depth": 6}), ("SiT-Ti/2", {})]
)
def test_bare_weights_also_of_no_registered_size(folder, name, settings):
    """Of half precision, in part one memory, in part with gaps in it."""
    state, config = random_state(name, **settings)
    state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    both = torch.stack([state["t_embedder.mlp.0.bias"], state["t_embedder.mlp.2.bias"]], dim=1)
    state["t_embedder.mlp.0.bias"], state["t_embedder.mlp.2.bias"] = both.unbind(1)
    torch.save(state, folder / "a.pt")
    main(["convert", str(folder / "a.pt"), str(folder / "a.safetensors"), *(["--model", name] if not settings else [])])
    checkpoint = read_checkpoint(folder / "a.safetensors")
    assert (checkpoint.model, checkpoint.recognised_by) == (None if settings else name, "its config entry")
    assert checkpoint.config == dataclasses.replace(config, label_std=0.02)
    assert checkpoint.objective["name"] == ("transport" if name == "SiT-Ti/2" else "gaussian")
    assert same(checkpoint.state, state)
    assert checkpoint.state["pos_embed"].dtype == torch.float16


@pytest.mark.parametrize("flags", [[], ["--weights", "model"]])
def test_unnamed_weights(folder, capsys, flags):
    """--weights chooses among weights that have names: what comes out is read by default."""
    state, _ = random_state("EDT-Ti/2")
    torch.save(state, folder / "a.pt")
    main(["convert", str(folder / "a.pt"), str(folder / "a.safetensors"), *flags])
    assert "a.safetensors: unnamed weights of EDT-Ti/2" in capsys.readouterr().out
    assert same(load_checkpoint(folder / "a.safetensors"), state)


def test_a_codec_in_a_folder_is_not_named(folder, capsys):
    """The converted file is for other machines too."""
    state, config = random_state("EDT-Ti/2")
    codec = {"name": str(folder), "scale": 0.5, "image_size": 128}
    stated = describe("EDT-Ti/2", config, codec=codec, class_names=())
    torch.save({"ema": state, "config": stated}, folder / "a.pt")
    main(["convert", str(folder / "a.pt"), str(folder / "a.safetensors")])
    assert "give --vae when sampling it" in capsys.readouterr().out
    assert read_checkpoint(folder / "a.safetensors").codec == {"scale": 0.5, "image_size": 128}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64])
def test_tensors_of_any_layout_are_written(tmp_path, dtype):
    """Scalars, empty and transposed tensors, shared memory, odd sizes."""
    values = torch.arange(35).reshape(5, 7).to(dtype)
    state = {"b": values, "a": values.T, "c": values[::2, 1:], "d": torch.tensor(3).to(dtype), "e": values[:0]}
    state["odd"] = torch.ones(3, dtype=torch.float16)
    write_safetensors(state, tmp_path / "a.safetensors", which="ema", config={"model": "ü"}, step=3)
    found = load_file(tmp_path / "a.safetensors")
    assert same(found, state) and all(found[key].dtype == state[key].dtype for key in state)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "weights": "ema", "config": json.dumps({"model": "ü"}), "step": "3"}


def test_safetensors_of_another_name(ours, folder, capsys):
    """A file of the cache or of a hub may have any name."""
    main(["convert", str(ours), str(folder / "out.safetensors")])
    (folder / "out.safetensors").rename(folder / "blob")
    assert same(load_checkpoint(folder / "blob"), load_checkpoint(ours))
    assert printed(capsys, "inspect", folder / "blob")["kind"] == "safetensors with a config entry"
    ours.rename(folder / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"wrong\.safetensors is damaged or no checkpoint"):
        load_checkpoint(folder / "wrong.safetensors")


def test_convert_refusals(ours, folder, fails, capsys, monkeypatch):
    out = folder / "out.safetensors"
    out.write_bytes(b"old")
    for argv, message in [
        ([ours, out], "exists: choose another name, or replace it with --force"),
        ([ours, folder / "out.pt"], "out.pt must end in .safetensors"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *map(str, argv)])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert "holds SiT-Ti/2, not SiT-S/2" in fails(main, "convert", ours, out, "--force", "--model", "SiT-S/2")
    (folder / "dir.safetensors").mkdir()
    assert "dir.safetensors is a folder" in fails(main, "convert", ours, folder / "dir.safetensors")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoints.__main__.write_safetensors", full)
        assert "No space left on device; what was there before is unchanged" in fails(main, "convert", ours, out, "--force")
    assert out.read_bytes() == b"old"
    main(["convert", str(ours), str(out), "--force"])
    assert same(load_checkpoint(out), load_checkpoint(ours))
    assert sorted(path.name for path in folder.iterdir()) == ["dir.safetensors", "ours.pt", "out.safetensors"]


def test_another_programs_header_is_no_config(folder):
    from safetensors.torch import save_file

    state, _ = random_state("EDT-Ti/2")
    for i, header in enumerate([{"config": "[]", "weights": "ema"}, {"config": "{", "weights": "ema"}, {"config": "{}"}]):
        save_file(state, folder / f"{i}.safetensors", metadata=header)
        assert read_checkpoint(folder / f"{i}.safetensors").recognised_by == "keys and shapes"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_run_as_a_module(ours, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["models.checkpoints", "inspect", str(ours)])
    runpy.run_module("models.checkpoints", run_name="__main__")
    assert "SiT-Ti/2" in capsys.readouterr().out
