"""What the matmuls for TPUs share: weights that they take, blocks, unpacking in VMEM."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.core.typing import Array, Int
from qjax.kernels.packing import PLANES, Format

# Channels of an input that are loaded at once, and rows of bytes that make a register.
LANES, ROWS = 128, 32

# The largest blocks of rows and columns, and the most input channels of one. Rows and
# columns of 512 let the matrix unit do some 256 products for every byte that crosses HBM,
# where a v5e has 480 operations of int8 for a byte; measured they are not, for want of a TPU.
BLOCK_M, BLOCK_N, BLOCK_K = 512, 512, 2304
# With groups every one of them goes through the float units and is written out in the
# program: smaller blocks compile several times faster.
GROUPED_M, GROUPED_N, GROUPED_K = 256, 256, 1152
# Of the 16 MiB that a kernel may use unless it asks for more.
VMEM_BYTES = 12 * 2**20


class Blocks(NamedTuple):
    """Rows, columns and input channels of one step of a kernel."""

    m: int
    n: int
    k: int


def why_not(
    size: int, groups: int, fmt: Format, *, rows: Any = BLOCK_M, itemsize: int = 1
) -> str | None:
    """Why the kernels do not take a weight, as half a sentence; None if they do.

    Args:
      size: Input channels.
      groups: Groups of them; 1 where one scale is for all.
      fmt: Storage of the weight.
      rows: Of the input; for any but a number, as many as a block has.
      itemsize: Bytes of a value of the input.
    """
    rows = rows if isinstance(rows, int) else BLOCK_M
    if fmt.pad or size % ROWS:
        return f"input channels must be a multiple of {ROWS}, got {size}"
    if groups > 1 and (size // groups) % ROWS:
        return f"groups must have a multiple of {ROWS} input channels, got {size // groups}"
    run = fmt.block * min(PLANES[fmt.bits]) // 8
    if fmt.packed and run % ROWS:
        return f"{fmt.bits} bits in blocks of {fmt.block} have runs of {run} bytes, not of {ROWS}"
    if choose_blocks(rows, size, 1, groups=groups, fmt=fmt, itemsize=itemsize) is None:
        return f"no divisor of {size} is whole in lanes, groups and packing blocks, and small"
    return None


def choose_blocks(
    rows: int, size: int, columns: int, *, groups: int, fmt: Format, itemsize: int = 1
) -> Blocks | None:
    """Blocks for any shape; None if no block of the input channels fits VMEM.

    The input channels are taken at once up to `BLOCK_K` (`GROUPED_K`), or cut into the largest
    equal parts that are whole in lanes, groups and packing blocks. Rows and columns are at most
    `BLOCK_M` and `BLOCK_N`, and halved until two blocks of everything fit.

    Args:
      rows: Rows of the input.
      size: Input channels.
      columns: Output channels.
      groups: Groups of input channels.
      fmt: Storage of the weight.
      itemsize: Bytes of a value of the input.
    """
    most = (BLOCK_M, BLOCK_N, BLOCK_K) if groups == 1 else (GROUPED_M, GROUPED_N, GROUPED_K)
    m, n, k = *most[:2], size
    if size > most[2]:
        unit = math.lcm(LANES, size // groups if groups > 1 else 1, fmt.block)
        parts = size // unit
        wanted = [i * unit for i in range(parts, 0, -1) if parts % i == 0 and i * unit <= most[2]]
        if size % unit == 0 and wanted:
            k = wanted[0]
    # A block of rows is whole lanes of their scales, or all rows.
    m = min(m, rows)
    n = min(n, -(-columns // LANES) * LANES)
    half = lambda length: -(-length // (2 * LANES)) * LANES
    while not fits(Blocks(m, n, k), fmt, itemsize):
        if m > LANES and m >= n:
            m = half(m)
        elif n > LANES:
            n = half(n)
        elif m > LANES:
            m = half(m)
        else:
            return None
    return Blocks(m, n, k)


def fits(blocks: Blocks, fmt: Format, itemsize: int) -> bool:
    """Whether blocks fit VMEM.

    Two blocks of inputs, weights and outputs, sums, and the weights in a wider form twice.
    """
    m, n, k = blocks
    weights = k * n * (fmt.bits if fmt.packed else 8) // 8
    needed = 2 * (m * k * itemsize + weights + 4 * m * n) + 4 * m * n + 2 * k * n * itemsize
    return needed <= VMEM_BYTES


def by_steps(array: Array, steps: int, length: int, dtype: Any) -> Array:
    """Values by group, `[groups, length or 1]`, as `[steps, groups of a step, length]`.

    Values for all groups have one step.
    """
    groups = array.shape[0]
    array = jnp.broadcast_to(array.astype(dtype), (groups, length))
    return array.reshape(steps if groups > 1 else 1, -1, length)


def call_by_blocks(
    kernel: Callable[..., None],
    operands: Mapping[str, Array],
    scratch: Mapping[str, Any],
    *,
    blocks: Blocks,
    dtype: Any,
    interpret: bool,
    name: str,
) -> Array:
    """Runs a matmul's kernel for every block of rows, of columns and of input channels.

    Args:
      kernel: Takes references of the operands, of the result's block (`y`) and of `scratch`,
        and their names as `names`. The last axis of its grid are the steps.
      operands: First the activations `[rows, size]`; then, by name, `q`, the stored weights, and
        what `by_steps` made: `x_...` for rows, `w_...` for columns.
      scratch: Memory that stays from step to step.
      blocks: Rows, columns and input channels of a block.
      dtype: Of the result.
      interpret: Whether to run on any device, slowly.
      name: Of the kernel, in a profile.

    Returns:
      `[rows, columns]`.
    """
    m, n, k = blocks
    first, *_ = operands
    (rows, size), columns = operands[first].shape, operands["q"].shape[1]
    steps = size // k

    def spec(operand: str, array: Array) -> pl.BlockSpec:
        if operand == first:
            return pl.BlockSpec((m, k), lambda i, j, s: (i, s))
        if operand == "q":
            return pl.BlockSpec((array.shape[0] // steps, n), lambda i, j, s: (s, j))
        own = array.shape[0] > 1
        if operand.startswith("x_"):
            return pl.BlockSpec((None, array.shape[1], m), lambda i, j, s: (s if own else 0, 0, i))
        return pl.BlockSpec((None, array.shape[1], n), lambda i, j, s: (s if own else 0, 0, j))

    return pl.pallas_call(
        functools.partial(kernel, names=(*operands, "y", *scratch)),
        grid=(pl.cdiv(rows, m), pl.cdiv(columns, n), steps),
        in_specs=[spec(operand, array) for operand, array in operands.items()],
        out_specs=pl.BlockSpec((m, n), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=name,
    )(*operands.values())


def unpack_words(stored: Array, fmt: Format) -> Int[Array, "k n"]:
    """The codes of a block in VMEM, as int8: `packing.unpack` on words of four rows.

    The vector units have no 8-bit shifts. What shifts bring in from the byte above is masked
    off, and the offset of stored codes is taken away without a borrow between bytes.
    """
    if not fmt.packed:
        return stored.astype(jnp.int8)
    words = pltpu.bitcast(stored, jnp.int32)
    length = fmt.block * fmt.bits // 32
    parts = []
    for start in range(0, words.shape[0], length):
        planes, shift = [], 0
        for width in PLANES[fmt.bits]:
            size = fmt.block * width // 32
            plane, start = words[start : start + size], start + size
            if width < 8:
                mask = _every_byte(2**width - 1)
                runs = [(plane >> (width * i)) & mask for i in range(8 // width)]
                plane = jnp.concatenate(runs, axis=0) << shift
            planes.append(plane)
            shift += width
        parts.append(functools.reduce(jnp.bitwise_or, planes))
    value = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)
    if fmt.bits < 8:
        value = value + _every_byte(128 - 2 ** (fmt.bits - 1))
    return pltpu.bitcast(value ^ _every_byte(128), jnp.int8)


def _every_byte(value: int) -> Array:
    """A 32-bit word of four equal bytes."""
    return jnp.int32(int.from_bytes(bytes([value] * 4), "little", signed=True))
