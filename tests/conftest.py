"""Fixtures that several test files share: tiny inputs made on the spot, nothing is downloaded."""

import os
from pathlib import Path

# The tests' promises are a CPU's, of one process or two: on a machine with GPUs they keep off these, but for test_cuda.py.
if not os.environ.get("REQUIRE_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.inception import save_random_inception
from runtime import cli

torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def adm_golden() -> dict[str, np.ndarray]:
    """Features, and ADM's metrics of them."""
    with np.load(Path(__file__).parent / "golden" / "adm_metrics.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory) -> Path:
    """Folder of an untrained AutoencoderKL with the SD VAE's geometry: 8 times downsampling, 4 channels, scale 0.18215."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        )
    folder = tmp_path_factory.mktemp("tiny_vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """14 random images of several formats and sizes in three classes, one of them below a nested folder. Read-only."""
    root = tmp_path_factory.mktemp("image_folder")
    rng = np.random.default_rng(0)
    extensions = {"ant": ("png", "jpg", "bmp", "PNG", "webp"), "bee": ("jpeg", "gif", "tiff", "png"), "cat": ("png",) * 5}
    for label, (name, kinds) in enumerate(extensions.items()):
        for k, extension in enumerate(kinds):
            folder = root / name / ("nested" if label == 1 and k == 3 else "")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (33 + 5 * k, 40 + 9 * label, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.{extension}")
    return root


@pytest.fixture(scope="session")
def latent_store(image_folder, tmp_path_factory) -> Path:
    """The image folder as a latent store of 16x16 pixels. Read-only."""
    import extract_features

    store = tmp_path_factory.mktemp("latent_store") / "features"
    extract_features.main(
        [
            "--data-path",
            str(image_folder),
            "--features-path",
            str(store),
            "--vae",
            "pixels",
            "--image-size",
            "16",
            "--num-workers",
            "0",
        ]
    )
    return store


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A weights file of torch-fidelity's Inception with random values."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    save_random_inception(path)
    return path


@pytest.fixture
def fails(capsys):
    """fails(main, *argv): run a script as its command line does; the one line it leaves on stderr beside its notes."""

    def run(main, *argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.run(lambda _: main(list(map(str, argv))))
        assert exit_.value.code == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps device, processes and precision for the life of the process; a script run in a test must not see those
    of the last one. A test that runs several calls the fixture's value between them."""
    from accelerate.state import AcceleratorState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield reset
    reset()
