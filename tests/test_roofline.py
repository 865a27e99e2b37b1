"""The floors: what is counted is what torch counts, and a floor is the larger of two times."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import reached, roofline
from bench.contenders import CLASSES, Setup
from bench.roofline import DATASHEETS, Machine
from bench.work import Images, Work, forward_backward, merged, summed
from rdarts_fast.draws import Draws
from rdarts_fast.networks import Supernet, softmax_weights

SMALL = ["--batch", "4", "--channels", "4", "--layers", "3", "--size", "16", "--copy-mb", "1"]


def total(works: list[Work], kernels: set[str], of: Callable[[Work], float]) -> float:
    assert kernels <= {work.kernel for work in works}
    return sum(of(work) for work in works if work.kernel in kernels)


def operations_back(
    g: Sequence[int], x: Sequence[int], weight: Sequence[int], *more: Any, out_shape: Any
) -> int:
    """In the place of torch's own count, which takes each group for the whole."""
    wanted = sum(out_shape[i] is not None for i in range(2))
    return wanted * 2 * math.prod(g) * math.prod(weight[1:])


@pytest.mark.parametrize("space", ["s1", "s2", "s4", "darts"])
def test_operations_are_those_that_torch_counts(space: str) -> None:
    setup = Setup(space, batch=3, channels=4, layers=3, size=8)
    net = Supernet(space, setup.channels, setup.layers, CLASSES, "reference").double()
    weights = softmax_weights(net.initial_alphas(0))
    images = torch.randn(setup.batch, 3, setup.size, setup.size).double()
    with FlopCounterMode(display=False) as forward:
        loss = net(images, weights, Draws(0)).sum()
    counted = {torch.ops.aten.convolution_backward: operations_back}
    with FlopCounterMode(display=False, custom_mapping=counted) as backward:
        loss.backward()
    works = forward_backward(setup)
    head = 2 * setup.batch * net.classifier.weight.numel()
    products = {"sep_stage", "mixing", "stem"}
    ours = total(works, products, lambda work: work.matrix)
    ours += total(works, {"sep_stage"}, lambda work: work.vector)
    assert ours == forward.get_total_flops() - head
    ours = total(works, {"sep_stage_backward", "mixing_backward", "stem backward"}, matrix_of)
    # Two of the three: the first is the depthwise part computed again.
    ours += 2 / 3 * total(works, {"sep_stage_backward"}, lambda work: work.vector)
    assert ours == pytest.approx(backward.get_total_flops() - 2 * head)


def matrix_of(work: Work) -> float:
    return work.matrix


def test_numbers_of_a_cell_by_hand() -> None:
    # s4 has a convolution of two stages on each edge. 14 edges of the first cell, the normal one,
    # leave 2 inputs (4 edges each) and 3 nodes (3, 2 and 1): a state is read once, not for each.
    found = forward_backward(Setup("s4", 2, 4, 3, 8))
    works = {work.kernel: work for work in found if work.shape.startswith("C4 8x8")}
    x, edges, states = Images(2, 4, 8).numbers, 14, 5
    first, second = states + edges, 2 * edges
    assert works["sep_stage"].calls == 2 * (states - 1)  # the inputs' are one
    assert works["sep_stage"].numbers == (first + second) * x
    assert works["sep_stage_backward"].numbers == 2 * (first + second) * x
    # Four nodes of 2, 3, 4 and 5 terms, and the batch norms of two inputs.
    assert works["node_sum"].numbers == (edges + 4 + 2 * 2) * x
    assert works["node_sum"].numbers == works["node_sum_dq"].numbers
    # Two inputs, each of three times the channels; backward g and z are read.
    assert works["mixing"].numbers == 2 * (3 + 1) * x
    assert works["mixing_backward"].numbers == 2 * (2 * 3 + 2) * x


def test_works_of_one_kernel_and_shape_are_one() -> None:
    made = Images(1, 2, 4)
    once, twice = merged(summed(3, 0, made)), merged([*summed(3, 0, made), *summed(3, 0, made)])
    assert [work.calls for work in twice] == [2, 2]
    assert [work.numbers for work in twice] == [2 * work.numbers for work in once]


@pytest.mark.parametrize(
    ("precision", "numbers", "vector", "matrix", "seconds"),
    [
        ("fp32", 100.0, 15.0, 20.0, 4.0),  # bytes: 400 of 100 a second
        ("fp32", 100.0, 300.0, 200.0, 50.0),  # operations: 10 a second
        ("bf16", 100.0, 1.0, 100.0, 2.0),  # half the bytes; 100 products a second
        ("bf16", 1.0, 30.0, 100.0, 4.0),
    ],
)
def test_a_floor_is_the_larger_of_two_times(
    precision: str, numbers: float, vector: float, matrix: float, seconds: float
) -> None:
    machine = Machine("m", "", 100.0, 10.0, {"fp32": 10.0, "bf16": 100.0})
    assert machine.floor(Work("k", "s", 1, numbers, vector, matrix), precision) == seconds


def test_a_floor_without_tensor_cores_has_the_general_units_rate() -> None:
    machine = Machine("m", "", 100.0, 10.0, {"fp32": 10.0, "bf16": 100.0})
    work = Work("k", "s", 1, 1.0, 30.0, 100.0)
    assert machine.floor_without(work, "bf16") == 13.0
    assert machine.floor_without(work, "fp32") == machine.floor(work, "fp32") == 13.0
    assert machine.floor_without(Work("k", "s", 1, 1e4, 30.0, 100.0), "bf16") == 200.0


def test_kernels_use_tensor_cores_where_they_lower_a_floor() -> None:
    """As csrc/cuda/tuning.h has it in the last column of its table."""
    text = (Path(__file__).resolve().parent.parent / "csrc/cuda/tuning.h").read_text()
    rows = re.findall(r"^    \{(\d+), (\d+), \d+, DType::k(\w+), .*(true|false)\},$", text, re.M)
    assert len(rows) == text.count("    {") and rows
    works = forward_backward(Setup("s4"))
    for channels, size, dtype, used in rows:
        shape = f"C{channels} {size}x{size}"
        backward = [work for work in works if work.kernel == "sep_stage_backward"]
        found = [work for work in backward if work.shape.startswith(shape)]
        precision = {"Float32": "tf32", "BFloat16": "bf16", "Float64": "fp32"}[dtype]
        assert found
        assert any(roofline.pays(work, precision) for work in found) == (used == "true")


def test_the_published_search_has_the_floor_of_the_design() -> None:
    found = roofline.totals(forward_backward(Setup("s4")), DATASHEETS[0], "fp32", 391, 50)
    assert 1.1 < found["forward_backward_ms"] < 1.5
    assert found["second_order_step_ms"] == pytest.approx(5 * found["forward_backward_ms"])
    assert found["search_s"] == pytest.approx(found["second_order_step_ms"] * 391 * 50 / 1e3)


def printed(monkeypatch: Any, capsys: Any, *arguments: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["roofline", *arguments])
    roofline.main()
    lines: list[str] = capsys.readouterr().out.splitlines()
    return lines


def test_a_table_and_lines_of_json(monkeypatch: Any, capsys: Any) -> None:
    rows = [json.loads(row) for row in printed(monkeypatch, capsys, "--json", *SMALL)]
    assert [row["machine"] for row in rows][:2] == ["H100", "A100"]
    for row in rows:
        assert row["forward_backward_ms"] == pytest.approx(
            sum(floor["floor_ms"] for floor in row["floors"]), rel=1e-2
        )
        assert row["gb_per_s"] > 0 < row["tflops"]
    assert rows[-1]["source"].startswith("measured")
    table = printed(monkeypatch, capsys, *SMALL)
    assert len(table) == 2 + len(rows[0]["floors"]) + len(rows)
    assert "search of 50 x 391 steps" in table[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp16"], 'unknown precision "fp16": one of fp32, tf32, bf16'),
        (["--space", "s9"], 'unknown space "s9"'),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--copy-mb", "0"], "--copy-mb: expected at least 1, got 0"),
    ],
)
def test_a_wrong_choice_is_one_line(
    arguments: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["roofline", *arguments])
    with pytest.raises(SystemExit) as exit:
        roofline.main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_reached_is_the_floor_over_the_time(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(
        "sys.argv", ["reached", "--json", "--batch", "2", "--copy-mb", "1", "--seconds", "0"]
    )
    reached.main()
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 * len(reached.SHAPES)
    for row in rows:
        assert row["ms"] > 0 < row["floor_ms"]
        assert row["percent_of_floor"] == pytest.approx(
            100 * row["floor_ms"] / row["ms"], abs=0.2, rel=2e-3
        )
    sums = [row for row in rows if row["kernel"] == "node_sum"]
    assert sums[0]["floor_ms"] == pytest.approx(2 * sums[1]["floor_ms"], rel=1e-2)


def test_the_works_that_are_timed_are_those_of_a_cell() -> None:
    images = Images(64, 16, 32)
    found = {name: work for name, (_, work) in reached.kernels(images).items()}
    # One state and the first stages of the four convolutions that leave it.
    assert found["sep_stage"].numbers == 5 * images.numbers
    assert found["sep_stage"].vector + found["sep_stage"].matrix == 4 * (18 + 32) * images.numbers
    assert found["node_sum"].numbers == 11 * images.numbers
