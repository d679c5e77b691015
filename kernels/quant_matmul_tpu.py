"""The low-bit matmul on TPUs: a Pallas kernel for Mosaic.

The formula is that of `quant_matmul_xla`. Weights cross HBM as they are stored and become int8
in VMEM; products are int8 with int32 sums, on the matrix unit. With one group the sums over all
input channels are integers; with more, those of a group become floats and are added up in
float32.

A group need not be a multiple of the 128 channels that are loaded at once: rows of the weights
around it are replaced by zeros, which takes no longer than the matrix unit would have idled.

The zero points of the weights take away sums of the activations' codes, which XLA adds up
where it makes the codes; those of the activations take away sums of the weights' codes, which
the matrix unit adds up by rows of ones.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.core.typing import Array, Float, Int
from qjax.kernels.packing import Format
from qjax.kernels.tiles_tpu import LANES, ROWS, Blocks, choose_blocks, unpack_words


def _dot(p: Int[Array, "m k"], q: Int[Array, "k n"]) -> Int[Array, "m n"]:
    return lax.dot_general(p, q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def _groups(size: int, group: int) -> Iterator[tuple[slice, slice]]:
    """The channels of every group, and the whole lanes that hold them."""
    for first in range(0, size, group):
        last = first + group
        yield (
            slice(first, last),
            slice(first // LANES * LANES, min(-(-last // LANES) * LANES, size)),
        )


def _among_zeros(q: Int[Array, "k n"], inside: slice, lanes: slice) -> Int[Array, "k2 n"]:
    """The rows of a group, and zeros in place of the other rows of its lanes."""
    around = (inside.start - lanes.start, lanes.stop - inside.stop)
    zeros = [jnp.zeros((rows, q.shape[1]), q.dtype) for rows in around]
    parts = [part for part in (zeros[0], q[inside], zeros[1]) if part.shape[0]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _kernel(*refs: Any, names: tuple[str, ...], fmt: Format, group: int | None) -> None:
    """One block: `[m, k]` codes, `[k, n]` stored weights; sums are kept over the last axis."""
    at = dict(zip(names, refs, strict=True))
    step, steps = pl.program_id(2), pl.num_programs(2)
    total, weight_sums = at["total"], at.get("weight_sums")

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        if weight_sums is not None:
            weight_sums[...] = jnp.zeros_like(weight_sums)

    p, q = at["p"][...], unpack_words(at["q"][...], fmt)
    ones = jnp.ones((ROWS, p.shape[1]), jnp.int8)
    # Values of rows come along lanes, [groups, m]: as columns they would fill 128 lanes each.
    of_rows: dict[str, Array] = {
        name: at[name][...].T for name in ("x_scale", "x_zero", "x_sum") if name in at
    }
    of_columns: dict[str, Array] = {
        name: at[name][...] for name in ("w_scale", "w_zero") if name in at
    }

    def row(name: str, g: int) -> Array:
        array = of_rows[name]
        return array[:, g : g + 1] if array.shape[1] > 1 else array

    def column(name: str, g: int) -> Array:
        array = of_columns[name]
        return array[g : g + 1] if array.shape[0] > 1 else array

    def scaled(dot: Array, sums: Array | None, size: int, g: int) -> Array:
        """The sum over a group, without what the zero points add, in float32."""
        if "w_zero" in at:
            dot = dot - row("x_sum", g) * column("w_zero", g)
        if sums is not None:
            if "w_zero" in at:
                sums = sums - size * column("w_zero", g)
            dot = dot - row("x_zero", g) * sums
        return dot.astype(jnp.float32) * row("x_scale", g) * column("w_scale", g)

    if group is None:
        total[...] += _dot(p, q)
        if weight_sums is not None:
            weight_sums[...] += _dot(ones, q)
    else:
        for g, (inside, lanes) in enumerate(_groups(p.shape[1], group)):
            weights = _among_zeros(q, inside, lanes)
            sums = _dot(ones[:, lanes], weights)[:1] if "x_zero" in at else None
            total[...] += scaled(_dot(p[:, lanes], weights), sums, group, g)

    @pl.when(step == steps - 1)
    def _():
        y = total[...]
        if group is None:
            sums = None if weight_sums is None else weight_sums[:1]
            y = scaled(y, sums, p.shape[1] * steps, 0)
        at["y"][...] = y.astype(at["y"].dtype)


def quant_matmul_tpu(
    p: Int[Array, "m k"],
    x_scale: Float[Array, "m gx"],
    x_zero: Int[Array, "m gx"] | None,
    q: Array,
    w_scale: Float[Array, "g n"],
    w_zero: Int[Array, "g n"] | None,
    *,
    fmt: Format,
    dtype: Any = jnp.float32,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """The low-bit matmul of `quant_matmul_xla`.

    Args:
      p: Activation codes, int8.
      x_scale: Steps of the activations; an axis of size 1 is shared.
      x_zero: Zero points of the activations, shaped as `x_scale`, or None.
      q: Weight codes as `fmt` stores them along the first axis.
      w_scale: Steps of the weights; an axis of size 1 is shared.
      w_zero: Zero points of the weights, shaped as `w_scale`, or None.
      fmt: Storage of `q`; `tiles_tpu.why_not` says which are taken.
      dtype: Of the result; sums are in float32 before.
      blocks: Sizes of a step; None for `tiles_tpu.choose_blocks`.
      interpret: Whether to run on any device, slowly.
    """
    (rows, size), columns = p.shape, q.shape[1]
    groups = max(x_scale.shape[1], w_scale.shape[0])
    blocks = blocks or choose_blocks(rows, size, columns, groups=groups, fmt=fmt)
    assert blocks is not None  # what `why_not` is for
    m, n, k = blocks
    steps = size // k

    def by_steps(array: Array, length: int, dtype: Any) -> Array:
        """`[groups, length or 1]` as `[steps, groups of a step, length]`."""
        array = jnp.broadcast_to(array.astype(dtype), (array.shape[0], length))
        return array.reshape(steps if array.shape[0] > 1 else 1, -1, length)

    operands = {
        "p": p,
        "q": q,
        "x_scale": by_steps(x_scale.T, rows, jnp.float32),
        "w_scale": by_steps(w_scale, columns, jnp.float32),
    }
    if x_zero is not None:
        operands["x_zero"] = by_steps(x_zero.T, rows, jnp.int32)
    if w_zero is not None:
        operands["w_zero"] = by_steps(w_zero, columns, jnp.int32)
        sums = jnp.sum(p.reshape(rows, groups, -1), axis=-1, dtype=jnp.int32)
        operands["x_sum"] = by_steps(sums.T, rows, jnp.int32)

    def spec(name: str, array: Array) -> pl.BlockSpec:
        if name == "p":
            return pl.BlockSpec((m, k), lambda i, j, s: (i, s))
        if name == "q":
            return pl.BlockSpec((array.shape[0] // steps, n), lambda i, j, s: (s, j))
        own = array.shape[0] > 1
        if name.startswith("x"):
            return pl.BlockSpec((None, array.shape[1], m), lambda i, j, s: (s if own else 0, 0, i))
        return pl.BlockSpec((None, array.shape[1], n), lambda i, j, s: (s if own else 0, 0, j))

    scratch = {"total": pltpu.VMEM((m, n), jnp.int32 if groups == 1 else jnp.float32)}
    if x_zero is not None and groups == 1:
        scratch["weight_sums"] = pltpu.VMEM((ROWS, n), jnp.int32)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            names=(*operands, "y", *scratch),
            fmt=fmt,
            group=size // groups if groups > 1 else None,
        ),
        grid=(pl.cdiv(rows, m), pl.cdiv(columns, n), steps),
        in_specs=[spec(name, array) for name, array in operands.items()],
        out_specs=pl.BlockSpec((m, n), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="quant_matmul",
    )(*operands.values())
