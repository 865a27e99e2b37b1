"""The benchmarks: the stopwatch measures, a wrong result is caught, the output is as promised."""

import dataclasses
import functools
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from bench import (
    contenders,
    correlation,
    counts,
    curvature,
    kernels,
    launches,
    search_step,
    second_order,
    timing,
)
from bench.contenders import OURS, Setup
from bench.curvature_baselines import BASELINES, Loss, trained
from rdarts_fast import bilevel, config, config_sources
from rdarts_fast.draws import Draws
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import supernet
from rdarts_fast.search import Losses, alpha_step, weight_step
from rdarts_fast.search_state import SearchState
from rdarts_fast.spaces import load_space
from rdarts_fast.tasks.classification import Classification
from tests import small

CPU = torch.device("cpu")
SMALL = Setup("s5", batch=4, channels=2, layers=3, size=8)
SIZES = ["--batch", "4", "--channels", "2", "--layers", "3", "--size", "8", "--seconds", "0"]
REPOSITORY = Path(__file__).parents[1]


def allocating(mb: int) -> timing.Call:
    return lambda: torch.ones(mb * 250_000)


def wrong_kind(mb: int) -> timing.Call:
    raise KeyError("not this one")


def test_twice_as_long_is_a_ratio_of_two() -> None:
    calls = [functools.partial(time.sleep, seconds) for seconds in (0.02, 0.04)]
    one, two = timing.in_turn(calls, CPU, seconds=0.0, least=9)
    assert len(one.ms) == len(two.ms) == 9
    assert 1.5 < two.median / one.median < 2.7
    assert one.quartiles[0] <= one.median <= one.quartiles[1]


def test_calls_run_in_turn_and_the_warm_up_does_not_count() -> None:
    order = []
    calls = [functools.partial(order.append, name) for name in "ab"]
    times = timing.in_turn(calls, CPU, seconds=0.0, least=2, warm_up=1)
    assert "".join(order) == "ababab"
    assert [len(of_call.ms) for of_call in times] == [2, 2]


def test_peak_memory_is_the_cases_own() -> None:
    # More than the cases hold: a fresh process must not inherit this one's peak.
    ours = torch.ones(75_000_000)
    small, large = (timing.peak_mb(functools.partial(allocating, mb), CPU) for mb in (20, 84))
    assert 20 < small < 150
    assert 60 < large - small < 68
    del ours


def test_what_fails_in_the_fresh_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'not this one'"):
        timing.peak_mb(functools.partial(wrong_kind, 1), CPU)


def sleeper(connection, folder: Path) -> None:
    """Start a process of its own, and let the test know both."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    connection.send((os.getpid(), child.pid))
    time.sleep(60)


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_process_that_takes_too_long_is_killed_with_all_it_started(tmp_path) -> None:
    with (
        pytest.raises(TimeoutError),
        timing.fresh_process(sleeper, tmp_path) as connection,
    ):
        processes = timing.receive(connection)
        timing.receive(connection, 0.1)
    deadline = time.monotonic() + 10
    while not all(map(gone, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, processes))


@pytest.mark.parametrize("space", ["s1", "s4"])
def test_the_check_passes_and_every_contender_runs(space: str) -> None:
    setup = Setup(space, batch=4, channels=2, layers=3, size=8)
    contenders.check(setup)
    for name in (OURS, "eager", "channels_last"):
        contender = contenders.Contender(name, setup)
        before = {k: v.clone() for k, v in contender.state.supernet.named_parameters()}
        alphas = [alpha.clone() for alpha in contender.state.alphas.values()]
        for case in contenders.CASES.values():
            case(contender)
        after = dict(contender.state.supernet.named_parameters())
        assert not torch.equal(before["stem.0.weight"], after["stem.0.weight"])
        assert not any(map(torch.equal, alphas, contender.state.alphas.values()))
        assert all(parameter.grad is None for parameter in after.values())


def test_torchs_noise_has_the_shape_and_layout_of_the_input() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(8, 6, 9, 7).to(memory_format=memory_format)
        for stride in (1, 2):
            drawn = contenders.TorchNoise(stride, memory_format)(x)
            assert drawn.shape == x[:, :, ::stride, ::stride].shape
            assert drawn.is_contiguous(memory_format=memory_format)
            assert 0.8 < drawn.std() < 1.2


def test_the_check_of_a_search_step_catches_a_wrong_network(monkeypatch) -> None:
    right = supernet.fused_cell

    def larger(*given, **ways):
        return [1.01 * node for node in right(*given, **ways)]

    monkeypatch.setattr(supernet, "fused_cell", larger)
    with pytest.raises(AssertionError, match="s5: our logits differ"):
        contenders.check(SMALL)


def test_the_check_of_a_search_step_catches_a_wrong_gradient(monkeypatch) -> None:
    right = supernet.fused_cell

    def without_weights(cell, plan, inputs, weights, *arguments, **ways):
        return right(cell, plan, inputs, weights / 2 + weights.detach() / 2, *arguments, **ways)

    monkeypatch.setattr(supernet, "fused_cell", without_weights)
    with pytest.raises(AssertionError, match="s5: our gradient differ"):
        contenders.check(SMALL)


def test_the_check_of_the_kernels_catches_a_wrong_one(monkeypatch) -> None:
    setup = kernels.Setup("node_sum", "C64 8x8", "channels_last", batch=2)
    inputs = kernels.Inputs.draw(setup)
    kernels.check(setup, inputs)
    right = kernels.node_sum
    monkeypatch.setattr(kernels, "node_sum", lambda z, *a: right(z[::-1], *a))
    with pytest.raises(AssertionError, match="node_sum, C64 8x8 channels_last: output"):
        kernels.check(setup, inputs)


FIELDS = {"bench", "case", "space", "baseline", "ours_ms", "baseline_ms", "ratio"} | {
    "peak_mb", "baseline_peak_mb", "device", "dtype", "commit"
}  # fmt: skip


@pytest.fixture
def printed(monkeypatch, capsys) -> Callable[..., list[str]]:
    """Run a command line and return the lines it prints."""

    def run(main: Callable[[], None], *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        main()
        return capsys.readouterr().out.splitlines()

    return run


def test_search_step_prints_a_line_of_json_a_row(printed) -> None:
    choice = ["--spaces", "s5", "--cases", "forward+backward", "--baselines", "eager"]
    counted, row = map(json.loads, printed(search_step.main, "--json", *choice, *SIZES))
    assert set(row) >= FIELDS <= set(counted)
    assert (row["bench"], row["space"], row["baseline"]) == ("search_step", "s5", "eager")
    assert counted["case"] == search_step.COUNTS and counted["ratio"] is None
    assert 0 < counted["operations"] < counted["kernels"] < counted["baseline_kernels"]
    assert f"kernels {counted['kernels']:,} against" in counted["note"]
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], rel=1e-3)
    assert row["peak_mb"] > 0 < row["baseline_peak_mb"]
    assert row["rounds"] == 5


def test_a_step_dispatches_and_launches_a_fraction_of_the_operations() -> None:
    ours, theirs = (counts.count(name, Setup("s2")) for name in (OURS, "eager"))
    assert 120 * ours.operations <= theirs.operations
    assert 10.8 * ours.kernels <= theirs.kernels
    launched = counts.counted(dataclasses.replace(Setup("s2"), **counts.SMALL), 1)
    assert ours.kernels - ours.operations == sum(row.launches for row in launched.values())
    assert theirs.kernels == theirs.operations


def test_views_and_allocations_are_no_operations() -> None:
    x = torch.ones(4, 4, requires_grad=True)

    def call() -> None:
        y = torch.empty(4, 4).detach().view(16)[:4]
        (x.t() * 2 + y).sum().backward()

    assert counts.operations_of(call) == {
        "mul": 2, "add": 1, "add_": 1, "sum": 1, "ones_like": 1
    }  # fmt: skip


def test_what_does_not_compile_in_time_has_a_row_without_ratio(printed, monkeypatch) -> None:
    monkeypatch.setattr(search_step, "_peak", lambda *_: 1.0)
    choice = ["--spaces", "s5", "--baselines", "compile", "--compile-seconds", "0.5"]
    rows = [json.loads(line) for line in printed(search_step.main, "--json", *choice, *SIZES)]
    assert [row["case"] for row in rows] == list(contenders.CASES)
    assert {row["note"] for row in rows} == {"did not compile in time"}
    assert {row["ratio"] for row in rows} == {None}


CURVATURE = ["--json", "--spaces", "s5", "--train-steps", "2", *SIZES]


def peak_here(prepare: Callable[[], timing.Call], device: str) -> float:
    """In place of peak_mb: what goes to the fresh process runs in this one."""
    pickle.loads(pickle.dumps(prepare))()()
    return 1.0


def test_curvature_prints_a_line_of_json_a_case(printed) -> None:
    choice = ["--baselines", "row loop", "--cases", "hessian"]
    (line,) = printed(curvature.main, *CURVATURE, *choice)
    row = json.loads(line)
    assert set(row) >= FIELDS
    assert (row["bench"], row["space"], row["baseline"]) == ("curvature", "s5", "row loop")
    assert "extrapolated from 3 + 3 rows: 6 x" in row["note"]
    assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], rel=1e-3)
    assert row["gradients"] > 1.0
    assert row["peak_mb"] > 0 < row["baseline_peak_mb"]


def test_curvature_has_rows_for_every_baseline(printed, monkeypatch) -> None:
    monkeypatch.setattr(curvature, "peak_mb", peak_here)
    monkeypatch.setattr(curvature, "SHORT_MS", 0.0)
    rows = [json.loads(line) for line in printed(curvature.main, *CURVATURE)]
    assert [(row["baseline"], row["case"]) for row in rows] == list(
        itertools.product(["row loop", "vmap", "curvlinops"], ["hessian", "lambda_max"])
    )
    assert rows[0]["baseline_ms"] == rows[1]["baseline_ms"]  # it needs all rows for either
    for row in rows[2:]:
        count = 12 if row["case"] == "hessian" else row["lanczos_products"]
        assert f": {count:g} x " in row["note"]
        seconds = row["note"].rpartition(" x ")[2].removesuffix(" s")
        assert row["baseline_ms"] == pytest.approx(1e3 * count * float(seconds), rel=0.01)
    for row in rows[1::2]:
        assert row["note"].startswith("dense, ")
        assert 1 <= row["lanczos_products"] <= 12


def test_lanczos_runs_on_short_products(printed, monkeypatch) -> None:
    monkeypatch.setattr(curvature, "peak_mb", peak_here)
    monkeypatch.setattr(curvature, "SHORT_MS", 1e9)
    choice = ["--baselines", "curvlinops", "--cases", "lambda_max"]
    (line,) = printed(curvature.main, *CURVATURE, *choice)
    row = json.loads(line)
    assert row["note"].endswith("Lanczos on its products")
    low, high = row["baseline_quartiles_ms"]
    assert 0 < low < high  # three runs, not one multiplied


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_have_our_hessian_and_lambda_max(baseline: str) -> None:
    start = trained(SMALL, 3)
    ours = Loss(OURS, SMALL, torch.float64, start)
    theirs = Loss("eager", SMALL, torch.float64, start)
    operator = BASELINES[baseline](theirs)
    assert_close(operator @ torch.eye(12).double(), ours.hessian(), rtol=1e-9, atol=1e-12)
    found, expected = theirs.top_of(operator, 1), ours.top()
    assert found.products < 12
    assert found.value == pytest.approx(expected.value, rel=1e-3)
    trained_weight, fresh_weight = (
        loss.supernet.stem[0].weight for loss in (theirs, Loss("eager", SMALL, torch.float64))
    )
    assert not torch.equal(trained_weight, fresh_weight)
    assert expected.value > 0.0


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_check_of_the_curvature_catches_a_wrong_hessian(monkeypatch, baseline: str) -> None:
    right = Loss.hessian
    monkeypatch.setattr(Loss, "hessian", lambda self: 1.001 * right(self))
    with pytest.raises(RuntimeError, match=rf"s5, {baseline}: the Hessians differ by 1\.0e-03"):
        curvature.check(SMALL, [baseline])


def test_the_check_of_the_curvature_has_our_noise() -> None:
    setup = Setup("s4")
    curvature.check(setup, ["vmap", "curvlinops"])


def test_a_missing_curvlinops_is_one_line(printed, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(SystemExit) as exit:
        printed(curvature.main, *CURVATURE, "--baselines", "curvlinops")
    assert exit.value.code == 2
    assert "pip install curvlinops-for-pytorch" in capsys.readouterr().err


def test_kernels_prints_a_table_and_json(printed) -> None:
    small = ["--kernels", "channel_sums", "--batch", "2", "--seconds", "0", "--no-memory"]
    assert len(printed(kernels.main, *small)) == 2 + 4 + 2
    rows = [json.loads(line) for line in printed(kernels.main, *small, "--json")]
    assert all(set(row) >= FIELDS for row in rows)
    assert all(row["ratio"] > 0 for row in rows[:4])
    assert all(row["percent_of_copy"] > 0 for row in rows[4:])


def test_correlation_prints_a_table_and_json(printed, monkeypatch) -> None:
    monkeypatch.setitem(correlation.SHAPES, "tiny", correlation.Shape(2, 3, 4, 9, 2))
    tiny = ["--shapes", "tiny", "--seconds", "0", "--no-memory"]
    assert len(printed(correlation.main, *tiny)) == 2 + 2 * 2 * len(correlation.BASELINES)
    rows = [json.loads(line) for line in printed(correlation.main, *tiny, "--json")]
    assert all(set(row) >= FIELDS and row["ratio"] > 0 and row["most"] == 2 for row in rows)
    assert {row["baseline"] for row in rows} == set(correlation.BASELINES)


@pytest.mark.parametrize("way", ["ours", *correlation.BASELINES])
def test_the_check_of_the_correlation_catches_a_wrong_one(monkeypatch, way: str) -> None:
    monkeypatch.setitem(correlation.SHAPES, "tiny", correlation.Shape(2, 3, 4, 9, 2))
    setup = correlation.Setup("tiny", "NCHW")
    correlation.check(setup)
    right = correlation.WAYS[way]
    monkeypatch.setitem(
        correlation.WAYS, way, lambda a, b, first, count: right(a, b, first + 1, count)
    )
    with pytest.raises(AssertionError, match=r"tiny NCHW: .* is off by"):
        correlation.check(setup)


@pytest.fixture
def search_in_space_with_noise(tmp_path) -> tuple[config.SearchConfig, Classification, SearchState]:
    """A tiny search that has gone on for a few steps, with the same draws in all passes."""
    settings = config_sources.from_settings(
        config.SearchConfig, small.settings(tmp_path, space="s4", noise_per_pass="shared")
    )
    task = Classification.load(settings, CPU)
    state = SearchState.start(settings, task.supernet(settings, load_space("s4")))
    for number in range(6):
        step_of_search(settings, task, state, Draws(1, step=number))
    return settings, task, state


def finite(value: torch.Tensor, name: str) -> None:
    assert value.isfinite(), name


def step_of_search(settings, task, state, draws: Draws, number: int = 0) -> None:
    """Do step `number` of the epoch, as search.loop does."""
    rows = task.search_epoch(Draws(settings.seed))[number], task.validation_rows(draws)
    batches = [task.training_batch(rows[i], draws, 0.0, validation=i == 1) for i in (0, 1)]
    losses = Losses(settings, task, state, draws)
    alpha_step(
        settings,
        state,
        losses.of(batches[0], "weights"),
        losses.of(batches[1], "alphas"),
        0.1,
        finite,
    )
    weight_step(settings, state, losses.of(batches[0], "weights"), finite)


@pytest.fixture
def step(search_in_space_with_noise) -> second_order.Step:
    return second_order.Step(*search_in_space_with_noise, 0.1, 1)


def test_what_second_order_compares_is_the_searchs_own_gradient(
    search_in_space_with_noise, step, monkeypatch
) -> None:
    settings, task, state = search_in_space_with_noise
    found = []
    right = bilevel.second_order
    monkeypatch.setattr(
        bilevel, "second_order", lambda *a, **k: found.append(right(*a, **k)) or found[-1]
    )
    settings = dataclasses.replace(settings, implicit="exact")
    step_of_search(settings, task, state, Draws(settings.seed, step=1), 1)
    (expected,) = (torch.cat([g.flatten() for g in result.gradient]) for result in found)
    assert_close(step.gradient(0.01, exact=True).float(), expected, rtol=1e-3, atol=1e-5)


def test_the_two_forms_of_second_order_agree_for_a_tiny_step(step) -> None:
    found = second_order.compare(step, 0.01)
    assert list(found["implicit"]) == ["0.01", "0.0001", "1e-06", "1e-09"]
    assert found["implicit"]["1e-09"] > 0.999
    assert found["length"]["1e-09"] == pytest.approx(1.0, abs=1e-3)
    assert found["share"] > 0.0
    assert all(-1.0 <= cosine <= 1.0 for cosine in (found["cosine"], *found["implicit"].values()))


def test_the_direct_term_is_what_is_left_without_the_implicit_one(step, monkeypatch) -> None:
    direct, whole = step.direct(), step.gradient(0.01)
    zero = lambda loss, parameters, alphas, *_: [torch.zeros_like(a) for a in alphas]  # noqa: E731
    monkeypatch.setattr(bilevel, "implicit_term", zero)
    assert torch.equal(step.gradient(0.01), direct)
    assert not torch.equal(whole, direct)


def test_second_order_prints_a_line_of_json_a_search_and_a_pair(printed, tmp_path) -> None:
    data = small.write_images(tmp_path / "images.npz")
    choice = ["--space", "s5", "--data", f"npz:{data}", "--seeds", "0,1", "--every", "2"]
    sizes = ["--epochs", "2", "--channels", "2", "--layers", "3", "--batch-size", "6"]
    lines = printed(second_order.main, "--json", *choice, *sizes, "--epoch-steps", "2")
    rows = [json.loads(line) for line in lines]
    assert [row["case"] for row in rows] == 4 * ["search"] + 4 * ["agreement"]
    searches = [(row["implicit"], row["seed"]) for row in rows[:4]]
    assert searches == [("difference", 0), ("exact", 0), ("difference", 1), ("exact", 1)]
    for row in rows[:4]:
        assert (row["bench"], row["space"], row["data"]) == ("second_order", "s5", "npz-images")
        assert (row["epochs"], row["channels"], row["seconds"] > 0) == (2, 2, True)
        assert len(row["valid_accuracy"]) == len(row["lambda_max"]) == 2
        assert [point["epoch"] for point in row["points"]] == [0, 1]
        for point in row["points"]:
            assert abs(point["cosine"]) <= 1.0 < 1.0 + point["share"]
            assert point["implicit"]["1e-09"] > 0.999
            assert point["length"]["1e-09"] == pytest.approx(1.0, abs=1e-2)
        assert set(row["genotype"]) == {"normal", "reduce"}
    assert rows[0]["lambda_max"] != rows[1]["lambda_max"] != rows[2]["lambda_max"]
    for row in rows[4:]:
        assert 0 <= row["operations"] <= row["edges"] <= row["of"] == 4
    assert rows[4]["searches"] == ["difference, seed 0", "exact, seed 0"]
    shown = [second_order.text(row) for row in rows]
    assert shown[0].startswith("s5, npz-images, difference, seed 0: ")
    assert len(shown[0].splitlines()) == 4
    assert str(tmp_path) not in "".join(lines)


def test_genotypes_agree_in_edges_and_operations() -> None:
    skip, conv = "skip_connect", "sep_conv_3x3"
    normal = [[(conv, 0), (skip, 1)], [(conv, 0), (conv, 2)]]
    other = [[(conv, 0), (conv, 1)], [(conv, 0), (conv, 1)]]
    one, two = (Genotype({"normal": nodes, "reduce": normal}) for nodes in (normal, other))
    assert second_order.agreement(one, two) == {"edges": 7, "operations": 6, "of": 8}
    assert second_order.agreement(one, one) == {"edges": 8, "operations": 8, "of": 8}


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (search_step.main, ["--spaces", "s9"], 'unknown space "s9": one of s1, s2, s3'),
        (search_step.main, ["--cases", "third"], 'unknown case "third": one of forward+backward'),
        (search_step.main, ["--baselines", "x"], 'unknown baseline "x": one of eager'),
        (search_step.main, ["--batch", "0"], "--batch: expected at least 1, got 0"),
        (curvature.main, ["--cases", "x"], 'unknown case "x": one of hessian, lambda_max'),
        (curvature.main, ["--baselines", "x"], 'unknown baseline "x": one of row loop, vmap'),
        (curvature.main, ["--train-steps", "-1"], "--train-steps: expected at least 0, got -1"),
        (curvature.main, ["--layers", "0"], "--layers: expected at least 1, got 0"),
        (second_order.main, ["--space", "s9"], 'unknown space "s9": one of s1, s2, s3'),
        (second_order.main, ["--every", "0"], "--every: expected at least 1, got 0"),
        (kernels.main, ["--kernels", "x"], 'unknown kernel "x": one of node_sum'),
        (correlation.main, ["--shapes", "x"], 'unknown shape "x": one of 960x540'),
        (kernels.main, ["--batch", "0"], "--batch: expected at least 1, got 0"),
    ],
)
def test_a_wrong_choice_is_one_line_with_the_right_ones(
    main, arguments, message, printed, capsys
) -> None:
    with pytest.raises(SystemExit) as exit:
        printed(main, *arguments)
    assert exit.value.code == 2
    out, error = capsys.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert message in error


def test_ctrl_c_is_one_line(tmp_path) -> None:
    command = [sys.executable, "-m", "bench.search_step", "--spaces", "s5", "--baselines", "eager"]
    running = subprocess.Popen(
        [*command, *SIZES[:-2], "--seconds", "60"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    running.stdout.readline()  # the head of the table: it is at work
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while len(children.read_text().split()) < 2:  # until one starts to measure memory
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does, to all of its processes
    _, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (130, "interrupted\n")


def test_launches_are_counted_beside_the_floor(monkeypatch, capsys) -> None:
    floor = launches.floor_bytes(Setup("s4"))
    assert floor == pytest.approx(13 * 4 * 62.4e6, rel=1e-3)  # 62 M elements at the published sizes
    sizes = ["--batch", "2", "--channels", "2", "--layers", "1", "--size", "4", "--json"]
    monkeypatch.setattr("sys.argv", ["launches", "--space", "s5", *sizes])
    launches.main()
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    by_kernel = {row["kernel"]: row["launches"] for row in rows if "kernel" in row}
    assert by_kernel["sep_stage_backward"] > 0
    assert by_kernel.pop("all") == sum(by_kernel.values())
    assert rows[-1]["floor_gb"] >= 0
