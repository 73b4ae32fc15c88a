"""The comparison of the networks from end to end, on tiny ones, and the work of a training step against closed forms. Nothing
here depends on real speed."""

import dataclasses
import re

import pytest
import torch
from PIL import Image

from benchmarks import compare
from benchmarks.networks import compiled, forward_call, random_inputs, randomized, training_batch
from benchmarks.products import record_products, total_flops
from benchmarks.timing import Result
from models import create_model
from models.macs import fresh_on_meta, multiply_accumulates, training_multiply_accumulates
from models.registry import model_config
from runtime.distributed import start_training

CPU = torch.device("cpu")


# The work of a training step


def without_gradient(config) -> int:
    """Products whose input needs no gradient: the patches' and the first of the timestep's."""
    width = config.widths[0] if hasattr(config, "widths") else config.width
    patches = (config.input_size // config.patch_size) ** 2 * config.patch_size**2 * config.in_channels * width
    return patches + 256 * width


@pytest.mark.parametrize(
    "name, settings",
    [("DiT-Ti/2", {}), ("EDT-Ti/2", {}), ("MDTv2-Ti/2", {}), ("SiT-Ti/2", {"mediator_num": 16}), ("DiT-S/2", {})],
)
def test_training_is_three_forwards_but_for_the_inputs_gradient(name, settings):
    """torch's own counter took the mediators' depthwise convolution for a dense one on the way back: 3.7 forwards."""
    config = model_config(name, **settings)
    expected = 3 * multiply_accumulates(config) - without_gradient(config)
    assert training_multiply_accumulates(config, False) == expected


@pytest.mark.parametrize("early_mask_block", [None, 0])
def test_a_masked_pass_of_edt_is_as_much_work_as_the_other(early_mask_block):
    config = model_config("EDT-Ti/2", early_mask_block=early_mask_block)
    assert training_multiply_accumulates(config, True) == 2 * training_multiply_accumulates(config, False)


def test_a_masked_pass_of_mdt_encodes_the_kept_tokens_and_has_a_side_block():
    """96 channels, MLP ratio 4, an encoder of 2 + 2 blocks; 64 tokens, of which 40 % are dropped: 38 are left."""
    config = model_config("MDTv2-Ti/2", depth=6)
    plain = training_multiply_accumulates(config, False)

    def block_work(tokens: int) -> int:
        return 12 * 96**2 * tokens + 2 * 96 * tokens**2  # qkv, proj and MLP; q k^T and the probabilities by v

    joins = 2 * 2 * 96**2 * (64 - 38)  # those of encoder-out with the skips
    saved = 4 * (block_work(64) - block_work(38)) + joins
    side_block = block_work(64) + 6 * 96**2  # with its modulation
    assert training_multiply_accumulates(config, True) == 2 * plain + 3 * (side_block - saved)


@pytest.mark.parametrize("name, masked", [("EDT-Ti/2", True), ("MDTv2-Ti/2", True), ("MDTv2-Ti/2", False), ("SiT-Ti/2", False)])
def test_training_work_is_that_of_the_recorded_products(name, masked):
    """Of the same batch of 2 images that is timed: another counter, another way in."""
    config = model_config(name, **({"mediator_num": 4} if name.startswith("SiT") else {}))
    batch = training_batch(config, 2, masked=masked).to(torch.device("meta"))
    model, inputs = fresh_on_meta(config).train(), len(batch.y.flatten())
    assert inputs == (4 if masked else 2)
    x = torch.empty(inputs, config.in_channels, config.input_size, config.input_size, device="meta")
    kwargs = {"kept": batch.kept} if masked else {}
    products = record_products(lambda: model(x, x[:, 0, 0, 0], batch.y.flatten(), **kwargs).sum().backward())
    assert 2 * training_multiply_accumulates(config, masked) == total_flops(products) // 2


def test_no_masked_pass_is_named():
    with pytest.raises(ValueError, match=r"masked=True: .*DiTConfig has no masked pass"):
        training_multiply_accumulates(model_config("DiT-Ti/2"), True)


# What is timed


def test_the_timed_masks_drop_the_mean_share():
    config = model_config("MDTv2-S/2")
    [kept] = training_batch(config, 2, masked=True).kept
    assert kept.shape == (2, int(256 * 0.6))
    first, second = training_batch(model_config("EDT-S/2"), 64, masked=True).kept
    assert first.float().mean() == pytest.approx(0.55, abs=0.02)
    assert second.float().mean() == pytest.approx(0.85, abs=0.02)
    assert training_batch(config, 2, masked=False).kept == []


def test_a_compiled_twin_shares_the_weights(monkeypatch):
    monkeypatch.setattr("benchmarks.networks.compile_blocks", lambda model: model.register_buffer("seen", torch.ones(1)))
    model = randomized(create_model("MDTv2-Ti/2")).eval()
    twin = compiled(model)
    assert hasattr(twin, "seen") and not hasattr(model, "seen")
    assert all(own is other for own, other in zip(model.parameters(), twin.parameters(), strict=True))
    inputs = random_inputs(model.config, 1, CPU)
    before = forward_call(twin, inputs)()
    with torch.no_grad():
        model.final_layer.linear.bias += 1
    torch.testing.assert_close(forward_call(twin, inputs)(), before + 1)


def test_transports_get_times_and_diffusions_steps():
    _, steps, _ = random_inputs(model_config("DiT-Ti/2"), 8, CPU)
    _, times, _ = random_inputs(model_config("SiT-Ti/2"), 8, CPU)
    assert steps.dtype == torch.int64 and steps.max() > 1
    torch.testing.assert_close(times, steps / 1000)


# What is reported


def fake_results(args, systems, seconds) -> dict[str, Result]:
    """seconds: of a round's call, a function of (system's label, work, mode, round)."""
    items = {"forward": args.batch_size, "training": args.train_batch_size}
    return {
        (name := f"{system.label}, {work}{mode}"): Result(
            name=name,
            items=items[work],
            seconds=tuple(seconds(system.label, work, mode, k) for k in range(3)),
            peak_bytes=2_000_000,
        )
        for system in systems
        for work in compare.WORK
        for mode in compare.modes(args)
    }


def cells(text: str, label: str) -> list[list[str]]:
    """The rows of the tables that begin with the label."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in text.splitlines()
        if line.startswith("|") and line.strip("| ").split("|")[0].strip() == label
    ]


def seconds_of(label: str, work: str, mode: str, k: int) -> float:
    """A machine that halves its speed every round; MDTv2 is 3 times as slow in training, 2 times in sampling, compiled 5."""
    slowness = (5 if mode else 3 if work == "training" else 2) if label.startswith("MDTv2") else 1
    return slowness * 2.0**k


def test_report_is_consistent_with_the_results():
    args = compare.parse(["--compile", "--mediators", "4", "16", "--batch-size", "2", "--train-batch-size", "1"])
    systems = compare.create_systems(args)
    published = {"EDT-S/2": "2.66", "MDTv2-S/2": "-", "DiT-S/2": "6.06", "SiT-S/2": "6.06"}
    published |= {"SiT-S/2 M=4": "5.49", "SiT-S/2 M=16": "5.55"}
    assert [system.label for system in systems] == list(published)
    assert [system.optimizer for system in systems] == ["adan"] * 2 + ["adamw"] * 4
    # Small networks under the names: they are counted faster.
    tiny = [system.config for system in compare.create_systems(compare.parse(["--size", "Ti", "--mediators", "4", "16"]))]
    systems = [dataclasses.replace(system, config=config) for system, config in zip(systems, tiny, strict=True)]
    text = compare.report(args, CPU, systems, fake_results(args, systems, seconds_of), "compare.png")
    for system in systems:
        work, eager = cells(text, system.label)
        [fast] = cells(text, f"{system.label}, compiled")
        forward = multiply_accumulates(system.config)
        training = training_multiply_accumulates(system.config, system.label[:3] in ("EDT", "MDT"))
        assert work[1:] == [f"{forward / 1e9:.3f}", published[system.label], f"{training / 1e9:.3f}"]
        slow = system.label == "MDTv2-S/2"  # the median round: 2 seconds a unit of slowness
        assert eager[::4] == (["2000", "6000"] if slow else ["1000", "2000"])
        assert fast[::4] == (["5000", "10000"] if slow else ["1000", "2000"])
        assert eager[2::4] == (["0.500", "0.167"] if slow else ["1.00", "0.500"])
        assert eager[3::4] == ["2.00"] * 2
    assert cells(text, "EDT-S/2")[0][0] == "1.27"  # README's
    edt, mdt = tiny[:2]
    sampling = f"{multiply_accumulates(mdt) / multiply_accumulates(edt):.2f}"
    training = f"{training_multiply_accumulates(mdt, True) / training_multiply_accumulates(edt, True):.2f}"
    than = "EDT-S/2 is {} times as fast as MDTv2-S/2 (paper: {}); GMAC alone: {}"
    lines = text.splitlines()
    assert f"- Inference: {than.format('2.00 [2.00-2.00]', '2.29', sampling)}" in lines
    assert f"- Training: {than.format('3.00 [3.00-3.00]', '3.93', training)}" in lines
    assert f"- Inference, compiled: {than.format('5.00 [5.00-5.00]', '2.29', sampling)}" in lines
    assert f"- Training, compiled: {than.format('5.00 [5.00-5.00]', '3.93', training)}" in lines
    saved = f"{multiply_accumulates(tiny[3]) / multiply_accumulates(tiny[4]):.2f}"
    assert f"- Inference: SiT-S/2 M=4 is 1.00 [1.00-1.00] times as fast as SiT-S/2; GMAC alone: {saved}" in lines
    assert sum("(paper: " in line for line in lines) == 4


@pytest.mark.parametrize("flags, blocks", [([], 6), (["--size", "B"], 4), (["--decode-layer", "8"], 8)])
def test_mdt_has_the_published_decoder(flags, blocks):
    _, mdt, *_ = compare.create_systems(compare.parse(flags))
    assert mdt.config.decode_layer == blocks


def test_speedups_are_medians_of_the_rounds_ratios():
    """1, 3 and 1 where the medians are 3 and 2: on a busy machine two medians may come from different rounds."""
    args = compare.parse(["--size", "Ti"])
    systems = compare.create_systems(args)
    slow = {"MDTv2-Ti/2": (1.0, 6.0, 3.0)}
    results = fake_results(args, systems, lambda label, work, mode, k: slow.get(label, (1.0, 2.0, 3.0))[k])
    line = next(iter(compare.speedup_lines(args, systems, results)))
    assert line.startswith("- Inference: EDT-Ti/2 is 1.00 [1.00-2.00] times as fast as MDTv2-Ti/2; GMAC alone: ")


@pytest.mark.parametrize("flags, paper", [([], 3.93), (["--decode-layer", "4"], None), (["--size", "Ti"], None)])
def test_the_paper_is_cited_for_its_own_networks(flags, paper):
    assert compare.paper_speedup(compare.parse(flags), "training") == paper


def test_compiled_training_has_an_optimizer_of_its_own(monkeypatch):
    def compile_blocks(model):
        for block in model.blocks:
            block.compile(backend="eager")

    monkeypatch.setattr("benchmarks.networks.compile_blocks", compile_blocks)
    monkeypatch.setattr("training.placement.compile_blocks", compile_blocks)
    args = compare.parse(["--size", "Ti", "--compile", "--batch-size", "2", "--train-batch-size", "2", "--precision", "bf16"])
    dit = compare.create_systems(args)[2]
    cases = {case.name: case.run for case in compare.cases_of(dit, args, start_training("bf16"))}
    eager, compiled_step = cases["DiT-Ti/2, training"].func, cases["DiT-Ti/2, training, compiled"].func
    before = [parameter.clone() for parameter in eager.model.parameters()]
    cases["DiT-Ti/2, training, compiled"]()
    pairs = list(zip(compiled_step.model.parameters(), eager.model.parameters(), before, strict=True))
    assert all(torch.equal(own, old) for _, own, old in pairs)
    assert all(not torch.equal(moved, old) for moved, _, old in pairs if moved.requires_grad)
    torch.testing.assert_close(cases["DiT-Ti/2, forward, compiled"](), cases["DiT-Ti/2, forward"](), rtol=0.02, atol=0.02)


def test_plots_do_not_overwrite_one_another(monkeypatch):
    monkeypatch.setattr(compare, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    names = [compare.plot_path(size, torch.device(device)).name for size in ("S", "XL") for device in ("cpu", "cuda")]
    assert names == [
        "compare.png",
        "compare-nvidia-h100-80gb-hbm3.png",
        "compare-XL.png",
        "compare-XL-nvidia-h100-80gb-hbm3.png",
    ]


def test_small_run_writes_table_and_plot(capsys, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(compare, "write_section", lambda title, text: written.append((title, text)))
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    flags = ["--size", "Ti", "--mediators", "4", "16", "--batch-size", "2", "--train-batch-size", "1"]
    compare.main([*flags, "--repeats", "1", "--warmup", "1"])
    text = capsys.readouterr().out.rstrip("\n")
    [(title, section)] = written
    assert title.startswith("benchmarks.compare: size Ti on ") and section == text
    for label in ("EDT-Ti/2", "MDTv2-Ti/2", "DiT-Ti/2", "SiT-Ti/2", "SiT-Ti/2 M=4", "SiT-Ti/2 M=16"):
        work, times = cells(text, label)
        assert float(work[0]) > 0 and len(times) == 8
        for ms_per_image, images_per_second in (times[0:3:2], times[4:7:2]):
            assert float(ms_per_image) * float(images_per_second) == pytest.approx(1000, rel=0.02)
    assert len(re.findall(r"^- (?:Inference|Training): \S+.* is \S+ times as fast as ", text, re.MULTILINE)) == 8
    assert text.endswith("(compare-Ti.png)")
    with Image.open(tmp_path / "compare-Ti.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--mediators", "5"], "--mediators 5: .*square"),
        (["--mediators", "4", "4"], "--mediators 4 4: give each number once"),
        (["--decode-layer", "5"], "--decode-layer 5: .*even number"),
        (["--size", "L"], "--size: invalid choice: 'L'"),
    ],
)
def test_unfit_flags_are_refused_before_anything_is_timed(flags, says, capsys):
    with pytest.raises(SystemExit):
        compare.main(flags)
    assert re.search(says, capsys.readouterr().err)
