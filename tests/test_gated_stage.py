"""The stages on tangents against plain torch."""

import pytest
import torch
from torch import Tensor

from rdarts_fast.kernels.gated_stage import Tangents, gated_stage, gated_stage_twin
from rdarts_fast.kernels.sep_stage import Geometry
from tests.conftest import device_of
from tests.tolerances import assert_equal

GEOMETRIES = [Geometry(3, 1, 1), Geometry(3, 1, 2), Geometry(5, 2, 1), Geometry(7, 1, 2)]


def operands(
    shape: tuple[int, int, int, int],
    out: int,
    directions: int,
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    maps: bool = True,
    device: str = "cpu",
) -> tuple[Tangents, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    c = shape[1]
    dx = [normal(*shape).contiguous(memory_format=torch.channels_last) for _ in range(directions)]
    gate = normal(*shape).contiguous(memory_format=torch.channels_last)
    rows = [normal(directions, c) for _ in range(3)] if maps else [None] * 3
    k = geometry.kernel
    return Tangents(dx, gate, *rows), normal(c, 1, k, k), normal(out, c, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [(16, 16), (5, 3), (1, 1), (24, 40)])
def test_it_equals_the_twin(
    dtype: torch.dtype, geometry: Geometry, channels: tuple[int, int], backend: str
) -> None:
    for maps in (False, True):
        c, out = channels
        device = device_of(backend)
        given = operands((2, c, 7, 9), out, 3, geometry, dtype, maps=maps, device=device)
        dz = gated_stage(*given, geometry)
        assert dz.is_contiguous(memory_format=torch.channels_last)
        assert_equal(dz, gated_stage_twin(*given, geometry), dtype)


def test_more_directions_than_a_launch_takes() -> None:
    geometry = Geometry(3, 1, 1)
    given = operands((1, 4, 3, 3), 4, 70, geometry, torch.float64)
    expected = gated_stage_twin(*given, geometry)
    assert_equal(gated_stage(*given, geometry), expected, torch.float64)


def test_bad_input() -> None:
    geometry = Geometry(3, 1, 1)
    good, depthwise, pointwise = operands((2, 4, 3, 3), 5, 3, geometry, torch.float64)
    assert good.scale is not None
    for tangents, message in (
        (good._replace(dx=[]), "dx: expected at least one direction"),
        (good._replace(dx=[x[:1] for x in good.dx]), r"dx\[0\]"),
        (good._replace(scale=good.scale[:2]), "scale"),
        (good._replace(shift=None), "scale, by_gate, shift: expected all or none"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_stage(tangents, depthwise, pointwise, geometry)
    with pytest.raises(TypeError, match=r"dx\[0\]"):
        gated_stage(good._replace(dx=[x.float() for x in good.dx]), depthwise, pointwise, geometry)
    for weights, message in (
        ((depthwise[:3], pointwise), "depthwise: expected shape"),
        ((depthwise, pointwise[:, :3]), "pointwise: expected shape"),
        ((depthwise.float(), pointwise), "depthwise: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_stage(good, *weights, geometry)
    with pytest.raises(ValueError, match="depthwise: expected shape"):
        gated_stage(good, depthwise, pointwise, Geometry(5, 1, 1))


def test_a_gate_of_zero_is_shut() -> None:
    geometry = Geometry(3, 1, 1)
    tangents, depthwise, pointwise = operands((1, 4, 3, 3), 4, 2, geometry, torch.float64)
    shut = tangents._replace(gate=torch.zeros_like(tangents.gate))
    assert gated_stage(tangents, depthwise, pointwise, geometry).any()
    assert not gated_stage(shut, depthwise, pointwise, geometry).any()


def test_the_bits_do_not_depend_on_the_threads() -> None:
    geometry = Geometry(3, 1, 1)
    given = operands((5, 16, 8, 8), 16, 4, geometry, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gated_stage(*given, geometry))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
