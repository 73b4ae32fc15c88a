"""evaluator.py: what it prints and writes, and what it says to bad input."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluations import evaluator, scores
from evaluations.features import Features
from evaluations.metrics import (
    bootstrap_frechet,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_covariance,
    membership,
    precision_recall,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def files(tmp_path, rng):
    """ref.npz and samples.npz: 60 and 50 images of 4 x 4, of different brightness."""
    ref, samples = rng.integers(0, 200, (60, 4, 4, 3), np.uint8), rng.integers(30, 256, (50, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "ref.npz", ref)
    np.savez_compressed(tmp_path / "samples.npz", samples)
    return tmp_path, ref, samples


def flat(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1) / np.float32(255)


@pytest.fixture
def evaluate(files, fresh_accelerate_state):
    folder, _, _ = files

    def run(*flags, ref="ref.npz", samples="samples.npz"):
        fresh_accelerate_state()
        return evaluator.main([str(folder / ref), str(folder / samples), "--features", "pixels", *map(str, flags)])

    return run


def test_prints_adms_lines_with_the_values_of_the_metrics(files, evaluate, capsys):
    _, ref, samples = files
    result = evaluate()
    fid = frechet_distance(*mean_covariance(flat(ref)), *mean_covariance(flat(samples)))
    precision, recall = precision_recall(flat(ref), flat(samples))
    assert result["fid"] == pytest.approx(fid, rel=1e-6)
    assert (result["precision"], result["recall"]) == (precision, recall)
    assert result["inception_score"] is None and result["sfid"] is None
    assert capsys.readouterr().out.splitlines() == [
        "Inception Score: n/a (these features have no such layer)",
        f"FID: {result['fid']} (pixels)",
        "sFID: n/a (these features have no such layer)",
        f"Precision: {precision} (pixels)",
        f"Recall: {recall} (pixels)",
    ]


def test_batch_size_changes_nothing_and_json_holds_the_result(files, evaluate):
    folder, _, _ = files
    whole = evaluate("--batch-size", "1000")
    result = evaluate("--batch_size=7", "--json", folder / "out" / "metrics.json")
    assert result == whole
    assert json.loads((folder / "out" / "metrics.json").read_text()) == result
    assert (result["num_ref"], result["num_samples"], result["features"], result["pr_half"]) == (60, 50, "pixels", False)


def test_half_reaches_precision_and_recall(files, evaluate):
    _, ref, samples = files
    result = evaluate("--pr-half")
    assert (result["precision"], result["recall"]) == precision_recall(flat(ref), flat(samples), half=True)
    assert result["pr_half"] is True


def test_a_set_against_itself(evaluate):
    result = evaluate(samples="ref.npz")
    assert result["fid"] == pytest.approx(0, abs=1e-9)
    assert (result["precision"], result["recall"]) == (1, 1)


# --- statistics that a reference carries


@pytest.mark.parametrize("owner", ["pixels", ["pixels"]])
def test_carried_statistics_are_used_instead_of_the_images(files, evaluate, owner):
    folder, ref, samples = files
    mu, sigma = mean_covariance(flat(ref))
    np.savez(folder / "carrying.npz", arr_0=ref, mu=mu + 1, sigma=4 * sigma, features=np.array(owner))
    expected = frechet_distance(mu + 1, 4 * sigma, *mean_covariance(flat(samples)))
    assert evaluate(ref="carrying.npz")["fid"] == pytest.approx(expected, rel=1e-6)


def test_statistics_alone_give_fid_only(files, evaluate, capsys, fails):
    folder, ref, _ = files
    mu, sigma = mean_covariance(flat(ref))
    np.savez(folder / "statistics.npz", mu=mu, sigma=sigma, features=np.array(["pixels"]))
    fid = evaluate()["fid"]
    capsys.readouterr()
    result = evaluate(ref="statistics.npz")
    assert result["fid"] == pytest.approx(fid, rel=1e-9)
    assert result["precision"] is None and result["recall"] is None
    assert "Recall: n/a (the reference holds statistics only, no images)" in capsys.readouterr().out
    for flag in ("--kid", "--density-coverage"):
        argv = (folder / "statistics.npz", folder / "samples.npz", "--features", "pixels", flag)
        assert f"{flag} needs the reference's images" in fails(evaluator.main, *argv)


def test_statistics_of_other_features(files, evaluate, capsys, fails):
    """ADM's reference batches carry Inception's and do not say so: nothing else must be compared with them, not even features
    that happen to be as many."""
    folder, ref, _ = files
    np.savez(folder / "inception.npz", arr_0=ref, mu=np.zeros(48), sigma=np.eye(48))
    np.savez(folder / "statistics.npz", mu=np.zeros(48), sigma=np.eye(48))
    fid = evaluate()["fid"]
    capsys.readouterr()
    assert evaluate(ref="inception.npz")["fid"] == fid
    assert "carries statistics of --features inception: they are not used" in capsys.readouterr().err
    message = fails(evaluator.main, folder / "statistics.npz", folder / "samples.npz", "--features", "pixels")
    assert re.search(r"carries statistics of --features inception and no images, they do not compare with pixels", message)


def test_features_of_the_reference_are_named_before_others_are_fetched(files, capsys):
    folder, ref, _ = files
    np.savez(folder / "pixels.npz", arr_0=ref, mu=np.zeros(48), sigma=np.eye(48), features=np.array("pixels"))
    argv = [folder / "pixels.npz", folder / "samples.npz", "--inception-weights", folder / "missing"]
    with pytest.raises(ValueError, match="missing"):
        evaluator.main([*map(str, argv)])
    noted = capsys.readouterr().err
    assert "was made with --features pixels, and --features is inception: --features pixels compares by the same" in noted


def test_statistics_that_do_not_fit(files, fails):
    folder, ref, _ = files
    for mu, sigma, message in [
        (np.zeros(7), np.eye(7), r"mu of 7 features, the samples have 48"),
        (np.zeros(48), np.eye(7), r"mu is \(48,\) and sigma \(7, 7\), \(D,\) and \(D, D\) are needed"),
        (np.full(48, np.nan), np.eye(48), "mu or sigma has a non-finite entry"),
        (np.zeros(48), None, r"features is \(2,\) <U6, it is to be one text"),
    ]:
        statistics = {"mu": mu, "features": ["pixels"]} | ({"features": ["a", "pixels"]} if sigma is None else {"sigma": sigma})
        np.savez(folder / "bad.npz", arr_0=ref, **statistics)
        line = fails(evaluator.main, folder / "bad.npz", folder / "samples.npz", "--features", "pixels")
        assert re.search(message, line) and "bad.npz" in line


# --- an extractor with every layer


class ThreeLayers:
    name = statistics = fingerprint = "inception"

    def __call__(self, images):
        pool = flat(images).astype(np.float32)
        return Features(pool=pool[:, :10], spatial=pool[:, 10:30], probs=np.exp(pool) / np.exp(pool).sum(1, keepdims=True))


@pytest.fixture
def three_layers(monkeypatch):
    monkeypatch.setattr(evaluator, "load_extractor", lambda *_: ThreeLayers())
    return ThreeLayers()


def test_all_five(files, evaluate, three_layers, capsys):
    """Numbers of Inception stand alone on their lines, as ADM prints them."""
    _, ref, samples = files
    ref_layers, layers = three_layers(ref), three_layers(samples)
    result = evaluate("--split-size", "20", "--batch-size", "9")
    assert result["inception_score"] == pytest.approx(inception_score(layers.probs, 20), rel=1e-6)
    for key, layer in (("fid", "pool"), ("sfid", "spatial")):
        both = mean_covariance(getattr(ref_layers, layer)), mean_covariance(getattr(layers, layer))
        assert result[key] == pytest.approx(frechet_distance(*both[0], *both[1]), rel=1e-6)
    expected = [f"{title}: {result[key]}" for key, title in scores.LINES.items()]
    assert capsys.readouterr().out.splitlines() == expected


def test_statistics_without_the_spatial_layer(files, evaluate, three_layers, capsys):
    """They are computed where there are images, and are absent where not."""
    folder, ref, _ = files
    sfid = evaluate()["sfid"]
    mu, sigma = mean_covariance(three_layers(ref).pool)
    np.savez(folder / "statistics.npz", mu=mu, sigma=sigma)
    np.savez(folder / "both.npz", mu=mu + 1, sigma=sigma, arr_0=ref)
    assert evaluate(ref="both.npz")["sfid"] == sfid
    assert evaluate(ref="statistics.npz")["sfid"] is None
    assert "sFID: n/a (the reference has neither images nor mu_s and sigma_s)" in capsys.readouterr().out


# --- on request


def test_kid_density_coverage_and_interval(files, evaluate, capsys):
    _, ref, samples = files
    result = evaluate("--kid", "--kid-subsets", 5, "--kid-subset-size", 30, "--seed", 3, "--density-coverage", "--bootstrap", 8)
    ref, samples = flat(ref).astype(np.float32), flat(samples).astype(np.float32)
    assert (result["kid"], result["kid_std"]) == pytest.approx(kernel_distance(ref, samples, 5, 30, 3), rel=1e-6)
    assert (result["density"], result["coverage"]) == density_coverage(ref, samples)
    error = bootstrap_frechet(*mean_covariance(ref), samples, 8, 3).std(ddof=1)
    assert result["fid_standard_error"] == pytest.approx(error, rel=1e-6)
    assert result["fid_interval"] == pytest.approx([result["fid"] - 1.96 * error, result["fid"] + 1.96 * error], rel=1e-6)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[5:]] == ["FID 95 % interval", "KID", "Density", "Coverage"]
    assert all(line.endswith("(pixels)") for line in printed[5:])


def test_num_samples_is_a_fixed_subset(files, evaluate):
    """As if the file held those images only."""
    folder, _, samples = files
    rows = evaluator.choose_rows(50, evaluator.parse_args(["r", "s", "--num-samples", "20"]))
    assert len(set(rows)) == 20 and rows == sorted(rows) and rows != list(range(20))
    np.savez(folder / "subset.npz", samples[rows])
    subset, expected = evaluate("--num-samples", 20, "--batch-size", 6), evaluate(samples="subset.npz")
    assert subset["num_samples"] == 20
    assert [subset[key] for key in scores.LINES] == [expected[key] for key in scores.LINES]
    assert evaluate("--num-samples", 20, "--seed", 1)["fid"] != subset["fid"]


@pytest.fixture
def labelled(files):
    folder, _, samples = files
    labels = np.repeat([0, 1, 3], [20, 20, 10])
    np.savez(folder / "labelled.npz", arr_0=samples, arr_1=labels)
    return labels


def test_precision_per_class(files, evaluate, labelled, capsys):
    _, ref, samples = files
    inside = membership(flat(ref), flat(samples))[0]
    result = evaluate("--per-class", samples="labelled.npz")
    assert result["precision_per_class"] == {str(label): inside[labelled == label].mean() for label in (0, 1, 3)}
    assert "Lowest precision per class: " in capsys.readouterr().out
    subset = evaluate("--per-class", "--num-samples", 30, samples="labelled.npz")["precision_per_class"]
    rows = evaluator.choose_rows(50, evaluator.parse_args(["r", "s", "--num-samples", "30"]))
    assert subset == {str(label): inside[rows][labelled[rows] == label].mean() for label in (0, 1, 3)}
    assert len(set(subset.values())) > 1, "or the labels could be in any order"


def test_class_balance(evaluate, labelled, capsys):
    """Counts 20, 20, 0, 10 against 12.5 each: chi-square 22, three degrees of freedom."""
    balance = evaluate("--class-balance", samples="labelled.npz")["class_balance"]
    assert balance.pop("p_value") == pytest.approx(6.5e-5, rel=0.01)
    assert balance == {"num_classes": 4, "fewest": 0, "most": 20, "absent": [2]}
    assert "Class balance: 0 to 20 images in each of 4 classes, 1 classes absent" in capsys.readouterr().out
    assert evaluate("--class-balance", "--num-classes", 6, samples="labelled.npz")["class_balance"]["absent"] == [2, 4, 5]


def test_labels_that_do_not_fit(files, labelled, fails):
    folder, _, samples = files
    for arrays, flags, message in [
        ({}, ("--per-class",), "has no labels arr_1"),
        ({"arr_1": np.zeros(49, np.int64)}, ("--class-balance",), r"arr_1 is \(49,\) int64, class labels must be \(50,\)"),
        ({"arr_1": np.zeros(50)}, ("--per-class",), r"\(50,\) float64"),
        (
            {"arr_1": np.full(50, 7)},
            ("--class-balance", "--num-classes", 7),
            "--num-classes 7: .* has the label 7, pass at least 8",
        ),
        ({"arr_1": np.full(50, 10**12)}, ("--class-balance",), "integers from 0 to 999999"),
    ]:
        np.savez(folder / "bad.npz", arr_0=samples, **arrays)
        line = fails(evaluator.main, folder / "ref.npz", folder / "bad.npz", "--features", "pixels", *flags)
        assert re.search(message, line)


# --- bad input


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
STATISTICS = {"mu": np.zeros(48), "sigma": np.eye(48)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "has no array named arr_0; it holds images"),
        ({"arr_0": IMAGES / 255}, r"arr_0 is float64.*for these values in \[0, 1\] save \(255 \* arr_0\)\.round\(\)"),
        ({"arr_0": IMAGES / 127.5 - 1}, r"arr_0 is float64.*for these values in \[-1, 1\] save \(127\.5 \* arr_0 \+ 128\)"),
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32.*from \d+ to \d+, save arr_0\.round\(\)"),
        ({"arr_0": np.where(np.arange(6)[:, None, None, None] == 4, np.nan, IMAGES)}, "image 4 is not even finite"),
        ({"arr_0": IMAGES // 128}, r"no value of the first 6 images is above 1: .* images in \[0, 1\] were cast to uint8"),
        ({"arr_0": (IMAGES / 256).astype(np.uint8)}, r"no value of the first 6 images is above 1"),
        ({"arr_0": IMAGES.astype(str)}, r"arr_0 is <U\d+, images are uint8 from 0 to 255: save numbers"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"\(6, 3, 4, 4\), channels first: save arr_0\.transpose\(0, 2, 3, 1\)"),
        ({"arr_0": IMAGES[..., :1]}, r"\(6, 4, 4, 1\), RGB images \(N, H, W, 3\)"),
        ({"arr_0": IMAGES[0]}, r"\(4, 4, 3\), RGB images \(N, H, W, 3\)"),
        ({"arr_0": IMAGES[:1]}, r"holds 1 image\(s\)"),
        ({"arr_0": IMAGES[:0]}, r"\(0, 4, 4, 3\)"),
        ({"arr_0": IMAGES.repeat(2, 1).repeat(2, 2)}, r"ref\.npz holds images of \(H, W, C\) \(4, 4, 3\), .* of \(8, 8, 3\)"),
        (STATISTICS, "holds statistics and no images: are REF and SAMPLES swapped"),
        ({"arr_0": IMAGES} | STATISTICS, "REF and SAMPLES are swapped, the reference comes first"),
    ],
)
def test_bad_samples(files, fails, arrays, message):
    folder, _, _ = files
    np.savez(folder / "bad.npz", **arrays)
    line = fails(evaluator.main, folder / "ref.npz", folder / "bad.npz", "--features", "pixels")
    assert re.search(message, line) and "bad.npz" in line


def test_bad_files(files, fails):
    folder, _, _ = files
    whole = (folder / "ref.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-100])
    assert "cut.npz is not a whole .npz file" in fails(evaluator.main, folder / "cut.npz", folder / "samples.npz")
    assert "absent.npz does not exist" in fails(evaluator.main, folder / "ref.npz", folder / "absent.npz")


def test_too_large_subsets_are_refused_before_the_work(files, fails, monkeypatch):
    folder, _, _ = files
    monkeypatch.setattr(evaluator, "load_extractor", None)
    line = fails(evaluator.main, folder / "ref.npz", folder / "samples.npz", "--kid")
    assert "--kid-subset-size 1000: the smaller of the two sets has 50" in line
    np.savez(folder / "few.npz", files[2][:5])
    line = fails(evaluator.main, folder / "ref.npz", folder / "few.npz", "--density-coverage")
    assert "the smaller of the two sets has 5, it needs 6" in line


def test_outputs_that_cannot_be_written_are_refused_before_the_work(files, fails, monkeypatch):
    folder, _, _ = files
    monkeypatch.setattr(evaluator, "load_extractor", None)
    for flag, target in (("--json", folder), ("--json", folder / "ref.npz" / "a.json"), ("--cache", folder / "ref.npz")):
        assert str(target) in fails(evaluator.main, folder / "ref.npz", folder / "samples.npz", flag, target)


def test_json_is_written_though_nobody_reads_the_lines(files):
    """A pipe that has closed, as of ``| head -0``, took the numbers with it."""
    folder, _, _ = files
    command = [
        sys.executable,
        "-m",
        "evaluations.evaluator",
        folder / "ref.npz",
        folder / "samples.npz",
        "--features",
        "pixels",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--json", folder / "a.json"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((folder / "a.json").read_text())["fid"] > 0


def test_num_samples_out_of_range(files, fails):
    folder, _, _ = files
    for number in (3, 51):
        line = fails(evaluator.main, folder / "ref.npz", folder / "samples.npz", "--num-samples", number)
        assert f"--num-samples {number}: " in line and "pass 4 to 50" in line


def test_usage_errors(evaluate, capsys):
    for flags, message in [
        (("--features", "vgg"), "'vgg' is unknown: pass inception, inception-tf, pixels, timm:NAME or MODULE.pt"),
        (("--bootstrap", 1), "--bootstrap 1: a deviation needs at least 2 resamples"),
        (("--kid-subset-size", 1), "1 must be at least 2"),
        (("--num-classes", 10), "--num-classes 10 is of --class-balance"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            evaluate(*flags)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_notes(files, evaluate, capsys, three_layers):
    """What may be meant but is worth a second look: two references, different sizes, few images, images of one colour."""
    folder, ref, samples = files
    mu, sigma = mean_covariance(three_layers(ref).pool)
    carrying = {"mu": mu, "sigma": sigma}
    np.savez(folder / "carrying.npz", arr_0=ref, **carrying)
    np.savez(folder / "carrying2.npz", arr_0=ref, **carrying)
    evaluate(ref="carrying.npz", samples="carrying2.npz")
    assert "REF comes first, SAMPLES second" in capsys.readouterr().err
    np.savez(folder / "wide.npz", samples.repeat(2, axis=2))
    evaluator.main([str(folder / "ref.npz"), str(folder / "wide.npz")])
    assert "ref.npz holds images of 4 x 4 pixels, " in capsys.readouterr().err
    samples[[7, 30]] = 128
    np.savez(folder / "grey.npz", samples[:40])
    result = evaluate(samples="grey.npz")
    assert "grey.npz: 2 image(s) of one colour throughout, at 7, 30." in capsys.readouterr().err
    assert result["constant_images"] == {"ref": [], "samples": [7, 30]}
    evaluate("--num-samples", 8)
    assert "samples.npz: 8 images for 10 features" in capsys.readouterr().err


# --- the scripts as scripts


@pytest.mark.parametrize("script", ["evaluator.py", "reference.py"])
def test_missing_installation_is_one_line(monkeypatch, script):
    """Python puts only evaluations/ on the path of a script there."""
    monkeypatch.setitem(sys.modules, "runtime", None)
    with pytest.raises(SystemExit, match=r"^error: install the repository first: pip install -e \.$"):
        runpy.run_path(str(ROOT / "evaluations" / script))


def test_runs_from_its_own_folder(files):
    folder, _, _ = files
    command = [sys.executable, "evaluator.py", folder / "ref.npz", folder / "samples.npz", "--features", "pixels"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "evaluations", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == list(scores.LINES.values())
