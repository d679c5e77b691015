"""The definition of the low-bit matmul, in plain XLA: runs everywhere.

With activation codes `p` (scale `s_x`, zero point `z_x` per row and group) and weight codes
`q` (scale `s_w`, zero point `z_w` per column and group),

    y[m, n] = sum_g s_x[m, g] s_w[g, n] sum_{k in g} (p[m, k] - z_x[m, g]) (q[k, n] - z_w[g, n])

where the inner sum is accumulated in int32, exactly: the products of 8-bit integers stay
below 2**31 for groups of up to 131,071 input channels. The outer sum is in float32.

Weights are unpacked in pieces of K inside a loop, so that a packed model never has more
than one piece of one layer in a wider form (`WORKSPACE` bytes).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format

# Largest unpacked piece of a weight. Below it a whole layer is one piece; above it the
# loop's overhead is under 2 % of the piece's matmul on a CPU.
WORKSPACE = 2**20


def piece_size(size: int, columns: int, fmt: Format, group_size: int, itemsize: int) -> int:
    """Input channels to unpack at once: whole blocks and whole groups, within `WORKSPACE`.

    At least one unit, the least common multiple of block and group; the whole axis where
    units do not tile it.
    """
    unit = math.lcm(fmt.block if fmt.packed else 1, group_size)
    if unit >= size or size % unit or fmt.pad:
        return size
    units = size // unit
    fit = max(1, WORKSPACE // (unit * columns * itemsize))
    return unit * max(n for n in range(1, units + 1) if units % n == 0 and n <= fit)


def integer_dot(
    p: Int[Array, "m k"],
    q: Int[Array, "k n"],
    p_zero: Int[Array, "m 1"] | None,
    q_zero: Int[Array, "1 n"] | None,
) -> Int[Array, "m n"]:
    """`(p - p_zero) @ (q - q_zero)` in int32, the zero points kept out of the int8 matmul."""
    dot = lax.dot_general(p, q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    if q_zero is not None:
        rows = jnp.sum(p, axis=1, keepdims=True, dtype=jnp.int32)
        dot = dot - rows * q_zero.astype(jnp.int32)
    if p_zero is not None:
        columns = jnp.sum(q, axis=0, keepdims=True, dtype=jnp.int32)
        if q_zero is not None:
            columns = columns - q.shape[0] * q_zero.astype(jnp.int32)
        dot = dot - p_zero.astype(jnp.int32) * columns
    return dot


def _column(array: Array | None, group: int) -> Array | None:
    """Group `group` of `[m, g]` as `[m, 1]`; all groups share an axis of size 1."""
    if array is None:
        return None
    return array if array.shape[1] == 1 else lax.slice_in_dim(array, group, group + 1, axis=1)


def _line(array: Array | None, group: int) -> Array | None:
    """Group `group` of `[g, n]` as `[1, n]`; all groups share an axis of size 1."""
    if array is None:
        return None
    return array if array.shape[0] == 1 else lax.slice_in_dim(array, group, group + 1, axis=0)


def _over_pieces(body, init, count: int):
    """`body(i, carry)` for every piece; without a loop where there is only one."""
    return body(0, init) if count == 1 else lax.fori_loop(0, count, body, init)


def _piece(array: Array | None, i: int | Array, count: int, axis: int) -> Array | None:
    """Piece `i` of `count` along `axis`; an axis of size 1 is shared by all."""
    if array is None or count == 1 or array.shape[axis] == 1:
        return array
    size = array.shape[axis] // count
    return lax.dynamic_slice_in_dim(array, i * size, size, axis=axis)


def quant_matmul_xla(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
) -> Float[Array, "m n"]:
    """The low-bit matmul of the module's formula, in float32.

    Args:
      p: Activation codes, int8.
      x_scale: Steps of the activations; an axis of size 1 is shared.
      x_zero: Zero points of the activations, or None.
      q: Weight codes as `fmt` stores them along the first axis.
      w_scale: Steps of the weights; an axis of size 1 is shared.
      w_zero: Zero points of the weights, or None.
      fmt: Storage of `q`.

    Raises:
      ValueError: If the groups of activations and weights are of unequal size.
    """
    size = p.shape[1]
    groups = max(x_scale.shape[1], w_scale.shape[0])
    if {x_scale.shape[1], w_scale.shape[0]} - {1, groups} or size % groups:
        raise ValueError(
            "Activations and weights need the same groups, or one for all; got "
            f"{x_scale.shape[1]} and {w_scale.shape[0]} groups of {size} input channels."
        )
    group_size = size // groups
    piece = piece_size(size, q.shape[1], fmt, group_size if groups > 1 else 1, 1)
    count = size // piece
    x_scale, w_scale = x_scale.astype(jnp.float32), w_scale.astype(jnp.float32)

    def codes(i):
        part = fmt.decode(_piece(q, i, count, 0))
        return part[:piece] if part.shape[0] != piece else part

    if groups == 1:

        def add_integers(i, total):
            part = integer_dot(_piece(p, i, count, 1), codes(i), x_zero, w_zero)
            return total + part

        if count == 1:
            total = integer_dot(p, codes(0), x_zero, w_zero)
        else:
            zeros = jnp.zeros((p.shape[0], q.shape[1]), jnp.int32)
            total = lax.fori_loop(0, count, add_integers, zeros)
        return total.astype(jnp.float32) * x_scale * w_scale

    per_piece = piece // group_size

    def add_groups(i, total):
        values, part = codes(i), _piece(p, i, count, 1)
        xs, xz = _piece(x_scale, i, count, 1), _piece(x_zero, i, count, 1)
        ws, wz = _piece(w_scale, i, count, 0), _piece(w_zero, i, count, 0)
        for j in range(per_piece):
            run = slice(j * group_size, (j + 1) * group_size)
            dot = integer_dot(part[:, run], values[run], _column(xz, j), _line(wz, j))
            total = total + dot.astype(jnp.float32) * _column(xs, j) * _line(ws, j)
        return total

    zeros = jnp.zeros((p.shape[0], q.shape[1]), jnp.float32)
    return _over_pieces(add_groups, zeros, count)


def weight_matmul_xla(
    x: Float[Array, "m k"],
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
) -> Float[Array, "m n"]:
    """`x @ ((q - w_zero) * w_scale)` with float activations, in the dtype of `x`.

    Weights are dequantized to the dtype of `x` piece by piece; the sum is in float32.
    """
    size, groups = x.shape[1], w_scale.shape[0]
    group_size = size // groups
    piece = piece_size(size, q.shape[1], fmt, group_size if groups > 1 else 1, x.dtype.itemsize)
    count = size // piece
    late = groups == 1  # one scale per column multiplies the result instead of the weights
    w_scale = w_scale.astype(jnp.float32)

    def add(i, total):
        values = fmt.decode(_piece(q, i, count, 0))[:piece].astype(jnp.float32)
        values = values.reshape(-1, group_size if groups > 1 else piece, q.shape[1])
        if w_zero is not None:
            values = values - _piece(w_zero, i, count, 0)[:, None].astype(jnp.float32)
        if not late:
            values = values * _piece(w_scale, i, count, 0)[:, None]
        values = values.reshape(piece, q.shape[1]).astype(x.dtype)
        part = jnp.matmul(_piece(x, i, count, 1), values, preferred_element_type=jnp.float32)
        return part if total is None else total + part

    if count == 1:
        total = add(0, None)
    else:
        zeros = jnp.zeros((x.shape[0], q.shape[1]), jnp.float32)
        total = lax.fori_loop(0, count, add, zeros)
    return (total * w_scale if late else total).astype(x.dtype)


def in_row_blocks(f, x: Array, *, rows: int) -> Array:
    """`f(x)` for a row-wise `f`, evaluated on blocks of `rows` rows, one after the other.

    On a CPU a block and its integers stay in the cache between quantization and matmul; the
    last block is filled with rows of zeros whose results are dropped.
    """
    m = x.shape[0]
    if m <= rows:
        return f(x)
    count = -(-m // rows)
    padded = jnp.pad(x, ((0, count * rows - m), (0, 0)))
    blocks = jax.lax.map(f, padded.reshape(count, rows, x.shape[1]))
    return blocks.reshape(count * rows, -1)[:m]
