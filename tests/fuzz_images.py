"""Image folders with one file that is damaged, of an odd format or no image at all."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz_damage import damage, damages
from tests.fuzzing import HERE


def make_images(folder: Path) -> None:
    """Two good images of two classes; a third is added by each case."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / label / f"{i}.png")


FORMATS = ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm", "tga", "ico", "jp2", "avif")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "RGBX", "La", "RGBa")
SIDES = ((1, 1), (1, 500), (500, 1), (3, 2), (24, 20), (1000, 16))
ODD_FILES = (
    "empty", "text", "folder", "broken link", "link to itself", "fifo", "locked", "bomb png", "bomb header", "long name",
    "unicode name", "not utf-8 name", "new line name", "hidden", "upper case", "svg", "link out", "truncated jpeg", "deep",
    "device", "mpo", "16-bit png",
)  # fmt: skip
READ_IMAGES = {
    "extract": (
        "extract_features",
        f"--data-path {HERE}/files --features-path {HERE}/new --vae pixels --image-size 16 --num-workers 0 --batch-size 2",
    ),
    "extract others": (
        "extract_features",
        f"--data-path {HERE}/files --features-path {HERE}/new --vae pixels --image-size 16 --num-workers 0 --skip-bad",
    ),
    "reference": (
        "evaluations.reference",
        f"{HERE}/files {HERE}/new.npz --image-size 16 --features pixels --num-workers 1",
    ),
    "train": (
        "train_mask_adan",
        f"--data-path {HERE}/files --model EDT-Ti/2 --vae pixels --image-size 16 --max-steps 1 --global-batch-size 4 "
        f"--num-workers 0 --results-dir {HERE}/new",
    ),
}


@st.composite
def image_cases(draw_) -> dict:
    case = {"read": draw_(st.sampled_from(tuple(READ_IMAGES)))}
    if draw_(st.integers(0, 2)) == 0:
        return case | {"odd": draw_(st.sampled_from(ODD_FILES))}
    case |= {"format": draw_(st.sampled_from(FORMATS)), "mode": draw_(st.sampled_from(MODES))}
    case |= {"size": draw_(st.sampled_from(SIDES)), "frames": draw_(st.sampled_from((1, 1, 3)))}
    return case | ({"bytes": draw_(damages())} if draw_(st.booleans()) else {})


def spoil_images(case: dict, folder: Path) -> None:
    place = folder / "files" / "a"
    if "odd" in case:
        return _add_odd_file(place, case["odd"])
    path = place / f"new.{case['format']}"
    pixels = np.random.default_rng(0).integers(0, 256, (*case["size"][::-1], 3), np.uint8)
    more = {"save_all": True, "append_images": [Image.fromarray(255 - pixels)] * 2} if case["frames"] > 1 else {}
    try:
        _as_mode(Image.fromarray(pixels), case["mode"]).save(path, **more)
    except (OSError, ValueError, KeyError, RuntimeError, SystemError):  # formats take some modes only
        path.unlink(missing_ok=True)
        Image.fromarray(pixels).save(path.with_suffix(".png"))
        path = path.with_suffix(".png")
    if "bytes" in case:
        damage(path, case["bytes"])


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode in ("LA", "La", "PA"):
        return image.convert("L").convert("LA").convert(mode)
    if mode == "RGBa":
        return image.convert("RGBA").convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    if mode == "I;16":
        return Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    return image.convert(mode)


def _add_odd_file(place: Path, kind: str) -> None:
    good, path = place / "0.png", place / "odd.jpg"
    names = {
        "long name": "n" * 240 + ".png", "unicode name": "ünïcode-文\u202e.png", "not utf-8 name": os.fsdecode(b"\xff\xfe.png"),
        "new line name": "new\nline.png", "hidden": ".hidden.png", "upper case": "UPPER.PNG",
    }  # fmt: skip
    if kind in names:
        shutil.copy(good, place / names[kind])
    elif kind == "empty":
        path.touch()
    elif kind in ("text", "svg"):
        path.write_text("no image" if kind == "text" else '<svg xmlns="http://www.w3.org/2000/svg"/>')
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("broken link", "link to itself", "link out", "device"):
        path.symlink_to(
            {"broken link": "nowhere", "link to itself": "odd.jpg", "link out": "/etc/hostname", "device": "/dev/zero"}[kind]
        )
    elif kind == "locked":
        shutil.copy(good, path)
        path.chmod(0)
    elif kind in ("bomb png", "bomb header"):
        side = 20_000 if kind == "bomb png" else 2**31 - 1
        data = bytearray(good.read_bytes())
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (place / "bomb.png").write_bytes(data)
    elif kind == "truncated jpeg":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-900])
    elif kind == "deep":
        deep = place.joinpath(*["d"] * 60)
        deep.mkdir(parents=True)
        shutil.copy(good, deep)
    elif kind == "mpo":
        Image.open(good).save(place / "two.mpo", save_all=True, append_images=[Image.open(good)])
    elif kind == "16-bit png":
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160).save(place / "deep.png")
