"""app.py as its user meets it: a page in headless Chromium shows what the scripts make, and asks nobody but its own server."""

import base64
import contextlib
import io
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from page import layout
from page.library import Library
from page.settings import Limits, Pictures, Side, parse
from sampling.grids import draw_grid
from tests import sit_checkpoints
from tests.edt_checkpoints import random_checkpoint

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

SECONDS = 30
FINISHED = "#picture-{}[data-done='1']"


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def page_of(*argv: object) -> Iterator[tuple[str, Library]]:
    """Its address, and what it draws from."""
    limits = ["--max-images", "8", "--max-steps", "1000", "--frames", "4"]
    args = parse([*map(str, argv), "--port", str(free_port()), *limits])
    library = Library(args, torch.device("cpu"))
    page = layout.build(library)
    yield layout.launch(page, args, block=False), library
    page.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Library]]:
    with page_of("--ckpt", random_checkpoint(tmp_path_factory.mktemp("page") / "edt.pt")) as page:
        yield page


@pytest.fixture
def stages(tmp_path) -> Iterator[tuple[str, Library]]:
    """The page of two models that can take turns."""
    paths = [sit_checkpoints.random_checkpoint(tmp_path / f"{m}.pt", seed=m, mediator_num=m) for m in (1, 4)]
    with page_of("--ckpts", *paths, "--solver", "ab4", "--num-sampling-steps", 6) as page:
        yield page


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # No sandbox: it cannot be had by root, as which CI runs. No names but this machine's: nothing can leave it.
        flags = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(served, chromium):
    """visit(): the page, or another, in a window of its own. At the end all requests went to the pages' servers and none
    failed, and the console is empty."""
    windows, addresses, requests, complaints = [], [], [], []

    def answered(response) -> None:
        if response.status >= 400:
            complaints.append(f"{response.status} {response.url}")

    def open_window(address: str = served[0]):
        addresses.append(address)
        window = chromium.new_page(viewport={"width": 1440, "height": 1200})
        window.set_default_timeout(1000 * SECONDS)
        window.on("request", lambda request: requests.append(request.url))
        window.on("response", answered)
        window.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        window.on("pageerror", lambda error: complaints.append(str(error)))
        window.goto(address)
        window.wait_for_selector("#run")
        windows.append(window)
        return window

    yield open_window
    for window in windows:
        window.close()
    assert not complaints
    assert requests and all(url.startswith((*addresses, "data:image/png;")) for url in requests)


def choose(window, name: str, value: str) -> None:
    """From a list."""
    window.click(f"#{name} input")
    window.locator(f"#{name}").get_by_role("option", name=value, exact=True).click()


def write(window, name: str, value: float) -> None:
    window.fill(f"#{name} input[type=number]", str(value))
    window.keyboard.press("Tab")


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def shown(window, side: str) -> np.ndarray:
    return pixels(window.get_attribute(f"#picture-{side}", "src"))


def expected(library: Library, side: Side, pictures: Pictures) -> np.ndarray:
    """By the generate iterator, without the page's way of watching it."""
    from page.job import recipe
    from sampling.generate import generate

    made, labels = recipe(library, side, Limits(images=8, steps=1000, seconds=60.0)), pictures.of_each
    [batch] = generate(
        made.model, made.sampler, made.codec, range(len(labels)), labels=labels.__getitem__, seed=pictures.seed,
        guidance=made.guidance, batch_size=len(labels),
    )  # fmt: skip
    return np.asarray(draw_grid(batch.images.numpy(), pictures.per_class, [str(label) for label in pictures.labels]))


# Keeps every picture that the page shows of a side, by its step.
WATCH = """() => { window.seen = {A: {}, B: {}}; new MutationObserver(() => { for (const side of "AB") {
    const image = document.querySelector("#picture-" + side);
    if (image) window.seen[side][image.dataset.step] = image.src; } }).observe(document, {childList: true, subtree: true,
    attributes: true}); }"""


def test_two_settings_side_by_side(visit, served, monkeypatch):
    window, library = visit(), served[1]
    monkeypatch.setattr(library, "placement", lambda index, cfg_scale: f"that of {cfg_scale:g}")
    for label in ("1", "2", "3"):
        window.click(f"#classes button[aria-label='Remove {label}'], #classes .token:has-text('{label}') .token-remove")
    choose(window, "classes", "7")
    window.keyboard.press("Escape")
    write(window, "per-class", 3)
    write(window, "seed", 11)
    choose(window, "solver-A", "ddim")
    write(window, "steps-A", 6)
    choose(window, "amm-A", "on")
    choose(window, "solver-B", "dpm++2m")
    write(window, "steps-B", 5)
    write(window, "scale-B", 1.5)
    window.wait_for_selector("#low-B", state="visible")
    write(window, "high-B", 0.9)
    window.wait_for_selector("#amm-B:has-text('AMM (on = that of 1.5)')")
    window.evaluate(WATCH)
    window.click("#run")
    for side in "AB":
        window.wait_for_selector(FINISHED.format(side))
    window.wait_for_selector("#compared .flip")
    pictures = Pictures(labels=(0, 7), per_class=3, seed=11)
    a = Side(solver="ddim", steps=6, amm="on")
    b = Side(solver="dpm++2m", steps=5, cfg_scale=1.5, interval=(0.0, 0.9))
    assert np.array_equal(shown(window, "A"), expected(library, a, pictures))
    assert np.array_equal(shown(window, "B"), expected(library, b, pictures))
    with window.expect_download() as download:
        window.click("#side-A .save")
    saved = np.asarray(Image.open(download.value.path()))
    assert np.array_equal(saved, shown(window, "A")) and download.value.suggested_filename == "A-seed11.png"
    compared = [pixels(image.get_attribute("src")) for image in window.query_selector_all("#compared img")]
    assert all(np.array_equal(image, shown(window, side)) for image, side in zip(compared, "AB", strict=True))
    seen = window.evaluate("window.seen")
    assert list(seen["A"]) == ["1", "3", "4", "6"] and list(seen["B"]) == ["1", "2", "4", "5"]
    assert all(len(set(frames.values())) == 4 for frames in seen.values())
    assert window.inner_text("#side-A figcaption").startswith("6 steps") and "6 network calls" in window.inner_text("#side-A")
    assert "Done." in window.inner_text("#status") and window.is_enabled("#run")


def test_what_cannot_be_done_is_a_message(visit, monkeypatch):
    window = visit()
    write(window, "per-class", 5)
    window.click("#run")
    message = window.inner_text("#status .error")
    assert "4 classes with 5 pictures each are 20 pictures; this page makes at most 8 (--max-images)" in message
    window.wait_for_selector("#run:enabled")
    write(window, "per-class", 1)
    write(window, "scale-A", 2)
    write(window, "low-A", 0.8)
    write(window, "high-A", 0.2)
    window.click("#run")
    window.wait_for_selector("#status .error:has-text('guidance from noise level 0.8 to 0.2')")
    window.wait_for_selector("#run:enabled")
    window.click("#seed input")
    window.fill("#seed input", "")
    window.click("#run")
    window.wait_for_selector("#status .error:has-text('Seed is empty: write a number')")
    window.wait_for_selector("#run:enabled")
    monkeypatch.setattr(layout, "MAX_WAITING", -1)
    window.click("#run")
    window.wait_for_selector("text=jobs are waiting: try again in a while")
    assert window.is_enabled("#run") and not window.is_enabled("#stop") and not window.query_selector("#picture-A")


def test_models_in_turn_beside_one_of_them(visit, stages):
    address, library = stages
    window = visit(address)
    assert [window.input_value(f"#solver-{side} input") for side in "AB"] == ["ODE ab4", "ODE ab2"]
    assert not window.is_visible("#ratios-A")
    choose(window, "model-A", "2: SiT-Ti/2, 4 mediators, step 1")
    choose(window, "model-B", layout.TURNS)
    window.fill("#ratios-B textarea, #ratios-B input", "0.95")
    choose(window, "solver-B", "SDE euler")
    write(window, "steps-B", 8)
    write(window, "per-class", 1)
    window.click("#run")
    window.wait_for_selector("#compared .flip")
    pictures = Pictures(labels=(0, 1, 2, 3), per_class=1, seed=0)
    a, b = Side(model=1, solver="ODE ab4", steps=6), Side(model=None, solver="SDE euler", steps=8, ratios=(0.95,))
    for side, name in ((a, "A"), (b, "B")):
        assert np.array_equal(shown(window, name), expected(library, side, pictures))
    assert "switched after step" in window.inner_text("#side-B") and "switched" not in window.inner_text("#side-A")


def test_a_job_can_be_stopped_and_the_next_user_waits(visit):
    first, second = visit(), visit()
    for window, steps in ((first, 1000), (second, 3)):
        write(window, "per-class", 2)
        for side in "AB":
            write(window, f"steps-{side}", steps)
    first.click("#run")
    first.wait_for_selector("#picture-A")
    second.click("#run")
    second.wait_for_selector("#status:has-text('Waiting for its turn')")
    second.wait_for_timeout(300)
    assert not second.query_selector("#picture-A") and first.query_selector("#picture-A[data-done='0']")
    first.click("#stop")
    first.wait_for_selector("#status:has-text('Stopped.')")
    assert first.get_attribute("#picture-A", "data-done") == "0"
    for side in "AB":
        second.wait_for_selector(FINISHED.format(side))
    first.wait_for_selector("#run:enabled")


@pytest.mark.parametrize("path", ["gradio_api/file=/etc/hostname", "gradio_api/info", "gradio_api/upload", "docs"])
def test_no_files_and_no_api(served, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(served[0] + path)


def test_only_under_its_own_name(served):
    """A site whose name was made to resolve to this machine gets nothing."""
    request = urllib.request.Request(served[0], headers={"Host": "lured.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
    assert urllib.request.urlopen(served[0]).status == 200


def test_it_listens_on_this_machine_alone(served):
    port = int(served[0].rstrip("/").rpartition(":")[2])
    others = {"127.0.0.2"}
    with contextlib.suppress(socket.gaierror):  # a machine may not know its own name
        others |= {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, port), timeout=2).close()
