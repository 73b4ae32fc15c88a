"""Sampling that draws ahead, writes behind and fills its last batch up: the images are the same, and it ends as it should."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sample_ddp
from data.codec import load_codec
from diffusion import create_diffusion
from diffusion.transport import ODE, SDE, create_transport
from runtime.files import SharedRows
from sampling import generate as generating
from sampling import many
from sampling.generate import Batch, Guidance, generate
from sampling.samplers import GaussianSampler, TransportSampler
from sampling.writers import SampleFolder
from tests.edt_checkpoints import random_checkpoint
from tests.shared import files_of, grey_levels

NUM_STEPS = 4


class Network(nn.Module):
    """Calls, in sizes; before each, ``meanwhile`` with its number."""

    def __init__(self, out_channels: int = 3, meanwhile=lambda k: None):
        super().__init__()
        self.config = SimpleNamespace(in_channels=3, input_size=4, num_classes=10)
        self.weight = nn.Parameter(torch.full((out_channels, 3), 0.1))
        self.sizes, self.meanwhile = [], meanwhile

    def forward(self, x, t, y):
        self.meanwhile(len(self.sizes))
        self.sizes.append(len(x))
        return torch.einsum("oc,bchw->bohw", self.weight, x) + 0.01 * y.view(-1, 1, 1, 1)


def gaussian(ddim=False):
    return GaussianSampler(create_diffusion(str(NUM_STEPS)), ddim=ddim)


def transport(process, **options):
    return TransportSampler(process(create_transport(), num_steps=NUM_STEPS, **options), likelihood=process is ODE)


SAMPLERS = {
    "ancestral": gaussian(),
    "ddim": gaussian(ddim=True),
    "sde": transport(SDE, diffusion_form="sigma"),
    "likelihood": transport(ODE, sampling_method="heun"),
}


def batches_of(sampler, *, network=None, count=7, batch_size=3, **options) -> list[Batch]:
    network = network or Network(6 if isinstance(sampler, GaussianSampler) else 3)
    options = {"labels": lambda i: i % 10, "seed": 0, "guidance": Guidance(), **options}
    return list(generate(network, sampler, load_codec("pixels"), range(count), batch_size=batch_size, **options))


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.image_ids == b.image_ids and torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)
        assert all(torch.equal(c, d) for c, d in zip(a.previews, b.previews, strict=True))
        assert a.records.keys() == b.records.keys() and all(torch.equal(a.records[key], b.records[key]) for key in a.records)


@pytest.fixture
def ahead(monkeypatch):
    """As for an accelerator: a thread draws."""
    made = generating._Draws.__init__

    def init(self, *args):
        made(self, *args)
        self.ahead = True

    return lambda: monkeypatch.setattr(generating._Draws, "__init__", init)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if name.startswith(("ahead", "behind"))]


# Drawing ahead


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_thread_draws_is_the_same(ahead, monkeypatch, name):
    drawn, normals = [], generating.normals

    def record(seed, purpose, ids, k, shape):
        drawn.append((threading.current_thread() is threading.main_thread(), tuple(ids), k))
        return normals(seed, purpose, ids, k, shape)

    monkeypatch.setattr(generating, "normals", record)
    here = batches_of(SAMPLERS[name], num_previews=2)
    assert drawn and all(in_main for in_main, *_ in drawn)
    wanted = {entry[1:] for entry in drawn}
    drawn.clear()
    ahead()
    assert_same(batches_of(SAMPLERS[name], num_previews=2), here)
    assert drawn and not any(in_main for in_main, *_ in drawn)
    assert wanted <= {entry[1:] for entry in drawn} and len(drawn) == len(set(drawn))  # nothing twice


def test_the_next_batch_is_drawn_during_this_one(ahead, monkeypatch):
    drawn, normals = [], generating.normals
    monkeypatch.setattr(
        generating, "normals", lambda s, p, ids, k, shape: drawn.append((ids[0], k)) or normals(s, p, ids, k, shape)
    )

    def meanwhile(call):
        if call == 0:
            limit = time.monotonic() + 10
            while (3, 0) not in drawn or (0, 2) not in drawn:  # the next batch's first noise, and the next step's
                assert time.monotonic() < limit
                time.sleep(0.001)
            assert (6, 0) not in drawn and (0, 3) not in drawn

    ahead()
    batches_of(gaussian(), network=Network(6, meanwhile))


def test_an_error_in_drawing_is_told(ahead):
    ahead()
    with pytest.raises(ZeroDivisionError):
        batches_of(gaussian(), labels=lambda i: 1 // (i - 4))


def test_an_error_in_sampling_ends_the_threads_that_draw(ahead):
    ahead()
    with pytest.raises(ZeroDivisionError) as held:
        batches_of(gaussian(), network=Network(6, lambda call: 1 // (call - 5)))
    assert held.traceback  # which keeps every frame alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


# One shape


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_filled_last_batch(name, scale):
    sampler = SAMPLERS[name]
    options = {"guidance": Guidance(scale), "num_previews": 2}
    outputs = 6 if isinstance(sampler, GaussianSampler) else 3
    filled, plain = Network(outputs), Network(outputs)
    actual = batches_of(sampler, network=filled, pad_last=True, **options)
    expected = batches_of(sampler, network=plain, **options)
    assert set(filled.sizes) == {3 * int(scale)} and set(plain.sizes) == {3 * int(scale), int(scale)}
    assert_same(actual[:2], expected[:2])
    last, other = actual[2], expected[2]
    assert last.image_ids == [6] and last.labels.tolist() == [6] and last.images.shape == other.images.shape
    for a, b in zip([last.images, *last.previews], [other.images, *other.previews], strict=True):
        assert len(a) == 1 and grey_levels(a.numpy(), b.numpy()) <= 1
    for key, value in other.records.items():
        torch.testing.assert_close(last.records[key], value, rtol=1e-4, atol=1e-4)


def test_a_batch_whose_steps_are_chosen_together_is_not_filled():
    """Copies of an image would weigh its error more, and so change the steps of all."""
    method = {"sampling_method": "dopri5", "num_steps": NUM_STEPS}
    together, alone = (TransportSampler(ODE(create_transport(), per_sample=each, **method)) for each in (False, True))
    assert together.process.coupled and not alone.process.coupled
    assert not (together.may_be_filled or alone.may_be_filled)
    network = Network()
    assert_same(batches_of(together, network=network, pad_last=True), batches_of(together))
    assert set(network.sizes) == {3, 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "0000001.pt")


def argv(checkpoint: Path, folder: Path, *extra: str) -> list[str]:
    return [
        "--ckpt", str(checkpoint), "--sample-dir", str(folder), "--num-fid-samples", "7", "--num-sampling-steps",
        str(NUM_STEPS), "--per-proc-batch-size", "2", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def samples(checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "out"
    sample_ddp.main(argv(checkpoint, folder))
    return folder


@pytest.mark.parametrize("compiled", [False, True])
def test_the_script_fills_up_for_a_compiled_network(checkpoint, tmp_path, monkeypatch, compiled):
    asked = []
    monkeypatch.setattr(many, "generate", lambda *args, **kwargs: asked.append(kwargs["pad_last"]) or generate(*args, **kwargs))
    with torch.compiler.set_stance("force_eager"):
        sample_ddp.main(argv(checkpoint, tmp_path / "out", *(["--compile"] if compiled else [])))
    assert asked == [compiled]


# Writing behind


def test_batches_are_written_while_the_next_is_made_and_two_wait_at_most(checkpoint, samples, tmp_path, monkeypatch):
    made, written = [], []
    write = SampleFolder.write

    def slow(self, batch, missing):
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.05)
        write(self, batch, missing)
        written.append(batch.image_ids)

    def counted(*args, **kwargs):
        for batch in generate(*args, **kwargs):
            made.append(batch.image_ids)
            assert len(made) - len(written) <= 2
            yield batch

    monkeypatch.setattr(SampleFolder, "write", slow)
    monkeypatch.setattr(many, "generate", counted)
    sample_ddp.main(argv(checkpoint, tmp_path / "out"))
    assert made == written == [[0, 1], [2, 3], [4, 5], [6]]
    assert files_of(tmp_path / "out") == files_of(samples)


def test_an_error_in_writing_ends_the_run_at_once(checkpoint, samples, tmp_path, monkeypatch, fails):
    """With its own message, within a step, and the same command goes on."""
    failed, steps = threading.Event(), []
    write = SharedRows.write

    def full(self, row, value):
        if row == 1:
            failed.set()
            raise OSError("cannot write it: no room")
        write(self, row, value)

    def step(self, *args, call=many.WriteBehind.check, **kwargs):
        steps.append(failed.is_set())
        if len(steps) > NUM_STEPS:  # in the second batch
            assert failed.wait(10)
            time.sleep(0.05)
        call(self)

    with monkeypatch.context() as patch:
        patch.setattr(SharedRows, "write", full)
        patch.setattr(many.WriteBehind, "check", step)
        message = fails(sample_ddp.main, *argv(checkpoint, tmp_path / "out"))
    assert message == "error: cannot write it: no room"
    assert len(steps) == NUM_STEPS + 1
    assert np.fromfile(tmp_path / "out" / ".samples.progress", np.uint8).tolist() == [1, 0, 0, 0, 0, 0, 0]
    sample_ddp.main(argv(checkpoint, tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(samples)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_in_sampling_leaves_what_is_finished(checkpoint, samples, tmp_path, monkeypatch, error):
    """Where the network fails while a batch is being written, that one is written and marked; no thread is left."""
    begun, write = threading.Event(), SampleFolder.write

    def slow(self, batch, missing):
        begun.set()
        time.sleep(0.1)
        write(self, batch, missing)

    def stop(self, *args, steps=[], **kwargs):  # noqa: B006
        steps.append(begun.is_set())
        if len(steps) == NUM_STEPS + 2:
            assert begun.wait(10)
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", slow)
        patch.setattr(many.WriteBehind, "check", stop)
        with pytest.raises(error):
            sample_ddp.main(argv(checkpoint, tmp_path / "out"))
    assert np.fromfile(tmp_path / "out" / ".samples.progress", np.uint8).tolist() == [1, 1, 0, 0, 0, 0, 0]
    sample_ddp.main(argv(checkpoint, tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(samples)


def test_a_batch_waits_for_its_copies_once():
    waited = []
    batch = Batch([0], torch.zeros(1), torch.zeros(1), [], {}, SimpleNamespace(synchronize=lambda: waited.append(1)))
    assert batch.wait() is batch.wait() is batch
    assert waited == [1]


def test_batches_have_arrived_unless_asked_otherwise(monkeypatch):
    waited = []
    monkeypatch.setattr(Batch, "wait", lambda self: waited.append(self.image_ids) or self)
    batches_of(gaussian(), wait=False)
    assert waited == []
    batches_of(gaussian())
    assert waited == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_writer_waits_for_the_copies(checkpoint, tmp_path, monkeypatch):
    waited, written, write = [], [], SampleFolder.write
    monkeypatch.setattr(Batch, "wait", lambda self: waited.append(self.image_ids) or self)
    monkeypatch.setattr(
        SampleFolder, "write", lambda self, batch, missing: written.append(list(waited)) or write(self, batch, missing)
    )
    sample_ddp.main(argv(checkpoint, tmp_path / "out"))
    assert [seen[-1] for seen in written] == [[0, 1], [2, 3], [4, 5], [6]]
