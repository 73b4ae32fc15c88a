"""Moving a SiT checkpoint to another resolution, against SciPy's interpolation."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d

from models import create_model
from models.checkpoints import Checkpoint, load_weights, warm_start
from models.layers import sincos_table
from models.resolution import change_resolution
from tests.test_sit import random_model

AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
NAME, SETTINGS = "SiT-S/2", {"width": 16, "num_heads": 2, "num_classes": 10, "depth": 3}


@pytest.mark.parametrize("settings", [{}, {"mediator_num": 4}, {"mediator_num": 9, "mediator_layers": 2}])
@pytest.mark.parametrize("input_size", [32, 64, 18, 12])
def test_tables_are_resized_and_the_rest_is_kept(settings, input_size):
    model = random_model(**settings)
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    new_state, new_config, report = change_resolution(state, model.config, input_size)
    larger = create_model(NAME, **SETTINGS, **settings, input_size=input_size)
    larger.load_state_dict(new_state)
    assert new_config == larger.config
    n = input_size // 2
    assert torch.equal(new_state["pos_embed"], sincos_table(16, n))
    resized = 0
    for key, value in before.items():
        assert torch.equal(state[key], value)  # the old state is not touched
        axis = AXES.get(key.split(".")[-1])
        if axis is not None:
            line = interp1d(np.linspace(0, 1, 8), value.double().numpy(), axis=axis)
            np.testing.assert_allclose(new_state[key], line(np.linspace(0, 1, n)), rtol=0, atol=1e-6)
            resized += 1
        elif key != "pos_embed":
            assert torch.equal(new_state[key], value)
    assert resized == 4 * model.config.mediator_depth
    assert len(report) == (5 if settings else 1)


def test_report():
    model = random_model(mediator_num=4)
    _, _, report = change_resolution(model.state_dict(), model.config, 32)
    assert report[0] == "pos_embed: (1, 64, 16) -> (1, 256, 16), computed anew"
    expected = "blocks.*.attn.ah_bias: 3 of (1, 2, 4, 8, 1) -> (1, 2, 4, 16, 1), resized linearly, end points kept"
    assert report[1] == expected


@pytest.mark.parametrize("settings", [{}, {"mediator_num": 4}])
def test_the_same_size_changes_nothing(settings):
    model = random_model(**settings)
    state = model.state_dict()
    new_state, new_config, report = change_resolution(state, model.config, 16)
    assert (new_config, report) == (model.config, [])
    assert new_state.keys() == state.keys()
    assert all(torch.equal(new_state[key], state[key]) for key in state)


def test_precision_is_kept():
    model = random_model(mediator_num=4).double()
    new_state, _, _ = change_resolution(model.state_dict(), model.config, 32)
    assert {value.dtype for value in new_state.values()} == {torch.float64}


def test_two_steps_up_keep_the_ends():
    """256 -> 512 -> 1024 as the published scripts go."""
    model = random_model(mediator_num=4)
    state, config, _ = change_resolution(model.state_dict(), model.config, 32)
    state, config, _ = change_resolution(state, config, 64)
    for key, value in model.state_dict().items():
        axis = AXES.get(key.split(".")[-1])
        if axis is not None:
            ends = torch.tensor([0, value.shape[axis] - 1]), torch.tensor([0, config.grid - 1])
            torch.testing.assert_close(state[key].index_select(axis, ends[1]), value.index_select(axis, ends[0]))


def test_mistakes():
    model = random_model(mediator_num=16)
    state, config = model.state_dict(), model.config
    with pytest.raises(ValueError, match="input_size must be divisible by the patch side 2, got 33"):
        change_resolution(state, config, 33)
    with pytest.raises(ValueError, match="mediator_num must be a square number, at most 3"):
        change_resolution(state, config, 6)
    with pytest.raises(ValueError, match=r"does not fit its config: pos_embed has shape \(1, 256, 16\), the model's is"):
        change_resolution(change_resolution(state, config, 32)[0], config, 64)
    with pytest.raises(ValueError, match=r"does not fit its config: blocks\.1\.attn\.wa_bias is missing"):
        change_resolution({key: value for key, value in state.items() if key != "blocks.1.attn.wa_bias"}, config, 32)
    edt = create_model("EDT-Ti/2")
    with pytest.raises(ValueError, match="only a SiT can change its resolution, this is EDT"):
        change_resolution(edt.state_dict(), edt.config, 32)


def checkpoint_of(model):
    return Checkpoint(path=Path("a.pt"), state=model.state_dict(), model=None, config=model.config)


@pytest.mark.parametrize("settings", [{}, {"mediator_num": 4}])
def test_loading_at_another_resolution_names_the_mend(settings):
    """It was a list of tables whose shapes differ."""
    checkpoint = checkpoint_of(random_model(**settings))
    larger = random_model(**settings, input_size=32)
    message = (
        r"a\.pt holds the position tables of latents 16 wide \(with a VAE of 8: 128-pixel images\), the model's are 32 wide "
        r"\(256 pixels\): .* attention_mediator/train_256to512\.py or train_512to1024\.py \(--resume-ckpt-low-resolution\)"
    )
    with pytest.raises(ValueError, match=message):
        warm_start(larger, checkpoint)
    with pytest.raises(ValueError, match=message):
        load_weights(larger, checkpoint.state, checkpoint.path)
    state, config, _ = change_resolution(checkpoint.state, checkpoint.config, 32)
    assert warm_start(larger, dataclasses.replace(checkpoint, state=state, config=config))
    assert all(torch.equal(larger.state_dict()[key], state[key]) for key in state)


def test_an_edt_stays_at_its_resolution():
    checkpoint = checkpoint_of(create_model("EDT-Ti/2"))
    with pytest.raises(ValueError, match=r"latents 16 wide .* the model's are 32 wide .*: train at the checkpoint's size"):
        warm_start(create_model("EDT-Ti/2", input_size=32), checkpoint)
