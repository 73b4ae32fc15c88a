"""benchmarks.run from end to end on a tiny network, its rows, targets, picture, memory. Nothing here depends on real speed."""

import dataclasses
import json
from argparse import Namespace
from collections import Counter

import pytest
import torch
from PIL import Image

from benchmarks import endtoend, memory, plot, run, speed
from benchmarks.hot_spots import own_times
from benchmarks.memory import Need
from benchmarks.networks import random_inputs, training_batch, training_step
from benchmarks.products import Product, record_products, total_flops
from benchmarks.reference import plain_network
from benchmarks.rows import ALONE, AMM, OURS, PLAIN, Part, Row, find, read_parts, row_of, table, write_parts
from benchmarks.saved import saved_for_backward
from benchmarks.targets import TARGETS, target_lines
from benchmarks.timing import Result
from models import create_model
from models.macs import multiply_accumulates, training_multiply_accumulates
from runtime.distributed import start_training

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
SMALL = ["--size", "Ti", "--no-compile", "--repeats", "1", "--batch-size", "2", "--train-batch-size", "1"]
SMALL += ["--sample-images", "3", "--sample-batch-size", "2", "--sample-steps", "2", "--share-rounds", "1", "--amm-rounds", "1"]


def row(**values) -> Row:
    return Row(**{"work": "forward", "model": "EDT-S/2", "path": "fp32", "batch": 8, "ms_per_item": 2.0, **values})


def part(*rows: Row, **values) -> Part:
    return Part(**{"environment": "a machine", "seconds": 3.0, "caption": "What.", "rows": list(rows), "lines": [], **values})


# Rows


def test_a_row_says_what_was_measured():
    result = Result(
        name="x", items=4, seconds=(0.2, 0.4, 0.2), ratio=0.25, flops=8 * 10**9, product_seconds=0.1, share_of_product_rate=0.5
    )
    found = row_of(result, "training", "EDT-S/2", "fp32", error=1e-3)
    assert (found.batch, found.ms_per_item, found.speedup, found.rounds) == (4, 50.0, 4.0, 3)
    assert found.gflops == pytest.approx(40) and found.product_gflops == pytest.approx(80) and found.share == 0.5
    assert found.error == 1e-3 and found.saved_bytes is None


def test_parts_are_replaced_one_by_one(tmp_path):
    path = tmp_path / "results.json"
    write_parts({"forward": part(row()), "training": part(row(work="training"))}, path)
    write_parts({"forward": part(row(ms_per_item=7.0, share=0.25), lines=["- more"])}, path)
    parts = read_parts(path)
    assert list(parts) == ["forward", "training"]
    assert parts["forward"] == part(row(ms_per_item=7.0, share=0.25), lines=["- more"])
    assert parts["training"].rows == [row(work="training")]


@pytest.mark.parametrize("content", ["", "[]", '{"forward": {}}', '{"forward": {"rows": [{"speed": 3}]}}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results.json cannot be read .*benchmarks.run"):
        read_parts(path)


def test_table_leaves_out_what_no_row_has():
    heading, _, first, second = table([row(speedup=1.5), row(path=PLAIN, error=2e-3)]).splitlines()
    assert [cell.strip() for cell in heading.strip("|").split("|")] == [
        "model", "path", "batch", "ms/image", "rounds", "times as fast as plain", "error"
    ]  # fmt: skip
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["EDT-S/2", "fp32", "8", "2.00", "1", "1.50", "-"]
    assert [cell.strip() for cell in second.strip("|").split("|")][-1] == "2e-3"


# Targets


def test_targets_are_judged_by_the_best_path_of_the_right_batch():
    rows = [
        row(path=PLAIN, product_gflops=200.0),
        row(path="fp32", speedup=1.2, share=0.8, product_gflops=200.0, ceiling=1.5),
        row(path="fp32 compiled", speedup=1.45, share=0.9, product_gflops=200.0, ceiling=1.5),
        row(path="bf16 compiled", speedup=2.5, share=0.4, product_gflops=400.0, ceiling=6.25, error=1.5e-2),
        row(model="EDT-B/2", path="bf16 compiled", batch=8, share=0.9),
        row(work="optimizer", model="EDT-B/2", path=OURS, speedup=3.2, ceiling=5.0),
    ]
    fp32, bf16, optimizer, error = target_lines(rows)
    assert fp32.startswith("- EDT-S/2 forward, batch 8, fp32 (fp32 compiled): 1.45, target 1.40: met; 90 % of its time are")
    assert "2.50, target 3.00: not met; 40 % of its time are its products, alone at 400 GFLOP/s, 2.00 times fp32's" in bf16
    assert bf16.endswith("if nothing else took time, it would be 6.25")
    assert "3.20, target 3.00: met; at the rate of copying memory it would be 5.00" in optimizer
    assert error == "- Error of bf16 forwards: at most 1.5e-02, target 2e-02: met"
    [share] = [target for target in TARGETS if target.field == "share"]
    rows[4] = dataclasses.replace(rows[4], batch=share.batch)
    assert any("90 %, target 70 %: met" in line for line in target_lines(rows))
    alone = dataclasses.replace(rows[4], path="bf16 compiled" + ALONE, share=0.6, rounds=15)
    assert any("60 %, target 70 %: not met" in line for line in target_lines([*rows, alone]))


def test_the_cost_of_amm_is_the_pairs():
    rows = [row(path="bf16 compiled" + AMM, speedup=1.0, amm_cost=0.024), row(path="bf16 compiled", speedup=3.5)]
    lines = list(target_lines(rows))
    assert "- EDT-S/2 forward, bf16 compiled: AMM takes 2.4 % more time, target at most 3 %: met" in lines


# Products


@pytest.mark.parametrize("name", ["EDT-Ti/2", "MDTv2-Ti/2", "DiT-Ti/2", "SiT-Ti/2"])
def test_products_of_a_forward(name):
    """The plain formulation does the network's arithmetic, and counts it on meta as it does it."""
    model = create_model(name).eval()
    found = speed.forward_products(model.config, 3)
    assert total_flops(found) == 2 * 3 * multiply_accumulates(model.config)
    plain, inputs = plain_network(model).eval(), random_inputs(model.config, 3, CPU)
    assert found == record_products(torch.no_grad()(lambda: plain(*inputs)))


@pytest.mark.parametrize("k", range(4))
def test_products_of_a_training_step(k):
    system = run.systems("Ti")[k]
    found = speed.step_products(system, 2)
    assert total_flops(found) == 2 * 2 * training_multiply_accumulates(system.config, system.masked)


def test_products_change_their_precision():
    products = Counter({Product(1, 2, 3, 4, FP32): 5})
    assert speed.in_dtype(products, BF16) == {Product(1, 2, 3, 4, BF16): 5}
    products[Product(2, 2, 3, 4, FP32)] = 1
    assert speed.in_dtype(products, BF16, packed=True) == {Product(1, 2, 3, 4, BF16, True): 5, Product(2, 2, 3, 4, BF16): 1}


# Memory


def test_saved_bytes_of_a_product_chain():
    """Each linear saves its input for the weight's gradient, and relu its output, which is the next one's input."""
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(10, 8)
    assert saved_for_backward(lambda: network(x).sum().backward(), network) == 4 * (10 * 8 + 10 * 16)


def test_one_pass_after_the_other_holds_one_at_a_time():
    network, x = torch.nn.Linear(8, 16), torch.randn(10, 8)

    def twice() -> None:
        for tensor in (x, x + 1):
            network(tensor).sum().backward()

    assert saved_for_backward(twice, network) == 4 * 10 * 8


def test_largest_batch_is_on_the_line():
    need = Need.through(held=1000, peaks={2: 700, 6: 1500})
    assert (need.fixed, need.per_image) == (300.0, 200.0)
    assert need.largest_batch(1000 + 300 + 200 * 7 + 199) == 7
    assert need.largest_batch(1000) == 0


def test_held_bytes_are_weights_average_and_adans_states():
    network = create_model("EDT-Ti/2")
    step = training_step(network, 1, start_training("fp32"))
    batch = training_batch(network.config, 1, masked=True)
    weights = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    index = sum(buffer.nbytes for buffer in network.buffers())
    assert memory.held_bytes(step) == 2 * (4 * weights + index)
    step(0, batch, 1e-3)
    assert memory.held_bytes(step) == pytest.approx(2 * (4 * weights + index) + 4 * 4 * trained, rel=1e-3)


# All of it


def test_small_run_writes_table_json_and_picture(capsys, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(run, "write_section", lambda title, text: written.append((title, text)))
    monkeypatch.setattr(run, "json_path", lambda size, device: tmp_path / "results.json")
    monkeypatch.setattr(endtoend, "VAE_CHANNELS", (8,) * 4)
    monkeypatch.setattr(memory, "PEAKS", 1)
    edt = run.systems("Ti")[0]
    monkeypatch.setattr(run, "systems", lambda size: [edt])
    run.main([*SMALL, "--memory-batches", "1", "2"])
    text = capsys.readouterr().out.rstrip("\n")
    [(title, section)] = written
    assert title.startswith("benchmarks.run: size Ti on ") and section == text
    parts = read_parts(tmp_path / "results.json")
    assert list(parts) == list(run.PARTS)
    for work in ("forward", "training", "optimizer", "sampling"):
        plain, *with_amm, ours = parts[work].rows
        assert [row.path for row in with_amm] == (["fp32" + AMM] if work == "forward" else [])
        assert all(row.amm_cost is not None and row.error < 1e-2 for row in with_amm)
        assert plain.path == PLAIN and plain.speedup is None and ours.speedup > 0 and ours.error < 1e-2
        assert work in ("optimizer", "sampling") or (ours.saved_bytes is None) == (work == "forward")
    assert [row.path for row in parts["memory"].rows] == ["fp32", "fp32, recomputed", "bf16", "bf16, recomputed"]
    assert find(parts["forward"].rows, "forward", "EDT-Ti/2", "fp32").gflops > 0
    assert "| aten::" in text and text.endswith("(results.png)")
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    before = parts["training"]
    run.main([*SMALL, "--only", "optimizer"])
    assert read_parts(tmp_path / "results.json")["training"] == before


def test_compiled_paths(monkeypatch):
    """With copies in place of compilations: what is compiled is what is compared, and leaves the others alone."""
    monkeypatch.setattr(speed, "prepared", lambda model, dtype: model.__class__(model.config).eval())
    args = Namespace(**{**vars(run.parse(SMALL)), "compile": True})
    edt = run.systems("Ti")[0]
    rows, calls = speed.forward_rows(args, edt, 2, CPU)
    assert [row.path for row in rows] == list(calls)
    assert list(calls) == [PLAIN, "fp32" + AMM, "fp32", "fp32 compiled", "bf16 compiled" + AMM, "bf16 compiled"]
    assert rows[1].error < 1e-5 and rows[2].error < 1e-5 and rows[5].error == 1.0  # a fresh network gives zeros
    assert [row.amm_cost is None for row in rows] == [True, False, True, True, False, True]
    assert rows[2].product_gflops != rows[5].product_gflops
    again, _ = speed.forward_rows(Namespace(**{**vars(args), "share_rounds": 2}), edt, 2, CPU)
    assert [row.path for row in again[-2:]] == ["bf16 compiled", "bf16 compiled" + ALONE]
    assert (again[-1].rounds, again[-1].speedup, again[-2].rounds) == (2, None, 1)
    assert [row.path for row in speed.forward_rows(args, run.systems("Ti")[2], 2, CPU)[0]] == [PLAIN, "fp32", "bf16 compiled"]


def test_profile_names_the_largest_first():
    a = torch.randn(400, 400)
    lines = own_times(lambda: a @ a + 1, CPU).splitlines()
    assert lines[2].startswith("| aten::mm ")


# Picture and flags


def test_picture_of_a_file(tmp_path, capsys, fails):
    path = tmp_path / "results-x.json"
    rates = {"gflops": 90.0, "product_gflops": 120.0, "share": 0.75}
    write_parts({"training": part(row(work="training", **rates), row(work="training", path=PLAIN, **rates))}, path)
    plot.main([str(path), "--out", str(tmp_path / "a.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n" and (tmp_path / "a.png").stat().st_size > 5000
    write_parts({"training": part(row())}, path)
    assert "holds neither forwards nor training steps" in fails(plot.main, path)
    path.write_text(json.dumps({"forward": 3}))
    assert "cannot be read" in fails(plot.main, path)


def test_unfit_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--memory-batches", "2", "2"])
    assert "--memory-batches 2 2: give two different ones" in capsys.readouterr().err


def test_the_large_network_is_left_out_of_small_runs():
    assert run.large_config(run.parse([]))[0] == "EDT-B/2"
    assert run.large_config(run.parse(["--size", "Ti"]))[0] == "EDT-Ti/2"


def test_networks_are_the_issues():
    labels = [system.label for system in run.systems("S")]
    assert labels == ["EDT-S/2", "MDTv2-S/2", "DiT-S/2", "SiT-S/2", "SiT-S/2 M=16"]
