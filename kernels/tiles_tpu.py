"""What the kernels for TPUs share: which weights they take, block sizes, unpacking in VMEM."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
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


def why_not(size: int, groups: int, fmt: Format) -> str | None:
    """Why the kernels do not take a weight, as half a sentence; None if they do.

    Args:
      size: Input channels.
      groups: Groups of them; 1 where one scale is for all.
      fmt: Storage of the weight.
    """
    if fmt.pad or size % ROWS:
        return f"input channels must be a multiple of {ROWS}, got {size}"
    if groups > 1 and (size // groups) % ROWS:
        return f"groups must have a multiple of {ROWS} input channels, got {size // groups}"
    run = fmt.block * min(PLANES[fmt.bits]) // 8
    if fmt.packed and run % ROWS:
        return f"{fmt.bits} bits in blocks of {fmt.block} have runs of {run} bytes, not of {ROWS}"
    if choose_blocks(1, size, 1, groups=groups, fmt=fmt) is None:
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
    while _vmem_bytes(m, n, k, fmt, itemsize) > VMEM_BYTES:
        if m > LANES and m >= n:
            m = half(m)
        elif n > LANES:
            n = half(n)
        elif m > LANES:
            m = half(m)
        else:
            return None
    return Blocks(m, n, k)


def _vmem_bytes(m: int, n: int, k: int, fmt: Format, itemsize: int) -> int:
    """Two blocks of inputs, weights and outputs, sums, and the weights in a wider form twice."""
    weights = k * n * (fmt.bits if fmt.packed else 8) // 8
    return 2 * (m * k * itemsize + weights + 4 * m * n) + 4 * m * n + 2 * k * n * itemsize


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
