"""The referee: ADM's frozen 2015 Inception graph, run by TensorFlow as ADM's script runs it.

Published FIDs were computed by this graph, so a number to be compared with them comes from here. TensorFlow is an extra
(``evaluations/requirements-tf.txt``); nothing imports it before an :class:`InceptionTF` is made.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from evaluations.features import INCEPTION, SPATIAL_CHANNELS, Features
from evaluations.weights import find_file
from runtime.cli import first_line

GRAPH_FILE = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_FILE}"

# Nodes of the graph. Images go in behind its JPEG decoder and before its own resize to 299 x 299 and (x - 128) / 128.
IMAGES, POOL, SPATIAL, LOGITS = "ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"
PUBLISHED_SHAPE = (2048, 1008)  # of the last layer's weights; no checksum of the graph is published


class InceptionTF:
    """Features of a frozen Inception graph: pool (B, 2048), spatial (B, 2023) and probs (B, 1008), sizes as the graph has them.

    Runs on ``device``, None for TensorFlow's choice, in its default arithmetic: TF32 on GPUs that have it, as in ADM's script.
    Raises ValueError where TensorFlow is missing, and where the file is absent, no GraphDef, or lacks a node.
    """

    def __init__(self, graph_path: str | os.PathLike, device: str | torch.device | None = None):
        try:
            data = Path(graph_path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the Inception graph {graph_path}: {error.strerror}") from error
        tf = import_tensorflow()
        self.fingerprint = f"inception-tf:{hashlib.sha256(data).hexdigest()}"
        graph_def = parse_graph(tf, data, graph_path)
        try:
            with tf.Graph().as_default() as graph:
                self._images = tf.compat.v1.placeholder(tf.uint8, (None, None, None, 3))
                # The graph ends in a reshape to (1, 2048), so its own softmax takes one image at a time: what comes before
                # that reshape takes any number, and the rest is done here. Without the bias, as ADM defines its score.
                pool, spatial, logits = tf.import_graph_def(
                    graph_def,
                    input_map={f"{IMAGES}:0": tf.cast(self._images, tf.float32)},
                    return_elements=[f"{POOL}:0", f"{SPATIAL}:0", LOGITS],
                    name="",
                )
                pool = tf.squeeze(pool, (1, 2))  # (B, 1, 1, D) -> (B, D)
                probs = tf.nn.softmax(tf.matmul(pool, logits.inputs[1]))
                self._outputs = pool, spatial[..., :SPATIAL_CHANNELS], probs
        except (ValueError, IndexError, tf.errors.OpError) as error:
            raise ValueError(
                f"{graph_path}: TensorFlow {tf.__version__} cannot use this graph ({first_line(error)}); "
                f"the file needed is {GRAPH_URL}"
            ) from error
        if tuple(logits.inputs[1].shape) == PUBLISHED_SHAPE:
            self.name = self.statistics = INCEPTION
        else:
            self.name, self.statistics = f"inception-tf of {Path(graph_path).name}", self.fingerprint
        config = tf.compat.v1.ConfigProto()
        config.gpu_options.allow_growth = True  # by default TensorFlow takes the whole GPU, and torch needs some of it
        if device is not None:
            device = torch.device(device)
            config.device_count["GPU"] = int(device.type == "cuda")
            if device.type == "cuda" and device.index is not None:
                config.gpu_options.visible_device_list = str(device.index)  # else every process takes the first GPU
        self._session = tf.compat.v1.Session(graph=graph, config=config)

    def __call__(self, images: np.ndarray) -> Features:
        """Features, each float32, of uint8 ``images`` (B, H, W, 3) of any size."""
        pool, spatial, probs = self._session.run(self._outputs, {self._images: images})
        return Features(pool=pool, spatial=spatial.reshape(len(images), -1), probs=probs)  # row, column, channel


def find_graph(path: str | os.PathLike | None = None) -> Path:
    """The graph's file: see :func:`find_file`. Raises ValueError without TensorFlow, before a download that is of no use."""
    import_tensorflow()
    return find_file(path, "INCEPTION_GRAPH", GRAPH_URL)


def import_tensorflow():
    """The module, with its log off unless TF_CPP_MIN_LOG_LEVEL is set: its failures arrive as exceptions, the rest is chatter.

    Raises ValueError, saying what to install, where it cannot be imported.
    """
    quiet = "TF_CPP_MIN_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.suppress(ImportError):
        # Both bring an LLVM: with TensorFlow's in place first, torch's import of triton, which many of its parts do, segfaults.
        import triton  # noqa: F401
    try:
        with stderr_to_null() if quiet else contextlib.nullcontext():
            import tensorflow
    except ImportError as error:
        raise ValueError(
            f"--features inception-tf cannot import TensorFlow ({first_line(error)}): "
            "pip install -r evaluations/requirements-tf.txt"
        ) from error
    return tensorflow


@contextlib.contextmanager
def stderr_to_null() -> Iterator[None]:
    """Drop what C++ writes to stderr: the lines that TensorFlow logs on import come before it knows its own log level."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def parse_graph(tf, data: bytes, path: str | os.PathLike):
    """The GraphDef in ``data``. Raises ValueError, naming ``path``, if it is none or lacks one of the nodes used here."""
    from google.protobuf.message import DecodeError

    graph_def = tf.compat.v1.GraphDef()
    try:
        graph_def.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(
            f"{path} ({len(data)} bytes) is no TensorFlow GraphDef, or not a whole one; the file needed is {GRAPH_URL}"
        ) from error
    missing = {IMAGES, POOL, SPATIAL, LOGITS} - {node.name for node in graph_def.node}
    if missing:
        raise ValueError(f"{path} has no node {', '.join(sorted(missing))}: the file needed is {GRAPH_URL}")
    return graph_def
