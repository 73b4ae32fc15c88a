"""data.images: listing, the centre crop against closed forms, unusual and damaged files."""

import os

import numpy as np
import pytest
from PIL import Image

from data.images import ImageFolder, center_crop, image_extensions, load_image


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_listing_is_sorted_and_labelled(image_folder):
    folder = ImageFolder(image_folder)
    assert len(folder) == 14
    assert folder.class_names == ["ant", "bee", "cat"]
    assert folder.labels.dtype == np.int64
    np.testing.assert_array_equal(folder.labels, [0] * 5 + [1] * 4 + [2] * 5)
    assert folder.paths == sorted(folder.paths)
    assert os.path.join(image_folder, "bee", "nested", "3.png") in folder.paths
    assert ImageFolder(str(image_folder)).paths == folder.paths


def test_listing_leaves_other_files_alone(tmp_path):
    (tmp_path / "a" / ".cache").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("a/1.png", "a/notes.txt", "a/.2.png", "a/.cache/3.png", ".hidden/4.png", "top.png"):
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ["a"]
    assert folder.paths == [str(tmp_path / "a" / "1.png")]


def test_extensions_are_pillows():
    assert {".jpeg", ".jpg", ".png", ".webp", ".tiff", ".gif", ".ppm"} <= image_extensions()
    assert ".pdf" not in image_extensions()  # Pillow writes it but cannot read it


def test_digest_follows_names_not_place(tmp_path):
    for root, name in (("one", "x"), ("two", "x"), ("three", "y")):
        (tmp_path / root / "a").mkdir(parents=True)
        (tmp_path / root / "a" / f"{name}.png").touch()
    one, two, three = (ImageFolder(tmp_path / root).digest() for root in ("one", "two", "three"))
    assert one == two != three
    assert ImageFolder(f"{tmp_path}/one/").digest() == one


def test_listing_errors(tmp_path):
    with pytest.raises(ValueError, match=r"gone does not exist"):
        ImageFolder(tmp_path / "gone")
    file = tmp_path / "file.png"
    file.touch()
    with pytest.raises(ValueError, match=r"file\.png is not a folder"):
        ImageFolder(file)
    with pytest.raises(ValueError, match=r"no class sub-folders .images lie directly in it"):
        ImageFolder(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no class sub-folders .it is empty"):
        ImageFolder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images in the 1 class"):
        ImageFolder(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.png").touch()
    with pytest.raises(ValueError, match=r"a holds no images: fill it or remove it"):
        ImageFolder(tmp_path)


def test_crop_of_the_right_size_is_the_identity():
    image = random_image(24, 24)
    np.testing.assert_array_equal(center_crop(image, 24), image)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(41, 24, 8, 0), (24, 41, 0, 8), (40, 24, 8, 0)])
def test_crop_without_resizing_cuts_the_middle(width, height, left, top):
    image = random_image(width, height)
    np.testing.assert_array_equal(center_crop(image, 24), np.asarray(image)[top : top + 24, left : left + 24])


def test_crop_halves_with_the_mean_of_two_by_two():
    """At exactly twice the size the result is the box mean, which bicubic resizing is not."""
    image = random_image(48, 48)
    mean = np.asarray(image, np.float64).reshape(24, 2, 24, 2, 3).mean((1, 3))
    np.testing.assert_allclose(center_crop(image, 24), mean, atol=1)  # Pillow rounds after each direction


def test_crop_halves_repeatedly_then_resizes():
    image = random_image(230, 107)
    halved = image.resize((115, 53), Image.Resampling.BOX)  # 53 < 2 * 32: no second halving
    resized = halved.resize((69, 32), Image.Resampling.BICUBIC)  # 115 * 32 / 53 = 69.4
    np.testing.assert_array_equal(center_crop(image, 32), np.asarray(resized)[:, 18:50])


@pytest.mark.parametrize(("width", "height"), [(7, 5), (5, 7), (1, 1), (300, 3), (101, 99)])
def test_crop_size_of_odd_shapes(width, height):
    assert center_crop(random_image(width, height), 16).size == (16, 16)


def test_crop_of_a_constant_image_is_constant():
    crop = np.asarray(center_crop(Image.new("RGB", (77, 51), (3, 141, 255)), 20))
    assert (crop == [3, 141, 255]).all()


def test_every_file_of_the_folder_loads(image_folder):
    for path in ImageFolder(image_folder).paths:
        image = load_image(path, 16)
        assert image.shape == (16, 16, 3)
        assert image.dtype == np.uint8
        assert image.std() > 5


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = load_image(tmp_path / "deep.png", 16)
    np.testing.assert_array_equal(image, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def test_other_modes_become_rgb(tmp_path):
    rgb = random_image(16, 16)
    grey = rgb.convert("L")
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load_image(tmp_path / "grey.png", 16), np.stack([np.asarray(grey)] * 3, axis=2))

    with_alpha = rgb.copy()
    with_alpha.putalpha(128)
    with_alpha.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.png", 16), rgb)

    palette = rgb.quantize(16)
    palette.save(tmp_path / "palette.png", transparency=0)
    np.testing.assert_array_equal(load_image(tmp_path / "palette.png", 16), palette.convert("RGB"))

    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    assert (load_image(tmp_path / "cmyk.tiff", 16) == [255, 0, 0]).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (load_image(tmp_path / "moving.gif", 16) == [255, 0, 0]).all()


def test_damaged_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    random_image(32, 32).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((16, 16), np.float32)).save(tmp_path / "float.tiff")
    for name in ("cut.png", "text.jpg", "empty.png", "float.tiff", "gone.png"):
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}.*replace or remove"):
            load_image(tmp_path / name, 16)
