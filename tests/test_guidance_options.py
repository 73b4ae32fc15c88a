"""The flags of guidance: what they build, what they refuse, and guided images from the scripts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import sample_ddp
from diffusion import create_diffusion
from models import create_model
from models.checkpoints import build_model, describe, read_checkpoint
from runtime import cli
from runtime.draws import Purpose, normals
from sampling import calibrate_switch
from sampling.generate import Guidance
from sampling.guidance_options import read_guidance
from sampling.options import add_sampling_arguments
from tests.shared import grey_levels, perturb
from time_step_wise_adjusting import sample_ddp_three

GAUSSIAN, TRANSPORT = {"name": "gaussian"}, {"name": "transport", "path_type": "Linear", "prediction": "velocity"}
PIXELS = {"name": "pixels", "scale": 1.0, "image_size": 16}
SETTINGS = {"DiT-Ti/2": {"depth": 2}, "SiT-Ti/2": {"depth": 2}, "MDTv2-Ti/2": {}, "EDT-Ti/2": {}}


def save(path: Path, name: str, *, objective=GAUSSIAN, codec=PIXELS, seed=0, ema_seed=None, **settings) -> Path:
    """A checkpoint of random weights; ema_seed: of the EMA, where it differs."""
    states = []
    for each in (seed, seed if ema_seed is None else ema_seed):
        torch.manual_seed(each)
        model = perturb(create_model(name, **{**SETTINGS[name], **settings}), 0.05)
        states.append(model.state_dict())
    config = describe(name, model.config, codec=codec, class_names=(), objective=objective)
    torch.save({"model": states[0], "ema": states[1], "config": config, "step": 1}, path)
    return path


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("dit") / "dit.pt", "DiT-Ti/2")


@pytest.fixture(scope="module")
def guide(tmp_path_factory) -> Path:
    """Narrower, of another family; model and EMA differ."""
    return save(tmp_path_factory.mktemp("guide") / "guide.pt", "EDT-Ti/2", seed=7, ema_seed=8)


@pytest.fixture(scope="module")
def sit(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("sit") / "sit.pt", "SiT-Ti/2", objective=TRANSPORT)


def sample(checkpoint: Path, folder: Path, *extra: str) -> np.ndarray:
    sample_ddp.main(argv(checkpoint, folder, *extra))
    return np.load(folder / "samples_3x16x16x3.npz")["arr_0"]


def argv(checkpoint: Path, folder: Path, *extra: str) -> list[str]:
    return [
        "--ckpt", str(checkpoint), "--sample-dir", str(folder), "--num-fid-samples", "3", "--num-sampling-steps", "4",
        "--labels", "balanced", "--per-proc-batch-size", "2", "--no-png", *extra,
    ]  # fmt: skip


def settings(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


# What the flags say


def parse(*argv: str):
    parser = cli.ArgumentParser("x")
    add_sampling_arguments(parser, ckpt=False)
    return parser.parse_args(list(argv))


def read(*argv: str, objective=GAUSSIAN) -> Guidance:
    return read_guidance(parse(*argv), objective)


def test_the_flags():
    assert read() == Guidance(1.0, 3, None, None, None)
    given = read("--guidance-interval", "0.2,0.8", "--cfg_scale=3", "--cfg-power", "2", "--cfg-channels", "all")
    assert given == Guidance(3.0, None, (0.2, 0.8), 2.0, None)
    assert read("--cfg-scale", "3", "--cfg-power", "0").power == 0


def test_a_transport_has_no_published_power():
    """MDTv2's is of Gaussian diffusion's noise; one that is asked for holds."""
    assert read("--cfg-scale", "3", objective=TRANSPORT).power == 0
    assert read("--cfg-scale", "3", "--cfg-power", "2", objective=TRANSPORT).power == 2


def test_autoguidance_guides_all_channels_unless_told_otherwise():
    args = ("--cfg-scale", "3", "--guide-ckpt", "a.pt")
    assert read(*args).channels is None
    assert read(*args, "--cfg-channels", "3").channels == 3
    assert read("--cfg-scale", "3").channels == 3


@pytest.mark.parametrize("text", ["0.5", "0.8,0.2", "0.5,0.5", "a,b", "0.1,0.2,0.3", "0,1.5", "nan,1", ""])
def test_a_flag_that_is_no_interval(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--guidance-interval", text)
    assert exit_.value.code == 2
    assert "--guidance-interval" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x"])
def test_a_flag_that_is_no_power(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(f"--cfg-power={text}")
    assert exit_.value.code == 2
    assert "--cfg-power" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value",
    [
        ("cfg-channels", "all"),
        ("cfg-channels", "3"),
        ("guidance-interval", "0.2,0.8"),
        ("cfg-power", "2.0"),
        ("guide-ckpt", "a.pt"),
        ("guide-weights", "model"),
    ],
)
def test_flags_of_no_guidance(flag, value):
    with pytest.raises(ValueError, match=rf"^--{flag} {value} means nothing to samples without guidance \(--cfg-scale 1\)"):
        read(f"--{flag}", value)


def test_weights_of_no_guide():
    with pytest.raises(ValueError, match=r"^--guide-weights ema means nothing to samples without --guide-ckpt: leave it out"):
        read("--cfg-scale", "2", "--guide-weights", "ema")


# From checkpoints to images


@pytest.mark.parametrize("which", ["ema", "model"])
def test_images_under_a_guide_are_those_of_a_plain_loop(dit, guide, tmp_path, which):
    """DDIM written out, image by image, with the weights that the flag names."""
    extra = ("--ddim", "--cfg-scale", "2.5", "--guide-ckpt", str(guide), "--guide-weights", which)
    images = sample(dit, tmp_path, *extra)
    strong, weak = build_model(read_checkpoint(dit)), build_model(read_checkpoint(guide, which))
    diffusion = create_diffusion("4")

    def guided(x, t, y):
        above, below = strong(x, t, y), weak(x, t, y)
        return torch.cat([(below + 2.5 * (above - below))[:, :3], above[:, 3:]], dim=1)

    for i in range(3):
        noise, y = normals(0, Purpose.SAMPLE_NOISE, [i], 0, (3, 16, 16)), torch.tensor([i])
        with torch.no_grad():
            x = diffusion.ddim_sample_loop(guided, noise.shape, noise, model_kwargs={"y": y})
        expected = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
        assert grey_levels(images[i], expected) <= 1
    held = settings(tmp_path)
    assert len(held["guide_sha256"]) == 64 != held["checkpoint_sha256"]
    assert (held["guide_weights"], held["cfg_channels"], held["cfg_power"]) == (which, "all", None)


def test_other_guidance_is_refused_in_the_same_folder(dit, guide, tmp_path):
    sample(dit, tmp_path, "--cfg-scale", "2", "--guide-ckpt", str(guide))
    for extra in ((), ("--guide-ckpt", str(guide), "--guide-weights", "model")):
        with pytest.raises(ValueError, match=r"guide_.* -> .*use another --sample-dir"):
            sample(dit, tmp_path, "--cfg-scale", "2", *extra)


def test_a_power_for_any_model(dit, sit, tmp_path):
    """It changes the images, Gaussian or not, and 0 does not."""
    for name, checkpoint, how in (("dit", dit, ("--ddim",)), ("sit", sit, ("--mode", "ODE", "--sampling-method", "euler"))):
        runs = {power: sample(checkpoint, tmp_path / f"{name}{power}", *how, "--cfg-scale", "5", "--cfg-power", power)
                for power in ("0", "2")}  # fmt: skip
        plain = sample(checkpoint, tmp_path / name, *how, "--cfg-scale", "5")
        assert np.array_equal(runs["0"], plain) and grey_levels(runs["2"], plain) > 1
        assert settings(tmp_path / f"{name}2")["cfg_power"] == 2 and settings(tmp_path / name)["cfg_power"] is None


def test_mdt_keeps_its_published_power(tmp_path):
    mdt = save(tmp_path / "mdt.pt", "MDTv2-Ti/2")
    published = sample(mdt, tmp_path / "published", "--cfg-scale", "5")
    assert settings(tmp_path / "published")["cfg_power"] == 4
    assert np.array_equal(sample(mdt, tmp_path / "4", "--cfg-scale", "5", "--cfg-power", "4"), published)
    assert grey_levels(sample(mdt, tmp_path / "0", "--cfg-scale", "5", "--cfg-power", "0"), published) > 1
    flow = save(tmp_path / "flow.pt", "MDTv2-Ti/2", objective=TRANSPORT)
    sample(flow, tmp_path / "flow", "--cfg-scale", "5")
    assert settings(tmp_path / "flow")["cfg_power"] is None


def test_settings_without_guidance_name_none(tmp_path):
    """MDTv2's published power and the three channels were written down where nothing was guided."""
    mdt = save(tmp_path / "mdt.pt", "MDTv2-Ti/2")
    for scale, expected in (("1", (None, None)), ("5", ("3", 4))):
        sample(mdt, tmp_path / scale, "--cfg-scale", scale)
        held = settings(tmp_path / scale)
        assert (held["cfg_channels"], held["cfg_power"]) == expected


def test_pictures_under_a_guide(sit, tmp_path):
    """A transport, by inference.py, in an interval and with a power."""
    earlier = save(tmp_path / "earlier.pt", "SiT-Ti/2", objective=TRANSPORT, seed=5)
    base = ["--ckpt", str(sit), "--mode", "ODE", "--sampling-method", "heun", "--num-sampling-steps", "4", "--classes", "1,2",
            "--per-class", "1", "--cfg-scale", "4"]  # fmt: skip
    pictures = []
    for k, extra in enumerate(((), ("--guide-ckpt", str(earlier)), ("--guide-ckpt", str(earlier), "--guidance-interval",
                               "0.3,0.7"), ("--guide-ckpt", str(earlier), "--cfg-power", "1"))):  # fmt: skip
        inference.main([*base, "--out", str(tmp_path / f"{k}.png"), *extra])
        pictures.append(np.array(Image.open(tmp_path / f"{k}.png")))
    for k, one in enumerate(pictures):
        assert all(grey_levels(one, other) > 1 for other in pictures[:k])


def test_amm_is_of_the_model_alone(guide, tmp_path):
    """With it a network may guide itself: away from its attention without."""
    common = ("--cfg-scale", "2", "--ddim", "--guide-ckpt", str(guide))
    with_amm = sample(guide, tmp_path / "amm", *common, "--amm", "exp:4")
    strong = build_model(read_checkpoint(guide), amm="exp:4")
    weak, diffusion = build_model(read_checkpoint(guide)), create_diffusion("4")
    noise, y = normals(0, Purpose.SAMPLE_NOISE, [1], 0, (3, 16, 16)), torch.tensor([1])
    with torch.no_grad():
        x = diffusion.ddim_sample_loop(lambda x, t, y: 2 * strong(x, t, y) - weak(x, t, y), noise.shape, noise,
                                       model_kwargs={"y": y})  # fmt: skip
    expected = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert grey_levels(with_amm[1], expected) <= 1


# What does not fit


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("SiT-Ti/2", {"objective": TRANSPORT}, "has objective transport, .* has gaussian"),
        ("DiT-Ti/2", {"num_classes": 9}, "has num_classes 9, .* has 10"),
        ("DiT-Ti/2", {"input_size": 32}, "has input_size 32, .* has 16"),
        ("DiT-Ti/2", {"in_channels": 4}, "has in_channels 4, .* has 3"),
        ("DiT-Ti/2", {"codec": {**PIXELS, "scale": 0.5}}, r"has codec scale 0\.5, .* has 1\.0"),
    ],
)
def test_a_guide_of_something_else(dit, tmp_path, fails, name, changes, message):
    other = save(tmp_path / "other.pt", name, seed=3, **changes)
    line = fails(sample_ddp.main, *argv(dit, tmp_path / "out", "--cfg-scale", "2", "--guide-ckpt", other))
    with pytest.raises(AssertionError, match=f"{message}: a model and its guide must share it"):
        raise AssertionError(line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, message", [({"path_type": "GVP"}, "path_type GVP"), ({"prediction": "noise"}, "prediction")])
def test_a_guide_on_another_path(sit, tmp_path, fails, changes, message):
    other = save(tmp_path / "other.pt", "SiT-Ti/2", objective={**TRANSPORT, **changes}, seed=3)
    line = fails(inference.main, "--ckpt", sit, "--cfg-scale", "2", "--guide-ckpt", other, "--out", tmp_path / "a.png")
    assert f"has {message}" in line and "a model and its guide must share it" in line


def test_a_guide_that_is_the_model(dit, tmp_path, fails):
    line = fails(sample_ddp.main, *argv(dit, tmp_path / "out", "--cfg-scale", "2", "--guide-ckpt", dit))
    assert "holds the weights that it would guide" in line and "pass a weaker checkpoint" in line


def test_a_guide_that_is_missing(dit, tmp_path, fails):
    line = fails(sample_ddp.main, *argv(dit, tmp_path / "out", "--cfg-scale", "2", "--guide-ckpt", tmp_path / "no.pt"))
    assert "no.pt" in line


def test_a_guide_that_names_another_codec(dit, tmp_path, capsys):
    other = save(tmp_path / "other.pt", "DiT-Ti/2", codec={**PIXELS, "name": "a/vae"}, seed=3)
    sample(dit, tmp_path / "out", "--cfg-scale", "2", "--guide-ckpt", str(other))
    assert "names the codec pixels, its guide a/vae: their latents must be the same" in capsys.readouterr().err


def test_models_that_take_turns_have_no_guide(sit, tmp_path, fails):
    stages = ["SDE", "--ckpts", sit, sit, "--num-sampling-steps", "6", "--cfg-scale", "2", "--guide-ckpt", sit]
    for main, extra in ((sample_ddp_three.main, ["--switch-ratios", "0.5"]), (calibrate_switch.main, ["--budget-gmac", "1"])):
        assert "are guided by classifier-free guidance alone" in fails(main, *stages, *extra)


def test_models_that_take_turns_take_a_power(sit, tmp_path):
    """The evaluations that are counted are those made: one where the scale is 1, at pure noise."""
    sample_ddp_three.main(
        ["SDE", "--ckpts", str(sit), "--sample-dir", str(tmp_path), "--num-fid-samples", "2", "--num-sampling-steps", "5",
         "--cfg-scale", "2", "--cfg-power", "2", "--guidance-interval", "0,0.8"]
    )  # fmt: skip
    rows = np.genfromtxt(tmp_path / "switch_steps.csv", delimiter=",", names=True)
    # Noise levels 1, 0.76, 0.52, 0.28, and 0.04 of the last step.
    assert rows["evaluations_1"].tolist() == [9, 9]


def test_compiled_networks_meet_few_shapes(tmp_path, monkeypatch):
    """With a guide one each, in an interval too; else a batch and its double. The last batch of three images is filled up."""
    model, guide = (save(tmp_path / f"{seed}.pt", "DiT-Ti/2", depth=1, seed=seed) for seed in (0, 3))
    sizes = []

    def compiled(graph, inputs, options):
        sizes.append(next(len(value) for value in inputs if value.ndim == 4))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compiled)
    common = ("--ddim", "--cfg-scale", "2", "--cfg-channels", "all", "--guidance-interval", "0.2,0.6")
    for k, (extra, expected) in enumerate(((("--guide-ckpt", str(guide)), [2, 2]), ((), [2, 4]))):
        plain = sample(model, tmp_path / f"plain{k}", *common, *extra)
        sizes.clear()
        fast = sample(model, tmp_path / f"fast{k}", *common, *extra, "--compile")
        assert sorted(sizes) == expected and grey_levels(fast, plain) <= 1
