"""benchmarks.curves: how differences of paired runs are measured against the spread between seeds."""

import numpy as np
import pytest

from benchmarks import curves


def losses() -> tuple[np.ndarray, np.ndarray]:
    """Three seeds, ten points: the seeds lie 1 apart, bf16 0.1, 0.2 and 0.3 above fp32."""
    fp32 = np.full((3, 10), 5.0) + np.arange(3)[:, None]
    return fp32, fp32 + np.array([[0.1], [0.2], [0.3]])


def test_differences_are_of_pairs_and_the_spread_is_of_seeds():
    rows = curves.compare(*losses())
    assert len(rows) == curves.PARTS + 1
    for row in rows:
        assert row["fp32"] == pytest.approx(6.0) and row["bf16"] == pytest.approx(6.2)
        assert row["difference"] == pytest.approx(0.2) and row["error"] == pytest.approx(0.1 / 3**0.5)
        assert row["spread"] == pytest.approx(((1 + 1.1**2) / 2) ** 0.5)


def test_the_section_says_whether_bf16_is_within_the_noise(tmp_path):
    args = curves.parse(["--steps", "100"])
    fp32, bf16 = losses()
    assert "within the spread" in curves.describe(curves.compare(fp32, bf16), args)
    assert "MORE THAN the spread" in curves.describe(curves.compare(fp32, bf16 + 2), args)
    curves.draw(fp32, bf16, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_numbers_that_leave_no_whole_parts_or_no_spread_are_usage_errors(capsys):
    for flags in (["--steps", "120"], ["--seeds", "1"]):
        with pytest.raises(SystemExit):
            curves.parse(flags)
        assert flags[0] in capsys.readouterr().err
