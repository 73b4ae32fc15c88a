"""The Inception graph in TensorFlow, against torch: on a small frozen graph with the names and quirks of the real one.

What needs TensorFlow is skipped without it; ``make test-tf`` has it.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluations import evaluator, inception_tf
from evaluations.features import Features
from evaluations.inception_tf import InceptionTF, find_graph, import_tensorflow
from evaluations.metrics import frechet_distance, inception_score, mean_covariance, precision_recall

ROOT = Path(__file__).parent.parent
CHANNELS, CLASSES, EPSILON = 9, 5, 0.001


@pytest.fixture
def tf():
    if "REQUIRE_TENSORFLOW" not in os.environ and not importlib.util.find_spec("tensorflow"):
        pytest.skip("needs TensorFlow: make test-tf")
    return import_tensorflow()


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    shapes = {"conv": (11, 11, 3, CHANNELS), "mean": CHANNELS, "variance": CHANNELS, "beta": CHANNELS, "gamma": CHANNELS}
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    weights |= {"variance": 1 + weights["variance"] ** 2, "softmax": 0.1 * rng.normal(size=(CHANNELS, CLASSES))}
    return {name: value.astype(np.float32) for name, value in weights.items()}


def small_graph(tf, weights, stride):
    """GraphDef with the real graph's node names, its old normalization op (of producer 8), and its reshape to one image.

    Stride 18 leaves 17 x 17 positions of 299 x 299 pixels, as the real graph does.
    """
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        jpeg = tf.constant(b"", name="DecodeJpeg/contents")
        decoded = tf.cast(tf.raw_ops.DecodeJpeg(contents=jpeg, channels=3), tf.float32)
        x = v1.image.resize_bilinear(v1.expand_dims(decoded, 0, name="ExpandDims"), (299, 299), name="ResizeBilinear")
        x = tf.multiply(tf.subtract(x, 128.0, name="Sub"), 0.0078125, name="Mul")
        x = tf.nn.conv2d(x, weights["conv"], stride, "VALID", name="mixed_6/conv/Conv2D")
        parameters = [tf.constant(weights[name], name=name) for name in ("mean", "variance", "beta", "gamma")]
        x = tf.nn.relu(tf.identity(x, name="mixed_6/conv/batchnorm"), name="mixed_6/conv")
        x = tf.nn.avg_pool2d(x, x.shape[1:3], 1, "VALID", name="pool_3")
        x = tf.matmul(tf.reshape(x, (1, CHANNELS), name="pool_3/_reshape"), weights["softmax"], name="softmax/logits/MatMul")
        tf.nn.softmax(tf.nn.bias_add(x, np.arange(CLASSES, dtype=np.float32), name="softmax/logits"), name="softmax")
    graph_def = graph.as_graph_def()
    graph_def.versions.producer = 8
    batchnorm = next(node for node in graph_def.node if node.name == "mixed_6/conv/batchnorm")
    batchnorm.op = "BatchNormWithGlobalNormalization"
    batchnorm.input.extend(parameter.op.name for parameter in parameters)
    batchnorm.attr["variance_epsilon"].f = EPSILON
    batchnorm.attr["scale_after_normalization"].b = False
    return graph_def


@pytest.fixture
def graph_path(tf, weights, tmp_path):
    path = tmp_path / "graph.pb"
    path.write_bytes(small_graph(tf, weights, stride=18).SerializeToString())
    return path


def by_torch(weights, images):
    """pool, spatial and probs of the small graph, in float64 behind a resize in TensorFlow 1's way by other people's code."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    mean, variance, beta = (torch.from_numpy(weights[name]).double()[:, None, None] for name in ("mean", "variance", "beta"))
    x = resize(torch.from_numpy(images).permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False).double()
    x = F.conv2d((x - 128) / 128, torch.from_numpy(weights["conv"]).double().permute(3, 2, 0, 1), stride=18)
    x = F.relu((x - mean) / (variance + EPSILON).sqrt() + beta)  # (B, C, 17, 17)
    pool = x.mean((2, 3))
    spatial = [x[:, c, row, column] for row in range(17) for column in range(17) for c in range(7)]
    probs = (pool @ torch.from_numpy(weights["softmax"]).double()).softmax(1)
    return pool.numpy(), torch.stack(spatial, 1).numpy(), probs.numpy()


def random_images(*shape):
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (299, 299), (350, 512)])
def test_features_equal_an_independent_computation(graph_path, weights, size):
    images = random_images(3, *size)
    features = InceptionTF(graph_path)(images)
    assert isinstance(features, Features)
    assert [value.shape for value in vars(features).values()] == [(3, CHANNELS), (3, 2023), (3, CLASSES)]
    for value, expected in zip(vars(features).values(), by_torch(weights, images), strict=True):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)  # near ReLU's zero the sums of 363 terms cancel


def test_batch_size_changes_nothing_beyond_rounding(graph_path):
    images, extractor = random_images(5, 48, 48), InceptionTF(graph_path, device="cpu")
    together = extractor(images)
    for layer, expected in vars(together).items():
        one_by_one = np.concatenate([getattr(extractor(images[i : i + 1]), layer) for i in range(5)])
        np.testing.assert_allclose(one_by_one, expected, rtol=1e-5, atol=1e-5)


def test_fingerprint_is_of_the_graph(graph_path):
    assert InceptionTF(graph_path).fingerprint == "inception-tf:" + hashlib.sha256(graph_path.read_bytes()).hexdigest()


def run_python(code, *args):
    """(exit status, stdout, stderr) of ``code`` in a process without this one's settings of TensorFlow."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_nothing_is_printed_or_imported_early(graph_path):
    code = """if True:
        import sys, numpy as np
        from evaluations.inception_tf import InceptionTF
        assert "tensorflow" not in sys.modules
        InceptionTF(sys.argv[1])(np.zeros((1, 8, 8, 3), np.uint8))
    """
    assert run_python(code, graph_path) == (0, "", "")


def test_torch_compiles_beside_tensorflow(tf):
    """Importing triton after TensorFlow ended the process: two copies of LLVM with the same symbols."""
    code = "from evaluations.inception_tf import import_tensorflow; import_tensorflow(); import torch._dynamo"
    assert run_python(code) == (0, "", "")


@pytest.mark.parametrize("name", ["ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"])
def test_a_graph_without_a_node_is_refused(tf, graph_path, name):
    graph_def = tf.compat.v1.GraphDef.FromString(graph_path.read_bytes())
    next(node for node in graph_def.node if node.name == name).name = "renamed"
    graph_path.write_bytes(graph_def.SerializeToString())
    with pytest.raises(ValueError, match=rf"graph\.pb has no node {name}: "):
        InceptionTF(graph_path)


def test_a_graph_tensorflow_cannot_use_is_refused(tf, graph_path):
    graph_def = tf.compat.v1.GraphDef.FromString(graph_path.read_bytes())
    next(node for node in graph_def.node if node.name == "pool_3").op = "NoSuchOp"
    graph_path.write_bytes(graph_def.SerializeToString())
    with pytest.raises(ValueError, match=r"graph\.pb: TensorFlow .* cannot use this graph \(.*NoSuchOp"):
        InceptionTF(graph_path)


def test_other_files_are_refused(tf, graph_path):
    for data in (b"<html>not found</html>", graph_path.read_bytes()[:-100]):  # an error page, a broken download
        graph_path.write_bytes(data)
        with pytest.raises(ValueError, match=r"graph\.pb \(\d+ bytes\) is no TensorFlow GraphDef, or not a whole one"):
            InceptionTF(graph_path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the Inception graph .*absent\.pb: No such file"):
        InceptionTF(tmp_path / "absent.pb")


def test_missing_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "graph.pb").touch()
    with pytest.raises(ValueError, match=r"^[^\n]*pip install -r evaluations/requirements-tf\.txt$"):
        InceptionTF(tmp_path / "graph.pb")
    assert (ROOT / "evaluations/requirements-tf.txt").is_file()


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The files of find_graph in its order, none of them there yet; a download fails."""

    def no_network(url, path, hash_prefix):
        raise OSError("name or service not known")

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("INCEPTION_GRAPH", "")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    name = "classify_image_graph_def.pb"
    return [tmp_path / "flag.pb", tmp_path / "variable.pb", Path(name), tmp_path / "hub/checkpoints" / name]


def test_find_graph_takes_the_nearest(places, monkeypatch):
    flag, variable, working_directory, hub = places
    for place in (hub, working_directory, variable):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        if place is variable:
            monkeypatch.setenv("INCEPTION_GRAPH", str(variable))
        assert find_graph(None) == place
    flag.touch()
    assert find_graph(str(flag)) == flag


def test_find_graph_does_not_pass_over_a_file_that_is_named(places, monkeypatch):
    flag, variable, working_directory, _ = places
    working_directory.touch()
    with pytest.raises(ValueError, match=r"--inception-weights .*flag\.pb is no file"):
        find_graph(flag)
    monkeypatch.setenv("INCEPTION_GRAPH", str(variable))
    with pytest.raises(ValueError, match=r"\$INCEPTION_GRAPH .*variable\.pb is no file"):
        find_graph(None)


def test_find_graph_downloads_where_it_finds_it_next_time(places, monkeypatch):
    urls = []

    def download(url, path, hash_prefix):
        urls.append(url)
        Path(path).touch()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert find_graph(None) == find_graph(None) == places[-1]
    assert urls == [inception_tf.GRAPH_URL]


def test_a_failed_download_says_where_to_get_the_graph_and_how_to_name_it(places):
    with pytest.raises(ValueError, match="name or service not known") as error:
        find_graph(None)
    for part in (inception_tf.GRAPH_URL, "--inception-weights", "$INCEPTION_GRAPH", "working directory"):
        assert part in str(error.value)
    assert not places[-1].exists()


def test_nothing_is_downloaded_without_tensorflow(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ValueError, match="requirements-tf"):
        find_graph(None)


def test_evaluator(tf, weights, tmp_path):
    path = tmp_path / "graph.pb"
    path.write_bytes(small_graph(tf, weights, stride=60).SerializeToString())  # 5 x 5 positions: a covariance made quickly
    ref, samples = random_images(40, 16, 16), random_images(30, 20, 20) // 2
    np.savez(tmp_path / "ref.npz", ref)
    np.savez(tmp_path / "samples.npz", samples)
    files = [str(tmp_path / "ref.npz"), str(tmp_path / "samples.npz")]
    flags = ["--features", "inception-tf", "--inception-weights", str(path), "--batch-size", "7", "--split-size", "10"]

    result = evaluator.main(files + flags)

    extractor = InceptionTF(path)
    a, b = extractor(ref), extractor(samples)
    precision, recall = precision_recall(torch.from_numpy(a.pool), torch.from_numpy(b.pool), k=3)
    expected = {
        "inception_score": inception_score(b.probs, split_size=10),
        "fid": frechet_distance(*mean_covariance(a.pool), *mean_covariance(b.pool)),
        "sfid": frechet_distance(*mean_covariance(a.spatial), *mean_covariance(b.spatial)),
        "precision": precision,
        "recall": recall,
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-4)
