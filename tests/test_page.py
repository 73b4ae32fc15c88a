"""page: what the page makes is what the scripts make, frame by frame, and what it cannot make is said in a line."""

import asyncio
import base64
import dataclasses
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from models.checkpoints import describe
from page import html
from page.job import Frame, recipe, run
from page.library import Library
from page.safety import OwnPathsOnly, is_allowed
from page.settings import Limits, Pictures, Side, parse, solver_names, start_solver
from page.turns import in_turns
from sampling.generate import evenly_spread, generate
from sampling.grids import draw_grid
from tests.edt_checkpoints import random_checkpoint, random_edt
from tests.sit_checkpoints import random_checkpoint as random_sit
from time_step_wise_adjusting import sample_ddp_three

LIMITS = Limits(images=8, steps=20, seconds=60.0)
PICTURES = Pictures(labels=(3, 1), per_class=2, seed=5)
DDIM = Side(solver="ddim", steps=5)
GUIDED = Side(solver="ancestral", steps=4, cfg_scale=1.5, amm="on", interval=(0.3, 1.0), power=1.0, channels="all")
AS_FLAGS = {
    DDIM: ["--ddim", "--num-sampling-steps", "5"],
    GUIDED: ["--num-sampling-steps", "4", "--cfg-scale", "1.5", "--amm", "True", "--guidance-interval", "0.3,1",
             "--cfg-power", "1", "--cfg-channels", "all"],
}  # fmt: skip


def library_of(*checkpoints, flags=()) -> Library:
    return Library(parse(["--ckpt", *map(str, checkpoints), *flags]), torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("page") / "edt.pt")


@pytest.fixture(scope="module")
def library(checkpoint) -> Library:
    return library_of(checkpoint)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return [random_sit(folder / f"{number}.pt", seed=number, mediator_num=number) for number in (1, 4)]


@pytest.fixture(scope="module")
def turning(stages) -> Library:
    return library_of(*stages)


@pytest.fixture(scope="module")
def mixed(stages, checkpoint) -> Library:
    return library_of(*stages, checkpoint)


def made(library: Library, *sides: Side, pictures=PICTURES, num_frames=3, **kwargs) -> list[list[Frame]]:
    """Each side's frames."""
    shown: list[list[Frame]] = [[] for _ in sides]
    for newest in run(library, sides, pictures, LIMITS, num_frames, **kwargs):
        for frames, frame in zip(shown, newest, strict=True):
            if frame is not None and (not frames or frames[-1] is not frame):
                frames.append(frame)
    return shown


def inferred(checkpoint, path, *flags) -> np.ndarray:
    inference.main(
        ["--ckpt", str(checkpoint), "--classes", "3,1", "--per-class", "2", "--seed", "5", "--out", str(path), *flags]
    )
    return np.asarray(Image.open(path))


def test_both_sides_show_the_pictures_of_inference(library, checkpoint, tmp_path):
    for side, frames in zip(AS_FLAGS, made(library, *AS_FLAGS), strict=True):
        grid = draw_grid(frames[-1].images, 2, ["3", "1"])
        assert np.array_equal(grid, inferred(checkpoint, tmp_path / "grid.png", *AS_FLAGS[side]))


def test_frames(library):
    """Three of each side, in turn, with growing work: a guided step evaluates twice, one outside the interval once."""
    alone, guided = made(library, DDIM, GUIDED)
    assert [frame.step for frame in alone] == [1, 3, 5] and [frame.step for frame in guided] == [1, 2, 4]
    assert [frame.done for frame in alone] == [False, False, True]
    assert [frame.evaluations for frame in alone] == [1, 3, 5]
    assert [frame.evaluations for frame in guided] == [2, 4, 7]  # levels 1, 0.67, 0.33 and 0
    gmac = alone[-1].gmac / 5
    assert guided[-1].gmac == pytest.approx(7 * gmac) and gmac > 0
    assert 0 < alone[0].seconds < alone[1].seconds < alone[2].seconds
    assert not np.array_equal(alone[0].images, alone[1].images) and alone[0].images.dtype == np.uint8
    orders = [[frame and frame.step for frame in newest] for newest in run(library, (DDIM, GUIDED), PICTURES, LIMITS, 3)]
    assert orders == [[1, None], [1, 1], [3, 1], [3, 2], [5, 2], [5, 4]]


def test_frames_are_the_previews_of_the_iterator(library):
    made_with, labels = recipe(library, GUIDED, LIMITS), PICTURES.of_each
    [batch] = generate(
        made_with.model, made_with.sampler, made_with.codec, range(4), labels=labels.__getitem__, seed=5,
        guidance=made_with.guidance, num_previews=3,
    )  # fmt: skip
    [frames] = made(library, GUIDED)
    for frame, preview in zip(frames[:-1], batch.previews[:-1], strict=True):
        assert np.array_equal(frame.images, preview)
    assert np.array_equal(frames[-1].images, batch.images)


def test_the_steps_that_are_shown():
    assert evenly_spread(6, 4) == {1, 3, 4, 6} and evenly_spread(3, 9) == {1, 2, 3}
    assert evenly_spread(6, 1) == {6} and evenly_spread(6, 0) == set()


def test_equal_settings_give_equal_pictures(library):
    a, b = made(library, GUIDED, dataclasses.replace(GUIDED), num_frames=1)
    assert len(a) == len(b) == 1 and np.array_equal(a[0].images, b[0].images)


def test_amm_needs_no_file_and_no_second_copy(checkpoint, tmp_path):
    copy = tmp_path / "copy.pt"
    copy.write_bytes(checkpoint.read_bytes())
    library = library_of(copy)
    copy.unlink()
    off, on = made(library, DDIM, dataclasses.replace(DDIM, amm="exp:4"), num_frames=1)
    assert not np.array_equal(off[0].images, on[0].images)
    plain, modulated = library.network(0), library.network(0, library.placement(0))
    pointers = [{weight.data_ptr() for weight in network.parameters()} for network in (plain, modulated)]
    assert pointers[0] == pointers[1] and plain is not modulated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "choose at least one class"),
        ({"labels": (10,)}, "class 10 does not exist: the model has classes 0 to 9"),
        ({"per_class": 5}, r"10 pictures; this page makes at most 8 \(--max-images\)"),
        ({"per_class": 0}, "choose at least one"),
        ({"seed": -1}, "seed -1: choose a whole number"),
        ({"solver": "dopri5"}, "solver 'dopri5' cannot be watched with this checkpoint: choose one of ancestral, ddim"),
        ({"steps": 21}, r"21 steps: this page takes 1 to 20 \(--max-steps\)"),
        ({"steps": 0}, "0 steps"),
        ({"cfg_scale": -1.0}, "guidance scale -1"),
        ({"cfg_scale": float("nan")}, "guidance scale nan"),
        ({"cfg_scale": 2.0, "interval": (0.7, 0.3)}, "guidance from noise level 0.7 to 0.3"),
        ({"cfg_scale": 2.0, "power": -1.0}, "guidance power -1"),
        ({"cfg_scale": 2.0, "guide": 0}, "guides itself changes nothing"),
        ({"amm": "exp:99"}, r"AMM at block\(s\) \(99,\)"),
        ({"amm": "yes"}, "amm='yes' is not understood"),
        ({"model": None}, "cannot take turns"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is(library, changes, message):
    pictures = {name: value for name, value in changes.items() if hasattr(PICTURES, name)}
    side = dataclasses.replace(DDIM, **{name: value for name, value in changes.items() if name not in pictures})
    before = library.work.evaluations
    with pytest.raises(ValueError, match=message) as error:
        next(run(library, (DDIM, side), dataclasses.replace(PICTURES, **pictures), LIMITS, 3))
    assert "\n" not in str(error.value) and library.work.evaluations == before


def test_a_job_stops_where_it_is(library):
    """After the step in which it is told to, and no thread is left."""
    threads, asked = threading.active_count(), []
    alone, guided = made(library, DDIM, GUIDED, num_frames=1, stopped=lambda: asked.append(1) or len(asked) > 3)
    assert not alone and not guided and len(asked) == 4
    jobs = run(library, (DDIM, GUIDED), PICTURES, LIMITS, 3)
    next(jobs)
    assert threading.active_count() > threads
    jobs.close()
    assert threading.active_count() == threads


def test_a_job_has_its_time(library):
    with pytest.raises(TimeoutError, match=r"stopped after 0.0001 seconds \(--max-seconds\)"):
        list(run(library, (DDIM,), PICTURES, dataclasses.replace(LIMITS, seconds=1e-4), 3))


def test_models_in_turn_are_those_of_the_script(turning, stages, tmp_path):
    turns = Side(model=None, solver="SDE euler", steps=8, cfg_scale=1.5, ratios=(0.95,))
    [frames] = made(turning, turns)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(map(str, PICTURES.of_each)))
    sample_ddp_three.main(
        ["SDE", "--ckpts", *map(str, stages), "--switch-ratios", "0.95", "--num-sampling-steps", "8", "--cfg-scale", "1.5",
         "--num-fid-samples", "4", "--labels", str(labels), "--seed", "5", "--sample-dir", str(tmp_path / "out")]
    )  # fmt: skip
    with np.load(tmp_path / "out" / "samples_4x16x16x3.npz") as file:
        assert np.array_equal(frames[-1].images, file["arr_0"])
    table = np.loadtxt(tmp_path / "out" / "switch_steps.csv", delimiter=",", skiprows=1)
    switched = table[table[:, 2] >= 0, 2]
    assert len(switched) > 0 and frames[-1].switches == (switched.mean(),)
    assert frames[-1].evaluations == table[:, 3:5].sum(1).mean() and frames[-1].gmac == pytest.approx(table[:, 5].mean())


def test_several_checkpoints(mixed, turning, stages, checkpoint, tmp_path):
    """Each alone, one guiding the other; networks of different mathematics beside each other."""
    assert [mixed.title(i) for i in range(3)] == [
        "1: SiT-Ti/2, 1 mediator, step 1",
        "2: SiT-Ti/2, 4 mediators, step 1",
        "3: EDT-Ti/2, step 1",
    ]
    assert not mixed.can_take_turns() and turning.can_take_turns()
    ode = Side(model=1, solver="ODE heun", steps=4)
    guided = dataclasses.replace(ode, cfg_scale=1.5, guide=0, channels="all")
    sit, weaker, edt = made(mixed, ode, guided, dataclasses.replace(DDIM, model=2), num_frames=1)
    flags = ["--mode", "ODE", "--sampling-method", "heun", "--num-sampling-steps", "4"]
    guiding = ["--cfg-scale", "1.5", "--guide-ckpt", str(stages[0])]
    for frames, file, more in (
        (sit, stages[1], flags),
        (weaker, stages[1], flags + guiding),
        (edt, checkpoint, AS_FLAGS[DDIM]),
    ):
        assert np.array_equal(draw_grid(frames[-1].images, 2, ["3", "1"]), inferred(file, tmp_path / "grid.png", *more))
    assert weaker[-1].evaluations == 2 * sit[-1].evaluations
    with pytest.raises(ValueError, match="a model and its guide must share it"):
        recipe(mixed, dataclasses.replace(guided, guide=2), LIMITS)
    with pytest.raises(ValueError, match="solver 'ODE dopri5' cannot be watched"):
        recipe(turning, Side(model=None, solver="ODE dopri5", steps=4, ratios=(0.5,)), LIMITS)
    with pytest.raises(ValueError, match=r"2 models need 1 switch ratio"):
        recipe(turning, Side(model=None, solver="SDE euler", steps=4), LIMITS)


def test_every_solver_that_is_offered(mixed):
    for model in (0, 2):
        names = solver_names(mixed.checkpoints[model])
        assert len(names) >= 6 and len(set(names)) == len(names)
        for name in names:
            assert recipe(mixed, Side(model=model, solver=name, steps=6), LIMITS).sampler.num_steps > 0


def test_what_the_flags_start_with(mixed):
    sit, _, edt = mixed.checkpoints
    for flags, checkpoint, expected in (
        ("", sit, "SDE euler"),
        ("--mode SDE --sampling-method Heun", sit, "SDE heun"),
        ("--solver ab2", sit, "ODE ab2"),
        ("--solver euler", sit, "ODE euler"),
        ("--mode ODE --sampling-method heun2", sit, "ODE heun"),
        ("--mode ODE", sit, "ODE heun"),
        ("", edt, "ancestral"),
        ("--ddim", edt, "ddim"),
        ("--solver unipc", edt, "unipc"),
    ):
        assert start_solver(parse(["--ckpt", "a", *flags.split()]), checkpoint) == expected
    with pytest.raises(ValueError, match="solver 'ODE dopri5' cannot be watched with this checkpoint: choose one of SDE euler"):
        start_solver(parse(["--ckpt", "a", "--solver", "dopri5"]), sit)


def test_flags_hold_where_they_mean_something(stages, checkpoint):
    """Those of the SDE say nothing of the ODE beside it, those of transports nothing of Gaussian diffusion."""
    given = ["--diffusion-form", "linear", "--last-step", "Euler", "--sample-eps", "0.01"]
    library = library_of(stages[0], checkpoint, flags=given)
    sde, ode, gaussian = (
        recipe(library, Side(model=model, solver=solver, steps=4), LIMITS).sampler.settings
        for model, solver in ((0, "SDE euler"), (0, "ODE ab2"), (1, "ddim"))
    )
    assert sde["diffusion_form"] == "linear" and sde["last_step"] == "Euler" and sde["sample_eps"] == 0.01
    assert ode["sample_eps"] == 0.01 and ode["solver"] == "ab2" and gaussian["solver"] == "ddim"


def test_a_message_names_no_folder(mixed):
    side = Side(model=1, solver="ODE ab2", steps=4, cfg_scale=1.5, guide=2)
    with pytest.raises(ValueError, match=r"4\.pt has .*edt\.pt|edt\.pt has .*4\.pt") as error:
        recipe(mixed, side, LIMITS)
    assert "/" not in str(error.value)


def test_a_compiled_network_meets_any_number_of_images(checkpoint, monkeypatch):
    """One graph serves them all: a graph for each would be made while a visitor waits, until the compiler gives up."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: asked.append(options["dynamic"]) or forward)
    library_of(checkpoint, flags=["--compile"])
    assert asked == [None]


def test_checkpoints_of_other_classes_are_refused(checkpoint, tmp_path):
    model = random_edt(num_classes=7)
    config = describe("EDT-Ti/2", model.config, codec={"name": "pixels", "scale": 1.0}, class_names=("<b>",))
    torch.save({"ema": model.state_dict(), "model": model.state_dict(), "config": config}, tmp_path / "seven.pt")
    with pytest.raises(ValueError, match=r"num_classes 7, .*edt\.pt has 10: the checkpoints of a page must share it"):
        library_of(checkpoint, tmp_path / "seven.pt")
    assert library_of(tmp_path / "seven.pt").class_names == ["<b>", *map(str, range(1, 7))]


def test_flags_of_the_page(capsys):
    for argv, message in (
        ([], "required: --ckpt"),
        (["--ckpt", "a", "--guide-ckpt", "b"], "name the weaker checkpoint as another --ckpt"),
        (["--ckpt", "a", "--num-sampling-steps", "300"], "--num-sampling-steps 300 is above --max-steps 250"),
        (["--ckpt", "a", "--share"], "unrecognized arguments: --share"),
    ):
        with pytest.raises(SystemExit) as exit_:
            parse(argv)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert parse(["--ckpts", "a", "b"]).host == "127.0.0.1" and parse(["--ckpt", "a", "--host", "[::1]"]).host == "::1"
    assert [parse(["--ckpt", "a", *flags]).num_sampling_steps for flags in ([], ["--max-steps", "20"])] == [50, 20]


def test_flags_that_do_not_fit_the_checkpoint(checkpoint):
    for flags, message in (
        (["--solver", "ab2"], "--solver ab2"),
        (["--mode", "ODE"], "mode ODE"),
        (["--cfg-power", "2"], "--cfg-power 2"),
    ):
        with pytest.raises(ValueError, match=message):
            library_of(checkpoint, flags=flags)


def test_a_picture_is_the_contact_sheet(rng):
    images = rng.integers(0, 256, (4, 16, 16, 3), np.uint8)
    url = html.data_url(images, 2, ["3", "1"])
    decoded = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert url.startswith("data:image/png;base64,") and np.array_equal(decoded, draw_grid(images, 2, ["3", "1"]))
    frame = Frame(5, 5, images, 1.0, 5.0, 0.1, done=True)
    other = dataclasses.replace(frame, images=np.where(np.arange(4)[:, None, None, None] < 3, images, 255 - images))
    text = html.comparison([frame, other], [url, "data:other"])
    assert "<b>3</b> of 4 pictures are the same" in text and url in text and "data:other" in text
    assert html.comparison([frame, dataclasses.replace(frame, done=False)], [url, url]) == ""
    assert html.picture(frame, url, "A", PICTURES).count(url) == 1
    assert "<script>" not in html.heading("<script>", ["<script>"])


def test_what_the_page_answers_to():
    allowed = ["/", "/config", "/assets/index.js", "/gradio_api/queue/join", "/gradio_api/heartbeat/abc", "/gradio_api/reset/"]
    assert all(map(is_allowed, allowed))
    refused = ["/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://x", "/gradio_api/run/work",
               "/docs", "/gradio_api/info", "/file=/etc/passwd", "/monitoring", "/gradio_api/vibe-edit/", "/login"]  # fmt: skip
    assert not any(map(is_allowed, refused))


@pytest.mark.parametrize(
    ("scope", "answer"),
    [
        ({"type": "lifespan"}, "passed on"),
        ({"type": "http", "path": "/config"}, "passed on"),
        ({"type": "http", "path": "/upload", "method": "GET", "headers": []}, 404),
        ({"type": "websocket", "path": "/config"}, "websocket.close"),
    ],
)
def test_only_pages_are_passed_on(scope, answer):
    sent = []

    async def app(scope, receive, send) -> None:
        sent.append({"type": "passed on"})

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(OwnPathsOnly(app)(scope, None, send))
    assert sent[0].get("status", sent[0]["type"]) == answer


def test_turns():
    """Two workers never work at once; what they raise comes out; closing ends them."""
    busy, threads = [], threading.active_count()

    def work(report):
        for value in range(3):
            busy.append(+1)
            time.sleep(0.02)
            assert sum(busy) == 1
            busy.append(-1)
            report(value)

    a, b = in_turns(work), in_turns(work)
    assert list(zip(a, b, strict=True)) == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ZeroDivisionError):
        list(in_turns(lambda report: report(1 / 0)))
    unused, cut = in_turns(work), in_turns(work)
    next(cut)
    cut.close()
    unused.close()
    assert threading.active_count() == threads
