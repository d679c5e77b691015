"""Dense and Conv: the two pluggable layers that every model here is built of.

Both take a float kernel or a QTensor kernel from the same place in the params tree, so a
model is quantized by replacing leaves and by nothing else. How the layer's input is
quantized travels with the QTensor (`QTensor.act`); static and per-step ranges are read
from the `"quant"` variable collection, at the layer's own path, where the sampler's scan
puts the current row of the step table.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from qjax.core import ops
from qjax.core.qtensor import QTensor
from qjax.core.typing import Array, Float

default_kernel_init = nn.initializers.lecun_normal()

LOW_RANK = ("lora_down", "lora_up", "lora_scale")
"""Leaves of a low-rank branch of rank r: `[..., i, r]` as the kernel, `[r, o]`, `[r]`."""


def _kernel(module: nn.Module, init, shape: Sequence[int], param_dtype) -> Array | QTensor:
    """The leaf named `kernel` as it is stored; created only when absent.

    `Module.param` would unbox a QTensor and check the shape of what comes out, so an
    existing leaf is read as a plain variable; a box of axis names around it comes off.
    """
    if module.has_variable("params", "kernel"):
        leaf: Any = module.get_variable("params", "kernel")
        if isinstance(leaf, nn.Partitioned) and isinstance(leaf.value, QTensor):
            leaf = leaf.value
        return leaf if isinstance(leaf, QTensor) else nn.meta.unbox(leaf)
    return module.param("kernel", init, tuple(shape), param_dtype)


def _row(module: nn.Module, kernel: Array | QTensor) -> dict[str, Array]:
    """The layer's entries of the current step's row; empty where there are none.

    Raises:
      ValueError: If the kernel says that the range of the input is read from the row, and
        the row has none.
    """
    row = {} if module.is_initializing() else dict(module.variables.get("quant", {}))
    act = kernel.act if isinstance(kernel, QTensor) else None
    if act is not None and act.mode != "dynamic" and "act_scale" not in row:
        path = "/".join(module.path) or "The layer"
        raise ValueError(
            f"{path} quantizes its input with mode={act.mode!r} and needs act_scale in the "
            f"'quant' collection at its own path; got {sorted(row) or 'nothing'}. Apply the model "
            "with {'params': ..., 'quant': row}, the row of a calibrated step table."
        )
    return row


def _low_rank(module: nn.Module, x: Array, y: Array, product: Callable[..., Array]) -> Array:
    """`y` plus the layer's low-rank branch, `product` being the layer's own with a kernel."""
    if not module.has_variable("params", LOW_RANK[0]):
        return y
    down, up, scale = (jnp.asarray(module.get_variable("params", name)) for name in LOW_RANK)
    h = product(x, down.astype(x.dtype)) * scale.astype(x.dtype)
    return y + ops.matmul(h, up.astype(x.dtype)).astype(y.dtype)


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axis, in float or at the kernel's low bits.

    Attributes:
      features: Output features.
      use_bias: Whether a bias is added.
      dtype: Float dtype of the computation; None computes in the input's dtype.
      param_dtype: Dtype in which `init` creates the parameters.
      kernel_init: Initializer of the kernel `[i, o]`.
      bias_init: Initializer of the bias `[o]`.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b i"], *, quantized: Float[Array, "*b i"] | None = None
    ) -> Float[Array, "*b o"]:
        """The layer's output.

        Args:
          x: Input.
          quantized: What the kernel multiplies in place of `x`, where a calibration simulates
            low bits in float; a low-rank branch sees `x` in any case.
        """
        kernel = _kernel(self, self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        if self.dtype is not None:
            x = x.astype(self.dtype)
        seen = x if quantized is None else quantized.astype(x.dtype)
        y = ops.matmul(seen, kernel, row=_row(self, kernel))
        y = _low_rank(self, x, y, ops.matmul)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            y = y + bias.astype(y.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution over `[b, h, w, c]`, in float or at the kernel's low bits.

    Attributes:
      features: Output features.
      kernel_size: Height and width of the kernel.
      strides: Step between output pixels, the same on both axes.
      padding: Zeros around the image: `((top, bottom), (left, right))`, or `"SAME"` or
        `"VALID"`. Checkpoints of PyTorch with `padding=p` are `((p, p), (p, p))`.
      use_bias: Whether a bias is added.
      dtype: Float dtype of the computation; None computes in the input's dtype.
      param_dtype: Dtype in which `init` creates the parameters.
      kernel_init: Initializer of the kernel `[h, w, i, o]`.
      bias_init: Initializer of the bias `[o]`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: int = 1
    padding: str | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = default_kernel_init
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        *,
        quantized: Float[Array, "b h w i"] | None = None,
        convolve: Callable[..., Array] = ops.conv,
    ) -> Float[Array, "b h2 w2 o"]:
        """The layer's output.

        Args:
          x: Images.
          quantized: As for `Dense`.
          convolve: The convolution with the kernel: `ops.conv`, or another form of it.
        """
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = _kernel(self, self.kernel_init, shape, self.param_dtype)
        if self.dtype is not None:
            x = x.astype(self.dtype)
        row = _row(self, kernel)
        seen = x if quantized is None else quantized.astype(x.dtype)
        y = convolve(seen, kernel, strides=self.strides, padding=self.padding, row=row)
        branch = functools.partial(ops.conv, strides=self.strides, padding=self.padding)
        y = _low_rank(self, x, y, branch)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            y = y + bias.astype(y.dtype)
        return y
