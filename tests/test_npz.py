"""Streaming .npz files: they are numpy's, whatever the block size, and damage is reported."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from data import npz
from data.npz import RowBlocks, npz_keys, npz_shape, read_array, read_batches, write_npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 100])
def test_reads_what_numpy_writes(tmp_path, save, batch_size):
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), np.uint8)
    path = tmp_path / "a.npz"
    save(path, images, mu=np.arange(3.0))
    assert npz_keys(path) == ["mu", "arr_0"]
    assert npz_shape(path, "arr_0") == ((10, 5, 4, 3), np.uint8)
    assert npz_shape(path, "mu") == ((3,), np.float64)
    blocks = list(read_batches(path, "arr_0", batch_size))
    assert [len(block) for block in blocks] == [batch_size] * (10 // batch_size) + [10 % batch_size] * (10 % batch_size > 0)
    np.testing.assert_array_equal(np.concatenate(blocks), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("rows", [range(3, 9), [0], [2, 3, 4, 7, 9], []])
def test_reads_chosen_rows(tmp_path, save, rows):
    """A process reads its own slice, a subset its own images: every gap is skipped, none shifts what follows."""
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), np.uint8)
    save(tmp_path / "a.npz", images)
    blocks = list(read_batches(tmp_path / "a.npz", "arr_0", 2, rows))
    assert [len(block) for block in blocks] == [2] * (len(rows) // 2) + [1] * (len(rows) % 2)
    np.testing.assert_array_equal(np.concatenate([images[:0], *blocks]), images[list(rows)])


def test_whole_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", names=np.array(["inception"]), mu=np.arange(9000.0), empty=np.empty((0, 3), np.int32))
    assert read_array(tmp_path / "a.npz", "names").tolist() == ["inception"]
    np.testing.assert_array_equal(read_array(tmp_path / "a.npz", "mu"), np.arange(9000.0))
    assert read_array(tmp_path / "a.npz", "empty").shape == (0, 3)


def test_numpy_reads_what_is_written(tmp_path, monkeypatch):
    """Arrays, memory maps, single numbers, empty and strided arrays, text."""
    monkeypatch.setattr(npz, "BLOCK_BYTES", 100)
    np.save(tmp_path / "mapped.npy", np.random.default_rng(0).random((50, 7), np.float32))
    arrays = {
        "mapped": np.load(tmp_path / "mapped.npy", mmap_mode="r"),
        "number": np.float64(3.5),
        "empty": np.empty((0, 4), np.int32),
        "strided": np.arange(60).reshape(6, 10).T[::2],
        "big_endian": np.arange(5, dtype=">i4"),
        "text": np.array(["inception", "pixels"]),
    }
    write_npz(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz") as loaded:
        assert sorted(loaded) == sorted(arrays)
        for key, array in arrays.items():
            assert loaded[key].dtype == array.dtype
            np.testing.assert_array_equal(loaded[key], array)


def test_blocks_give_the_bytes_of_the_whole_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 3), np.uint8)
    write_npz(tmp_path / "whole.npz", {"arr_0": images})
    blocks = (images[start : start + 3] for start in range(0, 11, 3))
    write_npz(tmp_path / "blocks.npz", {"arr_0": RowBlocks(images.shape, images.dtype, blocks)})
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "blocks.npz").read_bytes()


def test_members_announce_zip64(tmp_path):
    """Without it, zipfile fails after 2 GiB: 50,000 images of 256 x 256 have 9.8 GB. The header then says version 4.5."""
    write_npz(tmp_path / "a.npz", {"arr_0": np.zeros((2, 2), np.uint8)})
    assert (tmp_path / "a.npz").read_bytes()[4] == 45


def test_memory_holds_blocks_only(tmp_path):
    """64 MiB pass through, written from a generator and read back, with less than 8 MiB in memory."""
    rows, row = 64, np.zeros((1, 2**20), np.uint8)
    tracemalloc.start()
    try:
        write_npz(tmp_path / "a.npz", {"arr_0": RowBlocks((rows, 2**20), row.dtype, (row for _ in range(rows)))})
        assert sum(len(block) for block in read_batches(tmp_path / "a.npz", "arr_0", 2)) == rows
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([np.zeros((3, 2))], "3 rows were given, 4 were announced"),
        ([np.zeros((3, 2))] * 2, "6 rows were given, 4 were announced"),
        ([np.zeros((4, 3))], "a block of rows is"),
        ([np.zeros((4, 2), np.float32)], "a block of rows is"),
    ],
)
def test_wrong_blocks_leave_the_old_file(tmp_path, blocks, message):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_npz(path, {"arr_0": RowBlocks((4, 2), np.dtype(np.float64), blocks)})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_objects_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="Python objects"):
        write_npz(tmp_path / "a.npz", {"arr_0": np.array([{}, None])})


def read(path, key="arr_0"):
    return list(read_batches(path, key, 2))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.npz does not exist"):
        read(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path)


def test_not_an_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npy is not a whole \.npz file"):
        read(tmp_path / "a.npy")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match=r"empty\.npz is not a whole \.npz file"):
        read(tmp_path / "empty.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_files(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, np.random.default_rng(0).integers(0, 256, (100, 50), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.npz is not a whole \.npz file"):
        read(path)
    path.write_bytes(whole[:2000] + bytes(byte ^ 255 for byte in whole[2000:2100]) + whole[2100:])
    with pytest.raises(ValueError, match=r"a\.npz is not a whole \.npz file"):
        read(path)


def test_member_shorter_than_its_header_says(tmp_path):
    path = tmp_path / "a.npz"
    np.save(tmp_path / "a.npy", np.zeros((5, 4)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.npz: arr_0 ends within row 3 of 5"):
        read(path)


def test_members_that_cannot_be_read_by_rows(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, objects=np.array([{}, None]), fortran=np.zeros((3, 4), order="F"), number=1.0)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("noise.npy", b"no header at all")
    for key, message in {
        "objects": "pickled Python objects",
        "fortran": r"Fortran order.*np\.ascontiguousarray",
        "number": "single number",
        "noise": "no readable header",
        "arr_0": "no array named arr_0; it holds objects, fortran, number, noise",
    }.items():
        with pytest.raises(ValueError, match=rf"a\.npz.*{message}"):
            read(path, key)
