"""Damage to a file's bytes, and odd values for the entries of a file."""

import json
import os
from pathlib import Path

from hypothesis import strategies as st

ODD = (
    None, True, -1, 0, 1, 2**31, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "pixels", "nan", [], [1],
    [[1]], [-1, 2**70], {}, {"a": 1}, "\udcff", "é" * 300, "https://user:s3cret-pass@host.invalid/", "../../x", "/",
)  # fmt: skip


@st.composite
def damages(draw_) -> tuple[tuple, ...]:
    """Where: a fraction of the length, or so many bytes from the start (or, negative, from the end)."""
    near = st.one_of(st.integers(0, 600), st.integers(-600, -1), st.floats(0, 1))
    one = st.one_of(
        st.tuples(st.just("cut"), near),
        st.tuples(st.just("flip"), near, st.integers(0, 7)),
        st.tuples(st.just("flip"), near, st.integers(0, 7)),
        st.tuples(
            st.just("put"),
            near,
            st.sampled_from((b"\0", b"\xff" * 8, b"9", b"-", b"\x80\x04", b"{", b'"', os.linesep.encode() * 9)),
        ),
        st.tuples(st.just("insert"), near, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("remove"), near, st.integers(1, 40)),
    )
    return tuple(draw_(st.lists(one, min_size=1, max_size=4)))


def damage(path: Path, steps: tuple[tuple, ...]) -> None:
    data = bytearray(path.read_bytes())
    for kind, where, *rest in steps:
        place = int(where * len(data)) if isinstance(where, float) else where % max(1, len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "flip" and place < len(data):
            data[place] ^= 1 << rest[0]
        elif kind == "put":
            data[place : place + len(rest[0])] = rest[0]
        elif kind == "insert":
            data[place:place] = rest[0]
        elif kind == "remove":
            del data[place : place + rest[0]]
    replace_file(path, bytes(data))


def replace_file(path: Path, data: bytes) -> None:
    """Not in place: the template's files are linked."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def set_entry(content: object, entry: tuple, value: object) -> None:
    for key in entry[:-1]:
        content = content[key]
    content[entry[-1]] = value


def set_json(path: Path, entry: tuple, value: object) -> None:
    content = json.loads(path.read_text())
    set_entry(content, entry, value)
    replace_file(path, json.dumps(content).encode())
