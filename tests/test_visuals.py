"""The plots of AMM, mediators and switching hold the numbers they should, and are pictures."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from PIL import Image

from models import show_amm, show_mediators
from models.amm import parse_amm
from models.attention_maps import MediatorMap, attention_maps
from models.checkpoints import build_model, read_checkpoint
from models.inference import prepare
from models.registry import model_config
from models.token_plots import by_distance, token_at
from runtime.figures import save_figure
from sampling import show_switching
from sampling.probes import make_probe, noised
from sampling.show_switching import Switches, read_switches
from tests import edt_checkpoints, sit_checkpoints
from tests.shared import golden_arrays
from tests.test_probes import CODEC

QUICK = ("--num-images", "2", "--num-sampling-steps", "2")


def images_of(figure, title: str = "") -> list[np.ndarray]:
    """What the heat maps with such a title show, in order; what is left out is NaN."""
    panels = [axes for axes in figure.get_axes() if axes.images and title in axes.get_title()]
    return [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in panels]


# AMM's matrices


def test_matrices_are_the_published_ones():
    """Of EDT-S at 256 pixels: block 7 on 8 x 8 tokens, block 10 on 16 x 16."""
    golden = golden_arrays("amm")
    figure = show_amm.show_matrices(show_amm.parse(["--model", "EDT-S/2", "--image-size", "256"]))
    wholes = images_of(figure, "whole")
    assert [len(whole) for whole in wholes] == [64, 256]
    for whole, grid in zip(wholes, (8, 16), strict=True):
        expected = golden[f"amm_exp/{grid}"].numpy()
        assert_allclose(np.nan_to_num(whole), expected, rtol=1e-4, atol=1e-4)
        assert np.array_equal(np.isnan(whole), expected == 0)  # drawn as cut off
    around = images_of(figure, "around token")
    assert len(around) == 6
    assert_allclose(np.nan_to_num(around[5]).ravel(), golden["amm_exp/16"][8 * 16 + 8], rtol=1e-4, atol=1e-4)
    curve = next(axes.lines[0] for axes in figure.get_axes() if axes.get_ylabel() == "factor")
    x, y = curve.get_data()
    frequency = 2 * math.pi / (4 * 7 * math.sqrt(2))
    inside = x**2 <= 53  # of token 0 and token 23: 2 rows and 7 columns
    assert_allclose(y, np.where(inside, 0.5 * np.exp(np.cos(frequency * x)), 0), atol=1e-12)


def test_blocks_alike_are_drawn_once():
    found = show_amm.modulations(model_config("EDT-XL/2"), parse_amm("cos:0,3,23,25"))
    assert [(one.grid, one.blocks) for one in found] == [(16, (0, 3, 23, 25))]
    assert "cos form, 16 x 16" in found[0].title
    assert [(one.grid, one.blocks) for one in show_amm.modulations(model_config("EDT-S/2"), parse_amm("exp:5,7,8"))] == [
        (4, (5,)), (8, (7, 8)),
    ]  # fmt: skip


def test_mean_by_distance():
    """On 2 x 2 tokens: 4 entries at distance 0, 8 at 1, 4 at the root of 2."""
    matrix = np.array([[1, 2, 3, 9], [4, 1, 9, 5], [6, 9, 1, 7], [9, 8, 3, 1]])
    distances, means = by_distance(matrix, 2)
    assert_allclose(distances, [0, 1, math.sqrt(2)])
    assert_allclose(means, [1, (2 + 3 + 4 + 5 + 6 + 7 + 8 + 3) / 8, 9])
    assert [token_at(query, 4) for query in ((0, 0), (0.5, 0.25), (1, 1))] == [0, 9, 15]


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--model", "SiT-S/2"), "no AMM placement is published for SiT-S/2: name the blocks"),
        (("--model", "EDT-S/2", "--amm", "exp:12"), "AMM at block.*could|those that can have it are 0 to 11"),
        (("--model", "EDT-S/2", "--blocks", "9"), r"--blocks 9: the placement exp:7,10 does not modulate it; .*--amm exp:9"),
        (("--model", "EDT-S/2", "--no-amm"), "--no-amm leaves nothing to draw"),
    ],
)
def test_matrices_that_do_not_exist(argv, message):
    with pytest.raises(ValueError, match=message):
        show_amm.show_matrices(show_amm.parse(list(argv)))


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "name a model with --model, or a checkpoint"),
        (("--model", "EDT-S/2", "--image-size", "100"), "not divisible by 8"),
        (("--ckpt", "a.pt", "--image-size", "256"), "--image-size means nothing to --ckpt"),
        (("--model", "EDT-S/2", "--level", "0.3"), "--level means nothing without --ckpt"),
        (("--model", "EDT-S/2", "--blocks", "7;10"), "write numbers, for example 7,10"),
        (("--model", "EDT-S/2", "--queries", "2,3"), "parts of the side"),
        (("--model", "EDT-S/2", "--queries", "middle"), "for example 0.5,0.25"),
        (("--model", "EDT-S/2", "--out", "amm.jpg"), "must end in one of .png, .pdf, .svg"),
    ],
)
def test_command_lines_that_make_no_sense(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        show_amm.parse(list(argv))
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_pictures_are_written_in_each_format(tmp_path):
    figure = Figure()
    figure.subplots().plot([1, 2])
    for suffix in (".PDF", ".svg"):
        save_figure(figure, tmp_path / f"amm{suffix}")
    show_amm.main(["--model", "EDT-Ti/2", "--out", str(tmp_path / "amm.png")])
    with Image.open(tmp_path / "amm.png") as picture:
        picture.load()
        assert picture.width > 1000
    assert (tmp_path / "amm.PDF").read_bytes().startswith(b"%PDF-")
    assert ElementTree.parse(tmp_path / "amm.svg").getroot().tag.endswith("svg")


# Attention with a checkpoint


@pytest.fixture(scope="module")
def edt(tmp_path_factory):
    return edt_checkpoints.random_checkpoint(tmp_path_factory.mktemp("edt") / "edt.pt")


def test_attention_is_drawn_before_and_after_amm(edt):
    argv = ["--ckpt", str(edt), "--amm", "exp:4", "--blocks", "3,4", "--level", "0.3", "--queries", "0,0", "0.5,0.5", *QUICK]
    args = show_amm.parse(argv)
    figure = show_amm.show_attention(args)
    checkpoint = read_checkpoint(edt)
    model = prepare(build_model(checkpoint, amm=parse_amm("exp:4")))
    probe = make_probe(args, checkpoint, model, CODEC)
    x, t = noised(checkpoint, probe, 0.3, 0)
    found = attention_maps(model, [4], x, t, probe.labels)[4]
    plain, applied = found.probabilities.numpy(), found.applied.numpy()
    before, after = (images_of(figure, f"query row 2, col. 2\n{when}")[-1] for when in ("before", "after"))
    assert_allclose(before.ravel(), 16 * plain[0].mean(0)[10], rtol=1e-5)
    assert_allclose(after.ravel(), 16 * applied[0].mean(0)[10], rtol=1e-5)
    whole = images_of(figure, "all images, heads\nafter")
    assert len(whole) == 1  # block 3 is not modulated
    assert_allclose(whole[0], 16 * applied.mean((0, 1)), rtol=1e-5)
    heads = images_of(figure, "head 2")
    assert_allclose(heads[-1].ravel(), 16 * plain[0, 2, 10], rtol=1e-5)
    lines = [axes.lines for axes in figure.get_axes() if "mean attention" in axes.get_title()]
    assert [len(one) for one in lines] == [1, 2]
    for line, matrix in zip(lines[1], (plain, applied), strict=True):
        assert_allclose(line.get_data(), by_distance(16 * matrix.mean((0, 1)), 4), rtol=1e-5)
    assert_allclose(images_of(figure, "first image")[0], probe.images[0])
    assert_allclose(images_of(figure, "as the network sees it")[0], CODEC.decode(x[:1])[0])


def test_attention_without_amm(edt):
    figure = show_amm.show_attention(show_amm.parse(["--ckpt", str(edt), "--no-amm", "--blocks", "0", *QUICK]))
    assert not images_of(figure, "after") and len(images_of(figure, "query")) == 3


@pytest.mark.parametrize(
    "settings, argv, message",
    [
        (None, ("--blocks", "9"), "block 9 does not exist: the model has blocks 0 to 5"),
        (None, ("--no-amm",), "--no-amm leaves no blocks to choose: name them"),
        ({}, (), "no AMM placement is published for SiT-Ti/2"),
        ({"mediator_num": 4}, ("--no-amm", "--blocks", "1"), "block 1 goes through mediators: see python -m models.show_med"),
    ],
)
def test_attention_that_does_not_exist(edt, tmp_path, settings, argv, message):
    path = edt if settings is None else sit_checkpoints.random_checkpoint(tmp_path / "sit.pt", **settings)
    with pytest.raises(ValueError, match=message):
        show_amm.show_attention(show_amm.parse(["--ckpt", str(path), *argv, *QUICK]))


# Mediators


def test_mosaic_lays_maps_out_as_mediators_lie():
    sheet = show_mediators.mosaic(np.arange(4)[:, None, None] * np.ones((4, 2, 2)))
    expected = [[0, 0, np.nan, 1, 1], [0, 0, np.nan, 1, 1], [np.nan] * 5, [2, 2, np.nan, 3, 3], [2, 2, np.nan, 3, 3]]
    assert_allclose(sheet, expected)


@pytest.mark.parametrize("grid, side", [(8, 4), (8, 3), (7, 2), (5, 5), (16, 1)])
def test_windows_are_those_of_adaptive_pooling(grid, side):
    """A pixel alone is seen by the means of the windows that hold it."""
    held = np.stack([
        torch.nn.functional.adaptive_avg_pool1d(torch.eye(grid)[i].view(1, 1, grid), side).flatten().numpy() > 0
        for i in range(grid)
    ], axis=1)  # fmt: skip
    assert [(int(row.argmax()), int(row.argmax() + row.sum())) for row in held] == show_mediators.windows(grid, side)


def test_maps_of_mediators_that_look_at_one_token():
    """Mediator m takes from token m alone, and token i reads mediator i mod 4 alone: token i looks at token i mod 4."""
    gather, read = torch.zeros(2, 3, 4, 9), torch.zeros(2, 3, 9, 4)
    gather[:, :, range(4), range(4)] = 1
    read[:, :, range(9), [i % 4 for i in range(9)]] = 1
    gather[:, 1] = 1 / 9  # but for head 1, which takes from all
    found = MediatorMap(3, 2, gather, read)
    maps = show_mediators.maps_of(found, (0.5, 0.9), head=0)  # token 5
    assert_allclose(maps["gathered"].reshape(4, 9), 9 * np.eye(4, 9))
    assert_allclose(maps["read"].reshape(4, 9), 4 * (np.arange(9) % 4 == np.arange(4)[:, None]))
    assert_allclose(maps["joint"].ravel(), 9 * np.eye(9)[1])
    mean = show_mediators.maps_of(found, (0.5, 0.9), head=None)
    assert_allclose(mean["joint"].ravel(), (2 * 9 * np.eye(9)[1] + 1) / 3, rtol=1e-6)


def test_mediators_side_by_side(tmp_path):
    paths = [str(sit_checkpoints.random_checkpoint(tmp_path / f"{m}.pt", seed=m, mediator_num=m)) for m in (1, 16)]
    args = show_mediators.parse(["--ckpt", *paths, "--block", "2", "--level", "0.4", *QUICK])
    figure = show_mediators.show(args)
    checkpoints = [read_checkpoint(path) for path in paths]
    models = [prepare(build_model(checkpoint)) for checkpoint in checkpoints]
    probe = make_probe(args, checkpoints[0], models[0], CODEC)  # the first makes the images
    x, t = noised(checkpoints[0], probe, 0.4, 0)
    for number, model in zip((1, 16), models, strict=True):
        found = attention_maps(model, [2], x, t, probe.labels)[2]
        gathered, read, joint = images_of(figure, f"M = {number}:")
        side = math.isqrt(number)
        assert gathered.shape == read.shape == (9 * side - 1, 9 * side - 1)
        last = found.gather.mean((0, 1))[-1].numpy()
        assert_allclose(gathered[-8:, -8:].ravel(), 64 * last, rtol=1e-5)
        assert_allclose(np.nansum(gathered), 64 * number, rtol=1e-5)
        assert_allclose(np.nansum(read), 64 * number, rtol=1e-5)
        assert_allclose(joint.ravel(), 64 * (found.read @ found.gather)[0].mean(0)[36].numpy(), rtol=1e-5)
    save_figure(figure, tmp_path / "picture.png", dpi=40)
    with Image.open(tmp_path / "picture.png") as picture:
        picture.load()


@pytest.mark.parametrize(
    "settings, argv, message",
    [
        ({"mediator_num": 4, "mediator_layers": 2}, ("--block", "3"), "--block 3: .* has no mediators there; .* do: 0, 1"),
        ({}, (), "has no mediators there; blocks that do: none"),
        ({"mediator_num": 4}, ("--block", "4"), "block 4 does not exist: the model has blocks 0 to 3"),
        ({"mediator_num": 4}, ("--head", "3"), "--head 3: block 0 of .* has heads 0 to 2"),
    ],
)
def test_mediators_that_do_not_exist(tmp_path, settings, argv, message):
    path = sit_checkpoints.random_checkpoint(tmp_path / "sit.pt", **settings)
    with pytest.raises(ValueError, match=message):
        show_mediators.show(show_mediators.parse(["--ckpt", str(path), *argv, *QUICK]))


def test_checkpoints_that_cannot_stand_side_by_side(tmp_path):
    small = sit_checkpoints.random_checkpoint(tmp_path / "small.pt", mediator_num=4)
    large = sit_checkpoints.random_checkpoint(tmp_path / "large.pt", mediator_num=4, input_size=32)
    with pytest.raises(ValueError, match=r"has input_size 32, .* has 16: checkpoints side by side must share it"):
        show_mediators.show(show_mediators.parse(["--ckpt", str(small), str(large), *QUICK]))


# Switching

# Ten solver steps. Image 0 leaves model 1 after step 4 and model 2 after 6, image 1 only the first after 7, image 2 none;
# guidance doubles the 10 calls of each. GMAC of a call: 1, 2, 4.
TABLE = """image,label,switch_1_to_2,switch_2_to_3,evaluations_1,evaluations_2,evaluations_3,gmac
0,0,4,6,8,4,8,48
1,1,7,-1,14,6,0,26
2,2,-1,-1,20,0,0,20
"""


def folder_of(path, table=TABLE, settings=None):
    path.mkdir()
    (path / "switch_steps.csv").write_text(table)
    (path / "settings.json").write_text(json.dumps(settings or {"sampler": "SDE", "num_steps": 11}))
    return path


def test_switches_by_hand(tmp_path):
    found = read_switches(folder_of(tmp_path / "a"))
    one, two, three = found.shares()
    assert_allclose(one, np.array([3] * 4 + [2] * 3 + [1] * 3) / 3)
    assert_allclose(two, np.array([0] * 4 + [1] * 2 + [0] * 1 + [1] * 3) / 3)
    assert_allclose(three, np.array([0] * 6 + [1] * 4) / 3)
    assert_allclose(found.costs(), [1, 2, 4])
    assert found.saved() == pytest.approx(1 - (48 + 26 + 20) / (60 * 4))


def test_what_the_rows_do_not_tell():
    """What a model costs that was never asked, or always as often as the others."""
    never = Switches(5, np.array([[2, -1], [3, -1]]), np.array([[2.0, 3, 0], [3, 2, 0]]), np.array([8.0, 7]))
    assert_allclose(never.costs(), [1, 2, np.nan])
    assert math.isnan(never.saved())
    alike = Switches(5, np.array([[2, 4]] * 2), np.array([[2.0, 2, 1]] * 2), np.array([10.0, 10]))
    assert np.isnan(alike.costs()).all() and math.isnan(alike.saved())


def test_the_plot_shows_shares_and_switches(tmp_path):
    folder = folder_of(tmp_path / "a")
    ode = folder_of(tmp_path / "b", settings={"sampler": "ODE", "num_steps": 13})
    figure = show_switching.show([folder, ode], ["first", "second"], ["M = 4", "M = 16", "M = 64"])
    above, other, below, _ = figure.get_axes()
    tops = np.array([patch.get_data().values for patch in above.patches])
    assert_allclose(tops[-1], 100)
    assert_allclose(np.diff(tops, axis=0, prepend=0) / 100, read_switches(folder).shares())
    assert above.get_xlim() == (0, 10) and other.get_xlim() == (0, 12)
    assert above.get_title() == "first\n31.33 GMAC an image, 60.8% less than the last model alone"
    first, second = (patch.get_data() for patch in below.patches)
    assert dict(zip(first.edges[:-1] + 0.5, first.values, strict=True)) == {**dict.fromkeys(range(11), 0), 4: 1, 7: 1}
    assert second.values.sum() == second.values[6] == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "M = 4: 1 GMAC a call", "M = 16: 2 GMAC a call", "M = 64: 4 GMAC a call",
    ]  # fmt: skip
    assert [text.get_text() for text in below.get_legend().get_texts()] == [
        "1 to 2: after 5.5, 67% of images", "2 to 3: after 6.0, 33% of images",
    ]  # fmt: skip


def test_switching_of_real_samples(tmp_path):
    """From the script's own folder; two models, of which the plot's shares are those of the network calls."""
    from time_step_wise_adjusting import sample_ddp_three

    paths = [str(sit_checkpoints.random_checkpoint(tmp_path / f"{m}.pt", seed=m, mediator_num=m)) for m in (1, 16)]
    sample_ddp_three.main(
        ["SDE", "--ckpts", *paths, "--switch-ratios", "0.83", "--first-several-num", "2", "--num-fid-samples", "6", "--no-png",
         "--num-sampling-steps", "12", "--last-step", "None", "--sample-dir", str(tmp_path / "samples")]
    )  # fmt: skip
    found = read_switches(tmp_path / "samples")
    assert found.num_steps == 11 and len(set(found.switch_steps.ravel())) > 1
    assert_allclose(found.shares().sum(1), found.evaluations.mean(0))
    show_switching.main([str(tmp_path / "samples"), "--out", str(tmp_path / "switching.png")])
    with Image.open(tmp_path / "switching.png") as picture:
        picture.load()


def test_dollars_are_no_formula(tmp_path):
    """A traceback of matplotlib's parser, for names and for a folder's path."""
    folder = folder_of(tmp_path / r"$\foo$")
    show_switching.main([str(folder), "--out", str(tmp_path / "a.svg"), "--models", r"$\bar$", "b_$", "$"])
    show_switching.main([str(folder), "--out", str(tmp_path / "b.svg"), "--titles", r"$\frac$"])


def test_folders_that_cannot_be_drawn(tmp_path):
    whole = folder_of(tmp_path / "whole")
    two = "image,label,switch_1_to_2,evaluations_1,evaluations_2,gmac\n0,0,4,8,12,32\n"
    for folder, message in (
        (tmp_path, "holds no switch_steps.csv: pass a folder"),
        (folder_of(tmp_path / "empty", TABLE.splitlines()[0] + "\n"), "holds no images"),
        (
            folder_of(tmp_path / "other", "image,label,log_likelihood\n0,0,1\n"),
            "no table of switches: its columns are image, la",
        ),
        (folder_of(tmp_path / "text", TABLE.replace("14", "many")), r"cannot be read \(ValueError.*sample it again"),
        (folder_of(tmp_path / "steps", settings={"sampler": "SDE", "num_steps": 5}), "which tell of 4 solver steps"),
        (folder_of(tmp_path / "settings", settings={"sampler": "SDE"}), "cannot be read .*num_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            show_switching.show([folder])
    with pytest.raises(ValueError, match="have 3, 2 models"):
        show_switching.show([whole, folder_of(tmp_path / "two", two)])
    with pytest.raises(ValueError, match="--models: 3 are needed, got 2"):
        show_switching.show([whole], models=["a", "b"])
    with pytest.raises(ValueError, match="--titles: 1 are needed, got 2"):
        show_switching.show([whole], titles=["a", "b"])
