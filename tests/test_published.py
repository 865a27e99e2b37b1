"""The paper's numbers: spot values typed by hand, what ties the tables, when a run may stand beside
them.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest

from rdarts_fast import config, published
from rdarts_fast.config import RetrainConfig, SearchConfig
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import Network
from rdarts_fast.published import Published, error, matches, supernets
from rdarts_fast.training import count_parameters

SPACES = ("s1", "s2", "s3", "s4")
DATA = ("cifar10", "cifar100", "svhn")
DROP_PATHS = (0.0, 0.2, 0.4, 0.6)


@pytest.mark.parametrize(
    ("data", "space", "method", "mean", "deviation"),
    [
        ("cifar10", "s1", "darts", 0.0466, 0.0071),
        ("cifar10", "s1", "randomnas-ws", 0.0317, 0.0015),
        ("cifar10", "s2", "darts-es", 0.0341, 0.0014),
        ("cifar10", "s3", "darts-ada", 0.0299, 0.0034),
        ("cifar10", "s4", "randomnas-ws", 0.8939, 0.0084),
        ("cifar100", "s1", "darts-ada", 0.2494, 0.0081),
        ("cifar100", "s2", "darts", 0.2875, 0.0092),
        ("cifar100", "s4", "darts-es", 0.2390, 0.0201),
        ("svhn", "s1", "darts", 0.0988, 0.0550),
        ("svhn", "s3", "randomnas-ws", 0.0289, 0.0009),
        ("svhn", "s4", "darts-ada", 0.0252, 0.0006),
    ],
)
def test_errors(data: str, space: str, method: str, mean: float, deviation: float) -> None:
    assert error(space, data, method) == Published(mean, deviation, runs=3, source="W T1")


def test_every_benchmark_and_method_has_an_error() -> None:
    found = [error(*where) for where in itertools.product(SPACES, DATA, published.METHODS)]
    assert len(found) == 48 and len(set(found)) == 48  # no two are printed alike
    assert all(e is not None and 0.0 < e.deviation < e.mean < 1.0 for e in found)


# Column sums taken from the tables' text apart from this package: they find any wrong digit.
def test_the_columns_of_errors_add_up() -> None:
    sums = [213.74, 4.12, 153.08, 11.87, 129.62, 8.31, 124.01, 5.27]
    for method, mean, deviation in zip(published.METHODS, sums[::2], sums[1::2], strict=True):
        column = [error(*where, method) for where in itertools.product(SPACES, DATA)]
        assert 100 * sum(e.mean for e in column if e) == pytest.approx(mean, abs=1e-6)
        assert 100 * sum(e.deviation for e in column if e) == pytest.approx(deviation, abs=1e-6)


def test_the_columns_of_supernets_add_up() -> None:
    cells = [supernets(*where) for where in itertools.product(SPACES, DROP_PATHS)]
    sums = (
        ("valid_accuracy", 1e-2, (1327.23, 1330.33, 1328.54)),
        ("test_error", 1e-2, (64.33, 64.83, 61.14)),
        ("parameters", 1.0, (35.34, 33.60, 33.15)),
        ("lambda_max", 1.0, (4.874, 4.863, 3.927)),
    )
    for name, unit, expected in sums:
        for seed in range(3):
            found = sum(getattr(rows[seed], name) for rows in cells)
            assert found == pytest.approx(unit * expected[seed], abs=1e-6)


@pytest.mark.parametrize(
    ("space", "data"), [("s5", "cifar10"), ("darts", "svhn"), ("s1", "digits"), ("cifar10", "s1")]
)
def test_what_is_not_published_is_none(space: str, data: str) -> None:
    assert error(space, data) is None
    assert matches(space, data, {}, {}) == f"no published numbers for {space} on {data}"
    with pytest.raises(UserError, match=f"no published numbers for {space} on {data}"):
        published.network(space, data)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r'unknown published method "dart".*Did you mean "darts"'):
        error("s1", "cifar10", "dart")


@pytest.mark.parametrize(
    ("space", "drop_path", "seed", "row"),
    [
        ("s1", 0.0, 0, (0.8722, 0.0384, 2.24, 1.023)),
        ("s1", 0.6, 2, (0.7884, 0.0304, 3.17, 0.256)),
        ("s2", 0.0, 1, (0.8840, 0.0452, 0.86, 0.409)),
        ("s2", 0.4, 0, (0.8203, 0.0366, 1.28, 0.304)),
        ("s3", 0.2, 1, (0.8560, 0.0316, 4.04, 0.185)),
        ("s3", 0.6, 1, (0.8003, 0.0544, 2.30, 0.275)),
        ("s4", 0.0, 2, (0.8646, 0.0686, 1.05, 0.314)),
        ("s4", 0.4, 1, (0.7967, 0.0370, 1.44, 0.057)),
    ],
)
def test_supernets(space: str, drop_path: float, seed: int, row: tuple[float, ...]) -> None:
    assert supernets(space, drop_path)[seed] == published.Row(*row, source="W T2")


def test_every_cell_has_three_supernets() -> None:
    for space, drop_path in itertools.product(SPACES, DROP_PATHS):
        rows = supernets(space, drop_path)
        assert len(rows) == 3 and len(set(rows)) == 3
        for row in rows:
            assert 0.7 < row.valid_accuracy < 0.9 and 0.029 < row.test_error < 0.073
            assert 0.8 < row.parameters < 4.5 and 0.04 < row.lambda_max < 1.1
    assert supernets("s1", 0) == supernets("s1", 0.0)
    assert supernets("s1", 0.1) == supernets("s5", 0.0) == ()


@pytest.mark.parametrize("space", SPACES)
def test_the_column_of_darts_is_the_mean_of_the_searches_without_drop_path(space: str) -> None:
    errors = [row.test_error for row in supernets(space, 0.0)]
    column = error(space, "cifar10")
    assert column is not None
    assert round(statistics.fmean(errors), 4) == column.mean
    assert round(statistics.pstdev(errors), 4) == column.deviation


def test_searches_with_more_drop_path_validate_worse() -> None:
    for space in SPACES:
        means = [
            statistics.fmean(row.valid_accuracy for row in supernets(space, drop_path))
            for drop_path in DROP_PATHS
        ]
        assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("space", SPACES)
def test_the_published_sizes_are_those_of_the_protocols_networks(space: str) -> None:
    least, most = (size(space, operation) for operation in ("max_pool_3x3", "sep_conv_3x3"))
    for drop_path in DROP_PATHS:
        for row in supernets(space, drop_path):
            assert least <= row.parameters <= most
    if space == "s4":  # 1.44 is the network without noise
        assert {row.parameters for row in supernets("s4", 0.6)} == {most}


def size(space: str, operation: str) -> float:
    """Millions of parameters where every edge has this operation, as printed."""
    node = ((operation, 0), (operation, 1))
    layers, channels = published.network(space, "cifar10")
    genotype = Genotype({"normal": (node,) * 4, "reduce": (node,) * 4})
    return round(count_parameters(Network(genotype, channels, layers, 10, auxiliary=True)) / 1e6, 2)


def search(space: str, data: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a published search."""
    given = {"early_stop": "simulate", "curvature": "lambda", "space": space} | changes
    return config.to_json(config.defaults(SearchConfig, data, "paper")) | given


def retraining(space: str, data: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a published retraining."""
    preset = {"s1": "20x36", "s2": "20x16", "s3": "20x36", "s4": "20x16"}[space]
    preset = preset if data == "cifar10" else "8x16"
    return config.to_json(config.defaults(RetrainConfig, data, preset)) | changes


METHOD_SETTINGS = {
    "darts": {"early_stop": "off", "curvature": "off"},
    "darts-es": {"early_stop": "stop"},
    "darts-ada": {"early_stop": "off", "adaptive": "l2"},
}


@pytest.mark.parametrize("method", METHOD_SETTINGS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("space", SPACES)
def test_the_presets_stand_beside_the_published_numbers(space: str, data: str, method: str) -> None:
    pair = search(space, data, **METHOD_SETTINGS[method]), retraining(space, data)
    why = matches(space, data, *pair, method=method)
    if data == "cifar10" and method != "darts" and space != "s1":
        assert why == f"how {method}'s cells of {space} on cifar10 were retrained is not known"
    else:
        assert why is None


CHANGED_SEARCH = {
    "space": "s3", "data": "svhn", "image_size": 64, "epoch_steps": 12, "epochs": 25,
    "batch_size": 32, "channels": 8, "layers": 4, "learning_rate": 0.05, "learning_rate_min": 0.0,
    "momentum": 0.8, "weight_decay": 27e-4, "grad_clip": 1.0, "drop_path_prob": 0.2, "flip": False,
    "order": "first", "epsilon_scale": 1e-6, "implicit": "exact", "noise_per_pass": "shared",
    "precision": "bf16",
    "alpha_learning_rate": 3e-3, "alpha_beta1": 0.9, "alpha_beta2": 0.99,
    "alpha_weight_decay": 0.0, "early_stop": "stop", "adaptive": "l2",
}  # fmt: skip
CHANGED_RETRAINING = {
    "data": "svhn", "image_size": 64, "epoch_steps": 12, "epochs": 100, "batch_size": 64,
    "channels": 36, "layers": 20, "learning_rate": 0.05, "learning_rate_min": 0.001,
    "momentum": 0.8, "weight_decay": 5e-4, "grad_clip": 1.0, "drop_path_prob": 0.0, "flip": False,
    "cutout_length": 8, "cutout_prob": 0.5, "auxiliary": False, "auxiliary_weight": 0.2,
    "genotypes_at": "20", "holdout": True, "precision": "bf16",
}  # fmt: skip
# Settings that a run's config has and that change nothing of what is compared.
FREE_OF_ALL = {
    "task",  # the space says which
    "data_root", "preset", "out", "seed", "device", "threads", "checkpoint_minutes", "tensorboard",
}  # fmt: skip
FREE_RETRAINING = FREE_OF_ALL | {"source", "channels_last", "compile"}
FREE_SEARCH = FREE_OF_ALL | {
    "backend", "checkpoint_cells", "graph", "oracle", "cutout_length", "cutout_prob",
    "cutout_schedule",
    "curvature", "curvature_every", "curvature_decay",
    "stop_rule", "stop_factor", "stop_window", "stop_delta", "stop_start_epoch",
    "adaptive_factor", "adaptive_max", "adaptive_step", "adaptive_drop_path_max",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED_SEARCH)
def test_a_search_that_differs_is_named(name: str) -> None:
    value = CHANGED_SEARCH[name]
    run = search("s2", "cifar100")
    why = matches("s2", "cifar100", run | {name: value}, retraining("s2", "cifar100"))
    assert why is not None and why.startswith(f"search: {name} {value} (published ")
    del run[name]
    why = matches("s2", "cifar100", run, retraining("s2", "cifar100"))
    assert why is not None and why.startswith(f"search: {name} not there (published ")


@pytest.mark.parametrize("name", CHANGED_RETRAINING)
def test_a_retraining_that_differs_is_named(name: str) -> None:
    value = CHANGED_RETRAINING[name]
    run = retraining("s2", "cifar100") | {name: value}
    why = matches("s2", "cifar100", search("s2", "cifar100"), run)
    assert why is not None and why.startswith(f"retraining: {name} {value} (published ")


def test_every_setting_is_either_compared_or_free() -> None:
    pairs = (
        (search("s2", "cifar100"), set(CHANGED_SEARCH) | FREE_SEARCH),
        (retraining("s2", "cifar100"), set(CHANGED_RETRAINING) | FREE_RETRAINING),
    )
    for run, known in pairs:
        assert set(run) - known == set()
    free = dict.fromkeys(FREE_SEARCH, "?"), dict.fromkeys(FREE_RETRAINING, "?")
    runs = search("s2", "cifar100") | free[0], retraining("s2", "cifar100") | free[1]
    assert matches("s2", "cifar100", *runs) is None


def test_all_that_differs_is_in_one_line() -> None:
    pair = search("s1", "svhn", epochs=25, layers=4), retraining("s1", "svhn", epochs=40)
    assert matches("s1", "svhn", *pair) == (
        "search: epochs 25 (published 50), layers 4 (published 8); "
        "retraining: epochs 40 (published 600)"
    )


def test_cifar10_is_compared_with_the_network_of_its_space() -> None:
    pair = search("s3", "cifar10"), retraining("s2", "cifar10")
    assert matches("s3", "cifar10", *pair) == "retraining: channels 16 (published 36)"
    pair = search("s4", "cifar10"), retraining("s4", "svhn") | {"data": "cifar10"}
    assert matches("s4", "cifar10", *pair) == "retraining: layers 8 (published 20)"


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("darts-es", "early_stop", "off"),
        ("darts-es", "adaptive", "both"),
        ("darts-ada", "early_stop", "stop"),
        ("darts-ada", "adaptive", "drop-path"),
        ("darts-ada", "adaptive_factor", 3.0),
        ("darts-ada", "adaptive_max", 0.0243),
        *(
            (method, *setting)
            for method in ("darts-es", "darts-ada")
            for setting in (
                ("curvature", "off"),
                ("curvature_every", 1),
                ("curvature_decay", False),
                ("stop_rule", "paper"),
                ("stop_factor", 1.2),
                ("stop_window", 3),
                ("stop_delta", 2),
                ("stop_start_epoch", 0),
            )
        ),
    ],
)
def test_the_early_stop_is_compared_where_it_matters(method: str, name: str, value: Any) -> None:
    given = search("s2", "svhn", **METHOD_SETTINGS[method]) | {name: value}
    why = matches("s2", "svhn", given, retraining("s2", "svhn"), method=method)
    assert why is not None and why.startswith(f"search: {name} {value} (published ")


def test_the_genotype_of_another_epoch_is_not_darts() -> None:
    run = search("s2", "svhn")  # early_stop simulate: both methods' genotypes in one run
    last, other = (retraining("s2", "svhn", genotypes_at=epoch) for epoch in ("49", "20"))
    assert matches("s2", "svhn", run, last) is None
    assert matches("s2", "svhn", run, other) == "retraining: genotypes_at 20 (published none)"
    assert matches("s2", "svhn", run, other, method="darts-es") is None
    stopped = search("s2", "svhn", early_stop="stop")
    why = matches("s2", "svhn", stopped, other, method="darts-es")
    assert why == "retraining: genotypes_at 20 (published none)"


def test_drop_path_and_its_cutout_are_compared_with_the_second_table() -> None:
    run = search("s1", "cifar10", drop_path_prob=0.4)
    pair = run, retraining("s1", "cifar10")
    assert matches("s1", "cifar10", *pair, drop_path_prob=0.4) is None
    assert matches("s1", "cifar10", run, None, drop_path_prob=0.4) is None
    assert matches("s1", "cifar10", *pair) == "search: drop_path_prob 0.4 (published 0.0)"
    for name, value in (("length", 8), ("prob", 0.5), ("schedule", "linear")):
        changed = run | {f"cutout_{name}": value}
        why = matches("s1", "cifar10", changed, None, drop_path_prob=0.4)
        assert why is not None and why.startswith(f"search: cutout_{name} {value} (published ")


@pytest.mark.parametrize(
    ("space", "data", "method", "drop_path", "message"),
    [
        ("s1", "svhn", "darts", 0.2, "numbers for darts on s1, svhn, drop path 0.2"),
        ("s1", "cifar10", "darts", 0.3, "numbers for darts on s1, cifar10, drop path 0.3"),
        ("s1", "cifar10", "darts-es", 0.2, "numbers for darts-es on s1, cifar10, drop path 0.2"),
    ],
)
def test_a_sweep_that_is_not_in_the_tables(
    space: str, data: str, method: str, drop_path: float, message: str
) -> None:
    pair = search(space, data, drop_path_prob=drop_path), retraining(space, data)
    assert matches(space, data, *pair, method, drop_path) == f"no published {message}"


def test_a_search_alone_is_compared_with_published_supernets_only() -> None:
    assert matches("s3", "cifar10", search("s3", "cifar10"), None) is None
    why = matches("s3", "svhn", search("s3", "svhn"), None)
    assert why == "no published supernets for darts on s3, svhn, drop path 0.0"


def test_random_search_is_not_compared() -> None:
    why = matches("s3", "svhn", {}, retraining("s3", "svhn"), method="randomnas-ws")
    assert why == "the settings of a random search are not compared"
