"""Launches that wait: they run in order, on memory that is still there, and before what reads their
results is run.
"""

import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdarts_fast import kernels
from rdarts_fast.draws import Draws
from rdarts_fast.kernels import array, channel_affine, launches
from rdarts_fast.kernels.launches import at_once, run_waiting, scratch, together
from rdarts_fast.networks import Supernet, softmax_weights

CPU = torch.device("cpu")
UNREAD = float("nan")


def doubled_of(x: Tensor) -> Tensor:
    """Return 2 x by a launch; its coefficients have no other owner."""
    u = torch.full((1, x.shape[1]), 2.0)
    return channel_affine([x], u, torch.zeros_like(u))[0]


def doubled(x: Tensor) -> Tensor:
    """Return 2 x by a launch that reads a copy, which has no other owner either."""
    return doubled_of(x.clone())


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let results hold NaN until a launch fills them."""
    plain = torch.empty

    def filled(*size: object, **ways: object) -> Tensor:
        x = plain(*size, **ways)
        return x.fill_(UNREAD) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", filled)


def test_launches_wait_for_the_end_and_keep_their_order_and_memory() -> None:
    x = torch.ones(2, 3, 4, 4)
    with together(CPU):
        once = doubled(x)
        again = doubled_of(once)
        others = [torch.full((2, 3, 4, 4), 7.0) for _ in range(50)]  # where freed memory lay
        assert once.isnan().all() and again.isnan().all()
    assert (once == 2).all() and (again == 4).all() and len(others) == 50
    assert (doubled(x) == 2).all()


def test_what_reads_a_result_earlier_can_ask_for_it() -> None:
    x = torch.ones(2, 3, 4, 4)
    with together(CPU):
        early = doubled(x)
        run_waiting()
        assert (early == 2).all()
        late = doubled(x)
        with at_once():
            assert (late == 2).all() and (doubled(late) == 4).all()
            with together(CPU):
                inner = doubled(x)
                assert inner.isnan().all()
            assert (inner == 2).all()
        last = doubled(x)
        assert last.isnan().all()
    assert (last == 2).all()


def test_a_copy_of_what_a_launch_fills_is_made_after_it() -> None:
    x = torch.ones(2, 3, 4, 4)
    with together(CPU):
        copy = array.contiguous(doubled(x)[:, 1:])
    assert (copy == 2).all()


def test_an_error_drops_them() -> None:
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(ZeroDivisionError), together(CPU):
        dropped = doubled(x)
        raise ZeroDivisionError
    assert dropped.isnan().all()
    assert (doubled(x) == 2).all()


def test_a_launch_that_fails_says_so_and_the_rest_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no such launch")

    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="no such launch"), together(CPU):
        first = doubled(x)
        with monkeypatch.context() as patch:
            patch.setattr(launches.native, "extension", type("Broken", (), {"broken": fails}))
            launches.launch("broken")
        last = doubled(x)
    assert (first == 2).all() and last.isnan().all()
    assert (doubled(x) == 2).all()


def test_another_thread_s_do_not_wait() -> None:
    x, found = torch.ones(2, 3, 4, 4), []
    with together(CPU):
        thread = threading.Thread(target=lambda: found.append(bool((doubled(x) == 2).all())))
        thread.start()
        thread.join()
    assert found == [True]


def test_scratch_is_shared_by_launches_that_wait_and_by_no_others() -> None:
    with together(CPU):
        one, same, other = (scratch(key, list) for key in "aab")
        assert one is same and one is not other
    assert scratch("a", list) is not scratch("a", list)
    with together(CPU):
        assert scratch("a", list) is not one


class OfKernels(torch.nn.Module):
    """An operation of a user's own that reads what a kernel gives it, at once."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(doubled_of(x))


def test_an_operation_of_a_users_own_may_call_kernels() -> None:
    found = []
    for backend in ("reference", "fused"):
        torch.manual_seed(0)
        net = Supernet("s2", channels=2, layers=3, backend=backend)
        net.cells[0].edges[3].operations[1] = OfKernels()
        alphas = net.initial_alphas(1)
        for alpha in alphas.values():
            alpha.requires_grad_()
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        loss = net(images, softmax_weights(alphas), Draws(0)).square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(alphas.values()))])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * (1 + a.abs().max())


def test_no_kernel_is_launched_past_the_queue() -> None:
    sizes = "workspace|Block|edges_together|[a-z]+_buffer|recurrent_workspace"
    calls = [
        (path.name, name)
        for path in Path(str(kernels.__file__)).parent.glob("*.py")
        if path.name != "emulation.py"  # stands for the native functions
        for name in re.findall(r"native\.extension\.(\w+)", path.read_text())
    ]
    assert calls and all(re.fullmatch(sizes, name) for _, name in calls), calls
    taken = [
        path.name
        for path in Path(str(kernels.__file__)).parent.glob("*.py")
        if re.search(r"\.data_ptr\(\)", path.read_text())
    ]
    assert set(taken) == {"array.py", "emulation.py", "recurrent_node.py"}  # the last two no cell's
