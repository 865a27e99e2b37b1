"""What the convolution stages say of bad input, and that no input ends the process."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdarts_fast.kernels import mixing, sep_stage

X = torch.zeros(2, 3, 4, 4)
D, P = torch.zeros(3, 1, 3, 3), torch.zeros(5, 3, 1, 1)
S = torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sep_stage([], [], []), ValueError, "x: expected 1 to 64 tensors, got 0"),
        (lambda: sep_stage([X] * 65, [D] * 65, [P] * 65), ValueError, "x: expected 1 to 64"),
        (lambda: sep_stage(X, [D], [P]), TypeError, "x: expected a list of tensors"),
        (lambda: sep_stage([X], D, [P]), ValueError, "depthwise: expected G = 1 tensors"),
        (lambda: sep_stage([X], [D], [P, P]), ValueError, "pointwise: expected G = 1 tensors"),
        (lambda: sep_stage([X], [D[:2]], [P]), ValueError, r"depthwise\[0\]: expected shape"),
        (lambda: sep_stage([X], [D[..., :2, :2]], [P]), ValueError, r"K of 3, 5, 7"),
        (lambda: sep_stage([X], [D.double()], [P]), TypeError, r"depthwise\[0\]: expected dtype"),
        (lambda: sep_stage([X], [D], [P[:0]]), ValueError, r"pointwise\[0\]: expected shape"),
        (lambda: sep_stage([X], [D], [P[:, :2]]), ValueError, r"pointwise\[0\]: expected shape"),
        (lambda: sep_stage([X], [D], [P], stride=3), ValueError, "stride: expected 1 or 2, got 3"),
        (lambda: sep_stage([X], [D], [P], dilation=0), ValueError, "dilation: expected 1 or 2"),
        (lambda: sep_stage([X], [D], [P], scale=S), ValueError, "scale, shift: expected both"),
        (lambda: sep_stage([X], [D], [P], scale=S[:, :2], shift=S), ValueError, "scale: expected"),
        (lambda: sep_stage([X.bfloat16()], [D], [P]), ValueError, "bfloat16"),
        (lambda: mixing([], [[P]]), ValueError, "x: expected 1 to 64 tensors, got 0"),
        (lambda: mixing([X], []), ValueError, "weights: expected one or two tensors"),
        (lambda: mixing([X], [P]), ValueError, "weights: expected one or two tensors"),
        (lambda: mixing([X], [[P], [P, P]]), ValueError, r"weights\[1\]: expected 1 tensors"),
        (lambda: mixing([X, X], [[P]]), ValueError, r"weights\[0\]\[0\]: expected shape"),
        (
            lambda: mixing([X], [[P, P]]),
            ValueError,
            r"weights: expected one .* at stride 1, got two",
        ),
        (
            lambda: mixing([X], [[P, P[:2]]], stride=2),
            ValueError,
            r"weights\[0\]: expected two halves",
        ),
        (lambda: mixing([X], [[P.double()]]), TypeError, r"weights\[0\]\[0\]: expected dtype"),
        (lambda: mixing([X], [[P]], stride=0), ValueError, "stride: expected 1 or 2, got 0"),
        (lambda: mixing([X], [[P]], shift=S), ValueError, "scale, shift: expected both"),
        (lambda: mixing([X], [[P]], scale=S, shift=S[:0]), ValueError, "shift: expected shape"),
        (lambda: mixing([X.bfloat16()], [[P]]), ValueError, "bfloat16"),
    ],
)
def test_bad_input_names_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_shape_stride_or_type_crashes_the_process(data) -> None:
    def tensor(shape: Sequence[int]) -> Tensor:
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
        order = data.draw(st.permutations(range(len(shape))))
        steps = [data.draw(st.integers(1, 3)) for _ in shape]
        sizes = [size * step for size, step in zip(shape, steps, strict=True)]
        whole = torch.ones([sizes[i] for i in order], dtype=dtype).requires_grad_()
        back = sorted(range(len(shape)), key=lambda i: order[i])
        return whole.permute(back)[tuple(slice(None, None, step) for step in steps)]

    integer = st.integers(0, 4)
    n, c, h, w, o = (data.draw(integer) for _ in range(5))
    k, stride = data.draw(st.sampled_from([3, 5, 7, 1])), data.draw(st.integers(0, 2))
    count, halves = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    x = [tensor((n, c, h, w)) for _ in range(count)]
    depthwise = [tensor((c, 1, k, k)) for _ in range(count)]
    pointwise = [tensor((o, c, 1, 1)) for _ in range(count)]
    weights = [[tensor((o, c * count, 1, 1)) for _ in range(halves)] for _ in range(2)]
    for call in (
        lambda: sep_stage(x, depthwise, pointwise, stride=stride, dilation=1 + n % 2),
        lambda: mixing(x, weights, stride=stride),
    ):
        try:
            results = call()
            found = torch.autograd.grad([z.sum() for z in results], x)
        except (ValueError, TypeError) as error:
            assert "expected" in str(error)
            continue
        for result in (*results, *found):
            assert torch.equal(result, result.round())  # all inputs are ones


def test_no_output_channels_leave_a_gradient_of_zeros() -> None:
    x = torch.ones(1, 2, 1, 3, requires_grad=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        (z,) = mixing([x], [[torch.ones(0, 2, 1, 1)]])
        (dx,) = torch.autograd.grad(z.sum(), [x])
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(dx, torch.zeros_like(x))
