"""The alphas' gradient, on functions whose derivatives are known and on a supernet in float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rdarts_fast import bilevel
from rdarts_fast.draws import Draws
from rdarts_fast.networks import Supernet, softmax_weights

DOUBLE = torch.float64


class Quadratic:
    """L_train = |w - A alpha|^2 / 2 + sum(w^3) / 6, L_val = |w - t|^2 / 2 + alpha . s: all
    derivatives in closed form.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        self.a, self.t, self.s = normal(5, 3), normal(5), normal(3)
        self.w, self.alpha = normal(5).requires_grad_(), normal(3).requires_grad_()
        self.momentum = normal(5)

    def training_loss(self) -> Tensor:
        return (self.w - self.a @ self.alpha).square().sum() / 2 + self.w.pow(3).sum() / 6

    def validation_loss(self) -> Tensor:
        return (self.w - self.t).square().sum() / 2 + self.alpha @ self.s

    def expected(self, rate: float, momentum: float, decay: float) -> Tensor:
        w, alpha = self.w.detach(), self.alpha.detach()
        gradient = w - self.a @ alpha + w.square() / 2
        virtual = w - rate * (momentum * self.momentum + gradient + decay * w)
        vector = virtual - self.t  # dL_val/dw'
        mixed = -self.a.T @ vector  # d2L_train/dalpha dw = -A^T
        return self.s - rate * mixed


def test_second_order_on_a_quadratic() -> None:
    q = Quadratic()
    step = bilevel.VirtualStep(0.1, 0.9, 0.01, [q.momentum])
    before = q.w.detach().clone()
    result = bilevel.second_order(q.training_loss, q.validation_loss, [q.w], [q.alpha], step)
    torch.testing.assert_close(result.gradient[0], q.expected(0.1, 0.9, 0.01), rtol=1e-9, atol=1e-9)
    assert torch.equal(q.w, before)
    without_buffer = bilevel.second_order(
        q.training_loss,
        q.validation_loss,
        [q.w],
        [q.alpha],
        bilevel.VirtualStep(0.1, 0.9, 0.01, [None]),
    )
    torch.testing.assert_close(
        without_buffer.gradient[0], q.expected(0.1, 0.0, 0.01), rtol=1e-9, atol=1e-9
    )


def test_exact_second_order_on_a_quadratic() -> None:
    # The cubic part has a large third derivative in w, which a difference would see.
    q = Quadratic()
    step = bilevel.VirtualStep(0.1, 0.9, 0.01, [q.momentum])
    before = q.w.detach().clone()
    losses = q.training_loss, q.validation_loss
    result = bilevel.second_order(*losses, [q.w], [q.alpha], step, exact=True, epsilon_scale=10.0)
    torch.testing.assert_close(
        result.gradient[0], q.expected(0.1, 0.9, 0.01), rtol=1e-13, atol=1e-13
    )
    assert torch.equal(q.w, before)
    alpha = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    (term,) = bilevel.exact_implicit_term(q.training_loss, [q.w], [alpha], [q.t])
    assert torch.equal(term, torch.zeros(2, dtype=DOUBLE))


def test_first_order_on_a_quadratic() -> None:
    q = Quadratic()
    result = bilevel.first_order(q.validation_loss, [q.alpha])
    assert torch.equal(result.gradient[0], q.s)
    assert torch.equal(result.validation_loss, q.validation_loss().detach())


def test_implicit_term_of_a_zero_vector_is_zero() -> None:
    q = Quadratic()
    (term,) = bilevel.implicit_term(
        q.training_loss, [q.w], [q.alpha], [torch.zeros(5, dtype=DOUBLE)]
    )
    assert torch.equal(term, torch.zeros(3, dtype=DOUBLE))


class Net:
    """A small supernet in float64 with one fixed batch each, and noise and masks that are functions
    of the pass.
    """

    def __init__(self, space: str = "s4") -> None:
        torch.manual_seed(1)
        self.supernet = Supernet(space, channels=4, layers=3, classes=5).double()
        self.supernet.drop_path_prob = 0.3
        self.alphas = self.supernet.initial_alphas(3)
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(2, 6, 3, 8, 8, generator=generator, dtype=DOUBLE)
        self.labels = torch.randint(5, (2, 6), generator=generator)
        self.parameters = list(self.supernet.parameters())
        self.calls: list[str] = []

    def loss(self, half: int) -> Tensor:
        self.calls.append(["train", "val"][half])
        weights = softmax_weights(self.alphas)
        logits = self.supernet(self.images[half], weights, Draws(7, step=half))
        return torch.nn.functional.cross_entropy(logits, self.labels[half])

    def training_loss(self) -> Tensor:
        return self.loss(0)

    def validation_loss(self) -> Tensor:
        return self.loss(1)


@pytest.mark.parametrize("space", ["s1", "s3", "s4"])
def test_implicit_term_equals_double_backward(space: str) -> None:
    net = Net(space)
    alphas = list(net.alphas.values())
    generator = torch.Generator().manual_seed(4)
    vector = [torch.randn(p.shape, generator=generator, dtype=DOUBLE) for p in net.parameters]
    term = bilevel.implicit_term(net.training_loss, net.parameters, alphas, vector, 1e-6)
    gradient = torch.autograd.grad(net.training_loss(), net.parameters, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
    exact = torch.autograd.grad(product, alphas)
    difference = torch.cat([(t - e).flatten() for t, e in zip(term, exact, strict=True)]).norm()
    size = torch.cat([e.flatten() for e in exact]).norm()
    assert size > 1e-3
    assert difference / size < 1e-6
    term = bilevel.exact_implicit_term(net.training_loss, net.parameters, alphas, vector)
    for got, expected in zip(term, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_second_order_on_a_supernet_equals_the_formula() -> None:
    net = Net()
    alphas = list(net.alphas.values())
    generator = torch.Generator().manual_seed(0)  # others can put a ReLU's kink in the difference
    momenta = [torch.randn(p.shape, generator=generator).to(p) * 0.1 for p in net.parameters]
    rate, momentum, decay = 0.025, 0.9, 3e-4
    step = bilevel.VirtualStep(rate, momentum, decay, momenta)
    result = bilevel.second_order(
        net.training_loss, net.validation_loss, net.parameters, alphas, step, epsilon_scale=1e-6
    )
    assert net.calls == ["train", "val", "train", "train"]
    net.calls.clear()
    by_differentiating = bilevel.second_order(
        net.training_loss, net.validation_loss, net.parameters, alphas, step, exact=True
    )
    assert net.calls == ["train", "val", "train"]

    start = [p.detach().clone() for p in net.parameters]
    gradient = torch.autograd.grad(net.training_loss(), net.parameters, create_graph=True)
    with torch.no_grad():
        for p, g, b in zip(net.parameters, gradient, momenta, strict=True):
            p.data = p - rate * (momentum * b + g + decay * p)
    at_virtual = torch.autograd.grad(net.validation_loss(), [*alphas, *net.parameters])
    direct, vector = at_virtual[:2], at_virtual[2:]
    with torch.no_grad():
        for p, s in zip(net.parameters, start, strict=True):
            p.data = s
    gradient = torch.autograd.grad(net.training_loss(), net.parameters, create_graph=True)
    product = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
    mixed = torch.autograd.grad(product, alphas)
    for got, d, m in zip(result.gradient, direct, mixed, strict=True):
        assert rate * m.norm() > 1e-6 * d.norm()  # the term is there to be seen
        torch.testing.assert_close(got, d - rate * m, rtol=1e-6, atol=1e-10)
    for got, d, m in zip(by_differentiating.gradient, direct, mixed, strict=True):
        torch.testing.assert_close(got, d - rate * m, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", ["first", "second"])
def test_weights_and_buffers_are_the_same_bits_afterwards(order: str) -> None:
    net = Net("s3")
    alphas, buffers = list(net.alphas.values()), list(net.supernet.buffers())
    before = {k: v.clone() for k, v in net.supernet.state_dict().items()}
    if order == "first":
        bilevel.first_order(net.validation_loss, alphas, buffers)
    else:
        step = bilevel.VirtualStep(0.025, 0.9, 3e-4, [None] * len(net.parameters))
        bilevel.second_order(
            net.training_loss, net.validation_loss, net.parameters, alphas, step, buffers=buffers
        )
    after = net.supernet.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    net.training_loss()  # a pass outside does move the buffers
    after = net.supernet.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] != []


def test_passes_for_the_alphas_alone_have_no_gradient_in_the_weights() -> None:
    q, seen = Quadratic(), []

    def loss(of: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def recorded() -> Tensor:
            seen.append(q.w.requires_grad)
            return of()

        return recorded

    expected = bilevel.first_order(q.validation_loss, [q.alpha])
    got = bilevel.first_order(loss(q.validation_loss), [q.alpha], (), [q.w])
    assert torch.equal(got.gradient[0], expected.gradient[0])
    assert seen == [False] and q.w.requires_grad
    seen.clear()
    step = bilevel.VirtualStep(0.1, 0.0, 0.0, [None])
    bilevel.second_order(loss(q.training_loss), loss(q.validation_loss), [q.w], [q.alpha], step)
    assert seen == [True, True, False, False] and q.w.requires_grad


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_at_w_is_taken_within_what_the_step_says(exact: bool) -> None:
    """Its backward pass too."""
    q, inside, seen = Quadratic(), [False], []

    @contextmanager
    def within() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def loss() -> Tensor:
        found = q.training_loss()
        found.register_hook(lambda g: seen.append(inside[0]))
        return found

    step = bilevel.VirtualStep(0.1, 0.0, 0.0, [None], within=within)
    bilevel.second_order(loss, q.validation_loss, [q.w], [q.alpha], step, exact=exact)
    assert seen[0] and (all(seen) if exact else seen == [True, False, False])


def test_a_loss_without_the_alphas_has_a_zero_gradient_in_them() -> None:
    q = Quadratic()
    alpha = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    result = bilevel.first_order(lambda: q.w.square().sum(), [alpha], (), [q.w])
    assert torch.equal(result.gradient[0], torch.zeros(2, dtype=DOUBLE))


def test_an_exception_inside_leaves_the_weights_as_they_were() -> None:
    q = Quadratic()
    before = q.w.detach().clone()

    def fails() -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        bilevel.second_order(
            q.training_loss, fails, [q.w], [q.alpha], bilevel.VirtualStep(0.1, 0.9, 0.0, [None])
        )
    assert torch.equal(q.w, before)


def test_an_alpha_that_does_not_matter_gets_a_zero_gradient() -> None:
    q = Quadratic()
    idle = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    step = bilevel.VirtualStep(0.1, 0.0, 0.0, [None])
    result = bilevel.second_order(q.training_loss, q.validation_loss, [q.w], [q.alpha, idle], step)
    assert torch.equal(result.gradient[1], torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize("exact", [True, False])
def test_a_virtual_step_with_clipped_gradients_is_the_formula(exact: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, n, generator=generator).double() for n in (3, 2))
    w, c, momentum = (torch.randn(3, generator=generator).double() for _ in range(3))
    alpha, d = (torch.randn(2, generator=generator).double() for _ in range(2))
    w.requires_grad_(), alpha.requires_grad_()
    rate, decay, most = 0.1, 0.05, 0.3

    def clipped(gradient: torch.Tensor) -> torch.Tensor:
        assert gradient.norm() > most
        return gradient * most / (gradient.norm() + 1e-6)

    step = bilevel.VirtualStep(rate, 0.9, decay, [momentum], most)
    found = bilevel.second_order(
        lambda: 0.5 * (a @ w - b @ alpha).square().sum(),
        lambda: 0.5 * (w - c).square().sum() + alpha @ d,
        [w],
        [alpha],
        step,
        exact=exact,
    )
    with torch.no_grad():
        virtual = w - rate * (clipped(a.t() @ (a @ w - b @ alpha)) + decay * w + 0.9 * momentum)
        v = clipped(virtual - c) + decay * virtual
        expected = d + rate * (b.t() @ a @ v)
    torch.testing.assert_close(found.gradient[0], expected, rtol=1e-9, atol=1e-12)
    loose = bilevel.VirtualStep(rate, 0.9, 0.0, [momentum], 1e9)
    plain = bilevel.VirtualStep(rate, 0.9, 0.0, [momentum])
    one, other = (
        bilevel.second_order(
            lambda: 0.5 * (a @ w - b @ alpha).square().sum(),
            lambda: 0.5 * (w - c).square().sum() + alpha @ d,
            [w],
            [alpha],
            each,
            exact=exact,
        ).gradient[0]
        for each in (loose, plain)
    )
    assert torch.equal(one, other)
