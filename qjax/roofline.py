"""What a device could do at most, and how much of it a layer reached.

A layer takes at least its operations over the device's rate, and at least its bytes over the
device's bandwidth. Of accelerators both are what their makers publish, dense, without
sparsity; of a CPU both are measured, at the moment, by a large matmul and by sums of rows of an
array too large for caches. What stays in a cache goes beyond that bandwidth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.kernels.target import current_target
from qjax.timing import interleaved


class Peak(NamedTuple):
    """The most that a device does in a second.

    Attributes:
      float_operations: Multiplications and additions of floats: bfloat16, on a CPU float32.
      int8_operations: The same of int8 with int32 sums.
      bytes: Of memory, to and from.
      source: Where the numbers are from, in a word or two.
    """

    float_operations: float
    int8_operations: float
    bytes: float
    source: str


def _published(float_tera: float, int8_tera: float, bandwidth_tera: float) -> Peak:
    return Peak(float_tera * 1e12, int8_tera * 1e12, bandwidth_tera * 1e12, "published")


# By words of the device's kind, all of which must be there; the first that fits. Google Cloud's pages of TPU versions,
# NVIDIA's data sheets (SXM where there are several). A v4 has no faster int8.
PEAKS = {
    "TPU v6 lite": _published(918, 1836, 1.64),
    "TPU v6e": _published(918, 1836, 1.64),
    "TPU v5 lite": _published(197, 394, 0.82),
    "TPU v5e": _published(197, 394, 0.82),
    "TPU v5p": _published(459, 918, 2.77),
    "TPU v5": _published(459, 918, 2.77),
    "TPU v4": _published(275, 275, 1.23),
    "H200": _published(989, 1979, 4.8),
    "H100": _published(989, 1979, 3.35),
    "A100 40GB": _published(312, 624, 1.56),
    "A100": _published(312, 624, 2.04),
    "L40S": _published(362, 733, 0.86),
    "L4": _published(121, 242, 0.3),
    "T4": _published(65, 130, 0.32),
}

# Side of the matmul, and of the square of floats that is read, which a CPU is measured by.
MATMUL, READ = 1024, 8192


def peak() -> Peak | None:
    """What the device that programs are traced for can do; None for one that is not known."""
    platform, kind = current_target()
    if platform == "cpu":
        return _measured()
    words = set(kind.replace("-", " ").split())
    return next((found for name, found in PEAKS.items() if set(name.split()) <= words), None)


def _measured() -> Peak:
    square = (MATMUL, MATMUL)
    floats, codes = jnp.ones(square), jnp.ones(square, jnp.int8)
    data = jnp.ones((READ, READ))
    dot: Callable[..., Any] = jax.jit(
        lambda a, b: jnp.matmul(
            a, b, preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else None
        )
    )
    # Reading alone: what a copy writes is new memory, which takes several times as long.
    read = jax.jit(lambda a: a.sum(axis=1))
    seconds = interleaved(
        {
            "float": lambda: dot(floats, floats),
            "int8": lambda: dot(codes, codes),
            "read": lambda: read(data),
        }
    )
    operations = 2 * MATMUL**3
    return Peak(
        operations / seconds["float"],
        operations / seconds["int8"],
        data.nbytes / seconds["read"],
        "measured",
    )


def shares(
    peak: Peak, *, operations: float, moved: float, seconds: float, int8: bool
) -> tuple[float, float]:
    """Shares of the device's rate of operations and of its bandwidth, 1 for all of it.

    Args:
      peak: Of the device.
      operations: Multiplications and additions.
      moved: Bytes read and written, each array once.
      seconds: That they took.
      int8: Whether the multiplications were of int8.
    """
    rate = peak.int8_operations if int8 else peak.float_operations
    return operations / seconds / rate, moved / seconds / peak.bytes
