"""The paper's numbers, and whether a run of one's own may stand beside them.

The source "W" is the authors' workshop version of the paper (MetaLearn at NeurIPS 2019, same
title), with the number of its table: T1 has the error of each method on the twelve benchmarks, T2
what became of single searches on CIFAR-10 under scheduled drop path. The tables below are as
printed there, in percent and millions of parameters; the functions return shares in [0, 1].

How a found network was retrained (W, appendix B.1): 8 cells of 16 channels on CIFAR-100 and SVHN;
on CIFAR-10, in the sweep over drop path, 20 cells, of 36 channels on S1 and S3 and of 16 on S2 and
S4. T2 is of that sweep, and T1's column of DARTS on CIFAR-10 is the mean of T2's rows without drop
path. Of T1's other columns on CIFAR-10 it is known on S1 alone, where both sweeps have 20 cells of
36 channels: the sweep over L2 has 8 cells of 16 channels on S2 to S4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rdarts_fast.errors import UserError, unknown

METHODS = ("randomnas-ws", "darts", "darts-es", "darts-ada")

# Test error in percent, mean ± standard deviation of three searches.
_T1 = """
              RandomNAS-ws   DARTS          DARTS-ES       DARTS-ADA
cifar10  s1    3.17 ± 0.15    4.66 ± 0.71    3.05 ± 0.07    3.03 ± 0.08
cifar10  s2    3.46 ± 0.15    4.42 ± 0.40    3.41 ± 0.14    3.59 ± 0.31
cifar10  s3    2.92 ± 0.04    4.12 ± 0.85    3.71 ± 1.14    2.99 ± 0.34
cifar10  s4   89.39 ± 0.84    6.95 ± 0.18    4.17 ± 0.21    3.89 ± 0.67
cifar100 s1   25.81 ± 0.39   29.93 ± 0.41   28.90 ± 0.81   24.94 ± 0.81
cifar100 s2   22.88 ± 0.16   28.75 ± 0.92   24.68 ± 1.43   26.88 ± 1.11
cifar100 s3   24.58 ± 0.61   29.01 ± 0.24   26.99 ± 1.79   24.55 ± 0.63
cifar100 s4   30.01 ± 1.52   24.77 ± 1.51   23.90 ± 2.01   23.66 ± 0.90
svhn     s1    2.64 ± 0.09    9.88 ± 5.50    2.80 ± 0.09    2.59 ± 0.07
svhn     s2    2.57 ± 0.04    3.69 ± 0.12    2.68 ± 0.18    2.79 ± 0.22
svhn     s3    2.89 ± 0.09    4.00 ± 1.01    2.78 ± 0.29    2.58 ± 0.07
svhn     s4    3.42 ± 0.04    2.90 ± 0.02    2.55 ± 0.15    2.52 ± 0.06
"""

# CIFAR-10, a column per search, at each largest drop-path probability p: the supernet's validation
# accuracy and the retrained network's test accuracy in percent, the latter's parameters in
# millions, lambda_max at the end of the search.
_T2 = """
space p    valid accuracy      test accuracy       parameters       lambda_max
s1   0.0   87.22 87.01 86.98   96.16 94.43 95.43   2.24 1.93 2.03   1.023 0.835 0.698
s1   0.2   84.24 84.32 84.22   96.39 96.66 96.20   2.63 2.84 2.48   0.148 0.264 0.228
s1   0.4   82.28 82.18 82.79   96.44 96.94 96.76   2.63 2.99 3.17   0.192 0.199 0.149
s1   0.6   79.17 79.18 78.84   96.89 96.93 96.96   3.38 3.02 3.17   0.300 0.255 0.256
s2   0.0   88.49 88.40 88.35   95.15 95.48 96.11   0.93 0.86 0.97   0.684 0.409 0.268
s2   0.2   85.29 84.81 85.36   95.15 95.40 96.14   1.28 1.44 1.36   0.270 0.217 0.145
s2   0.4   82.03 82.66 83.20   96.34 96.50 96.44   1.28 1.28 1.36   0.304 0.411 0.282
s2   0.6   79.86 80.19 79.70   96.52 96.35 96.29   1.21 1.28 1.36   0.292 0.295 0.281
s3   0.0   88.78 89.15 88.67   94.70 96.27 96.66   2.21 2.43 2.85   0.496 0.535 0.446
s3   0.2   85.61 85.60 85.50   96.78 96.84 96.74   3.62 4.04 2.99   0.179 0.185 0.202
s3   0.4   83.03 83.24 83.43   97.07 96.85 96.48   4.10 3.74 3.38   0.156 0.370 0.184
s3   0.6   79.86 80.03 79.68   96.91 94.56 96.44   4.46 2.30 2.66   0.239 0.275 0.280
s4   0.0   86.33 86.72 86.46   92.80 93.22 93.14   1.05 1.13 1.05   0.400 0.442 0.314
s4   0.2   81.01 82.43 82.03   95.84 96.08 96.15   1.44 1.44 1.44   0.070 0.054 0.079
s4   0.4   79.49 79.67 78.96   96.11 96.30 96.28   1.44 1.44 1.44   0.064 0.057 0.049
s4   0.6   74.54 74.74 74.37   96.42 96.36 96.64   1.44 1.44 1.44   0.057 0.060 0.066
"""


@dataclass(frozen=True)
class Published:
    """A published test error: mean and standard deviation over `runs` searches, in [0, 1].

    Where it can be recomputed, for DARTS on CIFAR-10, the deviation is the root of the mean square
    (divided by 3, not by 2).
    """

    mean: float
    deviation: float
    runs: int
    source: str


@dataclass(frozen=True)
class Row:
    """One search of T2 and the network that it found.

    valid_accuracy: the supernet's after the search, test_error: the retrained network's after the
    last epoch, both in [0, 1]. parameters: the retrained network's in millions, its auxiliary head
    among them. lambda_max: at the end of the search.
    """

    valid_accuracy: float
    test_error: float
    parameters: float
    lambda_max: float
    source: str = "W T2"


def error(space: str, data: str, method: str = "darts") -> Published | None:
    """Return the test error of METHODS' `method` on `space` and `data` (W T1), None where T1 has
    none: it has s1 to s4 on cifar10, cifar100 and svhn. Raises UserError for an unknown method.
    """
    if method not in METHODS:
        raise unknown("published method", method, METHODS)
    cells = _rows(_T1).get((data, space))
    if cells is None:
        return None
    mean, deviation = cells[2 * METHODS.index(method) :][:2]
    return Published(_share(mean), _share(deviation), 3, "W T1")


def supernets(space: str, drop_path_prob: float) -> tuple[Row, ...]:
    """Return the three searches on CIFAR-10 with that largest drop-path probability (W T2), none
    where T2 has none: it has 0, 0.2, 0.4 and 0.6 on s1 to s4.
    """
    cells = _rows(_T2).get((space, str(float(drop_path_prob))))
    if cells is None:
        return ()
    columns = zip(cells[0:3], cells[3:6], cells[6:9], cells[9:12], strict=True)
    return tuple(
        Row(_share(valid), _share(100 - float(test)), float(millions), float(eigenvalue))
        for valid, test, millions, eigenvalue in columns
    )


def _rows(table: str) -> dict[tuple[str, str], list[str]]:
    """Return the numbers of each line under the line of titles, by the line's first two words."""
    lines = [re.split(r"[\s±]+", line) for line in table.strip().splitlines()[1:]]
    return {(first, second): numbers for first, second, *numbers in lines}


def _share(percent: str | float) -> float:
    return round(float(percent) / 100, 6)


# Setting of a run: the values that are the published one, which comes first. None is the data set's
# own, which is the published one on the three published sets.
_Expected = dict[str, tuple[Any, ...]]
_BOTH: _Expected = {
    "image_size": (None, 32),
    "epoch_steps": (None,),
    "learning_rate": (0.025,),
    "momentum": (0.9,),
    "weight_decay": (3e-4,),
    "grad_clip": (5.0,),
    "flip": (None, True),
}
_CUTOUT: _Expected = {"cutout_length": (16, None), "cutout_prob": (1.0,)}
_SEARCH: _Expected = _BOTH | {
    "epochs": (50,),
    "batch_size": (64,),
    "channels": (16,),
    "layers": (8,),
    "learning_rate_min": (0.001,),
    "order": ("second",),
    "epsilon_scale": (0.01,),
    "implicit": ("difference",),
    "noise_per_pass": ("fresh",),
    "precision": ("fp32",),
    "alpha_learning_rate": (3e-4,),
    "alpha_beta1": (0.5,),
    "alpha_beta2": (0.999,),
    "alpha_weight_decay": (1e-3,),
}
_RULE: _Expected = {
    "curvature": ("lambda", "spectrum", "full"),
    "curvature_every": (2,),
    "curvature_decay": (True,),
    "stop_rule": ("code",),
    "stop_factor": (1.3,),
    "stop_window": (5,),
    "stop_delta": (4,),
    "stop_start_epoch": (10,),
}
_METHOD: Mapping[str, _Expected] = {
    "darts": {"early_stop": ("off", "simulate"), "adaptive": ("off",)},
    "darts-es": {"early_stop": ("stop", "simulate"), "adaptive": ("off", "l2")} | _RULE,
    "darts-ada": {
        "early_stop": ("off", "simulate"),
        "adaptive": ("l2",),
        "adaptive_factor": (10.0,),
        "adaptive_max": (0.03,),
    }
    | _RULE,
}
_RETRAINING: _Expected = (
    _BOTH
    | _CUTOUT
    | {
        "epochs": (600,),
        "batch_size": (96,),
        "learning_rate_min": (0.0,),
        "drop_path_prob": (0.2,),
        "holdout": (False,),
        "auxiliary": (True,),
        "auxiliary_weight": (0.4,),
        "precision": ("fp32", "float32"),  # the latter is its older name
    }
)
_LAST_GENOTYPE = ("", "49")


def network(space: str, data: str) -> tuple[int, int]:
    """Return cells and channels of the retrained networks behind T2 and the DARTS column of T1.
    Raises UserError where they have none.
    """
    if error(space, data) is None:
        raise UserError(f"no published numbers for {space} on {data}")
    if data == "cifar10":
        return 20, 36 if space in ("s1", "s3") else 16
    return 8, 16


def matches(
    space: str,
    data: str,
    search: Mapping[str, Any],
    retraining: Mapping[str, Any] | None,
    method: str = "darts",
    drop_path_prob: float = 0.0,
) -> str | None:
    """Return None where a run may stand beside `error(space, data, method)` and, with `method`
    "darts" on cifar10, `supernets(space, drop_path_prob)`; else one line that names every setting
    that differs, or what is not published or not known.

    search, retraining: what config.json holds of a search and of the retraining of what it found;
    without a retraining the search alone is compared, for what T2 says of the supernets. Seeds,
    devices and backends are not compared. That `search` is where `retraining` has its genotype from
    is the caller's to see to, and so is the epoch in a retraining's genotypes_at where a search
    with early_stop "simulate" is to stand for DARTS-ES. Raises UserError for an unknown method.
    """
    why = _nothing_to_compare(space, data, method, drop_path_prob, retraining is None)
    if why is not None:
        return why
    wanted = _SEARCH | {"space": (space,), "data": (data,)} | _METHOD[method]
    wanted["drop_path_prob"] = (drop_path_prob,)
    if drop_path_prob > 0.0:  # a search has cutout beside drop path only
        wanted |= _CUTOUT | {"cutout_schedule": ("constant",)}
    found = [_differences("search", search, wanted)]
    if retraining is not None:
        layers, channels = network(space, data)
        wanted = _RETRAINING | {"data": (data,), "layers": (layers,), "channels": (channels,)}
        if not (method == "darts-es" and search.get("early_stop") == "simulate"):
            wanted["genotypes_at"] = _LAST_GENOTYPE
        found.append(_differences("retraining", retraining, wanted))
    return "; ".join(text for text in found if text) or None


def _nothing_to_compare(
    space: str, data: str, method: str, drop_path_prob: float, search_only: bool
) -> str | None:
    if error(space, data, method) is None:
        return f"no published numbers for {space} on {data}"
    if method == "randomnas-ws":
        # The published one takes 19,531 steps on every data set, then the best of 1,000 cells.
        return "the settings of a random search are not compared"
    in_t2 = data == "cifar10" and method == "darts" and supernets(space, drop_path_prob)
    if (search_only or drop_path_prob != 0.0) and not in_t2:
        what = "supernets" if search_only else "numbers"
        return f"no published {what} for {method} on {space}, {data}, drop path {drop_path_prob}"
    if data == "cifar10" and method != "darts" and space != "s1":
        return f"how {method}'s cells of {space} on {data} were retrained is not known"
    return None


def _differences(what: str, given: Mapping[str, Any], expected: _Expected) -> str:
    """Return "search: epochs 25 (published 50), ...", or nothing where nothing differs."""
    found = []
    for name, values in expected.items():
        value = given.get(name, "not there")
        if value not in values:
            found.append(f"{name} {value} (published {'none' if values[0] == '' else values[0]})")
    return f"{what}: {', '.join(found)}" if found else ""
