"""Kernels for an NVIDIA GPU, written in Triton; who calls them states shapes and meaning (rotary.py, gating.py, residual.py,
adapted.py, fp8.py and quantised.py beside it).

Importing this raises ImportError where triton is missing, as in torch's builds for CPUs and for Windows.
"""

# A kernel's arguments are pointers and numbers, which Triton types itself; constants are in capitals, as it wants them.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0913, PLR0917

import triton
import triton.language as tl


def cdiv(count: int, size: int) -> int:
    """How many programs of `size` cover `count`."""
    return -(-count // size)


def power_of_two(size: int) -> int:
    """The least one that is not below `size`: a block's length."""
    return 1 << (size - 1).bit_length()


@triton.jit(do_not_specialize=["rows", "all_rows"])
def join(
    q, k, q_text, k_text, q_weight, k_weight, cos, sin, q_joint, k_joint,
    rows, all_rows, eps, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A row is a head of a token: of a sample, `rows` visual ones, then the text's up to `all_rows`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    sample = tl.program_id(1).to(tl.int64)
    column, half = tl.arange(0, SIZE)[None, :], tl.arange(0, SIZE // 2)[None, :]
    visual, text = row < rows, (row >= rows) & (row < all_rows)
    seen = (sample * rows + row) * SIZE + column
    told = (sample * (all_rows - rows) + row - rows) * SIZE + column
    joint = (sample * all_rows + row) * SIZE + column
    angle = row.to(tl.int64) * (SIZE // 2) + half
    c, s = tl.load(cos + angle, visual, 0.0), tl.load(sin + angle, visual, 0.0)
    x = _turned(_normed(q, seen, visual, q_weight + column, eps, SIZE), c, s, ROWS, SIZE).to(q_joint.dtype.element_ty)
    tl.store(q_joint + joint, tl.where(visual, x, tl.load(q_text + told, text, 0.0)), row < all_rows)
    x = _turned(_normed(k, seen, visual, k_weight + column, eps, SIZE), c, s, ROWS, SIZE).to(k_joint.dtype.element_ty)
    tl.store(k_joint + joint, tl.where(visual, x, tl.load(k_text + told, text, 0.0)), row < all_rows)


@triton.jit(do_not_specialize=["rows", "all_rows"])
def part(
    q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, dq, dk,
    rows, all_rows, eps, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The way back: turned by the opposite angle, then the norm's gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    sample = tl.program_id(1).to(tl.int64)
    column, half = tl.arange(0, SIZE)[None, :], tl.arange(0, SIZE // 2)[None, :]
    visual = row < rows
    seen = (sample * rows + row) * SIZE + column
    joint = (sample * all_rows + row) * SIZE + column
    angle = row.to(tl.int64) * (SIZE // 2) + half
    c, s = tl.load(cos + angle, visual, 0.0), -tl.load(sin + angle, visual, 0.0)
    grad = _turned(tl.load(q_grad + joint, visual, 0.0).to(tl.float32), c, s, ROWS, SIZE)
    tl.store(dq + seen, _norm_gradient(grad, q, seen, visual, q_weight + column, eps, SIZE), visual)
    grad = _turned(tl.load(k_grad + joint, visual, 0.0).to(tl.float32), c, s, ROWS, SIZE)
    tl.store(dk + seen, _norm_gradient(grad, k, seen, visual, k_weight + column, eps, SIZE), visual)


@triton.jit
def _normed(source, places, visual, weight, eps, SIZE: tl.constexpr):
    """RMS norm over a head, rounded to the source's dtype as the formula does before it turns; float32."""
    x = tl.load(source + places, visual, 0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None] * tl.load(weight).to(tl.float32)
    return x.to(source.dtype.element_ty).to(tl.float32)


@triton.jit
def _norm_gradient(grad, source, places, visual, weight, eps, SIZE: tl.constexpr):
    """Gradient of x for y = x r w with r = rsqrt(mean x^2 + eps): r (g w - x r^2 mean(g w x))."""
    x = tl.load(source + places, visual, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)[:, None]
    grad = grad * tl.load(weight).to(tl.float32)
    along = (tl.sum(grad * x, axis=1) / SIZE)[:, None]
    return scale * (grad - x * scale * scale * along)


@triton.jit
def _turned(x, cos, sin, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Pairs of x [ROWS, SIZE] turned by the angles whose cos and sin [ROWS, SIZE / 2] are given."""
    even, odd = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, SIZE))


@triton.jit
def gate_codes(hidden, codes, scales, size, BLOCK: tl.constexpr):
    """A row's gate in float32, as a scale and e4m3 codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    first = tl.load(hidden + row * 2 * size + column, column < size, 0.0).to(tl.float32)
    second = tl.load(hidden + row * 2 * size + size + column, column < size, 0.0).to(tl.float32)
    value = first * second * tl.sigmoid(second)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(codes + row * size + column, (value * (1.0 / scale)).to(codes.dtype.element_ty), column < size)


@triton.jit
def gate_gradient(gradient, hidden, result, size, BLOCK: tl.constexpr):
    """A row's two halves at once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    first, second = _halves(gradient, hidden, row, column, size)
    tl.store(result + row * 2 * size + column, first, column < size)
    tl.store(result + row * 2 * size + size + column, second, column < size)


@triton.jit
def gate_gradient_codes(gradient, hidden, factors, codes, scales, size, BLOCK: tl.constexpr):
    """The same times factors, as a scale for the row and e4m3 codes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    first, second = _halves(gradient, hidden, row, column, size)
    first = first * tl.load(factors + column, column < size, 0.0)
    second = second * tl.load(factors + size + column, column < size, 0.0)
    top = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
    scale = tl.maximum(top, 1e-12) / 448.0
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    tl.store(codes + row * 2 * size + column, (first * inverse).to(codes.dtype.element_ty), column < size)
    tl.store(codes + row * 2 * size + size + column, (second * inverse).to(codes.dtype.element_ty), column < size)


@triton.jit
def row_codes(values, factors, codes, scales, size, FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    """A row, with FACTORS times those, as a scale and e4m3 codes; read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(values + row * size + column, column < size, 0.0).to(tl.float32)
    if FACTORS:
        value = value * tl.load(factors + column, column < size, 0.0)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(codes + row * size + column, (value * (1.0 / scale)).to(codes.dtype.element_ty), column < size)


@triton.jit
def _halves(gradient, hidden, row, column, size):
    """Gradients of a row's first and second half in float32."""
    first = tl.load(hidden + row * 2 * size + column, column < size, 0.0).to(tl.float32)
    second = tl.load(hidden + row * 2 * size + size + column, column < size, 0.0).to(tl.float32)
    above = tl.load(gradient + row * size + column, column < size, 0.0).to(tl.float32)
    share = tl.sigmoid(second)
    return above * second * share, above * first * share * (1.0 + second * (1.0 - share))


@triton.jit(do_not_specialize=["rows"])
def residual_norm(
    x, y, gate, factor, total, normed, codes, scales,
    rows, size, eps, ADD: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token: with ADD its sum with the gated norm of y, with NORM the scaled norm of that, with CODES as e4m3 too.

    `rows` tokens a sample share a row of `gate` and `factor`. Rounded where the formula rounds.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there, places, shared = column < size, row * size + column, (row // rows) * size + column
    value = tl.load(x + places, there, 0.0).to(tl.float32)
    if ADD:
        other = tl.load(y + places, there, 0.0).to(tl.float32)
        other = other * tl.rsqrt(tl.sum(other * other, axis=0) / size + eps) * tl.load(gate + shared, there, 0.0)
        rounded = (value + other.to(x.dtype.element_ty).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + places, rounded, there)
        value = rounded.to(tl.float32)
    if NORM:
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / size + eps) * tl.load(factor + shared, there, 0.0)
        rounded = value.to(x.dtype.element_ty)
        tl.store(normed + places, rounded, there)
        if CODES:
            value = rounded.to(tl.float32)
            scale = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
            tl.store(scales + row, scale)
            tl.store(codes + places, (value * (1.0 / scale)).to(codes.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_gradient(
    above, normed_above, total, y, gate, factor, dx, dy,
    rows, size, eps, ADD: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of `total` and `normed` those of x, with NORM, and of y, with ADD."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there, places, shared = column < size, row * size + column, (row // rows) * size + column
    grad = tl.load(above + places, there, 0.0).to(tl.float32)
    if NORM:
        upper = tl.load(normed_above + places, there, 0.0).to(tl.float32) * tl.load(factor + shared, there, 0.0)
        grad += _row_norm_gradient(upper, tl.load(total + places, there, 0.0).to(tl.float32), size, eps)
        tl.store(dx + places, grad, there)
    if ADD:
        grad = grad * tl.load(gate + shared, there, 0.0)
        tl.store(dy + places, _row_norm_gradient(grad, tl.load(y + places, there, 0.0).to(tl.float32), size, eps), there)


@triton.jit
def _row_norm_gradient(grad, x, size, eps):
    """Of a row x for its norm x r, r = rsqrt(mean x^2 + eps): r (g - x r^2 mean(g x)). What lies beyond `size` is zero."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    along = tl.sum(grad * x, axis=0) / size
    return scale * (grad - x * scale * scale * along)


@triton.jit(do_not_specialize=["rows"])
def low_rank_sum(
    base, low, up, total, rows, size, rank, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile of base + low up^T, summed in float32 and rounded once. Neighbouring programs share rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inner, wide = tl.arange(0, RANK), column < size
    left = tl.load(low + row * rank + inner[None, :], (row < rows) & (inner < rank)[None, :], 0.0)
    right = tl.load(up + column[None, :] * rank + inner[:, None], wide[None, :] & (inner < rank)[:, None], 0.0)
    places, there = row * size + column[None, :], (row < rows) & wide[None, :]
    value = tl.load(base + places, there, 0.0).to(tl.float32) + tl.dot(left, right, input_precision="ieee")
    tl.store(total + places, value, there)


@triton.jit
def byte_product(x, codes, scales, result, size, all_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some outputs of a linear held in bytes, of one input vector, in float32."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    sample, there, wide = tl.program_id(1).to(tl.int64), row < all_rows, (column < size)[None, :]
    weight = tl.load(codes + row[:, None] * size + column[None, :], there[:, None] & wide, 0).to(tl.float32)
    vector = tl.load(x + sample * size + column, column < size, 0.0).to(tl.float32)
    total = tl.sum(weight * vector[None, :], axis=1) * tl.load(scales + row, there, 0.0)
    tl.store(result + sample * all_rows + row, total, there)
