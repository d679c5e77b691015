"""Low-bit convolution as matmuls of int8 patches, in plain XLA.

A convolution is the matmul of its patches, `[b, h, w, taps * i]`, with its kernel read as
`[taps * i, o]`. Patches of int8 codes cost a quarter of the memory of float ones. Two forms
give the same integers:

- `im2col` gathers all taps side by side and does one matmul;
- `shifted` adds up one matmul per tap, of the shifted image, and gathers nothing.

XLA's own int8 convolution is slower than both on a CPU and weak on GPUs (jax#7637).
"""

import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Int, Shaped

Padding = tuple[tuple[int, int], tuple[int, int]]


def explicit_padding(
    padding: str | Padding, image: tuple[int, int], kernel: tuple[int, int], strides: int
) -> Padding:
    """Padding as numbers of pixels, as XLA understands `"SAME"` and `"VALID"`."""
    if isinstance(padding, str):
        top, left = lax.padtype_to_pads(image, kernel, (strides, strides), padding)
        return tuple(top), tuple(left)
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)


def pad_image(
    x: Shaped[Array, "b h w i"], padding: Padding, value: Array | None
) -> Shaped[Array, "b h2 w2 i"]:
    """Surround the image with `value`, broadcastable to it; zeros if None.

    Codes are padded with their zero point, which is what the float image's zeros become.
    """
    if padding == ((0, 0), (0, 0)):
        return x
    widths = ((0, 0), *padding, (0, 0))
    padded = jnp.pad(x, widths)
    if value is None:
        return padded
    inside = jnp.pad(jnp.ones((1, *x.shape[1:3], 1), bool), widths)
    return jnp.where(inside, padded, value.astype(x.dtype))


def taps(
    x: Shaped[Array, "b h w i"], kernel: tuple[int, int], strides: int
) -> list[Shaped[Array, "b h2 w2 i"]]:
    """The image as each tap of the kernel sees it, row by row of the kernel."""
    height, width = kernel
    h2 = (x.shape[1] - height) // strides + 1
    w2 = (x.shape[2] - width) // strides + 1
    views = []
    for row in range(height):
        for column in range(width):
            last_row = row + (h2 - 1) * strides + 1
            last_column = column + (w2 - 1) * strides + 1
            views.append(x[:, row:last_row:strides, column:last_column:strides])
    return views


def im2col(
    x: Shaped[Array, "b h w i"], kernel: tuple[int, int], strides: int
) -> Shaped[Array, "b h2 w2 k"]:
    """Patches of a padded image, `taps * i` values for every output pixel."""
    views = taps(x, kernel, strides)
    return views[0] if len(views) == 1 else jnp.concatenate(views, axis=-1)


def shifted_dots(
    x: Int[Array, "b h w i"], q: Int[Array, "kh kw i o"], strides: int
) -> Int[Array, "b h2 w2 o"]:
    """The integer convolution of a padded image as one matmul per tap, summed in int32."""
    height, width, i, o = q.shape
    total = None
    for view, weights in zip(taps(x, (height, width), strides), q.reshape(-1, i, o), strict=True):
        dot = lax.dot_general(
            view, weights, (((3,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
        total = dot if total is None else total + dot
    return total
