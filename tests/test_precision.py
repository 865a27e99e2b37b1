"""--precision: what is stored in bfloat16, what that does to gradients, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast import native, training
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.kernels import node_sum
from rdarts_fast.kernels.emulation import emulated_bfloat16
from rdarts_fast.kernels.pool import KINDS, launch_pool_adjoint, launch_pools
from rdarts_fast.networks import narrow, precision, softmax_weights, supernet
from rdarts_fast.networks.precision import BF16, FP32, RULES, TF32, check_precision, torch_precision
from rdarts_fast.networks.supernet import Supernet
from rdarts_fast.random_search import run_random_search
from rdarts_fast.run_dir import Run
from rdarts_fast.search import run_search
from tests.host_cuda import on_host
from tests.small import settings

CPU = torch.device("cpu")


def network(
    space: str, channels: int, layers: int, dtype: torch.dtype = torch.float32, drop: float = 0.0
) -> tuple[Supernet, dict[str, Tensor]]:
    torch.manual_seed(1)
    net = Supernet(space, channels, layers)
    net.drop_path_prob = drop
    alphas = {k: a.detach().to(dtype) for k, a in net.initial_alphas(1).items()}
    return net.to(dtype), {k: a.requires_grad_() for k, a in alphas.items()}


def gradient(
    net: Supernet, alphas: dict[str, Tensor], size: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of the alphas and of the weights."""
    dtype = net.classifier.weight.dtype
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(dtype)
    labels = torch.arange(batch) % 10
    loss = F.cross_entropy(net(images, softmax_weights(alphas), Draws(3)), labels)
    found = torch.autograd.grad(loss, [*alphas.values(), *net.parameters()])
    flat = [g.flatten().double() for g in found]
    return loss.detach(), torch.cat(flat[: len(alphas)]), torch.cat(flat[len(alphas) :])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(("space", "drop"), [("s2", 0.0), ("s4", 0.2)])
def test_gradients_of_bfloat16_are_those_of_float64(
    space: str, drop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, *expected = gradient(*network(space, 16, 8, torch.float64, drop), size=16, batch=16)
    net, alphas = network(space, 16, 8, drop=drop)
    plain, *_ = gradient(net, alphas, size=16, batch=16)
    net.compute(BF16)
    with emulated_bfloat16():
        loss, *found = gradient(net, alphas, size=16, batch=16)
        monkeypatch.setattr(narrow, "rounded", lambda z, *maps: [x.bfloat16() for x in z])
        _, *nearest = gradient(net, alphas, size=16, batch=16)
    assert torch.equal(loss, plain)  # the forward pass is float32's
    assert abs(loss - exact) < 1e-5
    assert cosine(found[0], expected[0]) > 0.9999
    assert cosine(found[1], expected[1]) > 0.9999
    # What keeping to the side of each ReLU's zero is for:
    assert cosine(nearest[0], expected[0]) < cosine(found[0], expected[0])
    assert 1 - cosine(nearest[1], expected[1]) > 5 * (1 - cosine(found[1], expected[1]))


@pytest.mark.parametrize("space", ["s2", "s4"])
def test_lambda_max_is_that_of_float64(space: str) -> None:
    values = []
    for dtype in (torch.float32, torch.float64):
        net, alphas = network(space, 8, 4, dtype)
        net.train()
        if dtype == torch.float32:
            net.compute(BF16)  # the curvature is float32's all the same
        images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        operator = net.hessian_operator(alphas, images, torch.arange(16) % 10, Draws(3))
        values.append(float(torch.linalg.eigvalsh(operator.dense())[-1]))
        assert net.precision == (BF16 if dtype == torch.float32 else FP32)
    assert values[1] > 1e-3
    assert abs(values[0] - values[1]) < 0.02 * values[1]


def test_the_hessian_is_float32_s_whatever_the_precision() -> None:
    found, rounded = [], []
    for name in (FP32, TF32):
        net, alphas = network("s5", 8, 3)  # to 32 channels, whose products tf32 rounds
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with on_host(), torch_precision(name):
            operator = net.hessian_operator(alphas, images, torch.arange(2), Draws(3))
            one = operator @ torch.eye(operator.shape[0])[0]
            found.append((operator.gradient, one, operator.dense()))
            rounded.append(gradient(net, alphas, size=8, batch=2)[1])
    assert all(map(torch.equal, *found))
    assert not torch.equal(*rounded)


@pytest.mark.parametrize("space", ["s2", "s4"])
def test_gradients_of_rounded_products_are_those_of_float64(space: str) -> None:
    """Run by the CUDA kernels on the CPU, whose bodies of tensor cores round what those do."""
    _, *expected = gradient(*network(space, 12, 3, torch.float64), size=8, batch=4)
    for name, least in ((TF32, 0.99999), (BF16, 0.9999)):
        net, alphas = network(space, 12, 3)  # to 48 channels
        net.compute(name)
        with on_host(), torch_precision(name):
            _, *found = gradient(net, alphas, size=8, batch=4)
        for a, b in zip(found, expected, strict=True):
            assert least < cosine(a, b) < 1 - 1e-8  # float32's own error is 1e-12


@pytest.mark.parametrize("space", ["s1", "s4", "darts"])
def test_the_emulation_errs_as_the_gpu_s_kernels_do(space: str) -> None:
    """Run by the CUDA kernels on the CPU: they round gradients between two stages too."""
    errors = []
    for where in (emulated_bfloat16, on_host):
        with where():
            net, alphas = network(space, 4, 3, drop=0.2)
            loss, *expected = gradient(net, alphas, size=8, batch=4)
            net.compute(BF16)
            rounded, *found = gradient(net, alphas, size=8, batch=4)
        assert torch.equal(loss, rounded)
        assert all(cosine(a, b) > 0.999 for a, b in zip(found, expected, strict=True))
        errors.append([float((a - b).norm()) for a, b in zip(found, expected, strict=True)])
    for emulated, real in zip(*errors, strict=True):
        assert 0.5 * real < emulated < 2.0 * real


def test_the_table_is_what_is_stored() -> None:
    net, alphas = network("s2", 8, 3)
    net.compute(BF16)
    saved: list[Tensor] = []
    plan = net.cells[1].plan()  # of a reduction
    with (
        emulated_bfloat16(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        x = [torch.randn(4, 24, 8, 8, requires_grad=True), *torch.randn(4, 4, 8, 8, 8)]
        nodes = net.cells[1]([x[0]], x[1:], softmax_weights(alphas)["reduce"], Draws(1), 0.0)
        g = torch.autograd.grad(sum(n.sum() for n in nodes), [x[0], *net.cells[1].parameters()])
    images = [x for x in saved if x.dim() == 4 and x.shape[0] == 4 and x.shape[2] > 1]
    assert len(images) > 20
    assert {x.dtype for x in images} == {RULES["kept"].dtype}
    assert {x.dtype for x in [*nodes, *g]} == {RULES["forward"].dtype, RULES["optimisers"].dtype}
    (statistics,) = [x for x in saved if x.dim() == 3 and x.shape[:2] == (2, plan.rows)]
    assert statistics.dtype == RULES["statistics"].dtype


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_says_why(rule: str) -> None:
    assert RULES[rule].what and RULES[rule].why
    assert (RULES[rule].dtype == torch.bfloat16) == (rule in ("kept", "gradients"))


def test_operations_without_kernels_have_gradients() -> None:
    """Among those of bfloat16, theirs are float32."""

    def with_module() -> tuple[Supernet, dict[str, Tensor]]:
        net, alphas = network("s2", 4, 3)
        own = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Conv2d(4, 4, 1))
        net.cells[0].edges[3].operations[1] = own  # the first cell's channels are 4
        return net, alphas

    _, *expected = gradient(*with_module(), size=8, batch=8)
    net, alphas = with_module()
    net.compute(BF16)
    with emulated_bfloat16():
        _, *found = gradient(net, alphas, size=8, batch=8)
    assert len(net.cells[0].plan().sources[1].singles) == 1
    assert all(cosine(a, b) > 0.999 for a, b in zip(found, expected, strict=True))


def test_there_are_no_second_derivatives() -> None:
    net, alphas = network("s2", 4, 3)
    net.compute(BF16)
    loss = net(torch.randn(4, 3, 8, 8), softmax_weights(alphas), Draws(1)).sum()
    with emulated_bfloat16(), pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, list(alphas.values()), create_graph=True)


def test_emulation_ends_with_its_block() -> None:
    x = [torch.randn(2, 4, 6, 6).bfloat16()]
    before = native.extension
    with emulated_bfloat16():
        out = node_sum(x, torch.full((1, 4), 3.0))
        assert native.has_bfloat16(CPU)
    assert torch.equal(out, (3 * x[0].float()).bfloat16())
    assert native.extension is before and not native.has_bfloat16(CPU)
    with pytest.raises(ValueError, match="bfloat16"):
        node_sum(x, torch.ones(1, 4))


def test_emulated_pools() -> None:
    x = torch.randn(2, 4, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    with emulated_bfloat16():
        (most, mean), place, _ = launch_pools(x, 2, KINDS)
        back = launch_pool_adjoint([most, None], 2, KINDS, (6, 6), place)
    assert torch.equal(most, F.max_pool2d(x.float(), 3, 2, 1).bfloat16())
    expected = F.avg_pool2d(x.float(), 3, 2, 1, count_include_pad=False)
    assert (mean.float() - expected).abs().max() <= 2.0**-8 * expected.abs().max()
    assert back.shape == x.shape and back.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "backend", "text"),
    [
        (TF32, "fused", "tf32: only GPUs have it"),
        (TF32, "torch", "tf32: only GPUs have it"),
        (BF16, "fused", "the CPU's kernels have no bfloat16"),
        (BF16, "reference", "the reference backend has no rules"),
    ],
)
def test_what_the_cpu_does_not_have_is_refused(name: str, backend: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_precision(name, CPU, backend)
    check_precision(FP32, CPU, backend)
    check_precision(BF16, CPU, "torch")  # autocast


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    with pytest.raises(UserError, match=r"tf32: needs .* 8\.0 or more, Old has 7\.5"):
        check_precision(TF32, torch.device("cuda"), "fused")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_precision(TF32, torch.device("cuda"), "fused")


def test_torch_s_settings_hold_inside() -> None:
    def now() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic

    before = now()
    for name, allowed in ((FP32, False), (TF32, True), (BF16, False)):
        with precision.torch_precision(name):
            assert now() == (allowed, allowed, True)
            inside = precision.in_float32(now)()
            assert inside == (False, False, True)
            assert now() == (allowed, allowed, True)
        assert now() == before


def test_a_network_without_it_says_so() -> None:
    net = Supernet("s2", 2, 3, backend="reference")
    with pytest.raises(UserError, match="reference backend"):
        net.compute(BF16)
    with pytest.raises(UserError, match=r'unknown precision "half"'):
        net.compute("half")
    net.has = ()
    with pytest.raises(UserError, match="--precision bf16: not for the space s2"):
        net.compute(BF16)


@pytest.mark.parametrize("order", ["first", "second"])
def test_a_search_in_bfloat16(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """All passes but second order's virtual step."""
    seen: list[tuple[bool, bool]] = []
    original = supernet.fused_cell

    def spied(*given: Any, **ways: bool) -> list[Tensor]:
        seen.append((torch.is_grad_enabled(), ways["narrow"]))
        return original(*given, **ways)

    monkeypatch.setattr(supernet, "fused_cell", spied)
    with emulated_bfloat16():
        made = settings(tmp_path, precision="bf16", order=order, curvature="lambda", space="s2")
        run = run_search(**made, epoch_steps=2)
    assert run.environment["precision"] == "bf16"
    assert ", bf16, 1 threads" in capsys.readouterr().out
    passes = [narrow for recorded, narrow in seen if recorded][::3]  # three cells
    a_step = [True, True] if order == "first" else [False, True, True, True, True]
    assert passes == 6 * a_step
    assert [record["epoch"] for record in run.metrics if "lambda_max" in record] == [0, 2]


def test_a_search_in_tf32_leaves_the_virtual_step_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    original = supernet.fused_cell

    def spied(*given: Any, **ways: bool) -> list[Tensor]:
        if torch.is_grad_enabled():
            seen.append(torch.backends.cuda.matmul.allow_tf32)
        return original(*given, **ways)

    monkeypatch.setattr(supernet, "fused_cell", spied)
    monkeypatch.setattr(training, "check_precision", lambda *given: None)  # here is no GPU
    made = settings(tmp_path, precision="tf32", order="second", space="s2", epochs=1)
    run_search(**made, epoch_steps=2)
    assert seen[::3] == 2 * [False, True, True, True, True]  # three cells


def test_a_random_search_in_bfloat16(tmp_path: Path) -> None:
    names = ("alpha_learning_rate",)
    made = {k: v for k, v in settings(tmp_path).items() if k not in names}
    made |= {"precision": "bf16", "epochs": 2, "samples": 3, "finalists": 2}
    with emulated_bfloat16():
        run = run_random_search(**made)
    assert run.environment["precision"] == "bf16" and run.result is not None
    with pytest.raises(UserError, match="no bfloat16"):
        run_random_search(**made | {"out": tmp_path / "other"})
    assert not (tmp_path / "other").exists()
    assert Run.read(run.folder).config["precision"] == "bf16"


def test_exact_second_order_keeps_to_float32(tmp_path: Path) -> None:
    """What is differentiated twice."""
    made = settings(tmp_path, space="s2", implicit="exact", epochs=1, epoch_steps=1)
    with emulated_bfloat16():
        assert run_search(**made, precision="bf16").result is not None
