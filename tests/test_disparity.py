"""The disparity network against its description written out by hand."""

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, discretize, one_hot_weights
from rdarts_fast.networks import BACKENDS, softmax_weights
from rdarts_fast.networks.disparity import (
    DisparityNetwork,
    DisparitySettings,
    DisparitySupernet,
)
from rdarts_fast.networks.disparity_cells import DisparityCell
from rdarts_fast.networks.disparity_loss import disparity_sums, multiscale_loss
from rdarts_fast.networks.disparity_operations import OPERATIONS, candidate, normalized_candidate
from rdarts_fast.spaces import OPERATIONS as NAMES
from rdarts_fast.spaces import load_space

SETTINGS = DisparitySettings(channels=2, max_displacement=3)
SMALL = load_space("disparity_small")

# Every operation of the small space in every cell type, every input read.
GENOTYPE = Genotype(
    {
        "normal": (
            (("sep_conv_3x3", 0), ("skip_connect", 1)),
            (("max_pool_3x3", 1), ("skip_connect", 2)),
            (("skip_connect", 3), ("sep_conv_3x3", 0)),
        ),
        "reduce": (
            (("skip_connect", 0), ("max_pool_3x3", 1)),
            (("sep_conv_3x3", 1), ("max_pool_3x3", 2)),
            (("skip_connect", 3), ("sep_conv_3x3", 2)),
        ),
        "upsample": (
            (("max_pool_3x3", 2), ("skip_connect", 3), ("sep_conv_3x3", 0), ("skip_connect", 1)),
            (("skip_connect", 4), ("sep_conv_3x3", 3)),
            (("skip_connect", 5), ("max_pool_3x3", 2)),
        ),
    }
)


def random_views(height: int = 64, width: int = 128, samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (samples, 2, 3, height, width)
    return torch.rand(shape, generator=generator, dtype=torch.float64) - 0.4


def built(kind: type, what, settings: DisparitySettings = SETTINGS, **more):
    torch.manual_seed(0)
    network = kind(what, settings, **more).double()
    with torch.no_grad():  # so that biases and both sides of min(0, x) play a part
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for head in network.heads:
            head.bias.fill_(-3.0)
    return network


def active(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def conv(x: Tensor, module: nn.Module, stride: int = 1) -> Tensor:
    weight, bias = module[0].weight, module[0].bias
    return active(F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2))


def doubled(x: Tensor, module: nn.Module) -> Tensor:
    return active(F.conv_transpose2d(x, module[0].weight, module[0].bias, 2, 1))


def one_operation(name: str, stride: int, x: Tensor, module: nn.Module) -> Tensor:
    if name == "max_pool_3x3":
        return F.max_pool2d(x, 3, stride, 1)
    if name == "skip_connect":
        return x if stride == 1 else conv(x, module, 2)
    parameters = list(module.parameters())
    assert name == "sep_conv_3x3" and len(parameters) == 8
    for stage, step in ((parameters[:4], stride), (parameters[4:], 1)):
        deep, deep_bias, point, point_bias = stage
        x = F.conv2d(x, deep, deep_bias, step, 1, 1, x.shape[1])
        x = active(F.conv2d(x, point, point_bias))
    return x


def nodes_of(cell: DisparityCell, states: list[Tensor]) -> Tensor:
    edges = iter(cell.edges)
    inputs = len(states)
    for node in GENOTYPE.cells[cell.kind]:
        strides = [2 if cell.kind == "reduce" and source < 2 else 1 for _, source in node]
        terms = [
            one_operation(name, stride, states[source], next(edges))
            for (name, source), stride in zip(node, strides, strict=True)
        ]
        states.append(torch.stack(terms).sum(dim=0))
    return torch.cat(states[inputs:], dim=1)


def encoded(cell: DisparityCell, s0: Tensor, s1: Tensor) -> Tensor:
    stride = s0.shape[2] // s1.shape[2]
    states = [conv(s0, cell.preprocess[0], stride), conv(s1, cell.preprocess[1])]
    assert cell.preprocess[0][0].kernel_size == ((3, 3) if stride == 2 else (1, 1))
    return nodes_of(cell, states)


def written_out(network: DisparityNetwork, views: Tensor) -> list[Tensor]:
    """The levels, and the final disparity."""
    per_view = []
    for view in range(2):
        x = conv(conv(views[:, view], network.stem[0], 2), network.stem[1], 2)
        per_view.append((x, encoded(network.features, x, x)))
    (quarter, left), (_, right) = per_view
    w, rows = left.shape[3], []
    for d in range(-3, 4):
        moved = torch.zeros_like(right)
        if d < 0:
            moved[..., -d:] = right[..., : w + d]
        else:
            moved[..., : w - d] = right[..., d:]
        rows.append((left * moved).mean(dim=1))
    s0, s1 = torch.cat([left, right], dim=1), torch.stack(rows, dim=1).clamp(min=0)
    kept = []
    for i, cell in enumerate(network.encoder):
        s0, s1 = s1, encoded(cell, s0, s1)
        if i % 2 == 1:
            kept.append(s1)  # of 1/16, 1/32, 1/64
    predictions = [F.conv2d(s1, network.heads[0].weight, network.heads[0].bias, padding=1)]
    s0 = s1
    for i, features in enumerate((kept[1], kept[0], left, quarter)):
        cell, head = network.decoder[i], network.heads[i + 1]
        before = cell.preprocess[0]
        first = conv(s0, before) if i == 0 else doubled(s0, before)
        enlarged = F.interpolate(
            predictions[-1].clamp(max=0), features.shape[2:], mode="bilinear", align_corners=False
        )
        states = [
            doubled(first, cell.upsample[0]),
            doubled(conv(s1, cell.preprocess[1]), cell.upsample[1]),
            conv(enlarged, cell.preprocess[2]),
            conv(features, cell.preprocess[3]),
        ]
        s0, s1 = s1, nodes_of(cell, states)
        predictions.append(F.conv2d(s1, head.weight, head.bias, padding=1))
    levels = [(-prediction).clamp(min=0) for prediction in predictions]
    size = views.shape[3:]
    final = F.interpolate(levels[-1], size, mode="bilinear", align_corners=False)
    return [tensor.squeeze(1) for tensor in (*levels, final)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_is_the_published_one_written_out(backend: str) -> None:
    network, views = built(DisparityNetwork, GENOTYPE, backend=backend), random_views()
    with torch.no_grad():
        found, expected = network(views), written_out(network, views)
    sizes = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert [tuple(level.shape[1:]) for level in found.levels] == sizes
    for a, b in zip((*found.levels, found.final), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert found.final.std() > 0.01 and any((level == 0).any() for level in found.levels)


def test_a_one_hot_supernet_is_the_discrete_network() -> None:
    """Its parameters, copied to the operations that the genotype keeps."""
    supernet, network = built(DisparitySupernet, SMALL), built(DisparityNetwork, GENOTYPE)
    found = supernet.state_dict()
    cells = dict(network.named_modules())
    state = {}
    for name, own in network.state_dict().items():
        if ".edges." not in name:
            state[name] = found[name]
            continue
        before, after = name.split(".edges.")
        kind, (e, _, rest) = cells[before].kind, after.partition(".")
        source, target, operation = GENOTYPE.edges(kind)[int(e)]
        edge = SMALL.edges_into(kind, target - (4 if kind == "upsample" else 2))[source]
        place = SMALL.cells[kind][edge].index(operation)
        state[name] = found[f"{before}.edges.{edge}.operations.{place}.{rest}"]
        assert state[name].shape == own.shape
    network.load_state_dict(state)
    weights = {
        kind: weight.double() for kind, weight in one_hot_weights(SMALL, GENOTYPE.cells).items()
    }
    with torch.no_grad():
        expected = network(random_views())
        for net in (supernet, supernet.restricted(weights)):
            got = net(random_views(), weights, Draws(0))
            torch.testing.assert_close(got.final, expected.final, rtol=1e-10, atol=1e-10)
            for a, b in zip(got.levels, expected.levels, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_alphas_and_genotypes_have_the_published_sizes() -> None:
    supernet = built(DisparitySupernet, SMALL)
    alphas = supernet.initial_alphas(0)
    shapes = {kind: tuple(alpha.shape) for kind, alpha in alphas.items()}
    assert shapes == {"normal": (9, 3), "reduce": (9, 3), "upsample": (15, 3)}
    assert sum(alpha.numel() for alpha in alphas.values()) == 99
    genotype = discretize(SMALL, alphas)
    assert [len(node) for node in genotype.cells["upsample"]] == [4, 2, 2]
    assert len(genotype.edges("upsample")) == 8
    again, other = supernet.initial_alphas(0), supernet.initial_alphas(1)
    assert all(torch.equal(alphas[kind], again[kind]) for kind in alphas)
    assert not any(torch.equal(alphas[kind], other[kind]) for kind in alphas)


def test_channels_are_the_released_networks() -> None:
    with torch.device("meta"):
        network = DisparityNetwork(GENOTYPE, DisparitySettings(channels=42))
        found = DisparityNetwork(GENOTYPE, DisparitySettings(channels=24, decoders=3))

    def widths(net: DisparityNetwork) -> list[int]:
        cells = (net.features, *net.encoder, *net.decoder)
        return [cell.preprocess[0][0].out_channels for cell in cells]

    assert [module[0].out_channels for module in network.stem] == [64, 128]
    assert widths(network) == [84, 84, 168, 168, 336, 336, 672, 336, 168, 84, 42]
    assert network.encoder[0].preprocess[1][0].in_channels == 81  # of the correlation
    assert widths(found) == [48, 48, 96, 96, 192, 192, 384, 192, 96, 48]


@pytest.mark.parametrize("size", [(70, 100), (64, 65), (33, 200), (5, 3)])
def test_any_size_is_resized_and_the_disparity_rescaled(size: tuple[int, int]) -> None:
    network = built(DisparityNetwork, GENOTYPE)
    views = random_views(*size, samples=1)
    full = [-(-side // 64) * 64 for side in size]
    with torch.no_grad():
        found = network(views)
        larger = F.interpolate(views.flatten(0, 1), full, mode="bilinear", align_corners=False)
        inside = network(larger.unflatten(0, (1, 2)))
    ratio = size[1] / full[1]
    assert found.final.shape == (1, *size)
    for a, b in zip(found.levels, inside.levels, strict=True):
        torch.testing.assert_close(a, ratio * b)
    quarter = ratio * inside.levels[-1].unsqueeze(1)
    expected = F.interpolate(quarter, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.final, expected.squeeze(1))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_keeps_channels_and_halves_at_stride_2(name: str, batch_norm: bool) -> None:
    assert set(OPERATIONS) == set(NAMES)
    make = normalized_candidate if batch_norm else candidate
    for stride in (1, 2):
        x = torch.randn(2, 4, 6, 8)
        module = make(name, 4, stride)
        z = module(x, Draws(0)) if name == "noise" else module(x)
        assert z.shape == (2, 4, 6 // stride, 8 // stride)
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert bool(norms) == (batch_norm and name != "none" and bool(list(module.children())))
        assert all(norm.eps == 1e-3 and not norm.affine for norm in norms)


def test_fresh_weights_are_as_tensorflow_counts_fan_in() -> None:
    torch.manual_seed(0)
    module = candidate("sep_conv_5x5", 64, 1)
    deep, point = module[0], module[1]
    assert deep.weight.std().item() == pytest.approx((2 / (25 * 64)) ** 0.5, rel=0.05)
    assert point.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert not deep.bias.any() and not point.bias.any()


def test_a_fresh_network_predicts_about_what_it_is_told_to() -> None:
    settings = DisparitySettings(channels=4, batch_norm=True, initial_disparity=40.0)
    torch.manual_seed(0)
    network = DisparityNetwork(GENOTYPE, settings)
    with torch.no_grad():
        found = network(random_views().float())
    for level in (*found.levels, found.final):
        assert (level > 0).float().mean() > 0.99 and abs(level.mean() - 40) < 10


def test_drop_path_drops_the_same_edges_of_both_views_and_none_in_eval_mode() -> None:
    supernet = built(DisparitySupernet, SMALL)
    weights = {k: w.detach() for k, w in softmax_weights(supernet.initial_alphas(0)).items()}
    views = random_views()
    views[:, 1] = views[:, 0]
    seen = []
    hook = supernet.features.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        plain = supernet(views, weights, Draws(1))
        supernet.drop_path_prob = 0.5
        dropped = supernet(views, weights, Draws(1))
        again = supernet(views, weights, Draws(1))
        other = supernet(views, weights, Draws(2))
        still = supernet.eval()(views, weights, Draws(1))
    hook.remove()
    assert torch.equal(dropped.final, again.final) and torch.equal(plain.final, still.final)
    assert not torch.equal(dropped.final, other.final)
    assert not torch.equal(dropped.final, plain.final)
    for features in seen:
        assert torch.equal(*features.chunk(2))


def test_the_hessian_over_the_alphas_is_that_of_differences() -> None:
    """Double backward through the whole loss; kinks apart, which a small step does not cross."""
    supernet = built(DisparitySupernet, SMALL)
    views, target = random_views(), torch.full((2, 64, 128), 4.0, dtype=torch.float64)
    alphas = supernet.initial_alphas(0)
    leaves = list(alphas.values())

    def gradient(keep: bool) -> list[Tensor]:
        loss = multiscale_loss(supernet(views, softmax_weights(alphas), Draws(0)), target)
        return list(torch.autograd.grad(loss, leaves, create_graph=keep))

    direction = [torch.randn_like(leaf) for leaf in leaves]
    product = torch.autograd.grad(gradient(True), leaves, direction)
    step, ends = 1e-7, []
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, along in zip(leaves, direction, strict=True):
                leaf.add_(along, alpha=sign * step)
        ends.append(gradient(False))
        with torch.no_grad():
            for leaf, along in zip(leaves, direction, strict=True):
                leaf.add_(along, alpha=-sign * step)
    for exact, up, down in zip(product, *ends, strict=True):
        difference = (up - down) / (2 * step)
        assert (exact - difference).norm() < 1e-4 * exact.norm() and exact.norm() > 0


def loss_by_hand(levels: Sequence[Tensor], final: Tensor, target: Tensor) -> float:
    """Pixel by pixel; every level's size divides the target's."""
    total = 0.0
    weights = [1 / 16, 1 / 16, 1 / 16, 1 / 8, 1 / 4, 1.0]
    for weight, level in zip(weights, [*levels, final], strict=True):
        n, h, w = level.shape
        down, across = target.shape[1] // h, target.shape[2] // w
        errors = []
        for b, i, j in itertools.product(range(n), range(h), range(w)):
            block = target[b, i * down : (i + 1) * down, j * across : (j + 1) * across]
            known = [t.item() for t in block.flatten() if t.isfinite()]
            if known:
                errors.append(abs(level[b, i, j].item() - sum(known) / len(known)))
        total += weight * sum(errors) / len(errors)
    return total


def test_the_loss_is_the_mean_error_of_every_level_over_known_pixels() -> None:
    network = built(DisparityNetwork, GENOTYPE)
    with torch.no_grad():
        found = network(random_views(samples=1))
    target = torch.rand(1, 64, 128, dtype=torch.float64) * 9
    target[:, 5:20, 30:90] = torch.inf
    target[:, 50, 3] = torch.nan
    target[:, :64, :64] = torch.inf  # a whole pixel of the coarsest level
    expected = loss_by_hand(found.levels, found.final, target)
    assert multiscale_loss(found, target).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="level_weights: expected 5 or more, got 2"):
        multiscale_loss(found, target, (1.0, 1.0))


def test_unknown_pixels_have_no_gradient_and_no_loss() -> None:
    network = built(DisparityNetwork, GENOTYPE)
    found = network(random_views(samples=1))
    target = torch.full((1, 64, 128), torch.inf, dtype=torch.float64)
    loss = multiscale_loss(found, target)
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)
    assert disparity_sums(found.final, target).tolist() == [0, 0, 0, 0]


def test_metrics_count_errors_above_one_and_three_pixels() -> None:
    target = torch.tensor([[[5.0, 5.0, 5.0, 5.0, torch.inf, torch.nan, 5.0]]])
    found = torch.tensor([[[5.0, 6.0, 3.5, 9.0, 0.0, 0.0, 8.0]]])
    assert disparity_sums(found, target).tolist() == [5, 0 + 1 + 1.5 + 4 + 3, 3, 1]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: DisparitySupernet("s2"), UserError, "space s2: cells for disparity needed"),
        (lambda: DisparitySupernet(SMALL, backend="cuda"), UserError, 'unknown backend "cuda"'),
        (lambda: DisparitySettings(channels=0), ValueError, "at least 1"),
        (lambda: DisparitySettings(decoders=5), ValueError, "decoders: expected 1 to 4, got 5"),
        (lambda: DisparitySettings(max_displacement=-1), ValueError, "max_displacement"),
        (lambda: DisparitySettings(initial_disparity=-1.0), ValueError, "initial_disparity"),
        (
            lambda: built(DisparityNetwork, GENOTYPE)(random_views()[:, :1]),
            ValueError,
            r"views: expected \[N, 2, 3, H, W\], got shape \(2, 1, 3, 64, 128\)",
        ),
        (
            lambda: built(DisparitySupernet, SMALL)(random_views(), {"normal": torch.ones(9, 3)}),
            ValueError,
            r"weights\['reduce'\]: expected shape \(9, 3\), got None",
        ),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_classifiers_genotype_is_refused() -> None:
    two = {kind: [[("skip_connect", 0), ("skip_connect", 1)]] for kind in ("normal", "reduce")}
    with pytest.raises(UserError, match="cells for disparity needed, has normal, reduce"):
        DisparityNetwork(Genotype(two))
