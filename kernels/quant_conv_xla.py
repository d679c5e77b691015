"""Low-bit convolution as matmuls of int8 patches, in plain XLA.

A convolution is the matmul of its patches, `[b, h, w, taps * i]`, with its kernel read as
`[taps * i, o]`. Patches of int8 codes cost a quarter of the memory of float ones. Four forms
give the same integers:

- `im2col` gathers all taps side by side, for one matmul;
- `shifted_dots` adds up one matmul per tap, of the shifted image, and gathers nothing;
- `float_dots` is the float convolution of the integers, exact while sums stay below 2**24;
- `native_dots` is XLA's own integer convolution, for TPUs, whose matrix unit does it without
  any patches in memory. It is about as fast as patches on a CPU, but six times slower with few
  channels, and weak on GPUs (jax#7637).

With float activations the weights are what must not grow: `weight_conv_xla` dequantizes one
tap at a time.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int, Shaped
from qjax.kernels.packing import Format
from qjax.kernels.quant_matmul_xla import weight_matmul_xla

Padding = tuple[tuple[int, int], tuple[int, int]]

# Dimension numbers of `lax.conv_general_dilated`.
IMAGE = ("NHWC", "HWIO", "NHWC")


def explicit_padding(
    padding: str | Sequence[tuple[int, int]],
    image: Sequence[int],
    kernel: Sequence[int],
    strides: int,
) -> Padding:
    """Padding as numbers of pixels, as XLA understands `"SAME"` and `"VALID"`."""
    if isinstance(padding, str):
        rows, columns = lax.padtype_to_pads(image, kernel, (strides, strides), padding)
    else:
        rows, columns = padding
    return (rows[0], rows[1]), (columns[0], columns[1])


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
    x: Int[Array, "b h w i"], q: Array, strides: int, fmt: Format
) -> Int[Array, "b h2 w2 o"]:
    """The integer convolution of a padded image as one matmul per tap, summed in int32.

    Args:
      x: Codes of the padded image, int8.
      q: Weight codes `[kh, kw, ., o]` as `fmt` stores them along the axis before the last;
        a tap is unpacked when its turn comes.
      strides: Step between output pixels.
      fmt: Storage of `q`.
    """

    def tap(view, at):
        codes = fmt.decode(at(q))[: x.shape[3]]
        return jnp.matmul(view, codes, preferred_element_type=jnp.int32)

    return _sum_of_taps(tap, x, q.shape, strides, jnp.int32)


def native_dots(
    x: Int[Array, "b h w i"],
    q: Int[Array, "kh kw i o"],
    strides: int,
    x_zero: Int[Array, "#b 1 1 1"] | None = None,
) -> Int[Array, "b h2 w2 o"]:
    """The integer convolution of a padded image by XLA's, in int32.

    Args:
      x: Codes of the image, int8, padded with their zero point.
      q: Codes of the weights, int8.
      strides: Step between output pixels.
      x_zero: Zero points of the images, or None.
    """
    dots = lax.conv_general_dilated(
        x,
        q,
        (strides, strides),
        "VALID",
        dimension_numbers=IMAGE,
        preferred_element_type=jnp.int32,
    )
    if x_zero is None:
        return dots
    return dots - x_zero.astype(jnp.int32) * jnp.sum(q, axis=(0, 1, 2), dtype=jnp.int32)


def float_dots(
    x: Int[Array, "b h w i"], q: Int[Array, "kh kw i o"], strides: int, padding: Padding
) -> Float[Array, "b h2 w2 o"]:
    """The integer convolution of an image by the float32 convolution of a CPU.

    The same integers, as long as no partial sum reaches 2**24 (`float_dots_are_exact`). The
    image is padded with zeros, here and not before, which a CPU's convolution does for free.
    Accelerators round the operands of float32 convolutions, so this is not for them.
    """
    x, q = x.astype(jnp.float32), q.astype(jnp.float32)
    return lax.conv_general_dilated(x, q, (strides, strides), padding, dimension_numbers=IMAGE)


def float_dots_are_exact(terms: int, bits: int) -> bool:
    """Whether sums of `terms` products of 8-bit codes and `bits`-bit codes fit a float32."""
    return terms * 2**7 * 2 ** (bits - 1) <= 2**24


def weight_conv_xla(
    x: Float[Array, "b h w i"],
    q: Array,
    w_scale: Float[Array, "kh kw g o"],
    w_zero: Int[Array, "kh kw g o"] | None,
    *,
    strides: int,
    fmt: Format,
) -> Float[Array, "b h2 w2 o"]:
    """The float convolution of a padded image with weights dequantized tap by tap.

    The taps are summed in float32 inside a loop, so that no more than a piece of one tap is
    ever wider than it is stored.

    Args:
      x: Padded image, any float dtype; the result has it too.
      q: Weight codes `[kh, kw, ., o]` as `fmt` stores them along the axis before the last.
      w_scale: Steps of the weights; an axis of size 1 is shared.
      w_zero: Zero points of the weights, shaped as `w_scale`, or None.
      strides: Step between output pixels.
      fmt: Storage of `q`.
    """

    def tap(view, at):
        parts = (at(array) for array in (q, w_scale, w_zero))
        return weight_matmul_xla(view, *parts, fmt=fmt, dtype=jnp.float32)

    return _sum_of_taps(tap, x, q.shape, strides, jnp.float32).astype(x.dtype)


def _sum_of_taps(
    tap: Callable[..., Array],
    x: Array,
    kernel: tuple[int, ...],
    strides: int,
    dtype: jnp.dtype,
) -> Shaped[Array, "b h2 w2 o"]:
    """The sum of `tap(view, at)` over the taps of a kernel `[kh, kw, ., o]`, in a loop.

    `view` `[b * h2 * w2, i]` is the image as the tap sees it; `at` picks the tap's part of an
    array `[kh, kw, ., .]`, or the shared one of `[1, 1, ., .]`.
    """
    kh, kw, _, o = kernel
    b, h, w, i = x.shape
    h2, w2 = (h - kh) // strides + 1, (w - kw) // strides + 1
    window = (b, (h2 - 1) * strides + 1, (w2 - 1) * strides + 1, i)

    def add_tap(index, total):
        row, column = index // kw, index % kw
        view = lax.dynamic_slice(x, (0, row, column, 0), window)[:, ::strides, ::strides]

        def at(array):
            if array is None or array.shape[:2] == (1, 1):
                return None if array is None else array[0, 0]
            return lax.dynamic_slice(array, (row, column, 0, 0), (1, 1, *array.shape[2:]))[0, 0]

        return total + tap(view.reshape(-1, i), at)

    total = lax.fori_loop(0, kh * kw, add_tap, jnp.zeros((b * h2 * w2, o), dtype))
    return total.reshape(b, h2, w2, o)
