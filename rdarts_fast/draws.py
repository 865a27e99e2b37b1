"""Every random number of a run: Philox4x32-10 counters instead of a generator with a state.

A number is a function of (seed, branch, step, pass, site, index) alone, so both devices, any number
of threads and a resumed run draw the same bits:

    key      k0 = low word of the seed, k1 = its high word
    counter  c0 = block (block b holds numbers 4b .. 4b+3), c1 = site, c2 = step,
             c3 = branch << 16 | pass
    uniform  (x >> 8) * 2**-24
    normals  two from each pair (x0, x1), (x2, x3) of a block, by Box-Muller:
             n = (x0 >> 8) + 1,   u = n * 2**-24 in (0, 1]
             u = 2**-e * (1 - s), 1 - s in [sqrt(1/2), sqrt(2))
             r = sqrt(e * 2 ln 2 + s * Q(s)),  Q(s) = -2 ln(1 - s) / s
             v = x1 >> 8,   q = (v + 2**21) >> 22,   f = (v - (q << 22)) * 2**-24 in [-1/8, 1/8)
             z0 = r * cos(q * pi/2 + 2 pi f),   z1 = r * sin(q * pi/2 + 2 pi f)

The polynomials take float32 multiplications and additions only, each rounded once, and the square
root is correctly rounded; hence the same bits in C++, CUDA and the plain torch twin below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rdarts_fast import native

Twin = Callable[[int, "Sequence[int | Tensor]", int, torch.device], Tensor]

# Ranges of sites, in one table so that no two users draw the same numbers. A site of the
# validation batch's augmentation is the training batch's + SITE_STREAM_VALIDATION.
SITE_ALPHAS = 0
SITE_ORDER = 1
SITE_VALIDATION_BATCH = 2
SITE_CROP = 3
SITE_FLIP = 4
SITE_CUTOUT = 5
SITE_SPLIT = 6
SITE_SAMPLE = 7
SITE_LANDSCAPE = 8
SITE_ARCHITECTURE = 9
SITE_STEREO_CROP = 12
SITE_STEREO_SPACE = 13
SITE_STEREO_LIGHT = 14
SITE_STEREO_NOISE = 15
SITE_STREAM_VALIDATION = 16
SITE_NETWORK = 1024

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LARGEST_COUNT = 4 << 32

# Minimax in relative error, rounded to float32; lowest power first. Errors before rounding:
# Q 3e-8 on [1 - sqrt(2), 1 - sqrt(1/2)], sine 4e-9 and cosine 6e-11 on [0, 1/64] (in f * f).
_LOG_Q = (
    2.0,
    0.99999976,
    0.66668373,
    0.5000415,
    0.39913625,
    0.3312469,
    0.299049,
    0.28734544,
    0.1744471,
)
_SINE = (6.2831855, -41.341663, 81.592354, -75.39356)
_COSINE = (1.0, -19.739208, 64.93931, -85.4423, 59.202797)
_TWO_LN2 = 1.3862944
_SQRT_HALF_BITS = 0x3F3504F3
_ONE_BITS = 0x3F800000


@dataclass(frozen=True)
class Draws:
    """The random numbers of one (seed, branch, step, pass); `at` moves to another.

    `branch` counts rollbacks, `step` is the user's clock, `pass_index` counts the forward passes of
    a step. `seed` lies in [0, 2**64), `step` and every `site` in [0, 2**32), `branch` and
    `pass_index` in [0, 2**16); anything else raises ValueError. `part` is (first, whole) where only
    the samples from `first` on of a batch of `whole` are drawn for: they get the numbers that they
    have in the whole batch. `clock` (new_clock, set_clock) adds its step and branch as they are
    when the numbers are drawn: a recorded launch that is replayed draws by it.
    """

    seed: int
    branch: int = 0
    step: int = 0
    pass_index: int = 0
    part: tuple[int, int] | None = None
    clock: Tensor | None = None

    def __post_init__(self) -> None:
        _check_range("seed", self.seed, 64)
        _check_range("branch", self.branch, 16)
        _check_range("step", self.step, 32)
        _check_range("pass_index", self.pass_index, 16)

    def at(self, **changes: Any) -> Draws:
        """Return the draws of another seed, branch, step, pass_index or part."""
        return replace(self, **changes)

    def bits(self, site: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return int64 [count], each uniform over the integers of [0, 2**32)."""
        return self._draw("philox_bits", philox_twin, torch.int64, site, (count,), device)

    def uniform(
        self,
        site: int,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        samples: int | None = None,
    ) -> Tensor:
        """Return float32 [*shape], uniform over the multiples of 2**-24 in [0, 1). `samples` is the
        dimension that counts those of a batch, where there is one.
        """
        return self._draw(
            "philox_uniform", uniform_twin, torch.float32, site, shape, device, samples
        )

    def normal(
        self,
        site: int,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        samples: int | None = None,
    ) -> Tensor:
        """Return float32 [*shape], standard normal; `samples` as in `uniform`."""
        return self._draw("philox_normal", normal_twin, torch.float32, site, shape, device, samples)

    def permutation(self, site: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return int64 [count]: the numbers 0 .. count - 1 in random order."""
        return torch.argsort(self.bits(site, count, device), stable=True)

    def _draw(
        self,
        fill: str,
        twin: Twin,
        dtype: torch.dtype,
        site: int,
        shape: Sequence[int],
        device: torch.device | str,
        samples: int | None = None,
    ) -> Tensor:
        if self.part is not None and samples is not None:
            first, whole = self.part
            count, sizes = shape[samples], list(shape)
            sizes[samples] = whole
            if not 0 <= first <= first + count <= whole:
                raise ValueError(f"part {self.part}: expected room for {count} samples")
            drawn = self.at(part=None)._draw(fill, twin, dtype, site, sizes, device)
            return drawn.narrow(samples, first, count).contiguous()
        _check_range("site", site, 32)
        count, where = math.prod(shape), torch.device(device)
        if not 0 <= count <= _LARGEST_COUNT:
            raise ValueError(f"a draw holds 0 to 2**34 numbers, found {count}")
        counter = (0, site, self.step, self.branch << 16 | self.pass_index)
        if self.clock is not None and self.clock.device != where:
            raise ValueError(f"clock: expected one on {where}, found {self.clock.device}")
        if native.runs_on(where):
            out = torch.empty(tuple(shape), dtype=dtype, device=where)
            return native.filled(fill, out, self.seed, counter, self.clock)
        words: list[int | Tensor] = list(counter)
        if self.clock is not None:
            step, stream = self.clock.long()
            words[2:] = [counter[2] + step & _MASK, counter[3] + stream & _MASK]
        return twin(self.seed, words, count, where).view(tuple(shape))


def new_clock(device: torch.device | str) -> Tensor:
    """Return a clock at step 0 of branch 0: int32 [2], a step and branch << 16, whose bits are
    those of words without a sign.
    """
    return torch.zeros(2, dtype=torch.int32, device=device)


def set_clock(clock: Tensor, step: int, branch: int) -> None:
    """Set a clock; ranges as in Draws."""
    for i, word in enumerate((step, branch << 16)):
        clock[i].fill_(word - (word >> 31 << 32))


def philox_twin(
    seed: int, counter: Sequence[int | Tensor], count: int, device: torch.device
) -> Tensor:
    """Return the first `count` outputs of Philox4x32-10, int64 [count], in plain torch.

    `counter` holds the four words of the first block's counter; tensors are int64 [].
    """
    c0 = counter[0] + torch.arange((count + 3) // 4, dtype=torch.int64, device=device)  # [blocks]
    c1, c2, c3 = (torch.zeros_like(c0) + word for word in counter[1:])
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(_ROUNDS):
        # A product of two words wraps around in int64, which leaves its 64 bits right.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _MASK) ^ c1 ^ k0,
            high & _MASK,
            (low >> 32 & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1).view(-1)[:count]


def uniform_twin(
    seed: int, counter: Sequence[int | Tensor], count: int, device: torch.device
) -> Tensor:
    """Return float32 [count] in [0, 1), in plain torch; arguments as philox_twin."""
    return (philox_twin(seed, counter, count, device) >> 8).float() * 2.0**-24


def normal_twin(
    seed: int, counter: Sequence[int | Tensor], count: int, device: torch.device
) -> Tensor:
    """Return float32 [count], standard normal, in plain torch; arguments as philox_twin."""
    pairs = (count + 3) // 4 * 2
    words = philox_twin(seed, counter, 2 * pairs, device).view(pairs, 2)
    radius = _radius(words[:, 0])
    v = words[:, 1] >> 8
    q = (v + (1 << 21)) >> 22
    f = (v - (q << 22)).float() * 2.0**-24
    f2 = f * f
    sine, cosine = f * _polynomial(_SINE, f2), _polynomial(_COSINE, f2)
    swapped = (q & 1).bool()
    x, y = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    x = torch.where((q + 1 & 2).bool(), -x, x)
    y = torch.where((q & 2).bool(), -y, y)
    return torch.stack((radius * x, radius * y), dim=1).view(-1)[:count]


def _radius(word: Tensor) -> Tensor:
    """Return sqrt(-2 ln(((word >> 8) + 1) * 2**-24)), float32 of word's shape."""
    n = ((word >> 8) + 1).float()
    exponent = (n.view(torch.int32) - _SQRT_HALF_BITS) >> 23
    mantissa = (n.view(torch.int32) - (exponent << 23)).view(torch.float32)
    s = 1.0 - mantissa
    square = (24 - exponent).float() * _TWO_LN2 + s * _polynomial(_LOG_Q, s)
    # torch's float32 sqrt may be one unit off; by way of float64 it is correctly rounded.
    return square.double().sqrt().float()


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _check_range(name: str, value: int, width: int) -> None:
    if not 0 <= value < 1 << width:
        raise ValueError(f"{name} must lie in [0, 2**{width}), found {value}")
