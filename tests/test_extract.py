"""extract_features.py end to end: contents, process counts, restarts, damaged images, refusals."""

import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_features
from data.codec import load_codec
from data.images import ImageFolder, load_image
from data.store import LatentStore
from runtime.draws import Purpose, normals
from tests import kills

ROOT = Path(__file__).resolve().parents[1]
ARRAYS = ("latents.npy", "latents_flipped.npy", "labels.npy")


def extract(images, store, *flags) -> LatentStore:
    """Run the script in this process; later flags win over these."""
    extract_features.main([str(flag) for flag in (*common_flags(images), "--features-path", store, *flags)])
    return LatentStore.open(store)


def common_flags(images) -> list:
    return ["--data-path", images, "--vae", "pixels", "--image-size", 16, "--num-workers", 0, "--batch-size", 4]


def launch(num_processes: int, *flags) -> subprocess.CompletedProcess:
    """Run the script as users do: python for one process, torchrun for more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", f"--master_port={port}"]
    command = [sys.executable, *(torchrun if num_processes > 1 else []), "extract_features.py", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def contents(store: Path) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in (*ARRAYS, "meta.json") if (store / name).exists()}


def test_pixels_are_the_images(image_folder, tmp_path, capsys):
    store = extract(image_folder, tmp_path / "store", "--flip")
    folder = ImageFolder(image_folder)
    assert sorted(path.name for path in store.path.iterdir()) == sorted((".lock", *ARRAYS, "meta.json"))  # no progress map
    assert (store.codec, store.scale, store.num_images, store.latent_shape) == ("pixels", 1.0, 14, (3, 16, 16))
    assert store.class_names == folder.class_names
    np.testing.assert_array_equal(store.labels, folder.labels)
    pixels = load_codec("pixels")
    every, mirrored = np.arange(14), np.ones(14, bool)
    images = np.stack([load_image(path, 16) for path in folder.paths])
    np.testing.assert_array_equal(pixels.decode(store.rows(every)), images)
    np.testing.assert_array_equal(pixels.decode(store.rows(every, flip=mirrored)), images[:, :, ::-1])
    assert "14 images, 0 left out, 3 classes" in capsys.readouterr().out


def test_vae_latents_equal_direct_encoding(image_folder, tiny_vae, tmp_path):
    """Posterior noise is a function of (seed, image number), and a moments store given that noise yields the same latents."""
    flags = "--vae", tiny_vae, "--image-size", 32, "--seed", 5, "--flip"
    latents = extract(image_folder, tmp_path / "latents", *flags)
    moments = extract(image_folder, tmp_path / "moments", *flags, "--store", "moments")
    codec = load_codec(str(tiny_vae))
    images = torch.from_numpy(np.stack([load_image(path, 32) for path in ImageFolder(image_folder).paths]))
    every = np.arange(14)
    for view in (0, 1):
        noise = normals(5, Purpose.LATENT, every.tolist(), view, (4, 4, 4))
        flip = np.full(14, bool(view))
        expected = codec.encode(images.flip(2) if view else images, noise)
        torch.testing.assert_close(latents.rows(every, flip=flip), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.rows(every, flip=flip, noise=noise), expected, rtol=1e-4, atol=1e-5)
    assert moments.meta["shape"] == [14, 8, 4, 4]


def test_half_precision_on_disk(image_folder, tmp_path):
    whole, half = (extract(image_folder, tmp_path / dtype, "--dtype", dtype) for dtype in ("float32", "float16"))
    assert np.load(half.path / "latents.npy").dtype == np.float16
    assert torch.equal(half.rows(range(14)), whole.rows(range(14)).half().float())


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.mark.parametrize("killed_after", [0, 6])
def test_restart_goes_on_where_it_stopped(image_folder, tiny_vae, tmp_path, monkeypatch, killed_after):
    flags = "--vae", tiny_vae, "--image-size", 32, "--flip"
    extract(image_folder, tmp_path / "whole", *flags)
    written = []
    write = extract_features.StoreWriter.write

    def counting(writer, row, values):
        if len(written) == killed_after:
            raise Killed
        write(writer, row, values)
        written.append(row)

    monkeypatch.setattr(extract_features.StoreWriter, "write", counting)
    with pytest.raises(Killed):
        extract(image_folder, tmp_path / "again", *flags)
    with pytest.raises(ValueError, match=f"unfinished .{14 - killed_after} of 14 rows are missing.: run extract_features"):
        LatentStore.open(tmp_path / "again")
    killed_after = -1
    extract(image_folder, tmp_path / "again", *flags)
    assert sorted(written) == list(range(14))  # each row once
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")

    monkeypatch.setattr(extract_features, "load_image", lambda *_: pytest.fail("read an image of a complete store"))
    extract(image_folder, tmp_path / "again", *flags)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.fixture
def rows_written(monkeypatch) -> list[int]:
    """The rows that this process writes from now on."""
    rows, write = [], extract_features.StoreWriter.write
    monkeypatch.setattr(extract_features.StoreWriter, "write", lambda *args: (rows.append(args[1]), write(*args)))
    return rows


def test_killed_at_any_moment(image_folder, tmp_path, rows_written):
    """kill -9 before, within and after writes: a rerun makes what is not marked, and the store is the uninterrupted one's."""
    flags = [*common_flags(image_folder), "--flip"]
    code, num_moments = kills.run("extract_features", [*flags, "--features-path", tmp_path / "whole"])
    assert code == 0 and num_moments > 4 * 2 * 14  # each row: data and mark in two halves, twice with --flip
    for moment in sorted({1, 3, 5, *np.linspace(7, num_moments - 1, 8).astype(int).tolist()}):
        store = tmp_path / str(moment)
        assert kills.run("extract_features", [*flags, "--features-path", store], kill_at=moment)[0] == -9
        marks = [np.fromfile(path, np.uint8) for path in store.glob("*.progress")]
        done = set(np.flatnonzero(np.all(marks, axis=0)).tolist()) if len(marks) == 2 else set()
        complete = (store / "meta.json").exists() and json.loads((store / "meta.json").read_text())["complete"]
        rows_written.clear()
        extract(image_folder, store, "--flip")
        assert rows_written == ([] if complete else [row for row in range(14) if row not in done])
        assert contents(store) == contents(tmp_path / "whole")
        assert set(os.listdir(store)) <= {*ARRAYS, "meta.json", ".lock", *(f"{a[:-4]}.progress" for a in ARRAYS if complete)}


def test_killed_again_and_again(image_folder, tmp_path):
    extract(image_folder, tmp_path / "whole")
    line = lambda k: [*common_flags(image_folder), "--features-path", tmp_path / str(k)]  # noqa: E731
    for k in range(kills.run_with_kills("extract_features", line, num_kills=10, seed=0, longest=50)):
        assert contents(tmp_path / str(k)) == contents(tmp_path / "whole")


def hold_and_be_killed(path: Path, row: int) -> None:
    """Lock a file until this process and all that it forked have ended. It is killed before it writes this row."""
    multiprocessing.set_start_method("fork", force=True)  # as in a script of its own
    fcntl.flock(os.open(path, os.O_CREAT | os.O_WRONLY), fcntl.LOCK_EX)
    write = extract_features.StoreWriter.write

    def deadly(self, number, values):
        if number == row:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, number, values)

    extract_features.StoreWriter.write = deadly


def test_what_reads_images_ends_with_its_process(image_folder, tmp_path):
    """Processes did, which outlived it and held its output open."""
    argv = [*common_flags(image_folder), "--num-workers", 2, "--batch-size", 2, "--features-path", tmp_path / "store"]
    for row in (3, 9):
        prepare = functools.partial(hold_and_be_killed, tmp_path / "held", row)
        assert kills.run("extract_features", argv, prepare=prepare)[0] == -signal.SIGKILL
        with open(tmp_path / "held") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert kills.run("extract_features", argv)[0] == 0
    extract(image_folder, tmp_path / "whole", "--batch-size", 2)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_images_are_read_one_batch_ahead(image_folder, monkeypatch):
    read = []
    monkeypatch.setattr(extract_features, "load_image", lambda path, size: read.append(path))
    batches = extract_features.read_batches(ImageFolder(image_folder), [[0, 1], [2, 3], [4, 5], [6, 7]], 16, 2)
    assert [row for row, *_ in next(batches)] == [0, 1]
    time.sleep(0.1)
    assert len(read) <= 4
    assert [row for batch in batches for row, *_ in batch] == [2, 3, 4, 5, 6, 7]


def test_a_process_without_images_opens_nothing(image_folder, tmp_path, monkeypatch):
    """It opened the progress map that the first process, done with everything, was removing."""
    monkeypatch.setattr(extract_features.StoreWriter, "__enter__", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr(extract_features.StoreWriter, "finish", lambda *_: np.empty(0))
    monkeypatch.setattr(extract_features, "show", lambda *_: 0)
    monkeypatch.setattr(extract_features.distributed, "my_share", lambda *_: [])
    extract_features.main(list(map(str, [*common_flags(image_folder), "--features-path", tmp_path / "store"])))


@pytest.mark.parametrize("text", ["", '{"format": 1,', "[]", "7", '"text"', '{"format": 1}', "\x00"])
def test_broken_meta(image_folder, tmp_path, fails, text):
    """It was said that the store is to be extracted again, which was what the user did."""
    extract(image_folder, tmp_path / "store")
    (tmp_path / "store" / "meta.json").write_text(text)
    argv = ["--data-path", image_folder, "--features-path", tmp_path / "store", "--vae", "pixels", "--image-size", 16]
    message = fails(extract_features.main, *argv)
    assert "meta.json" in message and f"remove {tmp_path / 'store'} first, or use a new folder" in message


def test_killed_before_the_progress_map_is_removed(image_folder, tmp_path):
    """Removing the map before the store was declared complete would make a restart create all files anew."""
    store = extract(image_folder, tmp_path / "store")
    before = contents(store.path)
    np.full(14, 1, np.uint8).tofile(store.path / "latents.progress")
    extract(image_folder, tmp_path / "store")
    assert contents(store.path) == before


@pytest.fixture
def with_bad_images(image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    whole = (images / "ant" / "0.png").read_bytes()
    (images / "ant" / "1b.png").write_bytes(whole[: len(whole) // 2])
    (images / "cat" / "9.jpg").write_text("not an image")
    return images


def test_a_bad_image_stops_the_script_with_its_name(with_bad_images, tmp_path):
    flags = "--data-path", with_bad_images, "--features-path", tmp_path / "store", "--vae", "pixels", "--image_size", 16
    done = launch(1, *flags)
    assert done.returncode == 1
    assert "error: cannot read the image " in done.stderr
    assert "1b.png" in done.stderr
    assert "--skip-bad" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_can_be_left_out(image_folder, with_bad_images, tmp_path, capsys, num_workers):
    good = extract(image_folder, tmp_path / "good")
    with pytest.raises(ValueError, match=r"1b\.png"):
        extract(with_bad_images, tmp_path / "store", "--num-workers", num_workers)
    store = extract(with_bad_images, tmp_path / "store", "--num-workers", num_workers, "--skip-bad")  # goes on
    output = capsys.readouterr().out
    assert [line.split("/")[-1] for line in output.splitlines() if line.startswith("left out: ")] == ["1b.png", "9.jpg"]
    assert (store.num_images, store.meta["num_images"], store.meta["num_left_out"]) == (14, 16, 2)
    np.testing.assert_array_equal(store.labels, good.labels)
    assert torch.equal(store.rows(range(14)), good.rows(range(14)))
    assert "complete already" not in output
    extract(with_bad_images, tmp_path / "store")
    assert "complete already" in capsys.readouterr().out


def test_only_bad_images(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").touch()
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        extract(tmp_path / "images", tmp_path / "store", "--skip-bad")


@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused(image_folder, tiny_vae, tmp_path, complete):
    store = tmp_path / "store"
    extract(image_folder, store)
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps({**meta, "complete": complete}))
    before = contents(store)
    for flags, named in [
        (("--image-size", 8), r"--image-size \(image_size 16, now 8\)"),
        (("--seed", 1), r"--seed \(seed 0, now 1\)"),
        (("--flip",), r"--flip \(flip False, now True\)"),
        (("--dtype", "float16"), r"--dtype \(dtype float32, now float16\)"),
        (("--vae", tiny_vae), r"--vae \(codec pixels, now .*\); --vae \(scale 1.0, now 0.18215\)"),
    ]:
        with pytest.raises(ValueError, match=f"begun with other settings: {named}.*or a new folder"):
            extract(image_folder, store, *flags)
    assert contents(store) == before


def test_another_image_folder_is_refused(image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    extract(images, tmp_path / "store")
    extract(image_folder, tmp_path / "store")  # the same listing elsewhere is the same data set
    (images / "cat").rename(images / "dog")
    with pytest.raises(ValueError, match=r"--data-path \(other class names\)"):
        extract(images, tmp_path / "store")
    (images / "dog").rename(images / "cat")
    (images / "cat" / "0.png").rename(images / "cat" / "00.png")
    with pytest.raises(ValueError, match=r"--data-path \(other files\)"):
        extract(images, tmp_path / "store")
    Image.new("RGB", (16, 16)).save(images / "cat" / "7.png")
    with pytest.raises(ValueError, match=r"--data-path \(num_images 14, now 15\)"):
        extract(images, tmp_path / "store")


def test_foreign_folders_are_refused(image_folder, tmp_path):
    (tmp_path / "latents.npy").touch()
    with pytest.raises(ValueError, match=r"holds latents\.npy without meta\.json: remove it or use a new folder"):
        extract(image_folder, tmp_path)
    with pytest.raises(ValueError, match="is a file: name a new folder"):
        extract(image_folder, tmp_path / "latents.npy")


def test_settings_that_do_not_fit(image_folder, tiny_vae, tmp_path):
    with pytest.raises(ValueError, match="--image-size 36 must be a multiple of 8"):
        extract(image_folder, tmp_path / "store", "--vae", tiny_vae, "--image-size", 36)
    with pytest.raises(ValueError, match="--store moments: codec pixels has no posterior"):
        extract(image_folder, tmp_path / "store", "--store", "moments")
    with pytest.raises(ValueError, match="does not exist"):
        extract(tmp_path / "gone", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    for flags in (("--batch-size", 0), ("--dtype", "int8"), ("--unknown",), ("--num-workers", -1)):
        with pytest.raises(SystemExit, match="2"):
            extract(image_folder, tmp_path / "store", *flags)


def test_readme_flags_have_these_defaults():
    args = extract_features.parse_args(["--data-path", "imagenet/train", "--features-path", "store/features"])
    assert (args.vae, args.image_size, args.batch_size) == ("sd-vae-ft-ema", 256, 32)
    assert (args.store, args.dtype, args.seed, args.flip, args.skip_bad) == ("latents", "float32", 0, False, False)
