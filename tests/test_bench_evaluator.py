"""The evaluator's benchmark from end to end, on small sets. Nothing here depends on real speed."""

import re

import numpy as np

from benchmarks import evaluator


def test_quick_run_compares_and_writes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "write_section", lambda *args: 1 / 0)
    evaluator.main(["--quick", "--rounds", "1"])
    text = capsys.readouterr().out
    for name in ("Frechet", "Frechet from features", "Frechet, singular", "precision and recall"):
        assert re.search(rf"^\| {name} +\|", text, re.MULTILINE), text
        found = re.search(rf"^- {name}: .* \(target .*relative difference (\S+)$", text, re.MULTILINE)
        assert float(found[1]) < 1e-5, text
    assert "times as fast as plain float32, " in text


def test_features_are_like_inceptions():
    features = evaluator.pool_features(600, 64, seed=1, shift=0.0)
    assert features.dtype == np.float32 and features.min() == 0 and 0.3 < (features == 0).mean() < 0.7
    spectrum = np.linalg.eigvalsh(np.cov(features, rowvar=False))
    assert spectrum[-1] > 10 * np.median(spectrum)
    assert not np.array_equal(features, evaluator.pool_features(600, 64, seed=2, shift=0.0))
