"""Latent stores and folders of the published layout whose files do not fit one another, or are damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

import extract_features
from tests.fuzz_damage import ODD, damage, damages, replace_file, set_json
from tests.fuzz_images import make_images
from tests.fuzzing import HERE

LAYOUTS = ("latents", "moments", "published")
FILES = ("meta.json", "latents.npy", "latents_flipped.npy", "labels.npy")
READ_STORE = {
    "train": (
        "train_mask_adan",
        f"--feature-path {HERE}/files/NAME --model EDT-Ti/2 --max-steps 2 --global-batch-size 4 --results-dir {HERE}/new",
    ),
    "reference": ("evaluations.reference", f"{HERE}/files/NAME {HERE}/new.npz --features pixels --vae pixels"),
    "extract": (
        "extract_features",
        f"--data-path {HERE}/files/images --features-path {HERE}/files/NAME --vae pixels --image-size 16 --num-workers 0",
    ),
}
META = (
    "format", "codec", "scale", "image_size", "store", "flip", "shape", "dtype", "class_names", "complete", "seed", "source",
    "num_images", "surplus",
)  # fmt: skip
SHAPES = (
    [4, 3, 16, 16],
    [5, 3, 16, 16],
    [3, 3, 16, 16],
    [0, 3, 16, 16],
    [4, 3, 16],
    [4, 6, 16, 16],
    [-1, 3, 16, 16],
    [4, "3", 16, 16],
    [4.0, 3, 16, 16],
)
ARRAYS: dict[str, Callable[[], np.ndarray]] = {
    "nan": lambda: np.full((4, 3, 16, 16), np.nan, np.float32),
    "one nan": lambda: _with_one(np.nan),
    "infinite": lambda: _with_one(np.inf),
    "huge": lambda: np.full((4, 3, 16, 16), 1e38, np.float32),
    "fewer": lambda: np.zeros((3, 3, 16, 16), np.float32),
    "more": lambda: np.zeros((5, 3, 16, 16), np.float32),
    "none": lambda: np.zeros((0, 3, 16, 16), np.float32),
    "other side": lambda: np.zeros((4, 3, 8, 8), np.float32),
    "not square": lambda: np.zeros((4, 3, 16, 8), np.float32),
    "one channel": lambda: np.zeros((4, 1, 16, 16), np.float32),
    "odd channels": lambda: np.zeros((4, 5, 16, 16), np.float32),
    "flat": lambda: np.zeros(4, np.float32),
    "scalar": lambda: np.array(1.0),
    "half": lambda: np.zeros((4, 3, 16, 16), np.float16),
    "double": lambda: np.zeros((4, 3, 16, 16)),
    "whole numbers": lambda: np.zeros((4, 3, 16, 16), np.int32),
    "fortran": lambda: np.asfortranarray(np.zeros((4, 3, 16, 16), np.float32)),
    "big-endian": lambda: np.zeros((4, 3, 16, 16), ">f4"),
    "objects": lambda: np.array([None] * 4, object),
    "text": lambda: np.array(["a"] * 4),
    "labels": lambda: np.array([0, 1, 1, 0]),
    "negative labels": lambda: np.array([0, -1, 1, 0]),
    "float labels": lambda: np.array([0.0, 1.0, 1.0, 0.0]),
    "labels beyond": lambda: np.array([0, 1, 2, 10**6]),
    "labels far beyond": lambda: np.array([0, 1, 2, 2**62]),
    "one label": lambda: np.array([1]),
    "one label far beyond": lambda: np.array([2**62]),
    "one negative label": lambda: np.array(-1),
    "unsigned labels": lambda: np.array([0, 1, 2, 2**64 - 1], np.uint64),
    "labels in a column": lambda: np.array([[0], [1], [1], [0]]),
    "true and false": lambda: np.array([True, False, True, False]),
    "fewer labels": lambda: np.array([0, 1]),
}


def _with_one(value: float) -> np.ndarray:
    latents = np.zeros((4, 3, 16, 16), np.float32)
    latents[2, 1, 3, 3] = value
    return latents


def make_stores(folder: Path) -> None:
    make_images(folder / "images")
    flags = ["--data-path", str(folder / "images"), "--vae", "pixels", "--image-size", "16", "--num-workers", "0"]
    extract_features.main([*flags, "--features-path", str(folder / "latents"), "--flip"])
    moments = shutil.copytree(folder / "latents", folder / "moments")  # which pixels have none of: the log-variances are 0
    for name in ("latents.npy", "latents_flipped.npy"):
        mean = np.load(moments / name)
        np.save(moments / name, np.concatenate([mean, np.zeros_like(mean)], axis=1))
    set_json(moments / "meta.json", ("store",), "moments")
    set_json(moments / "meta.json", ("shape",), [4, 6, 16, 16])
    latents, labels = (folder / "published" / f"imagenet16_{name}" for name in ("features", "labels"))
    latents.mkdir(parents=True)
    labels.mkdir()
    for i in range(4):
        np.save(latents / f"{i}.npy", np.random.default_rng(i).normal(size=(1, 4, 16, 16)).astype(np.float32))
        np.save(labels / f"{i}.npy", np.array([i % 2]))


@st.composite
def store_cases(draw_) -> dict:
    name = draw_(st.sampled_from(LAYOUTS))
    case = {"name": name, "read": draw_(st.sampled_from(tuple(READ_STORE)))}
    numbered = [f"imagenet16_{kind}/{i}.npy" for kind in ("features", "labels") for i in (0, 2)]
    file = draw_(st.sampled_from(numbered if name == "published" else FILES))
    case |= {"file": file}
    if file == "meta.json" and draw_(st.booleans()):
        entry = draw_(st.sampled_from(META))
        return case | {"entry": (entry,), "value": draw_(st.sampled_from(SHAPES if entry == "shape" else ODD))}
    how = draw_(st.sampled_from(("bytes", "array", "array", "odd")))
    values = {"bytes": damages(), "array": st.sampled_from(tuple(ARRAYS)), "odd": st.sampled_from(ODD_WAYS)}
    return case | {how: draw_(values[how])}


ODD_WAYS = ("gone", "folder", "empty", "other name", "surplus", "progress", "short progress", "emptied")


def spoil_store(case: dict, folder: Path) -> None:
    store = folder / "files" / case["name"]
    path = store / case["file"]
    if "entry" in case:
        set_json(path, case["entry"], case["value"])
    elif "bytes" in case:
        damage(path, case["bytes"])
    elif "array" in case:
        path.unlink()
        with open(path, "wb") as file:
            np.save(file, ARRAYS[case["array"]]())
    else:
        _make_odd(store, path, case["odd"])


def _make_odd(store: Path, path: Path, how: str) -> None:
    if how in ("gone", "folder", "other name"):
        data = path.read_bytes()
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "other name":
            path.with_name("00" + path.name).write_bytes(data)
    elif how == "empty":
        replace_file(path, b"")
    elif how == "surplus":
        shutil.copy(path, path.with_name("7.npy"))
    elif how in ("progress", "short progress"):
        (store / "latents.progress").write_bytes(b"\1\2\7\1" if how == "progress" else b"\1\1")
    else:
        shutil.rmtree(store)
        store.mkdir()
