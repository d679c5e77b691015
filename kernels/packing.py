"""Integers of 2 to 8 bits as bytes, along the second-to-last axis.

The axis (input channels, `K`) is cut into blocks of `block` values. Each value is stored
unsigned, `code + 2**(bits - 1)`, and split into planes of 4, 2 and 1 bits, least
significant first: 3 = 2+1, 5 = 4+1, 6 = 4+2. Within a block the planes follow each other,
and in a plane of `w` bits the byte at `j` holds, from its low end, the values at
`j, j + block*w/8, j + 2*block*w/8, ...`. So unpacking is a mask, a shift and a
concatenation of contiguous runs, never an interleave, and a cut between blocks is a cut
between bytes. A block takes `block * bits / 8` bytes exactly.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.core.typing import Array, Int, UInt8

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}

MAX_BLOCK = 256


def values_per_byte(bits: int) -> int:
    """Values that share a byte in the narrowest plane; a block is a multiple of it."""
    return 8 // min(PLANES[bits])


def block_size(size: int, bits: int) -> int:
    """The block for `size` values, rounded up to whole bytes: at most 256.

    The whole axis where it fits; else the largest power of two that divides it, for the
    sake of kernels that tile by powers of two; else its largest divisor. A size with no
    divisor of 32 or more (a prime, say) is padded instead of being cut into slivers.
    """
    unit = values_per_byte(bits)
    padded = -(-size // unit) * unit
    if padded <= MAX_BLOCK:
        return padded
    powers = [256, 128, 64, 32]
    others = range(MAX_BLOCK - unit, 31, -unit)
    return next((block for block in (*powers, *others) if padded % block == 0), MAX_BLOCK)


def packed_size(size: int, bits: int) -> tuple[int, int, int]:
    """Block, bytes and padding values along the axis for `size` values of `bits` bits."""
    block = block_size(size, bits)
    padded = -(-size // block) * block
    return block, padded * bits // 8, padded - size


def pack(codes: Int[Array, "*b i o"], *, bits: int) -> UInt8[Array, "*b bytes o"]:
    """Bytes that hold `codes`, signed integers of `bits` bits, along the axis before last.

    The axis is padded with the code that is stored as 0 to a whole number of blocks.
    """
    *batch, size, o = codes.shape
    block, length, pad = packed_size(size, bits)
    stored = (codes.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint8)
    stored = jnp.pad(stored, [(0, 0)] * len(batch) + [(0, pad), (0, 0)])
    blocks = stored.reshape(*batch, -1, block, o)
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (blocks >> shift) & jnp.uint8(2**width - 1)
        runs = plane.reshape(*blocks.shape[:-2], per_byte, block // per_byte, o)
        parts = [runs[..., k, :, :] << jnp.uint8(width * k) for k in range(per_byte)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged | part
        planes.append(merged)
        shift += width
    return jnp.concatenate(planes, axis=-2).reshape(*batch, length, o)


def unpack(
    packed: UInt8[Array, "*b bytes o"], *, bits: int, block: int, pad: int = 0
) -> Int[Array, "*b i o"]:
    """The signed integers, as int8, that `pack` was given."""
    *batch, length, o = packed.shape
    blocks = packed.reshape(*batch, -1, block * bits // 8, o)
    stored, shift, start = None, 0, 0
    for width in PLANES[bits]:
        size = block * width // 8
        plane = blocks[..., None, start : start + size, :]
        # One broadcast shift, not a concatenation of runs: XLA:CPU emits a loop without
        # branches for it, twice as fast (benchmarks/matmul.py, W4A8 at M=64).
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        runs = plane >> shifts.reshape(*(1,) * (plane.ndim - 3), -1, 1, 1)
        values = (runs & jnp.uint8(2**width - 1)) << jnp.uint8(shift)
        values = values.reshape(*blocks.shape[:-2], block, o)
        stored = values if stored is None else stored | values
        start, shift = start + size, shift + width
    assert stored is not None  # every width has a plane
    # Signed before the subtraction: where packing stands in the same program, XLA:CPU takes
    # the difference of unsigned bytes to floats without a sign (jax 0.10 to 0.12).
    if bits == 8:
        codes = lax.bitcast_convert_type(stored ^ jnp.uint8(128), jnp.int8)
    else:
        codes = lax.bitcast_convert_type(stored, jnp.int8) - jnp.int8(2 ** (bits - 1))
    codes = codes.reshape(*batch, length * 8 // bits, o)
    return codes[..., : codes.shape[-2] - pad, :] if pad else codes


class Format(NamedTuple):
    """How the integers of a weight are stored; static, and hashable.

    Attributes:
      bits: Width of a value.
      block: Values per packing block.
      pad: Values added at the end to fill a block.
      packed: Whether the array holds bytes; otherwise one integer per value.
    """

    bits: int
    block: int = 1
    pad: int = 0
    packed: bool = False

    @property
    def widens(self) -> bool:
        """Whether `decode` makes a larger array than the stored one."""
        return self.packed or self.bits <= 4

    def decode(self, stored: Array) -> Int[Array, "*b i o"]:
        """The integers as int8; the padding, at the end, is left to the caller."""
        if not self.packed:
            return stored.astype(jnp.int8)
        return unpack(stored, bits=self.bits, block=self.block)
