"""The definition of the low-bit matmul, in plain XLA: runs everywhere.

With activation codes `p` (scale `s_x`, zero point `z_x` per row and group) and weight codes
`q` (scale `s_w`, zero point `z_w` per column and group),

    y[m, n] = sum_g s_x[m, g] s_w[g, n] sum_{k in g} (p[m, k] - z_x[m, g]) (q[k, n] - z_w[g, n])

where the inner sum is exact, in int32, as long as it fits: products of 8-bit integers are at
most 128**2, so up to 131,071 channels in a group, and with zero points on both sides at most
255**2, so up to 33,025. (What the zero points take away may overflow on its way: int32 wraps
around and comes back.) The outer sum is in float32.

On a CPU the output is computed in pieces of columns inside a loop, so that a packed model
never has more than a piece of one layer in a wider form; `workspace_bytes` says how much that
is. Without the loop XLA:CPU unpacks every layer of a model before the first matmul and
keeps them all. Elsewhere XLA schedules for memory, and one matmul of full width is faster
and can be partitioned.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.target import by_platform

# Weights in one piece. On a CPU (2 cores, 1 MiB of L2 each) pieces of 2**17 to 2**19 weights
# took the same time within the noise, larger and smaller ones more: benchmarks/matmul.py.
PIECE_VALUES = 2**18
PIECE_STEP = 32

# Unpacked weights of fewer values than this are not worth a loop.
SMALL_VALUES = 2**16

# Outputs of more values than this leave the cache between their integers and their floats,
# and are computed in pieces of columns even where nothing is unpacked: 2048 x 1152 x 4608
# took 0.81 of the time of f32 in pieces of 512 columns and 0.75 in pieces of 768.
LARGE_OUTPUT = 2**22
LARGE_OUTPUT_COLUMNS = 768


def piece_columns(rows: int, size: int, columns: int, *, widened: bool) -> int:
    """Output columns that a CPU computes at once, in `[rows, size] @ [size, columns]`.

    Args:
      rows: Rows of the input.
      size: Input channels.
      columns: Output channels.
      widened: Whether the weights are unpacked, converted or summed by groups, so that a
        piece of them must be small; otherwise only the output's size counts.

    Returns:
      `columns` itself for one piece; else a multiple of 32, preferably a divisor.
    """
    if widened:
        whole = size * columns <= SMALL_VALUES
        most = min(PIECE_VALUES // size, columns // 2)
    else:
        # A symbolic number of rows (jax.export) compares with nothing.
        whole = not isinstance(rows, int) or rows * columns <= LARGE_OUTPUT
        most = LARGE_OUTPUT_COLUMNS
    most = max(most // PIECE_STEP, 1) * PIECE_STEP
    if whole or most >= columns:
        return columns
    candidates = range(most, most // 2, -PIECE_STEP)
    return next((piece for piece in candidates if columns % piece == 0), most)


def workspace_bytes(
    rows: int,
    size: int,
    columns: int,
    *,
    fmt: Format,
    groups: int = 1,
    itemsize: int | None = None,
) -> int:
    """Upper estimate of the temporary memory of one low-bit matmul on a CPU, in bytes.

    Input and output count as temporary, as they are inside a model. The parts: the input
    and its int8 codes (with groups also a copy cut into them), the output, the scales of the
    weights as floats, and for a piece of columns the unpacked weights as integers and as
    floats, the int32 and the float32 sums. (Before jaxlib 0.10 XLA:CPU multiplied int8 as
    int32, and needed up to twice as much.)

    Args:
      rows: Rows of the input.
      size: Input channels.
      columns: Output channels.
      fmt: Storage of the weight.
      groups: Groups of input channels.
      itemsize: Bytes of the input's float dtype for `weight_matmul_xla`, which computes in
        that dtype; None for `quant_matmul_xla`, whose input is float32 before it is
        quantized.
    """
    integer = itemsize is None
    widened = not integer or groups > 1 or fmt.widens
    piece = piece_columns(rows, size, columns, widened=widened)
    outside = 4 * rows * columns + (itemsize or 4) * rows * size + 4 * groups * columns
    if not integer:
        # Weights as floats, in float32 before they take the dtype of the input.
        return outside + piece * (size * (1 + 4 + (itemsize or 0)) + 4 * rows)
    outside += (2 if groups > 1 else 1) * rows * size
    return outside + piece * (2 * size + 4 * rows * (2 if groups > 1 else 1))


def shared_groups(
    p: Int[Array, "m k"], x_scale: Float[Array, "m gx"], w_scale: Float[Array, "g n"]
) -> int:
    """Groups of input channels; 1 where one scale is for all.

    Raises:
      ValueError: If those of activations and weights differ, or do not divide the channels.
    """
    groups = max(x_scale.shape[1], w_scale.shape[0])
    if {x_scale.shape[1], w_scale.shape[0]} - {1, groups} or p.shape[1] % groups:
        raise ValueError(
            "Activations and weights need the same groups, or one for all; got "
            f"{x_scale.shape[1]} and {w_scale.shape[0]} groups of {p.shape[1]} input channels."
        )
    return groups


def sums_by_group(codes: Int[Array, "a b"], groups: int, axis: int) -> Int[Array, "c d"]:
    """Sums of codes along an axis, one for every group of it."""
    cut = (*codes.shape[:axis], groups, codes.shape[axis] // groups, *codes.shape[axis + 1 :])
    return jnp.sum(codes.reshape(cut), axis=axis + 1, dtype=jnp.int32)


def integer_dot(
    p: Int[Array, "m k"],
    q: Int[Array, "k n"],
    p_zero: Int[Array, "m 1"] | None,
    q_zero: Int[Array, "1 n"] | None,
) -> Int[Array, "m n"]:
    """`(p - p_zero) @ (q - q_zero)` in int32, the zero points kept out of the int8 matmul."""
    dot = _int8_dot(p, q)
    if q_zero is not None:
        rows = _int8_dot(p, jnp.ones((p.shape[1], 1), jnp.int8))
        dot = dot - rows * q_zero.astype(jnp.int32)
    if p_zero is not None:
        columns = _int8_dot(jnp.ones((1, q.shape[0]), jnp.int8), q)
        if q_zero is not None:
            columns = columns - q.shape[0] * q_zero.astype(jnp.int32)
        dot = dot - p_zero.astype(jnp.int32) * columns
    return dot


def _int8_dot(p: Int[Array, "m k"], q: Int[Array, "k n"]) -> Int[Array, "m n"]:
    # Without the preferred type the sum would be int8, and overflow in silence.
    return lax.dot_general(p, q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def quant_matmul_xla(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    piece: int | None = None,
) -> Float[Array, "m n"]:
    """The low-bit matmul of the module's formula, in float32.

    Args:
      p: Activation codes, int8.
      x_scale: Steps of the activations; an axis of size 1 is shared.
      x_zero: Zero points of the activations, shaped as `x_scale`, or None.
      q: Weight codes as `fmt` stores them along the first axis.
      w_scale: Steps of the weights; an axis of size 1 is shared.
      w_zero: Zero points of the weights, shaped as `w_scale`, or None.
      fmt: Storage of `q`.
      piece: Columns at once on a CPU; None for `piece_columns`.

    Raises:
      ValueError: If the groups of activations and weights are of unequal size.
    """
    (rows, size), groups = p.shape, shared_groups(p, x_scale, w_scale)
    x_scale = x_scale.astype(jnp.float32)
    if groups > 1:
        p_groups = jnp.moveaxis(p.reshape(rows, groups, size // groups), 1, 0)
        x_groups = [_rows_by_group(array, groups) for array in (x_scale, x_zero)]

    def compute(q, w_scale, w_zero):
        codes, w_scale = _decode(q, fmt, size), w_scale.astype(jnp.float32)
        if groups == 1:
            dot = integer_dot(p, codes, x_zero, w_zero)
            return dot.astype(jnp.float32) * x_scale * w_scale

        def add_group(total, parts):
            p, (x_scale, x_zero), q, w_scale, w_zero = parts
            dot = integer_dot(p, q, x_zero, w_zero)
            return total + dot.astype(jnp.float32) * x_scale * w_scale, None

        w_groups = [_columns_by_group(array, groups) for array in (w_scale, w_zero)]
        parts = (p_groups, x_groups, codes.reshape(groups, -1, codes.shape[1]), *w_groups)
        zeros = jnp.zeros((rows, codes.shape[1]), jnp.float32)
        return lax.scan(add_group, zeros, parts)[0]

    if piece is None:
        piece = piece_columns(rows, size, q.shape[1], widened=groups > 1 or fmt.widens)
    return _in_pieces(compute, (q, w_scale, w_zero), rows, piece, jnp.float32)


def weight_matmul_xla(
    x: Float[Array, "m k"],
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    dtype: jnp.dtype | None = None,
    piece: int | None = None,
) -> Float[Array, "m n"]:
    """`x @ ((q - w_zero) * w_scale)` with float activations, in the dtype of `x`.

    Weights are dequantized to the dtype of `x` piece by piece; sums are in float32. One
    scale per column multiplies the sum instead of the weights, in float32.

    Args:
      x: Activations, any float dtype.
      q: Weight codes as `fmt` stores them along the first axis.
      w_scale: Steps of the weights; an axis of size 1 is shared.
      w_zero: Zero points of the weights, shaped as `w_scale`, or None.
      fmt: Storage of `q`.
      dtype: Dtype of the result; None for that of `x`.
      piece: Columns at once on a CPU; None for `piece_columns`.

    Raises:
      ValueError: If the groups do not divide the input channels.
    """
    (rows, size), groups, dtype = x.shape, w_scale.shape[0], dtype or x.dtype
    if size % groups:
        raise ValueError(
            f"The groups of the weights must divide the input channels; got {groups} groups "
            f"of {size} input channels."
        )

    def compute(q, w_scale, w_zero):
        codes, w_scale = _decode(q, fmt, size), w_scale.astype(jnp.float32)
        values = codes.astype(jnp.float32).reshape(groups, -1, codes.shape[1])
        if w_zero is not None:
            values = values - w_zero[:, None].astype(jnp.float32)
        if groups > 1:
            values = values * w_scale[:, None]
        values = values.reshape(size, -1).astype(x.dtype)
        y = jnp.matmul(x, values, preferred_element_type=jnp.float32)
        return (y if groups > 1 else y * w_scale).astype(dtype)

    if piece is None:
        piece = piece_columns(rows, size, q.shape[1], widened=True)
    return _in_pieces(compute, (q, w_scale, w_zero), rows, piece, dtype)


def _decode(q: Array, fmt: Format, size: int) -> Int[Array, "k n"]:
    """The integers of a piece as int8, without the padding."""
    codes = fmt.decode(q)
    return codes if codes.shape[0] == size else codes[:size]


def _rows_by_group(array: Array | None, groups: int) -> Array | None:
    """Steps or zero points of activations, `[m, g]` or `[m, 1]`, as `[g, m, 1]`."""
    if array is None:
        return None
    return jnp.broadcast_to(array.T[..., None], (groups, array.shape[0], 1))


def _columns_by_group(array: Array | None, groups: int) -> Array | None:
    """Steps or zero points of weights, `[g, n]` or `[1, n]`, as `[g, 1, n]`."""
    if array is None:
        return None
    return jnp.broadcast_to(array[:, None], (groups, 1, array.shape[1]))


def _in_pieces(
    compute: Callable[..., Array],
    weight: tuple[Array, Array, Array | None],
    rows: int,
    piece: int,
    dtype: jnp.dtype,
) -> Float[Array, "m n"]:
    """`compute(*weight)`, on a CPU `piece` columns after the other.

    The last piece reaches back where `piece` does not divide the columns, and computes some
    of them twice.
    """
    columns = weight[0].shape[1]
    if piece >= columns:
        return compute(*weight)

    def whole(weight):
        return compute(*weight)

    def pieces(weight):
        def columns_from(array, start):
            if array is None or array.shape[1] == 1:
                return array
            return lax.dynamic_slice_in_dim(array, start, piece, axis=1)

        def add_piece(i, y):
            start = jnp.minimum(i * piece, columns - piece)
            part = compute(*(columns_from(array, start) for array in weight))
            return lax.dynamic_update_slice_in_dim(y, part, start, axis=1)

        zeros = jnp.zeros((rows, columns), dtype)
        return lax.fori_loop(0, -(-columns // piece), add_piece, zeros)

    return by_platform(weight, cpu=pieces, default=whole)
