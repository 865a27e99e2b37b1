"""The correlation along rows against its formula in float64, with all its derivatives, on every
backend.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdarts_fast.kernels import correlation
from rdarts_fast.kernels.correlation import correlation_twin, displacements
from tests.conftest import device_of
from tests.test_kernels import LAYOUTS, SHAPES, Case
from tests.tolerances import assert_equal

# More than one vector and block of pixels, of channels and of displacements; part of each.
CORRELATED = [*SHAPES, (1, 33, 1, 70), (1, 5, 1, 130), (1, 37, 1, 17)]
RANGES = [(-3, 7), (-40, 41), (0, 1), (2, 3), (-9, 4), (-20, 41)]
DTYPES = [torch.float64, torch.float32]
# torch's own forward mode compiles by torch.jit, of which it warns.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning")


def written_out(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    n, _, h, w = left.shape
    out = torch.zeros(n, count, h, w, dtype=torch.float64)
    for i, x in itertools.product(range(count), range(w)):
        if 0 <= x + first + i < w:
            out[:, i, :, x] = (left[..., x].double() * right[..., x + first + i].double()).mean(1)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_the_formulas(backend: str, layout: str) -> None:
    for shape, dtype in itertools.product(CORRELATED, DTYPES):
        left, right = (x.to(device_of(backend)) for x in Case(shape, 2, layout, dtype).z)
        for first, count in RANGES:
            got = correlation(left, right, first, count)
            assert got.dtype == dtype
            expected = written_out(left.cpu(), right.cpu(), first, count)
            assert_equal(got.cpu(), expected, dtype)


def test_the_twin_is_the_formula() -> None:
    for shape, (first, count) in itertools.product(CORRELATED, RANGES):
        left, right = Case(shape, 2, "nchw", torch.float64).z
        expected = written_out(left, right, first, count)
        assert_equal(correlation_twin(left, right, first, count), expected, torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_their_gradients_are_the_twins(backend: str, layout: str) -> None:
    """Of cotangents with strides of their own; the second derivatives in all three that enter."""
    for shape, dtype in itertools.product(CORRELATED[1:], DTYPES):
        case = Case(shape, 4, layout, dtype)
        for first, count in RANGES[:1] if dtype == torch.float32 else RANGES[-3:]:
            wide = torch.randn(shape[0], count, shape[3], shape[2], generator=case.generator)
            found = []
            for function, exact in ((correlation, False), (correlation_twin, True)):
                device = "cpu" if exact else device_of(backend)
                type_ = torch.float64 if exact else dtype
                left, right, *h = (x.to(device).to(type_) for x in case.z)
                g = wide.to(device, dtype).to(type_).transpose(2, 3).requires_grad_()
                left.requires_grad_(), right.requires_grad_()
                out = function(left, right, first, count)
                once = torch.autograd.grad(out, (left, right), g, create_graph=True)
                twice = torch.autograd.grad(once, (left, right, g), h)
                found.append([*once, *twice])
            for a, b in zip(*found, strict=True):
                assert_equal(a.detach().cpu(), b.detach(), dtype)


@FORWARD_MODE
def test_it_is_closed_under_differentiation(backend: str) -> None:
    """Third derivatives too: those of a gradient's gradient."""
    device = device_of(backend)
    for layout in ("nchw", "nhwc"):
        left, right, h = (x.to(device) for x in Case((2, 3, 2, 5), 3, layout, torch.float64).z)
        inputs = left.requires_grad_(), right.requires_grad_()

        def function(left: Tensor, right: Tensor) -> Tensor:
            return correlation(left, right, -2, 4)

        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)

        def gradients(left: Tensor, right: Tensor, g: Tensor, h=h) -> tuple[Tensor, ...]:
            out = correlation(left, right, -2, 4)
            once = torch.autograd.grad(out, (left, right), g, create_graph=True)
            return torch.autograd.grad(once[0], (right, g), h, create_graph=True)

        g = torch.randn(2, 4, 2, 5, dtype=torch.float64, device=device, requires_grad=True)
        assert torch.autograd.gradcheck(gradients, (*inputs, g), fast_mode=True)


@FORWARD_MODE
def test_tangents_of_the_gradient_are_those_of_differences(backend: str) -> None:
    """Forward over backward: the adjoints' own tangents."""
    device = device_of(backend)
    left, right, dleft, dright = (
        x.to(device) for x in Case((1, 3, 2, 6), 4, "nchw", torch.float64).z
    )
    g, dg = (torch.randn(1, 5, 2, 6, dtype=torch.float64, device=device) for _ in range(2))

    def gradient(left: Tensor, right: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        left, right = left.requires_grad_(), right.requires_grad_()
        with torch.enable_grad():
            out = correlation(left, right, -3, 5)
            return torch.autograd.grad(out, (left, right), g, create_graph=True)

    with torch.autograd.forward_ad.dual_level():
        pairs = ((left, dleft), (right, dright), (g, dg))
        duals = [torch.autograd.forward_ad.make_dual(x.clone(), dx) for x, dx in pairs]
        found = gradient(*duals)
        tangents = [torch.autograd.forward_ad.unpack_dual(x).tangent for x in found]
    t = 0.25  # bilinear: a central difference is exact
    ends = [gradient(left + s * t * dleft, right + s * t * dright, g + s * t * dg) for s in (1, -1)]
    for tangent, up, down in zip(tangents, *ends, strict=True):
        assert_equal(tangent.detach().cpu(), ((up - down) / (2 * t)).detach().cpu(), torch.float64)


def test_only_what_is_asked_for_is_computed(backend: str) -> None:
    left, right = (x.to(device_of(backend)) for x in Case((2, 3, 4, 5), 2, "nchw", DTYPES[0]).z)
    right.requires_grad_()
    out = correlation(left, right, -2, 3)
    (dright,) = torch.autograd.grad(out, right, torch.ones_like(out))
    exact = right.detach().cpu().requires_grad_()
    expected = correlation_twin(left.cpu(), exact, -2, 3)
    (theirs,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    assert_equal(dright.cpu(), theirs, torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_again_and_on_two_threads(layout: str) -> None:
    case = Case((5, 33, 8, 40), 2, layout, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            left, right = (x.detach().requires_grad_() for x in case.z)
            out = correlation(left, right, -20, 41)
            results.append([out, *torch.autograd.grad(out, (left, right), out.detach())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_strides(backend: str) -> None:
    device = device_of(backend)
    for x in (
        torch.randn(1, 3, 1, 1).expand(2, 3, 4, 5),
        torch.randn(2, 3, 5, 4).transpose(2, 3),
        torch.randn(5, 4, 3, 2).permute(3, 2, 0, 1),
        torch.randn(2, 3, 9, 18)[:, :, ::2, ::2],
    ):
        other = torch.randn(x.shape)
        for left, right in ((x, other), (other, x)):
            got = correlation(left.to(device), right.to(device), -2, 5)
            assert_equal(got.cpu(), written_out(left, right, -2, 5), torch.float32)


def test_infinite_and_nan_pixels_stay_where_they_are_seen(backend: str) -> None:
    """Zeros outside are not multiplied into results that do not reach them."""
    left, right = torch.ones(1, 2, 1, 20), torch.ones(1, 2, 1, 20)
    right[0, 0, 0, 7] = torch.nan
    got = correlation(left.to(device_of(backend)), right.to(device_of(backend)), -1, 3)[0, :, 0]
    seen = torch.zeros(3, 20, dtype=torch.bool)
    seen[0, 8] = seen[1, 7] = seen[2, 6] = True
    assert torch.equal(got.cpu().isnan(), seen)


def test_displacements_are_the_published_ones() -> None:
    assert displacements(40) == (-40, 81) and displacements(40, one_sided=True) == (-40, 41)
    assert displacements(0) == (0, 1)
    with pytest.raises(ValueError, match="most: expected 0 or more, got -1"):
        displacements(-1)


def test_what_the_right_view_has_lies_at_the_negative_displacement(backend: str) -> None:
    """left[x] shows right[x - 3]: the largest correlation is that of -3."""
    right = torch.randn(1, 16, 2, 30, generator=torch.Generator().manual_seed(0))
    left = torch.roll(right, 3, dims=3)
    first, count = displacements(5)
    got = correlation(left.to(device_of(backend)), right.to(device_of(backend)), first, count)
    assert (got[0, :, :, 8:].argmax(dim=0) + first == -3).all()


def test_meta_tensors_give_shapes() -> None:
    left, right = (torch.empty(2, 3, 4, 8, device="meta", requires_grad=True) for _ in range(2))
    out = correlation(left, right, -2, 4)
    assert out.shape == (2, 4, 4, 8)
    g = torch.empty_like(out, requires_grad=True)
    once = torch.autograd.grad(out, (left, right), g, create_graph=True)
    assert once[0].shape == left.shape and once[0].device.type == "meta"
    assert torch.autograd.grad(once[0], g, torch.empty_like(left))[0].shape == g.shape


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: correlation([X], X, 0, 1), TypeError, "left: expected a tensor, got list"),
        (lambda: correlation(X, X[0], 0, 1), ValueError, "right: expected shape"),
        (lambda: correlation(X, X.double(), 0, 1), TypeError, "right: expected dtype"),
        (lambda: correlation(X.bfloat16(), X.bfloat16(), 0, 1), TypeError, "float32 or float64"),
        (lambda: correlation(X, X.to_sparse(), 0, 1), TypeError, "right: expected a dense"),
        (lambda: correlation(X[:, :0], X[:, :0], 0, 1), ValueError, "left: expected a channel"),
        (lambda: correlation(X, X, 0, 0), ValueError, "first and count: .* got 0, 0"),
        (lambda: correlation(X, X, 0.0, 1), ValueError, "first and count: .* got 0.0, 1"),
        (lambda: correlation(X, X, -1025, 1), ValueError, "displacements: expected -1024 to 1024"),
        (lambda: correlation(X, X, 1000, 26), ValueError, "got 1000 to 1025"),
        (lambda: correlation(X, X, -(1 << 70), 1), ValueError, "displacements"),
    ],
)
def test_bad_input_names_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_shape_stride_or_type_crashes_the_process(data) -> None:
    shape = [data.draw(st.integers(0, 6)) for _ in range(data.draw(st.sampled_from([4, 4, 4, 3])))]
    steps = [data.draw(st.integers(1, 3)) for _ in shape]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64]))
    order = data.draw(st.permutations(range(len(shape))))
    whole = torch.ones([size * step for size, step in zip(shape, steps, strict=True)], dtype=dtype)
    x = whole[tuple(slice(None, None, step) for step in steps)].permute(order)
    first = data.draw(st.one_of(st.integers(-8, 8), st.integers(-2000, 2000)))
    count = data.draw(st.one_of(st.integers(-1, 9), st.integers(0, 2000)))
    if x.is_floating_point():
        x.requires_grad_()
    try:
        out = correlation(x, x, first, count)
    except (ValueError, TypeError) as error:
        assert "expected" in str(error)
        return
    torch.testing.assert_close(out, correlation_twin(x, x, first, count))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert abs(dx.sum().item() - 2 * out.sum().item()) < 1e-3
