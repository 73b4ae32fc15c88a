"""Features of whole files: independent of the number of processes, kept by content, in bounded memory; and Inception's metrics
end to end against torch-fidelity's."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset

from evaluations import evaluator
from evaluations.extraction import extract
from evaluations.features import Features, create_features
from tests.launch import ROOT, run_script


@pytest.fixture
def state():
    from runtime.distributed import start

    return start()


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ref.npz", rng.integers(0, 200, (45, 6, 6, 3), np.uint8))
    np.savez_compressed(tmp_path / "samples.npz", rng.integers(30, 256, (37, 6, 6, 3), np.uint8))
    return tmp_path


# --- torch-fidelity


class Images(Dataset):
    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def blobs():
    """Twice 16 images of 48 x 48 that vary in few directions, so that the two sets overlap; the second varies more."""
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((4, 6, 6, 3))
    images = np.einsum("nk,khwc->nhwc", rng.standard_normal((32, 4)), basis).repeat(8, 1).repeat(8, 2)
    images = 127.5 + np.repeat([30, 50], 16)[:, None, None, None] * images
    images = images.clip(0, 255).astype(np.uint8)
    return images[:16], images[16:]


def test_inceptions_metrics_are_torch_fidelitys(blobs, inception_weights, tmp_path, capsys):
    """The same images and weights, by its own extraction and its own metrics."""
    ref, samples = blobs
    np.savez(tmp_path / "ref.npz", ref)
    np.savez(tmp_path / "samples.npz", samples)
    flags = ["--inception-weights", str(inception_weights), "--kid", "--kid-subset-size", "16", "--kid-subsets", "1"]
    ours = evaluator.main([str(tmp_path / "ref.npz"), str(tmp_path / "samples.npz"), "--batch-size", "8", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"FID: {ours['fid']} (inception of random.pth)", "published numbers alone stand alone"
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(samples), input2=Images(ref), batch_size=8, cuda=False, isc=True, fid=True, kid=True, prc=True,
        isc_splits=1, samples_shuffle=False, kid_subset_size=16, kid_subsets=1, prc_neighborhood=3, num_workers=0,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_weights), cache=False,
        verbose=False,
    )  # fmt: skip
    # A random network tells all images the same: its score is near 1, so that only the logarithm says something.
    assert np.log(ours["inception_score"]) == pytest.approx(np.log(theirs["inception_score_mean"]), rel=1e-4)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-4)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-4)
    assert ours["precision"] != ours["recall"], "or nothing tells them apart"


# --- any number of processes


class OffMean(torch.nn.Module):
    """Pixels less the batch's mean: features that depend on an image's company."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.flatten(1).float() / 255
        return pixels - pixels.mean(0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_print_what_one_prints(files):
    """Not nearly: the batches are the same ones, so every feature has the same bytes."""
    torch.jit.save(torch.jit.script(OffMean()), str(files / "off_mean.pt"))
    images = np.load(files / "samples.npz")["arr_0"]
    images[:9] = np.load(files / "ref.npz")["arr_0"][:9] + 1
    np.savez(files / "samples.npz", arr_0=images, arr_1=np.arange(37) % 3)
    flags = (
        "--features",
        str(files / "off_mean.pt"),
        "--batch-size",
        "4",
        "--kid",
        "--kid-subset-size",
        "20",
        "--per-class",
        "--class-balance",
    )
    args = (str(files / "ref.npz"), str(files / "samples.npz"), *flags, "--num-samples", "33")
    runs = {}
    for processes in (1, 2):
        done = run_script("evaluations/evaluator.py", *args, "--json", str(files / f"{processes}.json"), processes=processes)
        runs[processes] = done.stdout, json.loads((files / f"{processes}.json").read_text())
    assert runs[1] == runs[2]
    assert 0 < runs[1][1]["precision"] < 1


def test_an_error_of_one_process_is_told_once(files):
    """The others ended in tracebacks about closed connections."""
    args = (str(files / "ref.npz"), str(files / "samples.npz"))
    done = run_script("evaluations/evaluator.py", *args, "--inception-weights", "absent.pth", processes=2, expect=1)
    assert done.stderr.count("error: --inception-weights absent.pth is no file") == 1
    whole = np.load(files / "samples.npz")["arr_0"]
    np.savez(files / "broken.npz", whole)
    data = bytearray((files / "broken.npz").read_bytes())
    data[-600] ^= 255  # in the second half of the images: the archive's checksum is another
    (files / "broken.npz").write_bytes(data)
    flags = ("--features", "pixels", "--batch-size", "4")
    done = run_script("evaluations/evaluator.py", args[0], str(files / "broken.npz"), *flags, processes=2, expect=1)
    assert done.stderr.count("error: ") == 1 and "broken.npz is not a whole .npz file" in done.stderr
    assert "Connection closed" not in done.stderr


def test_more_processes_than_batches(files):
    """A process without images still takes part."""
    args = (str(files / "ref.npz"), str(files / "samples.npz"), "--features", "pixels")
    one = run_script("evaluations/evaluator.py", *args)
    assert run_script("evaluations/evaluator.py", *args, processes=2).stdout == one.stdout


# --- the cache


class Counting:
    name = statistics = "pixels"

    def __init__(self, fingerprint="counting"):
        self.fingerprint, self.images = fingerprint, 0

    def __call__(self, images):
        self.images += len(images)
        return create_features("pixels")(images)


@pytest.fixture
def measured(files, monkeypatch, fresh_accelerate_state):
    """Run with a cache; (result, images that went through the extractor)."""

    def run(fingerprint="counting", ref="ref.npz"):
        fresh_accelerate_state()
        extractor = Counting(fingerprint)
        monkeypatch.setattr(evaluator, "load_extractor", lambda *_: extractor)
        args = [files / ref, files / "samples.npz", "--features", "pixels", "--cache", files / "cache"]
        return evaluator.main(list(map(str, args))), extractor.images

    return run


def test_a_reference_is_measured_once(files, measured, capsys):
    images = np.load(files / "ref.npz")["arr_0"]
    images[5] = 9
    np.savez(files / "ref.npz", images)
    first, count = measured()
    assert count == 45 + 37
    again, count = measured()
    assert count == 37
    assert again == first and again["constant_images"]["ref"] == [5]
    notes = capsys.readouterr().err
    assert notes.count("ref.npz: 1 image(s) of one colour") == notes.count("ref.npz: 45 images for 108 features") == 2
    shutil.copy(files / "ref.npz", files / "moved.npz")
    os.utime(files / "moved.npz", (0, 0))
    assert measured(ref="moved.npz")[1] == 37, "the name and the time of a file are nothing"
    assert measured("other weights")[1] == 45 + 37
    images[0] += 1
    np.savez(files / "ref.npz", images)
    assert measured()[1] == 45 + 37


def test_a_damaged_cache_is_made_anew(files, measured, capsys):
    first, _ = measured()
    (kept,) = (files / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    again, count = measured()
    assert (again, count) == (first, 45 + 37)
    assert "it is made anew" in capsys.readouterr().err
    assert measured()[1] == 37


def test_cached_statistics_are_those_the_reference_carries(files, measured):
    images = np.load(files / "ref.npz")["arr_0"]
    np.savez(files / "ref.npz", arr_0=images, mu=np.ones(108), sigma=np.eye(108), features=np.array(["pixels"]))
    first, _ = measured()
    assert measured() == (first, 37)


# --- faults


def test_non_finite_feature_names_file_and_image(files, state):
    images = np.load(files / "samples.npz")["arr_0"]

    class Faulty(Counting):
        def __call__(self, batch):
            pool = create_features("pixels")(batch).pool
            pool[(batch == images[23]).all(axis=(1, 2, 3))] = np.nan
            return Features(pool=pool)

    with pytest.raises(ValueError, match=r"samples\.npz: image 23 has a non-finite pool feature"):
        extract(str(files / "samples.npz"), range(37), Faulty(), 8, state)
    with pytest.raises(ValueError, match=r"samples\.npz: image 23 has a non-finite pool feature"):
        extract(str(files / "samples.npz"), [3, 5, 20, 23, 30], Faulty(), 2, state)


def test_gathering_in_blocks(files):
    """Rows larger than what is sent at once arrive in order; only then do the numbers agree."""
    script = files / "gather.py"
    script.write_text(
        "import numpy as np\n"
        "from runtime import distributed\n"
        "state = distributed.start()\n"
        "distributed.GATHER_BYTES = 100\n"
        "rank = state.process_index\n"
        "rows = np.arange(70).reshape(10, 7)[:6] + 1000 * rank if rank else None\n"
        "rows = distributed.gather_rows(rows, state)\n"
        "assert distributed.gather_rows(None, state) is None\n"
        "distributed.leave_group()\n"
        "if state.is_main_process:\n"
        "    expected = np.concatenate([np.arange(42).reshape(6, 7) + 1000 * r for r in (1, 2)])\n"
        "    assert (rows == expected).all(), rows\n"
        "    print('in order')\n"
        "else:\n"
        "    assert rows is None\n"
    )
    assert run_script(str(script), processes=3).stdout == "in order\n"


# --- memory

MEASURE = """
import resource, sys
from evaluations import evaluator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluator.main([*sys.argv[1:], "--features", "pixels"])
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_3000_images_of_64_pixels(tmp_path):
    """Features of 32 x 32 x 3 in float32 are 35 MiB a file, a 3072 x 3072 covariance in float64 is 72 MiB, and the distance of
    two of them needs several such matrices. 800 MiB in all is the bound that docs/evaluation.md states."""
    rng = np.random.default_rng(0)
    for name in ("ref", "samples"):
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 256, (3000, 64, 64, 3), np.uint8))
    command = [sys.executable, "-c", MEASURE, tmp_path / "ref.npz", tmp_path / "samples.npz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout.split("MiB")[1]) < 800
