"""Sampling: image i depends on (seed, i) alone, and nothing made is lost or made twice."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import sample_ddp
from data.codec import load_codec
from diffusion import create_diffusion
from runtime import locks
from runtime.files import SharedRows
from sampling import many
from sampling.generate import Guidance, generate, label_source
from sampling.grids import draw_grid
from sampling.samplers import GaussianSampler
from sampling.writers import SampleFolder
from tests import kills
from tests.edt_checkpoints import random_checkpoint, random_edt
from tests.shared import files_of, grey_levels

NAME = "samples_7x16x16x3.npz"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "0000001.pt")


def sample(checkpoint: Path, folder: Path, *extra: str) -> np.ndarray:
    sample_ddp.main(argv(checkpoint, folder, *extra))
    return np.load(folder / NAME)["arr_0"]


def argv(checkpoint: Path, folder: Path, *extra: str) -> list[str]:
    return [
        "--ckpt", str(checkpoint), "--sample-dir", str(folder), "--num-fid-samples", "7", "--num-sampling-steps", "4",
        "--per-proc-batch-size", "3", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def samples(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "out"
    sample(checkpoint, folder)
    return folder


def test_outputs(samples, checkpoint):
    batch = np.load(samples / NAME)
    assert batch["arr_0"].shape == (7, 16, 16, 3) and batch["arr_0"].dtype == np.uint8
    assert sorted(path.name for path in (samples / "png").iterdir()) == [f"{i:06d}.png" for i in range(7)]
    for i in range(7):
        assert np.array_equal(np.array(Image.open(samples / "png" / f"{i:06d}.png")), batch["arr_0"][i])
    labels = label_source("random", 10, 0, 7)
    assert batch["arr_1"].tolist() == [labels(i) for i in range(7)]
    assert sorted(path.name for path in samples.iterdir()) == sorted([".lock", "png", "settings.json", NAME])
    assert batch["arr_0"].std() > 10  # pictures, not a constant


def test_images_are_what_a_plain_loop_gives(samples, checkpoint):
    """One image at a time, straight through the diffusion's own loop."""
    from runtime.draws import Purpose, normals

    model, diffusion, codec = random_edt().eval(), create_diffusion("4"), load_codec("pixels")
    images, labels = np.load(samples / NAME)["arr_0"], np.load(samples / NAME)["arr_1"]
    for i in (0, 5):
        noise = [normals(0, Purpose.SAMPLE_NOISE, [i], k, (3, 16, 16)) for k in range(5)]
        with torch.no_grad():
            out = diffusion.p_sample_loop(
                model, (1, 3, 16, 16), noise[0], model_kwargs={"y": torch.tensor([labels[i]])}, step_noise=noise.__getitem__
            )  # fmt: skip
        assert grey_levels(codec.decode(out)[0].numpy(), images[i]) <= 1


@pytest.mark.parametrize("cfg", ["1.0", "2.0"])
def test_batch_size_does_not_change_an_image(checkpoint, tmp_path, cfg):
    three = sample(checkpoint, tmp_path / "3", "--cfg-scale", cfg)
    eight = sample(checkpoint, tmp_path / "8", "--cfg-scale", cfg, "--per-proc-batch-size", "8")
    assert grey_levels(three, eight) <= 1


def test_restart_makes_only_what_is_missing(checkpoint, samples, tmp_path, monkeypatch):
    written, write = [], SharedRows.write

    def record(self, image_id, image):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(image_id)
        write(self, image_id, image)

    monkeypatch.setattr(SharedRows, "write", record)
    with pytest.raises(KeyboardInterrupt):
        sample(checkpoint, tmp_path)
    monkeypatch.setattr(SharedRows, "write", lambda self, i, image: (written.append(i), write(self, i, image)))
    images = sample(checkpoint, tmp_path)
    assert written == [0, 1, 2, 3, 4, 5, 6]
    assert grey_levels(images, np.load(samples / NAME)["arr_0"]) <= 1
    sample(checkpoint, tmp_path)  # all is there: nothing is made
    assert len(written) == 7


def test_killed_at_any_moment(checkpoint, samples, tmp_path, monkeypatch):
    """kill -9 before, within and after writes: a rerun makes what is not marked, and the samples are the uninterrupted ones,
    byte for byte, for an image is always made in the same batch."""
    written, write = [], SharedRows.write
    monkeypatch.setattr(SharedRows, "write", lambda self, i, image: (written.append(i), write(self, i, image)))
    num_moments = kills.run("sample_ddp", argv(checkpoint, tmp_path / "whole"))[1]
    assert files_of(tmp_path / "whole") == files_of(samples)
    for moment in sorted({1, 3, 5, *np.linspace(7, num_moments - 1, 8).astype(int).tolist()}):
        folder = tmp_path / str(moment)
        assert kills.run("sample_ddp", argv(checkpoint, folder), kill_at=moment)[0] == -9
        progress = folder / ".samples.progress"
        done = set(np.flatnonzero(np.fromfile(progress, np.uint8)).tolist()) if progress.exists() else set()
        packed = (folder / NAME).exists()
        written.clear()
        sample(checkpoint, folder)
        assert written == ([] if packed else [i for i in range(7) if i not in done])
        assert files_of(folder) == files_of(samples)


def test_killed_again_and_again(checkpoint, samples, tmp_path):
    line = lambda k: argv(checkpoint, tmp_path / str(k))  # noqa: E731
    for k in range(kills.run_with_kills("sample_ddp", line, num_kills=10, seed=0, longest=40)):
        assert files_of(tmp_path / str(k)) == files_of(samples)


def test_a_lost_picture_is_made_again(checkpoint, samples, tmp_path, monkeypatch):
    """The first process packed the folder without waiting for it, and a name that is no number was an error."""
    monkeypatch.setattr(SampleFolder, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(checkpoint, tmp_path)
    monkeypatch.undo()
    (tmp_path / "png" / "000004.png").unlink()
    (tmp_path / "png" / "notes.png").write_text("mine")
    (tmp_path / "png" / ".000003.png.123.tmp").write_text("half a picture")
    sample(checkpoint, tmp_path)
    (tmp_path / "png" / "notes.png").unlink()
    assert files_of(tmp_path) == files_of(samples)


def test_a_process_without_images_opens_nothing(checkpoint, tmp_path, monkeypatch):
    """It opened the files that the first process, done with everything, was removing."""
    opened = []

    class Folder(SampleFolder):
        def __enter__(self):
            opened.append(self)
            return super().__enter__()

        def packed(self):
            return False

        def complete(self):
            return True

        def finish(self, labels):
            pass

    monkeypatch.setattr(many, "SampleFolder", Folder)
    monkeypatch.setattr(many, "my_share", lambda *_: [])
    sample_ddp.main(argv(checkpoint, tmp_path))
    assert not opened


def test_a_folder_in_use_is_refused(checkpoint, samples, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    with locks.folder_lock(tmp_path / "out"):
        message = fails(sample_ddp.main, *argv(checkpoint, tmp_path / "out"))
    assert f"{tmp_path / 'out'} is in use by" in message and f"process {os.getpid()} on host" in message
    sample(checkpoint, tmp_path / "out")  # with nothing but its lock, the folder was empty
    assert files_of(tmp_path / "out") == files_of(samples)


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[]", "7", "null", "\x00"])
def test_broken_settings(checkpoint, samples, tmp_path, fails, text):
    shutil.copytree(samples, tmp_path / "copy")
    (tmp_path / "copy" / "settings.json").write_text(text)
    message = fails(sample_ddp.main, *argv(checkpoint, tmp_path / "copy"))
    assert "settings.json cannot be read" in message and "or use another --sample-dir" in message


def test_a_file_in_the_folders_place(checkpoint, tmp_path, fails):
    (tmp_path / "file").touch()
    assert f"--sample-dir {tmp_path / 'file'} is a file: name a folder" in fails(
        sample_ddp.main, *argv(checkpoint, tmp_path / "file")
    )


@pytest.mark.parametrize("name", [".samples.npy", ".samples.progress"])
def test_cut_work_files(checkpoint, samples, tmp_path, monkeypatch, fails, name):
    """A copy of the folder that ran out of room."""
    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(checkpoint, tmp_path)
    os.truncate(tmp_path / name, 5)
    assert f"{name} " in fails(sample_ddp.main, *argv(checkpoint, tmp_path))
    (tmp_path / name).unlink()
    sample(checkpoint, tmp_path)
    assert files_of(tmp_path) == files_of(samples)


def test_amm_guidance_and_ddim_change_the_images(checkpoint, samples, tmp_path):
    plain = np.load(samples / NAME)["arr_0"]
    for i, extra in enumerate(
        (["--amm", "True"], ["--cfg-scale", "3"], ["--ddim"], ["--seed", "1"], ["--cfg_scale=3", "--cfg-channels=all"])
    ):
        assert grey_levels(sample(checkpoint, tmp_path / str(i), *extra), plain) > 1, extra
    assert json.loads((tmp_path / "0" / "settings.json").read_text())["amm"] == "exp:4"


def test_no_png(checkpoint, samples, tmp_path):
    images = sample(checkpoint, tmp_path, "--no-png")
    assert np.array_equal(images, np.load(samples / NAME)["arr_0"])
    assert not (tmp_path / "png").exists()


def test_other_settings_are_refused(checkpoint, samples):
    with pytest.raises(ValueError, match=r"seed 0 -> 1.*use another --sample-dir"):
        sample(checkpoint, samples, "--seed", "1")


def test_a_foreign_folder_is_refused(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="use another --sample-dir"):
        sample(checkpoint, tmp_path)


def test_published_edt_checkpoint_needs_no_model_name(tmp_path, tiny_vae):
    """A bare EDT state dict of other depths: sizes come from its keys; the codec is the flag's, since the file does not say."""
    model = random_edt(depths=(2, 1, 1, 3, 1), in_channels=4, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "edt.pt")
    common = ("--ckpt", str(tmp_path / "edt.pt"), "--vae", str(tiny_vae), "--num-sampling-steps", "2")
    inference.main([*common, "--classes", "0,2", "--per-class", "2", "--out", str(tmp_path / "grid.png"), "--trajectory", "2"])
    assert Image.open(tmp_path / "grid.png").size[1] == 2 * 128 + 2
    width, height = Image.open(tmp_path / "grid-trajectory.png").size
    assert height == 2 * 128 + 2 and width >= 2 * 128 + 2


def test_previews_end_with_the_finished_prediction(checkpoint):
    sampler = GaussianSampler(create_diffusion("4"), ddim=True)
    codec = load_codec("pixels")
    (batch,) = generate(random_edt(), sampler, codec, range(2), labels=lambda i: i, seed=0, num_previews=2)
    assert len(batch.previews) == 2
    assert torch.equal(batch.previews[-1], batch.images)  # DDIM's last prediction of x_0 is the sample


def test_guidance_of_one_is_the_plain_network():
    model, sampler, codec = random_edt(), GaussianSampler(create_diffusion("3")), load_codec("pixels")
    calls = []
    model.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    for guidance in (Guidance(), Guidance(1.5)):
        list(generate(model, sampler, codec, range(2), labels=lambda i: i, seed=0, guidance=guidance))
    assert calls == [2, 2, 2, 4, 4, 4]


def test_random_labels_are_uniform_and_do_not_depend_on_the_rest():
    labels = label_source("random", 10, 7, 5000)
    counts = np.bincount([labels(i) for i in range(5000)], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
    assert labels(4321) == label_source("random", 10, 7, 1)(4321)
    assert [label_source("balanced", 3, 0, 5)(i) for i in range(5)] == [0, 1, 2, 0, 1]


def test_label_files(tmp_path):
    (tmp_path / "labels.txt").write_text("2\n0\n1\n")
    np.save(tmp_path / "labels.npy", np.array([2, 0, 1]))
    for name in ("labels.txt", "labels.npy"):
        labels = label_source(str(tmp_path / name), 3, 0, 3)
        assert [labels(i) for i in range(3)] == [2, 0, 1]
        with pytest.raises(ValueError, match="label 2 is not below the model's 2 classes"):
            label_source(str(tmp_path / name), 2, 0, 3)
        with pytest.raises(ValueError, match="4 are needed"):
            label_source(str(tmp_path / name), 3, 0, 4)
    with pytest.raises(ValueError, match="neither random, balanced, nor a file"):
        label_source("radnom", 3, 0, 3)


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    sheet = np.array(draw_grid(images, columns=2))
    assert sheet.shape == (3 * 64 + 2 * 2, 2 * 64 + 2, 3)
    assert sheet[0, 0, 0] == 10 and sheet[0, -1, 0] == 20 and sheet[70, 0, 0] == 30 and sheet[-1, 0, 0] == 50
    assert sheet[-1, -1, 0] == 255  # no sixth image
