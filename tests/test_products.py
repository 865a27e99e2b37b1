"""Products with the Hessian of a supernet by tangents of its backward pass, against differentiating
twice and against the dense matrix.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdarts_fast.curvature import HessianOperator, softmax_null_space, top_eigenvalue
from rdarts_fast.networks.chain import Chain, State
from rdarts_fast.networks.hessian import SupernetHessian
from rdarts_fast.networks.operations import FactorizedReduce, dil_conv
from rdarts_fast.networks.tangent import Gathered, Step, steps_of
from rdarts_fast.spaces import Space
from tests.small_hessian import ALL, DOUBLE, SPACES, Net
from tests.tape import Tapes


def directions(size: int) -> Tensor:
    """Return [size, 3]: along all alphas, the normal cells' and the reduction cells' alone."""
    v = torch.randn(size, 3, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    v[size // 2 :, 1] = v[: size // 2, 2] = 0.0
    return v


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Compare relative to the largest number, which must not be tiny."""
    size = float(expected.abs().max())
    assert size > 1e-4
    assert float((got - expected).abs().max()) < tolerance * size


def operator_of(net: Net, **more: Any) -> SupernetHessian:
    operator = net.operator(**more)
    assert isinstance(operator, SupernetHessian)
    return operator


def assert_products(net: Net, reference: Net | None = None) -> None:
    """Compare products with the dense matrix's and with differentiating twice."""
    operator = operator_of(net)
    v = directions(operator.shape[0])
    got = operator @ v
    assert_close(got, operator_of(net).dense() @ v)
    twice = HessianOperator(net.loss, net.alphas) if reference is None else reference.operator()
    assert_close(got, twice @ v)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: getattr(s, "name", s))
def test_every_space(space: Space | str) -> None:
    assert_products(Net(space, "fused"), Net(space, "reference"))


def test_in_eval_mode_and_with_some_batch_norms_held_still() -> None:
    net = Net("s2", "fused")
    net.loss()  # moves the running statistics away from their start
    net.supernet.eval()
    assert_products(net)
    net.supernet.train()
    for norm in [m for m in net.supernet.modules() if type(m) is nn.BatchNorm2d][::3]:
        norm.eval()
    assert_products(net)


def test_without_drop_path() -> None:
    net = Net("s4", "fused")
    net.supernet.drop_path_prob = 0.0
    assert_products(net)


def test_modules_without_kernels() -> None:
    net = Net("s5", "fused")
    for cell in net.supernet.cells:
        channels = cell.edges[0].operations[0][1].in_channels
        stride = cell.strides[1]
        for edge, pool in ((1, nn.AvgPool2d(3, stride, 1)), (0, nn.MaxPool2d(5, stride, 2))):
            norm = nn.BatchNorm2d(channels, affine=False)
            cell.edges[edge].operations[1] = nn.Sequential(norm, nn.ReLU(), pool).double()
    assert_products(net)


def test_columns_zeros_and_the_null_space() -> None:
    net = Net("s3", "fused")
    operator = operator_of(net)
    v = directions(operator.shape[0])
    whole = operator @ v
    for k in range(3):
        alone = operator @ v[:, k]
        assert alone.shape == v[:, k].shape
        assert_close(alone, whole[:, k], 1e-12)
    little = operator_of(net, memory=1) @ v  # a direction at a time
    assert torch.equal(little[:, 0], operator @ v[:, 0])
    assert (operator @ torch.zeros_like(v)).count_nonzero() == 0
    assert (operator @ v[:, :0]).shape == (len(v), 0)
    shapes = [(alpha.shape[0], alpha.shape[1]) for alpha in net.alphas]
    null = softmax_null_space(shapes)
    nothing = operator @ null[:, [0, -1]]
    assert float(nothing.abs().max()) < 1e-13 * float(whole.abs().max())
    with pytest.raises(ValueError, match="v: expected shape"):
        operator @ v[1:]


def test_a_product_leaves_nothing_behind() -> None:
    net = Net("s2", "fused")
    state = {name: tensor.clone() for name, tensor in net.supernet.state_dict().items()}
    operator = operator_of(net)
    v = directions(operator.shape[0])
    first = operator @ v
    assert torch.equal(operator @ v, first)
    for part in operator._passes._parts:
        assert all(norm.dz is None for norm in part.norms())
        assert all(s.tangent is None and s.gathered is None for s in part.states)
    assert torch.equal(operator.dense(), operator_of(net).dense())
    assert all(torch.equal(state[k], x) for k, x in net.supernet.state_dict().items())
    parameters = [*net.supernet.parameters(), *net.alphas]
    assert all(p.requires_grad and p.grad is None for p in parameters)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: getattr(s, "name", s))
def test_recorded_products_are_the_same(space: Space | str) -> None:
    """Replaying runs none of the product's Python, and waits for no value; so nothing hangs on the
    vector but numbers.
    """
    net, recorder = Net(space, "fused"), Tapes()
    operator, plain = operator_of(net, recorder=recorder), operator_of(net)
    v = directions(operator.shape[0])
    columns = [*v.t(), torch.zeros_like(v[:, 0]), v[:, 0]]
    got = [operator @ column for column in columns]
    assert recorder.counts == {"prepared": 1, "recorded": 1, "replayed": len(columns) - 2}
    assert all(torch.equal(a, plain @ b) for a, b in zip(got, columns, strict=True))
    assert torch.equal(got[0], got[-1]) and got[0].data_ptr() != got[-1].data_ptr()
    assert torch.equal(operator @ v, plain @ v)  # of several: as it is
    assert recorder.counts["replayed"] == len(columns) - 2


def test_lambda_max_by_recorded_products() -> None:
    net, recorder = Net("s3", "fused"), Tapes()
    null = softmax_null_space([(alpha.shape[0], alpha.shape[1]) for alpha in net.alphas])
    one, other = (
        top_eigenvalue(Products(operator_of(net, **more)), null_space=null)
        for more in ({}, {"recorder": recorder})
    )
    assert other.value == one.value and torch.equal(other.vector, one.vector)
    assert recorder.counts["replayed"] == other.products - 2 > 1


class Products:
    """An operator that has products alone."""

    def __init__(self, operator: SupernetHessian) -> None:
        self.operator, self.shape = operator, operator.shape

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.operator @ v


@pytest.mark.parametrize("space", ["s1", "s3"])
def test_lambda_max_by_products(space: str) -> None:
    net = Net(space, "fused")
    expected = float(torch.linalg.eigvalsh(operator_of(net).dense())[-1])
    null = softmax_null_space([(alpha.shape[0], alpha.shape[1]) for alpha in net.alphas])
    found = top_eigenvalue(Products(operator_of(net)), rtol=1e-10, atol=0.0, null_space=null)
    assert found.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("space", ["s1", ALL], ids=lambda s: getattr(s, "name", s))
def test_float32(space: Space | str) -> None:
    exact = operator_of(Net(space, "fused"))
    v = directions(exact.shape[0])
    operator = operator_of(Net(space, "fused", torch.float32))
    got, expected = operator @ v, exact @ v
    assert got.dtype == DOUBLE and (operator @ v.float()).dtype == torch.float32
    error = float((got - expected).abs().max() / expected.abs().max())
    assert 0.0 < error < 1e-5


def reduced(channels_in: int) -> list[Step] | None:
    return steps_of(FactorizedReduce(channels_in, 6, affine=False).double())


def steps(*modules: nn.Module) -> Callable[[], list[Step] | None]:
    return lambda: steps_of(nn.Sequential(*modules).double())


CHAINS = {
    "gate": steps(nn.ReLU()),
    "stage": steps(*list(dil_conv(3, 2, False, 5))[:3]),
    "linear": steps(nn.Conv2d(6, 4, 3, 2, 1, bias=False)),
    "maximum": steps(nn.MaxPool2d(2, 2)),
    "max pool": steps(nn.MaxPool2d(3, 2, 1)),
    "mean pool": steps(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "mixing": steps(nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False)),
    "mixing later": steps(nn.MaxPool2d(2, 2), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False)),
    "reduction": lambda: (reduced(6) or [])[:-1],
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHAINS)
def test_the_adjoint_of_a_chain(name: str) -> None:
    torch.manual_seed(0)
    made = CHAINS[name]()
    assert made
    chain, sources = Chain(made), 1 if name == "stage" else 2
    states = [State(torch.randn(2, 3, 5, 7, dtype=DOUBLE), moves=True) for _ in range(sources)]
    out = chain.primal(states)
    for state in states:  # of two directions
        state.tangent = torch.randn(4, 3, 5, 7, dtype=DOUBLE)
    dz = chain.tangent(states, None)
    assert dz is not None and dz.shape == (4, *out.shape[1:])
    g = torch.randn_like(dz)
    into = [Gathered(state.value, 2) for state in states]
    into[0].add(torch.ones(4, 3, 5, 7, dtype=DOUBLE))  # what has come before stays

    def no_norm(*given: object) -> Tensor:
        raise AssertionError(given)

    chain.adjoint(g, into, no_norm)
    pairs = [(one.value().clone(), s.tangent) for one, s in zip(into, states, strict=True)]
    pairs[0][0].sub_(1.0)
    for v in (slice(0, 2), slice(2, 4)):
        there = float((g[v] * dz[v]).sum())
        back = sum(float((x[v] * dx[v]).sum()) for x, dx in pairs if dx is not None)
        assert back == pytest.approx(there, rel=1e-12)
    # The tangent is what a small step does.
    moved = [
        State(s.value + 1e-7 * s.tangent[:2], moves=True) for s in states if s.tangent is not None
    ]
    step = (chain.primal(moved) - out) / 1e-7
    torch.testing.assert_close(step, dz[:2], rtol=0, atol=1e-6)
