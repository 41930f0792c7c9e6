"""Checks of chapter 4's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.book import fp8_slips as slips
from dsv3.book.exercise import Verdict, judge, judge_statements, judge_value


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Exercise 1


def decode(answer: Callable) -> Verdict:
    """An E4M3 code, 0 to 255 -> its number."""

    def wrong(**how) -> Callable:
        return lambda code: slips.decoded(code, **how)

    return judge(
        "decode",
        answer,
        slips.decoded,
        [(code,) for code in range(256)],
        {
            "exponent bits 0 are subnormal: the leading 1 is missing there": wrong(
                subnormals="normal"
            ),
            "subnormals have the power of the smallest normal numbers, 2^-6, not 2^-7": wrong(
                subnormals="lower"
            ),
            "0x7F and 0xFF are NaN, not 480": wrong(nan=False),
            "the sign bit is not used": wrong(sign=False),
            "the exponent is counted from -8 as if the bias were 8; it is 7": wrong(bias=8),
            "the exponent bits are counted from -7: take 7 off": wrong(bias=0),
            "there is no infinity: 0x7F and 0xFF are NaN": wrong(infinity=True),
            "normal numbers have a leading 1: 1 + mantissa / 8": wrong(leading=0),
            "the powers of two alone: the mantissa is missing": wrong(mantissas=False),
        },
        tolerance=0.0,
        praise="equal for all 256 codes",
    )


# Exercise 2


def _shown_zeros(scales: Callable) -> Callable:
    """A scale of 0 made to show beside one of 1e-12, which is as good as equal."""

    def marked(x: Tensor):
        found = scales(x)
        return torch.where(found == 0, torch.nan, found) if isinstance(found, Tensor) else found

    return marked


def tile_scales(answer: Callable) -> Verdict:
    """x (tokens, channels) -> scales (tokens, tiles)."""
    zeros = 500 * _random(4, 384, seed=3)
    zeros[1, 128:256] = 0
    negative = -500 * _random(3, 300, seed=1).abs()
    cases = [(500 * _random(5, 256),), (negative,), (zeros,), (5e4 * _random(2, 60, seed=2),)]

    def wrong(**how) -> Callable:
        return _shown_zeros(lambda x: slips.tile_scales(x, **how))

    @_shown_zeros
    def inverse(x: Tensor) -> Tensor:
        return 1 / slips.tile_scales(x)

    def whole_row(x: Tensor) -> Tensor:
        scale = (x.abs().amax(1, keepdim=True) / 448).clamp(1e-12)
        return scale.expand(-1, -(-x.shape[1] // 128))

    def whole_tensor(x: Tensor) -> Tensor:
        scale = (x.abs().max() / 448).clamp(1e-12)
        return scale.expand(x.shape[0], -(-x.shape[1] // 128))

    return judge(
        "tile_scales",
        _shown_zeros(answer) if callable(answer) else answer,
        _shown_zeros(slips.tile_scales),
        cases,
        {
            "the largest magnitude counts: take abs() before the maximum": wrong(absolute=False),
            "these are the largest magnitudes; divide them by 448": wrong(largest=1.0, floor=1e-12),
            "240 is the largest of another kind of E4M3 (with infinities); here it is 448": wrong(
                largest=240.0
            ),
            "a tile of zeros needs a scale above 0, 1e-12": wrong(floor=0.0),
            "that is 448 / amax; the scale is what codes are multiplied by, amax / 448": inverse,
            "that is one scale for a whole token; a tile has 128 channels": _shown_zeros(whole_row),
            "that is one scale for the whole tensor": _shown_zeros(whole_tensor),
        },
        tolerance=1e-5,
        praise="equal on all inputs, a tile of zeros and ragged tiles among them",
    )


# Exercise 3


def fp8_claims(answer: dict[str, bool | None]) -> Verdict:
    """Eight statements about FP8."""
    reasons = {
        "one channel 1000 times larger ruins the others in E4M3": (
            False,
            "they move down by ten powers of two, and E4M3 has fifteen with full precision",
        ),
        "weight_scale_inv multiplies the code": (
            True,
            "it is max|w| / 448, whatever its name says",
        ),
        "casting FP8 weights to BF16 brings back what rounding took": (
            False,
            "there are only as many values afterwards as there were codes",
        ),
        "Hopper sums all FP8 products of a dot product in FP32": (
            False,
            "the tensor core adds with about 14 bits; only what leaves it every 128 products is "
            "added in FP32",
        ),
        "V3 keeps its embedding and its router in FP8": (
            False,
            "embedding, head, router, norms and the core of attention have more bits",
        ),
        "fprop and dgrad can use the same codes of W": (
            True,
            "a square block that is transposed keeps its largest value, its scale and its codes",
        ),
        "E5M2 has more numbers between 1 and 2 than E4M3": (
            False,
            "two mantissa bits make four numbers, three make eight",
        ),
        "re-tiling with power-of-two scales keeps the mantissas": (
            True,
            "only the exponent changes, as long as nothing falls below the smallest step",
        ),
    }
    return judge_statements(
        "fp8_claims",
        answer,
        {statement: truth for statement, (truth, _) in reasons.items()},
        {statement: why for statement, (_, why) in reasons.items()},
    )


# Exercise 4


def underflow(answer: float | None) -> Verdict:
    """Smallest n for which an outlier 2^n turns more than half of the others into 0."""
    return judge_value(
        "underflow",
        answer,
        19,
        {
            18: "close: a number becomes 0 below half of the smallest step, 2^-10, not below 2^-9; "
            "at 18 it is 43% of them",
            20: "close: is that the first n with more than half, or the first at which you looked?",
            10: "at 1000 times next to nothing is lost: they move down by ten powers of two, and "
            "E4M3 has them",
            14: "that is where the damage begins: 3% become 0; half of them take longer",
            15: "there 6% become 0, and the others are rounded badly; half of them take longer",
            16: "there a ninth become 0; half of them take longer",
            17: "there less than a quarter become 0; half of them take longer",
            2**19: "that is the outlier; n is its exponent",
        },
        tolerance=1e-9,
        praise="19: half a step of 2^19 / 448 is 1.14, and three quarters of them are smaller",
    )


# Exercise 5


def suspect_product(x: Tensor, w: Tensor) -> Tensor:
    """What exercise 5 is about. Don't look: call it."""
    m, k = x.shape
    n = w.shape[0]
    blocks = -(-k // 128)
    x_tiles = F.pad(x, (0, -k % 128)).view(m, blocks, 128)
    w_blocks = F.pad(w, (0, -k % 128, 0, -n % 128)).view(-1, 128, blocks, 128)
    sx = (x_tiles.abs().amax(-1) / 448).clamp(1e-12)
    sw = (w_blocks.abs().amax((1, 3)) / 448).clamp(1e-12)
    cx = slips.e4m3(x_tiles / sx[..., None])
    cw = slips.e4m3(w_blocks / sw[:, None, :, None]).flatten(0, 1)[:n]
    y = torch.zeros(m, n)
    for b in range(blocks):
        y += cx[:, b] @ cw[:, b].T * sx[:, :1] * sw[:, b].repeat_interleave(128)[:n]
    return y


def wrong_line(answer: float | None) -> Verdict:
    """The line of suspect_product that is wrong."""
    return judge_value(
        "wrong_line",
        answer,
        5,
        {
            1: "with one block along K the result is right, whatever x is: its scales are made "
            "as they should be",
            2: "with one block along K the result is right, whatever w is: its scales are made "
            "as they should be",
            3: "rounding errors are a few percent; what you see is off by factors",
            4: "with all values 1 the sum of two blocks is right, so products are added up",
            6: "multiply the second half of w's columns by 8: the result is as it should be. Now "
            "do the same with x",
            7: "with all values 1 both parts arrive; one that was lost would halve the result",
        },
        tolerance=1e-9,
        praise="line 5: it takes the scale of x's first tile for every block, which is right "
        "for K = 128",
    )


# Exercise 6


def mx_blocks(answer: Callable) -> Verdict:
    """x (rows, columns) -> its values after MXFP8."""
    zeros = _random(3, 100, seed=6)
    zeros[1] = 0
    # Largest values that fit, that saturate (1.9 is 486 of 512) and a power of two; and neighbours
    # down in the subnormals, where scales that differ by a power of two can be told apart.
    deep = _random(3, 64, seed=5) * 2.0 ** (-0.6 * (torch.arange(64) % 32))
    deep = deep.clamp(-0.9, 0.9)
    deep[:, 2] = deep[:, 40] = torch.tensor([1.3, 1.9, 1.0])

    def wrong(**how) -> Callable:
        return lambda x: slips.mx_blocks(x, **how)

    return judge(
        "mx_blocks",
        answer,
        slips.mx_blocks,
        [(deep,), (zeros,), (_random(2, 256, seed=7) * torch.tensor([[1e-3], [100.0]]),)],
        {
            "blocks of MXFP8 are 32 wide, not 128": wrong(width=128),
            "that is V3's scale, amax / 448; here it is a power of two": wrong(rounding="none"),
            "that is ue8m0 as V3.1 has it, the power of two above amax / 448; the standard takes "
            "the floor of log2(amax), less 8": wrong(rounding="v3"),
            "the floor of the logarithm is asked for, and this is the ceiling": wrong(
                rounding="ceil"
            ),
            "take 8 off the exponent: 2^8 is the largest power of two in E4M3": wrong(shift=7),
            "what is beyond 448 must saturate; clamp before the cast": wrong(saturate=False),
        },
        tolerance=1e-6,
        praise="equal on all inputs, a block of zeros and saturating values among them",
    )


# Exercise 7


def scale_kernel(answer: Callable) -> Verdict:
    """A Triton kernel: x (tokens, cols) -> scales (tokens, tiles)."""

    def launched(x: Tensor) -> Tensor | None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tiles = -(-x.shape[1] // 128)
        out = torch.full((x.shape[0], tiles), torch.nan, device=device)
        # Behind the last row lie other numbers, as in a GPU's memory.
        room = torch.full((x.numel() + 128,), 1e6, device=device)
        room[: x.numel()] = x.flatten()
        answer[(x.shape[0], tiles)](room, out, x.shape[1], BLOCK=128)
        return None if out.isnan().all() else out.cpu() * 448

    def spec(**how) -> Callable:
        return lambda x: 448 * slips.tile_scales(x, floor=-math.inf, **how)

    def unmasked(x: Tensor) -> Tensor:
        """Each tile reads on into the next row, or behind the last."""
        room = torch.cat([x.flatten(), torch.full((128,), 1e6)])
        starts = [
            [row * x.shape[1] + 128 * t for t in range(-(-x.shape[1] // 128))]
            for row in range(len(x))
        ]
        return torch.tensor([[float(room[s : s + 128].abs().max()) for s in row] for row in starts])

    return judge(
        "scale_kernel",
        launched if hasattr(answer, "run") or hasattr(answer, "fn") else answer,
        spec(),
        [(_random(3, 256),), (-_random(5, 300, seed=1).abs(),), (_random(2, 60, seed=2),)],
        {
            "the largest magnitude counts: tl.abs before tl.max": spec(absolute=False),
            "these are the largest magnitudes; divide by 448": spec(largest=1.0),
            "the last tile reads on into the next row: mask the load where the column is not "
            "below cols": unmasked,
            "all programs of a token read its first tile; add program_id(1) * BLOCK to the "
            "columns": lambda x: spec()(x)[:, :1].expand(-1, -(-x.shape[1] // 128)),
            "all programs read the first token; add program_id(0) * cols": lambda x: spec()(x)[
                :1
            ].expand(len(x), -1),
        },
        tolerance=1e-6,
        praise="equal on all inputs, with ragged tiles",
    )


# Exercise 8


def rebuild(answer: Callable) -> Verdict:
    """x (M, K), w (N, K) -> x w^T by FP8."""
    uneven = _random(7, 300, seed=1) * torch.exp(4 * _random(7, 1, seed=2))
    uneven[:, 150:] *= 64
    rows = _random(200, 300, seed=3) * 0.05
    rows[130:] *= 30
    rows[:, :128] *= 20
    x, w = _random(5, 256, seed=4), _random(256, 256, seed=5) * 0.1
    w[:128] *= 8  # scales differ along both axes, so that a transposed grid shows
    cases = [(x, w), (uneven, rows)]

    def wrong(**how) -> Callable:
        return lambda x, w: slips.by_blocks(x, w, **how)

    def only_first(x: Tensor, w: Tensor) -> Tensor:
        whole = x.shape[1] // 128 * 128
        return slips.by_blocks(x[:, :whole], w[:, :whole])

    return judge(
        "rebuild",
        answer,
        slips.by_blocks,
        cases,
        {
            "scales multiply; you divide by both": wrong(
                x_scale=lambda s: 1 / s, w_scale=lambda s: 1 / s
            ),
            "the scales of x divide; they should multiply": wrong(x_scale=lambda s: 1 / s),
            "the scales of w divide; they should multiply": wrong(w_scale=lambda s: 1 / s),
            "the scales of x are missing from the sum": wrong(x_scale=torch.ones_like),
            "the scales of w are missing from the sum": wrong(w_scale=torch.ones_like),
            "no scales in the sum at all": wrong(x_scale=torch.ones_like, w_scale=torch.ones_like),
            "that is one scale for the whole of x": wrong(x_group=(0, 0)),
            "that is one scale for the whole of x, and one for the whole of w": wrong(
                x_group=(0, 0), w_group=(0, 0)
            ),
            "w has a scale for each row and 128 columns; blocks are 128 x 128": wrong(
                w_group=(1, 128)
            ),
            "that is one scale for the whole of w": wrong(w_group=(0, 0)),
            "x is grouped in blocks of 128 x 128; tiles are 1 x 128": wrong(x_group=(128, 128)),
            "tiles of x run along K: 1 x 128, not 128 x 1": wrong(x_group=(128, 1)),
            "nothing is rounded: the product of x and w is exact": lambda x, w: x @ w.T,
            "the last block along K is dropped when it is not full": only_first,
        },
        tolerance=2e-3,
        praise="a block-scaled product, from memory",
    )
