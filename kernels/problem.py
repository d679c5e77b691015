"""A low-bit matmul: what an implementation must take, and which ones do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.kernels import quant_matmul_hopper, tiles_tpu, weight_matmul_hopper
from qjax.kernels.packing import Format
from qjax.kernels.target import current_target


class Problem(NamedTuple):
    """What an implementation must take.

    Attributes:
      rows: Of the activations; may be symbolic.
      size: Input channels.
      columns: Output channels.
      groups: Groups of input channels.
      fmt: Storage of the weight.
      dtype: Of the activations; int8 for codes.
      out: Dtype of the result.
      x_zero: Whether the activations have zero points.
      w_zero: Whether the weights have.
    """

    rows: Any
    size: int
    columns: int
    groups: int
    fmt: Format
    dtype: Any
    out: Any = jnp.float32
    x_zero: bool = False
    w_zero: bool = False

    @property
    def codes(self) -> bool:
        """Whether the activations are codes, and not floats."""
        return self.dtype == jnp.int8

    def name(self) -> str:
        """The same for equal problems, in every process."""
        fmt, (dtype, out) = self.fmt, (jnp.dtype(one).name for one in (self.dtype, self.out))
        stored = f"{fmt.bits} bits packed by {fmt.block}" if fmt.packed else f"{fmt.bits} bits"
        shape = f"{self.rows}x{self.size}x{self.columns}"
        own = [of for of, there in (("inputs", self.x_zero), ("weights", self.w_zero)) if there]
        zeros = f", zero points of {' and '.join(own)}" if own else ""
        return f"{dtype} {shape} to {out}, {self.groups} groups, {stored}, {fmt.pad} padded{zeros}"


def why_not(implementation: str, problem: Problem) -> str | None:
    """Why an implementation cannot do a matmul on the device that programs are traced for.

    Args:
      implementation: "xla", "tpu" or "hopper".
      problem: The matmul.

    Returns:
      Half a sentence; None if it can.
    """
    rows, size, columns, groups, fmt, dtype, *_ = problem
    platform, kind = current_target()
    if implementation == "tpu":
        if platform != "tpu":
            return f"it needs a TPU, and programs are traced for {kind} ({platform})"
        if not problem.codes and dtype not in (jnp.bfloat16, jnp.float32):
            return f"activations must be bfloat16 or float32, got {jnp.dtype(dtype).name}"
        itemsize = jnp.dtype(dtype).itemsize
        return tiles_tpu.why_not(size, groups, fmt, rows=rows, itemsize=itemsize)
    if implementation == "hopper":
        if platform != "gpu":
            return f"it needs a Hopper GPU, and programs are traced for {kind} ({platform})"
        if jax.__version_info__ < (0, 10):
            return f"it needs jax >= 0.10, got {jax.__version__}"
        if problem.codes:
            return quant_matmul_hopper.why_not(size, columns, groups, kind)
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"activations must be bfloat16 or float16, got {jnp.dtype(dtype).name}"
        return weight_matmul_hopper.why_not(rows, size, columns, groups, fmt, kind)
    return None
