"""Damaged .npz batches: their bytes, arrays, headers or zip directory changed."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from tests.fuzz_damage import damage, damages, replace_file
from tests.fuzzing import HERE


def make_batches(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, sigma = rng.integers(0, 256, (2, 12, 4, 4, 3), np.uint8), np.eye(48) / 10
    np.savez(folder / "ref.npz", arr_0=images[0], mu=np.full(48, 0.5), sigma=sigma, features=np.array(["pixels"]))
    np.savez_compressed(folder / "samples.npz", arr_0=images[1], arr_1=rng.integers(0, 3, 12))


ODD_ARRAYS: dict[str, Callable[[], np.ndarray]] = {
    "float": lambda: np.random.default_rng(1).random((12, 4, 4, 3)),
    "nan": lambda: np.full((12, 4, 4, 3), np.nan),
    "infinite": lambda: np.full(48, np.inf),
    "int64": lambda: np.arange(12 * 48).reshape(12, 4, 4, 3),
    "bool": lambda: np.ones((12, 4, 4, 3), bool),
    "complex": lambda: np.ones((12, 4, 4, 3), complex),
    "text": lambda: np.array(["a"] * 12),
    "bytes": lambda: np.array([b"abc"] * 12),
    "objects": lambda: np.array([{}, None] * 6, dtype=object),
    "records": lambda: np.zeros(12, dtype=[("a", "u1"), ("b", "f4")]),
    "times": lambda: np.zeros((12, 4, 4, 3), "datetime64[s]"),
    "no rows": lambda: np.zeros((0, 4, 4, 3), np.uint8),
    "no pixels": lambda: np.zeros((12, 0, 4, 3), np.uint8),
    "one row": lambda: np.zeros((1, 4, 4, 3), np.uint8),
    "black": lambda: np.zeros((12, 4, 4, 3), np.uint8),
    "grey": lambda: np.full((12, 4, 4, 3), 128, np.uint8),
    "channels first": lambda: np.full((12, 3, 4, 4), 128, np.uint8),
    "alpha": lambda: np.full((12, 4, 4, 4), 128, np.uint8),
    "flat": lambda: np.zeros(12, np.uint8),
    "scalar": lambda: np.array(3),
    "fortran": lambda: np.asfortranarray(np.random.default_rng(1).integers(0, 256, (12, 4, 4, 3), np.uint8)),
    "big-endian": lambda: np.full((12, 4, 4, 3), 9, ">u2"),
    "other size": lambda: np.random.default_rng(1).integers(0, 256, (12, 5, 7, 3), np.uint8),
    "negative labels": lambda: np.arange(12) - 6,
    "great labels": lambda: np.arange(12) + 10**12,
    "unsigned labels": lambda: np.full(12, 2**64 - 1, np.uint64),
    "asymmetric": lambda: np.arange(48.0 * 48).reshape(48, 48),
    "indefinite": lambda: -np.eye(48),
    "huge numbers": lambda: np.full((48, 48), 1e308),
}
HEADERS = (
    {"shape": (10**12, 4, 4, 3)}, {"shape": (12, 10**9, 10**9, 3)}, {"shape": (-1, 4, 4, 3)}, {"shape": (2**63, 4, 4, 3)},
    {"shape": (13, 4, 4, 3)}, {"shape": (11, 4, 4, 3)}, {"shape": (12.0, 4, 4, 3)}, {"shape": ("a",)}, {"shape": [12]},
    {"descr": "|O"}, {"descr": "<f4"}, {"descr": "V" + "9" * 9}, {"descr": "nonsense"}, {"descr": [("a", "u1")]},
    {"fortran_order": 1},
    {"fortran_order": True}, {"surplus": 1}, {"descr": "<U99999999"}, {"descr": "|V0"}, {"shape": (True, 4, 4, 3)},
)  # fmt: skip
ZIPS = (
    "claims more",
    "claims less",
    "bomb",
    "encrypted",
    "twice",
    "escaping",
    "unknown method",
    "no members",
    "folder",
    "named png",
)
READ_BATCHES = (
    "", "--kid --kid-subsets 2 --kid-subset-size 4", "--per-class --class-balance", "--bootstrap 3", "--num-samples 8",
    f"--features {HERE}/module.pt", "--density-coverage", f"--cache {HERE}/kept --json {HERE}/new.json",
)  # fmt: skip
KEYS = ("arr_0", "arr_1", "mu", "sigma", "mu_s", "features", "surplus")


@st.composite
def npz_cases(draw_) -> dict:
    case = {"name": draw_(st.sampled_from(("ref.npz", "samples.npz"))), "flags": draw_(st.sampled_from(READ_BATCHES))}
    kind = draw_(st.sampled_from(("bytes", "array", "array", "header", "zip", "without")))
    values = {
        "bytes": damages(),
        "array": st.tuples(st.sampled_from(KEYS), st.sampled_from(tuple(ODD_ARRAYS))),
        "header": st.tuples(st.sampled_from(KEYS[:4]), st.sampled_from(HEADERS)),
        "zip": st.sampled_from(ZIPS),
        "without": st.sampled_from(KEYS),
    }
    return case | {kind: draw_(values[kind])}


def spoil_batch(case: dict, folder: Path) -> None:
    path = folder / "files" / case["name"]
    if "bytes" in case:
        return damage(path, case["bytes"])
    with np.load(path) as file:
        arrays = dict(file)
    path.unlink()
    if "array" in case:
        arrays[case["array"][0]] = ODD_ARRAYS[case["array"][1]]()
        np.savez(path, **arrays)
    elif "without" in case:
        arrays.pop(case["without"], None)
        np.savez(path, **arrays)
    elif "header" in case:
        _save_with_header(path, arrays, *case["header"])
    else:
        np.savez_compressed(path, **arrays)
        _spoil_zip(path, case["zip"])


def _save_with_header(path: Path, arrays: dict, key: str, said: dict) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            about = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | (said if name == key else {})
            text = (repr(about) + "\n").encode()
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + array.tobytes())


def _spoil_zip(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\1\2")  # the last member's, in the directory at the end
    if how in ("claims more", "claims less"):
        data[entry + 24 : entry + 28] = struct.pack("<I", 2**31 if how == "claims more" else 10)
    elif how == "encrypted":
        for place in (entry + 8, data.rfind(b"PK\3\4") + 6):
            data[place] |= 1
    elif how == "unknown method":
        data[entry + 10] = 99
    else:
        mode = "w" if how in ("no members", "bomb") else "a"
        with zipfile.ZipFile(path, mode, zipfile.ZIP_DEFLATED) as archive:
            if how == "bomb":  # 200 MB of zeros behind an honest header, from 200 kB
                with archive.open("arr_0.npy", "w") as member:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "|u1", "fortran_order": False, "shape": (200 * 2**20 // 48, 4, 4, 3)}
                    )
                    for _ in range(200):
                        member.write(bytes(2**20))
            elif how != "no members":
                names = {"twice": "arr_0.npy", "escaping": "../../escaped.npy", "folder": "arr_0.npy/", "named png": "a.png"}
                archive.writestr(names[how], b"nothing")
        return
    replace_file(path, bytes(data))


def batch_command(case: dict) -> tuple[str, str]:
    return (
        "evaluations.evaluator",
        f"{HERE}/files/ref.npz {HERE}/files/samples.npz --features pixels --split-size 5 {case['flags']}",
    )
