"""The convolution stages, sep_stage and mixing, against plain torch twins in float64."""

import importlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rdarts_fast.kernels import mixing, sep_stage
from rdarts_fast.kernels.mixing import (
    MixingGradients,
    Sources,
    launch_mixing,
    launch_mixing_backward,
    launch_mixings,
    launch_mixings_backward,
    mixing_twin,
)
from rdarts_fast.kernels.sep_stage import (
    Affine,
    Geometry,
    Operands,
    launch_sep_stage,
    launch_sep_stage_backward,
    sep_stage_twin,
)
from rdarts_fast.networks.precision import BF16, FP32, TF32, torch_precision
from tests.conftest import device_of
from tests.host_cuda import counts, reset
from tests.test_kernels import LAYOUTS, Case, dtypes_of
from tests.tolerances import assert_equal

# N, C, H, W; channels of z, edges
SIZES = [
    ((2, 7, 5, 9), 5, 3),
    ((1, 1, 4, 4), 1, 1),
    ((1, 33, 3, 2), 20, 1),
    ((3, 4, 1, 1), 6, 3),
    ((0, 4, 4, 4), 4, 1),
    ((1, 2, 19, 18), 4, 1),
    ((1, 70, 2, 3), 70, 1),
    ((70, 1, 2, 1), 2, 1),
]
GEOMETRIES = [Geometry(*g) for g in itertools.product((3, 5, 7), (1, 2), (1, 2))]
MIXES = [(1, 1), (2, 2), (2, 1)]  # stride, halves


class Gradients(NamedTuple):
    """What a backward gives: of v, of the weights, and the sums of dv and of dv * y."""

    dv: Sequence[Tensor]
    weights: Sequence[Tensor]
    sums: Tensor


class Backward:
    """Gradients g of a call's results, and what makes dz of them."""

    def __init__(self, z: Sequence[Tensor], layout: str, plain: bool) -> None:
        case = Case(tuple(z[0].shape), len(z), layout, z[0].dtype, seed=1)
        constant = case.coefficient(*case.scale.shape)
        self.plain = plain
        self.g = [x.to(z[0].device) for x in case.z]
        maps = (case.scale, case.shift, constant, case.factors)
        self.affine = Affine() if plain else Affine(*(x.to(z[0].device) for x in maps))

    def dz(self, z: Sequence[Tensor]) -> list[Tensor]:
        """Return factors * by_g * g + by_z * z + constant in float64."""
        if self.plain:
            return [g.cpu().double() for g in self.g]
        by_g, by_z, constant, factors = (x.cpu().double() for x in self.affine if x is not None)
        rows = zip(self.g, z, by_g, by_z, constant, factors, strict=True)
        return [
            f.view(-1, 1, 1, 1) * a.view(-1, 1, 1) * g.cpu().double()
            + b.view(-1, 1, 1) * one.cpu().double()
            + c.view(-1, 1, 1)
            for g, one, a, b, c, f in rows
        ]


def exact(x: Any) -> Any:
    """Return x, a tensor or nested lists of tensors, in float64 on the CPU."""
    if isinstance(x, Tensor):
        return x.detach().cpu().double()
    return None if x is None else [exact(one) for one in x]


def below_relu(x: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None) -> list[Tensor]:
    """Return v = scale * x + shift in float64, leaves of a graph."""
    if scale is None or shift is None:
        return [one.requires_grad_() for one in exact(x)]
    rows = zip(exact(x), exact(scale), exact(shift), strict=True)
    return [(one * a.view(-1, 1, 1) + b.view(-1, 1, 1)).requires_grad_() for one, a, b in rows]


def gradients_of(twin: Sequence[Tensor], v: Sequence[Tensor], weights, dz) -> Gradients:
    found = torch.autograd.grad(list(twin), [*v, *weights], dz)
    dv = found[: len(v)]
    pairs = [(d, d * one.clamp(min=0)) for d, one in zip(dv, v, strict=True)]
    sums = torch.stack(
        [torch.stack([x.sum((0, 2, 3)) for x in row]) for row in zip(*pairs, strict=True)]
    )
    return Gradients(dv, found[len(v) :], sums.detach())


def check_sums(z: Sequence[Tensor], sums: Tensor) -> None:
    """Hold a forward's sums to those of the values it stored, about its pivots."""
    for g, one in enumerate(exact(z)):
        centred = one - sums[2, g].cpu().view(-1, 1, 1)
        for got, terms in ((sums[0, g], centred), (sums[1, g], centred.square())):
            size = terms.abs().sum((0, 2, 3)).max() if terms.numel() else 0.0
            error = (got.cpu() - terms.sum((0, 2, 3))).abs().max()
            unit = 1e-13 if z[0].dtype == torch.float64 else 1e-6
            assert error <= unit * (1e-3 + size), (error, size)


def check_close(
    got: Sequence[Tensor], expected: Sequence[Tensor], dtype, times: float, slack=None
) -> None:
    """Hold to the tolerance what is left of each error above its `slack`."""
    for a, b, s in zip(got, expected, slack or [0.0] * len(got), strict=True):
        found, b = a.detach().cpu().double(), b.detach()
        assert_equal(found - torch.clamp(found - b, -s, s), b, dtype, times)


# Of a product's factors each is off by 2^-11 of itself at most, once rounded to 10 bits.
ROUNDED = 2.0**-10 + 2.0**-22


class Slack(NamedTuple):
    """What rounded factors of the 1x1 products may change: each sum by ROUNDED of the sum of its
    terms' sizes. None where they are not rounded, as in a forward of float32.
    """

    z: Sequence[Tensor] | None = None
    dv: Sequence[Tensor] | None = None
    weights: Sequence[Tensor] | None = None
    sums: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, twin, gradients: Gradients) -> "Slack":
        """Of a twin of sizes: all weights and dz without their signs."""
        found = [[ROUNDED * x.detach() for x in part] for part in (twin, *gradients[:2])]
        return cls(*found, [ROUNDED * gradients.sums])

    def of_forward(self, dtype: torch.dtype) -> Sequence[Tensor] | None:
        """Return what z may be off by."""
        return self.z if dtype == torch.bfloat16 else None


class Settings(NamedTuple):
    """One case: sizes, layout, type, and whether x is scaled and dz is more than g."""

    shape: tuple[int, int, int, int]
    out_channels: int
    edges: int
    layout: str
    dtype: torch.dtype
    whole: bool


def rounds(backend: str, s: Settings, precision: str) -> bool:
    """Say whether a backend's products are those of tensor cores."""
    channels, dtype = max(s.shape[1], s.out_channels), s.dtype
    tf32 = precision == TF32 and dtype == torch.float32 and channels > 16
    return backend.startswith("cuda") and (tf32 or dtype == torch.bfloat16)


def sizes(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights without their signs, leaves of a graph."""
    return [x.detach().abs().requires_grad_() for x in weights]


def cases(backend: str) -> Iterator[Settings]:
    flags = itertools.cycle([True, False, True])
    for (shape, o, g), layout, dtype in itertools.product(SIZES, LAYOUTS, dtypes_of(backend)):
        yield Settings(shape, o, g, layout, dtype, next(flags))


def operands_of(s: Settings, geometry: Geometry, backend: str) -> Operands:
    case, device, k = Case(s.shape, s.edges, s.layout, s.dtype), device_of(backend), geometry.kernel
    c = s.shape[1]
    depthwise = [case.coefficient(c, 1, k, k).to(device) for _ in case.z]
    pointwise = [case.coefficient(s.out_channels, c, 1, 1).to(device) for _ in case.z]
    maps = (case.scale.to(device), case.shift.to(device)) if s.whole else (None, None)
    return Operands([x.to(device) for x in case.z], depthwise, pointwise, geometry, *maps)


def backward_of(operands: Operands, z, backward: Backward, dv, adds, **wants):
    return launch_sep_stage_backward(operands, backward.g, z, backward.affine, dv, adds, **wants)


def check_stage(s: Settings, geometry: Geometry, backend: str, precision: str = FP32) -> None:
    """Hold a stage's values, sums and gradients to those of its twin."""
    operands = operands_of(s, geometry, backend)
    v = below_relu(operands.x, operands.scale, operands.shift)
    weights = [x.requires_grad_() for x in exact([*operands.depthwise, *operands.pointwise])]
    twin = sep_stage_twin(Operands(v, weights[: s.edges], weights[s.edges :], geometry))
    with torch_precision(precision):
        z, sums = launch_sep_stage(operands)
    backward, slack = Backward(z, s.layout, plain=not s.whole), Slack()
    dz = backward.dz(z)
    expected = gradients_of(twin, v, weights, dz)
    if rounds(backend, s, precision):
        size = sizes(weights)
        largest = sep_stage_twin(Operands(v, size[: s.edges], size[s.edges :], geometry))
        slack = Slack.of(largest, gradients_of(largest, v, size, [x.abs() for x in dz]))
    check_close(z, twin, s.dtype, 1, slack.of_forward(s.dtype))
    check_sums(z, sums)
    dv = [torch.empty_like(x, memory_format=torch.channels_last) for x in operands.x]
    with torch_precision(precision):
        own_sums, dweights = backward_of(
            operands, z, backward, dv, [False] * s.edges, wants_sums=True, wants_weights=True
        )
    own = operands.pointwise[0].dtype
    check_close(dv, expected.dv, s.dtype, 2, slack.dv)
    check_close([own_sums], [expected.sums], own, 5, slack.sums)  # sums of many terms
    check_close(dweights, expected.weights, own, 5, slack.weights)


def test_stage_of_every_size_layout_and_type(backend: str) -> None:
    for s, geometry in zip(cases(backend), itertools.cycle(GEOMETRIES)):
        check_stage(s, geometry, backend)


def test_stage_of_every_geometry(backend: str) -> None:
    for geometry in GEOMETRIES:
        s = Settings((1, 3, 6, 5), 2, 1, "nhwc", torch.float64, whole=True)
        check_stage(s, geometry, backend)


def test_stages_that_share_a_source_add_to_one_gradient(backend: str) -> None:
    for stride, dtype, edges in itertools.product((1, 2), dtypes_of(backend), (3, 27)):
        s = Settings((2, 3, 4, 3), 2, edges, "nhwc", dtype, whole=True)
        operands = operands_of(s, Geometry(3, 1, stride), backend)
        operands = operands._replace(x=[operands.x[0]] * s.edges)
        z, _ = launch_sep_stage(operands)
        backward = Backward(z, s.layout, plain=False)
        apart = [torch.empty_like(x) for x in operands.x]
        results = backward_of(
            operands, z, backward, apart, [False] * edges, wants_sums=True, wants_weights=False
        )
        for first in (False, True):
            dv = torch.full_like(operands.x[0], 3.0)
            adds = [first, *[True] * (edges - 1)]
            sums, dweights = backward_of(
                operands, z, backward, [dv] * edges, adds, wants_sums=first, wants_weights=False
            )
            assert dweights == [] and (sums is None or torch.equal(sums, results[0]))
            expected = torch.stack(exact(apart)).sum(0) + (3 if first else 0)
            assert_equal(dv.cpu(), expected, dtype, times=2)


def test_stage_computes_no_more_than_is_wanted(backend: str) -> None:
    s = Settings((2, 3, 4, 5), 4, 3, "nhwc", torch.float32, whole=True)
    operands = operands_of(s, Geometry(3, 1, 1), backend)
    z, _ = launch_sep_stage(operands)
    backward = Backward(z, s.layout, plain=False)
    everything = [torch.empty_like(x) for x in operands.x]
    all_sums, weights = backward_of(
        operands, z, backward, everything, [False] * 3, wants_sums=True, wants_weights=True
    )
    dv = [torch.empty_like(operands.x[0]), None, torch.empty_like(operands.x[2])]
    sums, none = backward_of(
        operands, z, backward, dv, [False] * 3, wants_sums=False, wants_weights=False
    )
    assert sums is None and none == []
    assert torch.equal(dv[0], everything[0]) and torch.equal(dv[2], everything[2])
    same, _ = backward_of(
        operands, z, backward, dv, [False] * 3, wants_sums=True, wants_weights=False
    )
    assert torch.equal(same, all_sums)  # of the dv that is not wanted, too
    _, alone = backward_of(
        operands, z, backward, [None] * 3, [False] * 3, wants_sums=False, wants_weights=True
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, weights, strict=True))


@pytest.mark.parametrize("scaled", [True, False])
def test_constants_get_no_gradient_and_cost_none(monkeypatch, scaled: bool) -> None:
    """Frozen weights, as in passes for the alphas alone, and inputs that are images."""
    x, d, p = torch.randn(2, 3, 5, 5), torch.randn(3, 1, 3, 3), torch.randn(4, 3, 1, 1)
    maps = dict.fromkeys(("scale", "shift"), torch.randn(1, 3) if scaled else None)
    calls: list[tuple[bool, bool]] = []
    for name in ("sep_stage", "mixing"):
        module = importlib.import_module(f"rdarts_fast.kernels.{name}")
        launcher = f"launch_{name}_backward"
        original = getattr(module, launcher)

        def recorded(*arguments, original=original, **wants):
            dv = arguments[4]
            calls.append((dv[0] is not None, wants["wants_weights"]))
            return original(*arguments, **wants)

        monkeypatch.setattr(module, launcher, recorded)
    for function in (
        lambda x, d, p: sep_stage([x], [d], [p], **maps)[0],
        lambda x, d, p: mixing([x], [[p]], **maps)[0],
    ):
        every = [t.clone().requires_grad_() for t in (x, d, p)]
        whole = torch.autograd.grad(function(*every).square().sum(), every, allow_unused=True)
        for kept in (0, 2):
            some = [t.clone().requires_grad_(i == kept) for i, t in enumerate((x, d, p))]
            calls.clear()
            (one,) = torch.autograd.grad(function(*some).square().sum(), [some[kept]])
            assert torch.equal(one, whole[kept])
            assert calls == [(kept == 0, kept == 2)]


def test_not_a_number_passes_the_relu(backend: str) -> None:
    device = device_of(backend)
    x = torch.randn(1, 2, 4, 4, device=device)
    x[0, 1, 1, 2] = torch.nan
    results = []
    for call, to in ((sep_stage, torch.float32), (None, torch.float64)):
        one = x.to(to).requires_grad_()
        d, p = torch.ones(2, 1, 3, 3).to(one), torch.ones(3, 2, 1, 1).to(one)
        operands = Operands([one], [d], [p], Geometry(3, 1, 1))
        z = call([one], [d], [p])[0] if call else sep_stage_twin(operands)[0]
        results.append((z, *torch.autograd.grad(z.nansum(), one)))
        edge = mixing([one], [[p]])[0] if call else mixing_twin(Sources([one], [[p]], 1))[0]
        results[-1] += (edge, *torch.autograd.grad(edge.nansum(), one))
    for got, expected in zip(*results, strict=True):
        assert got.isnan().any() == expected.isnan().any()
        torch.testing.assert_close(got.double(), expected, equal_nan=True)


def sources_of(s: Settings, stride: int, halves: int, backend: str, m: int) -> Sources:
    case, device = Case(s.shape, m, s.layout, s.dtype), device_of(backend)
    o, inputs = s.out_channels, m * s.shape[1]
    sizes = [o - o // 2, o // 2] if halves == 2 else [o]
    weights = [
        [case.coefficient(size, inputs, 1, 1).to(device) for size in sizes] for _ in range(s.edges)
    ]
    maps = (case.scale.to(device), case.shift.to(device)) if s.whole else (None, None)
    return Sources([x.to(device) for x in case.z], weights, stride, *maps)


def check_mixing(
    s: Settings, stride: int, halves: int, backend: str, m: int, precision: str = FP32
) -> None:
    """Hold a mixing's values, sums and gradients to those of its twin."""
    sources = sources_of(s, stride, halves, backend, m)
    v = below_relu(sources.x, sources.scale, sources.shift)
    weights = [[x.requires_grad_() for x in edge] for edge in exact(sources.weights)]
    twin = mixing_twin(Sources(v, weights, stride))
    with torch_precision(precision):
        z, sums = launch_mixing(sources)
    backward, slack = Backward(z, s.layout, plain=not s.whole), Slack()
    dz = backward.dz(z)
    expected = gradients_of(twin, v, [x for edge in weights for x in edge], dz)
    if rounds(backend, s, precision):
        size = [sizes(edge) for edge in weights]
        largest, each = mixing_twin(Sources(v, size, stride)), [x for edge in size for x in edge]
        slack = Slack.of(largest, gradients_of(largest, v, each, [x.abs() for x in dz]))
    check_close(z, twin, s.dtype, 1, slack.of_forward(s.dtype))
    check_sums(z, sums)
    for adds, wants_weights in ((False, True), (True, False)):
        dv = [
            torch.full_like(x, 3.0, memory_format=torch.channels_last)
            if adds
            else torch.empty_like(x, memory_format=torch.channels_last)
            for x in sources.x
        ]
        with torch_precision(precision):
            dweights = launch_mixing_backward(
                sources, backward.g, z, backward.affine, dv, [adds] * m, wants_weights=wants_weights
            )
        check_close(dv, [d + 3 * adds for d in expected.dv], s.dtype, 2, slack.dv)
        wanted = expected.weights if wants_weights else []
        own = sources.weights[0][0].dtype
        check_close(dweights, wanted, own, 5, slack.weights if wants_weights else None)


def test_mixing_of_every_size_layout_and_type(backend: str) -> None:
    for s, mix, m in zip(cases(backend), itertools.cycle(MIXES), itertools.cycle((1, 4, 2, 1, 3))):
        check_mixing(s, *mix, backend, m)


# Those of csrc/cuda/tuning.h, then such as have tiles by rule: N, C, H, W and channels of z.
TILED = [
    ((1, 16, 32, 32), 16),
    ((1, 32, 16, 16), 32),
    ((2, 64, 8, 8), 64),
    ((1, 19, 5, 9), 35),
    ((1, 3, 18, 3), 70),
]


@pytest.mark.parametrize("precision", [FP32, TF32, BF16])
def test_tiles_of_every_size(backend: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == BF16 else torch.float32
    if dtype not in dtypes_of(backend):
        pytest.skip("the CPU has no bfloat16 kernels")
    for i, (shape, o) in enumerate(TILED):
        s = Settings(shape, o, 1, "nhwc", dtype, whole=True)
        check_stage(s, Geometry(*((3, 1, 1), (5, 2, 2), (7, 1, 1))[i % 3]), backend, precision)
        check_mixing(s, 1, 1, backend, 1, precision)


def test_tf32_rounds_the_factors_of_the_backward_alone(backend: str) -> None:
    """By as much as is seen."""
    s = Settings((1, 32, 9, 8), 32, 1, "nhwc", torch.float32, whole=True)
    operands, sources = operands_of(s, Geometry(3, 1, 1), backend), sources_of(s, 1, 1, backend, 1)
    forward, backward = [], []
    for precision in (FP32, TF32):
        with torch_precision(precision):
            z = [launch_sep_stage(operands)[0][0], launch_mixing(sources)[0][0]]
            one, two = (Backward([x], s.layout, plain=True) for x in z)
            dv = [torch.empty_like(x, memory_format=torch.channels_last) for x in z]
            _, of_stage = backward_of(
                operands, z[:1], one, dv[:1], [False], wants_sums=False, wants_weights=True
            )
            of_mixing = launch_mixing_backward(
                sources, two.g, z[1:], two.affine, dv[1:], [False], wants_weights=True
            )
        forward.append(z), backward.append([*dv, *of_stage, *of_mixing])
    assert all(map(torch.equal, *forward))
    for exactly, rounded in zip(*backward, strict=True):
        differs = (exactly - rounded).abs().max() / exactly.abs().max()
        assert differs == 0 if backend.startswith("cpu") else 1e-5 < differs < 2e-3


def test_mixing_computes_no_more_than_is_wanted(backend: str) -> None:
    s = Settings((2, 3, 4, 5), 4, 2, "nhwc", torch.float32, whole=True)
    sources = sources_of(s, 2, 2, backend, 2)
    z, _ = launch_mixing(sources)
    backward = Backward(z, s.layout, plain=False)

    def run(dv: Sequence[Tensor | None], wants_weights: bool) -> list[Tensor]:
        return launch_mixing_backward(
            sources, backward.g, z, backward.affine, dv, [False] * 2, wants_weights=wants_weights
        )

    everything = [torch.empty_like(x) for x in sources.x]
    weights = run(everything, True)
    second = torch.empty_like(sources.x[1])
    assert run([None, second], False) == [] and torch.equal(second, everything[1])
    assert all(map(torch.equal, run([None, None], True), weights))


def room_for(x: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """Return where gradients go, and that nothing is there."""
    room = [torch.empty_like(one, memory_format=torch.channels_last) for one in x]
    return room, [False] * len(x)


@pytest.mark.parametrize("wants_weights", [True, False])
def test_two_mixings_that_share_a_launch(backend: str, wants_weights: bool) -> None:
    """Of other sizes, sources and strides; the bits are those that each alone would have."""
    calls_of = ((1, 4, 12), (1, 4, 20), (3, 20, 20))  # the second's z have 12 or 20 channels
    for (m, sources, out), dtype in itertools.product(calls_of, dtypes_of(backend)):
        large = Settings((2, 5, 17, 18), 7, 1, "nhwc", dtype, whole=True)
        small = Settings((3, 6, 5, 4), out, 1, "sliced", dtype, whole=False)
        calls = [sources_of(large, 2, 2, backend, m), sources_of(small, 1, 1, backend, sources)]
        alone = [launch_mixing(one) for one in calls]
        reset()
        pairs = launch_mixings(calls, [None, None])
        launched = counts()["mixing"].launches if "host" in backend else 0
        for (z, sums), (one, own) in zip(pairs, alone, strict=True):
            assert all(map(torch.equal, z, one)) and torch.equal(sums, own)
        backward = [Backward(z, "nchw", plain=False) for z, _ in alone]
        both, each = (
            [
                MixingGradients(one, b.g, z, b.affine, *room_for(one.x))
                for one, b, (z, _) in zip(calls, backward, alone, strict=True)
            ]
            for _ in range(2)
        )
        found = launch_mixings_backward(both, wants_weights=wants_weights)
        expected = [launch_mixing_backward(*one, wants_weights=wants_weights) for one in each]
        for a, b, dweights, own in zip(both, each, found, expected, strict=True):
            assert all(map(torch.equal, a.dv, b.dv)) and all(map(torch.equal, dweights, own))
            assert len(dweights) == wants_weights * len([h for e in a.sources.weights for h in e])
        if "host" in backend and sources == 4:
            # Tiles of other sizes are other kernels.
            assert launched == (1 if out == 12 or dtype == torch.float64 else 2)
            assert counts()["mixing_backward"].launches == 1 + 2


def test_many_edges_and_many_sources(backend: str) -> None:
    """More than one launch's parameters hold."""
    s = Settings((1, 2, 2, 3), 2, 64, "nhwc", torch.float32, whole=True)
    check_stage(s, Geometry(3, 1, 1), backend)
    check_mixing(s, 1, 1, backend, 1)
    check_mixing(s._replace(edges=1), 2, 2, backend, 64)


def test_first_and_second_derivatives(backend: str) -> None:
    for stride, scaled in ((1, True), (2, False)):
        s = Settings((2, 2, 3, 4), 2, 2, "nhwc", torch.float64, whole=scaled)
        o = operands_of(s, Geometry(3, 2, stride), backend)
        sources = sources_of(s, stride, stride, backend, 2)
        weights = [half for edge in sources.weights for half in edge]

        def stage(*t: Tensor, stride: int = stride) -> tuple[Tensor, ...]:
            maps = {"scale": t[6], "shift": t[7]} if len(t) > 6 else {}
            turned = [w.transpose(0, 1) for w in t[4:6]]  # weights need not be contiguous
            return tuple(sep_stage(t[:2], t[2:4], turned, stride=stride, dilation=2, **maps))

        def mix(*t: Tensor, halves: int = stride, count: int = len(weights)) -> tuple[Tensor, ...]:
            maps = {"scale": t[count + 2], "shift": t[count + 3]} if len(t) > count + 2 else {}
            edges = [t[i : i + halves] for i in range(2, count + 2, halves)]
            return tuple(mixing(t[:2], edges, stride=halves, **maps))

        rest = [x for x in (o.scale, o.shift) if x is not None]
        for function, tensors in (
            (stage, [*o.x, *o.depthwise, *o.pointwise, *rest]),
            (mix, [*sources.x, *weights, *rest]),
        ):
            inputs = [x.detach().clone().requires_grad_() for x in tensors]
            assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_images_of_bfloat16_have_second_derivatives(backend: str) -> None:
    if torch.bfloat16 not in dtypes_of(backend):
        return
    s = Settings((2, 2, 3, 4), 2, 1, "nhwc", torch.bfloat16, whole=True)
    o = operands_of(s, Geometry(3, 1, 1), backend)
    x, maps = o.x[0].requires_grad_(), {"scale": o.scale, "shift": o.shift}
    for call in (
        lambda: sep_stage([x], o.depthwise, o.pointwise, **maps),
        lambda: mixing([x], [o.pointwise], **maps),
    ):
        first = torch.autograd.grad(call()[0].sum(), x)[0]
        again = torch.autograd.grad(call()[0].sum(), x, create_graph=True)[0]
        assert first.dtype == again.dtype == torch.bfloat16 and again.requires_grad
        assert_equal(first.cpu(), again.detach().cpu(), torch.bfloat16)


def test_the_same_bits_again_and_on_two_threads() -> None:
    s = Settings((19, 16, 8, 8), 16, 2, "nhwc", torch.float32, whole=True)
    before, results = torch.get_num_threads(), []
    o, sources = operands_of(s, Geometry(3, 1, 2), "cpu"), sources_of(s, 2, 2, "cpu", 2)
    weights = [half for edge in sources.weights for half in edge]
    inputs = [x.requires_grad_() for x in (*o.x, *o.depthwise, *o.pointwise, *sources.x, *weights)]
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            z = sep_stage(o.x, o.depthwise, o.pointwise, stride=2, scale=o.scale, shift=o.shift)
            z += mixing(sources.x, sources.weights, stride=2)
            found = torch.autograd.grad([one.square().sum() for one in z], inputs)
            results.append([*z, launch_sep_stage(o)[1], launch_mixing(sources)[1], *found])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_zero_strides_are_read_and_meta_tensors_give_shapes(backend: str) -> None:
    device = device_of(backend)
    x = torch.randn(1, 3, 1, 1, device=device).expand(2, 3, 4, 5)
    d, p = torch.ones(3, 1, 3, 3, device=device), torch.ones(2, 3, 1, 1, device=device)
    for got, expected in (
        (sep_stage([x], [d], [p]), sep_stage([x.contiguous()], [d], [p])),
        (mixing([x], [[p]]), mixing([x.contiguous()], [[p]])),
    ):
        assert torch.equal(got[0], expected[0])
    meta = [t.to("meta").requires_grad_() for t in (x, d, p)]
    for (z,) in (
        sep_stage(meta[:1], meta[1:2], meta[2:], stride=2),
        mixing(meta[:1], [[meta[2], meta[2]]], stride=2),
    ):
        assert z.device.type == "meta" and z.shape[2:] == (2, 3)
        found = torch.autograd.grad(z.sum(), [meta[0], meta[2]])
        assert [t.shape for t in found] == [x.shape, p.shape]
