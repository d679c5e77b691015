"""Float convolution whose gradients stay fast inside a loop on a CPU.

XLA:CPU has a fast convolution for operands in one order, images `[b, h, w, i]` with kernels
`[h, w, i, o]`, and brings other orders into it in a program's outermost computation only; in
the body of a loop they run as plain scalar loops, 30 to 100 times slower. The forward pass is
in that order. Its gradients, as JAX writes them, are not: so that a calibration that takes its
steps in a `lax.scan` or `lax.fori_loop` spends nearly all of its time there.

Here both gradients are written as convolutions in the fast order, by transposing what goes in:

    y[b, r]     = sum_k  x[b, s r + k - p] . w[k]                    the convolution itself
    dx[b, r]    = sum_k  dy~[b, r + p - k] . w[k]^T                  dy~: dy, s - 1 zeros between
    dw[k][i, o] = sum_br x[b, s r + k - p, i] dy[b, r, o]            dy is the kernel, s its dilation

so `dw` is a convolution whose images are the input channels, whose channels are the batch, and
whose kernel is as large as the output image. Neither needs patches, nine times the input, which
matmuls over im2col do; on 64 to 320 channels they take 0.5 to 1 times what those take, and the
same as the gradients of JAX outside a loop (benchmarks/conv_gradients.py).

Other platforms have libraries of their own for `dw` and `dx`, and get what JAX writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float
from qjax.kernels.quant_conv_xla import IMAGE, Padding, pad_image
from qjax.kernels.target import by_platform


def conv(
    x: Float[Array, "b h w i"], w: Float[Array, "kh kw i o"], *, strides: int, pads: Padding
) -> Float[Array, "b h2 w2 o"]:
    """`lax.conv_general_dilated` of an image with a kernel, and gradients fit for loops.

    Differentiable once, in reverse, in `x` and `w`. A 1x1 kernel is a plain matmul. Under
    `vmap` over kernels it becomes a grouped convolution, slow on a CPU: use `lax.map` there.

    Args:
      x: Image, float32 or a shorter float; sums are in float32 whichever it is.
      w: Kernel, in the dtype of `x`.
      strides: Step between output pixels.
      pads: Zeros before and after rows and columns; `explicit_padding` has them.

    Returns:
      In the dtype of `x`; each gradient has the dtype of what it is of.

    Raises:
      TypeError: If the dtypes differ.
    """
    if x.dtype != w.dtype:
        raise TypeError(
            f"x and w must have the same dtype; got {x.dtype} and {w.dtype}. "
            "Cast one of them; its gradient is then cast back."
        )
    if w.shape[:2] == (1, 1):
        seen = pad_image(x, pads, None)[:, ::strides, ::strides]
        return jnp.matmul(seen, w[0, 0], preferred_element_type=jnp.float32).astype(x.dtype)
    return _conv(x, w, strides, pads)


def _plain(x, w, strides: int, pads: Padding):
    return lax.conv_general_dilated(x, w, (strides, strides), pads, dimension_numbers=IMAGE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, w, strides: int, pads: Padding):
    def wide(x, w):
        # The fast convolution of a CPU knows no bfloat16.
        y = _plain(x.astype(jnp.float32), w.astype(jnp.float32), strides, pads)
        return y.astype(x.dtype)

    plain = functools.partial(_plain, strides=strides, pads=pads)
    return by_platform(x, w, cpu=wide, default=plain)


def _forward(x, w, strides, pads):
    return _conv(x, w, strides, pads), (x, w)


def _backward(strides, pads, saved, dy):
    x, w = saved

    def transposed(x, w, dy):
        x, w, dy = (array.astype(jnp.float32) for array in (x, w, dy))
        return input_gradient(dy, w, x.shape, strides, pads).astype(saved[0].dtype), (
            kernel_gradient(x, dy, w.shape, strides, pads).astype(saved[1].dtype)
        )

    def as_jax_does(x, w, dy):
        return jax.vjp(functools.partial(_plain, strides=strides, pads=pads), x, w)[1](dy)

    return by_platform(x, w, dy, cpu=transposed, default=as_jax_does)


_conv.defvjp(_forward, _backward)


def input_gradient(
    dy: Float[Array, "b h2 w2 o"],
    w: Float[Array, "kh kw i o"],
    shape: tuple[int, ...],
    strides: int,
    pads: Padding,
) -> Float[Array, "b h w i"]:
    """The gradient to an image of `shape`: `dy`, spread out, convolved with `w` turned over."""
    around = []
    for size, kernel, (before, _), out in zip(
        shape[1:3], w.shape[:2], pads, dy.shape[1:3], strict=True
    ):
        first = kernel - 1 - before
        around.append((first, size + kernel - 1 - first - ((out - 1) * strides + 1)))
    turned = jnp.swapaxes(w[::-1, ::-1], 2, 3)
    return lax.conv_general_dilated(
        dy, turned, (1, 1), around, lhs_dilation=(strides, strides), dimension_numbers=IMAGE
    )


def kernel_gradient(
    x: Float[Array, "b h w i"],
    dy: Float[Array, "b h2 w2 o"],
    shape: tuple[int, ...],
    strides: int,
    pads: Padding,
) -> Float[Array, "kh kw i o"]:
    """The gradient to a kernel of `shape`: `x`, with its batch as channels, convolved with `dy`."""
    around = []
    for size, kernel, (before, _), out in zip(
        x.shape[1:3], shape[:2], pads, dy.shape[1:3], strict=True
    ):
        # What no output reads is cut off: the result then is exactly as large as the kernel.
        around.append((before, kernel + (out - 1) * strides - size - before))
    images, taps = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(dy, (1, 2, 0, 3))
    dw = lax.conv_general_dilated(
        images, taps, (1, 1), around, rhs_dilation=(strides, strides), dimension_numbers=IMAGE
    )
    return jnp.transpose(dw, (1, 2, 0, 3))
