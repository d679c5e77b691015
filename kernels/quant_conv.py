"""The low-bit convolution of codes: what callers see, and the choice of a form.

These forms give the same integers:

| form | where |
|---|---|
| patches, and the low-bit matmul | everywhere; with the matmul's own choice of implementation |
| one matmul for each tap, of the shifted image | from 1280 input channels on |
| the float convolution of the integers | on a CPU, of few input channels |
| XLA's integer convolution | on a TPU, without groups |
| windows found in place (`quant_matmul_hopper.windows_matmul_hopper`) | on a Hopper GPU, if preferred |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from qjax.core.typing import Array, Float, Int
from qjax.kernels import quant_matmul_hopper as hopper
from qjax.kernels.packing import Format
from qjax.kernels.problem import Problem
from qjax.kernels.quant_conv_xla import (
    Padding,
    float_dots,
    float_dots_are_exact,
    im2col,
    native_dots,
    pad_image,
    shifted_dots,
)
from qjax.kernels.quant_matmul import Implementation, choose, on_its_platform, quant_matmul
from qjax.kernels.target import by_platform, current_target

# Forms by input channels, on a CPU (benchmarks/conv.py): one matmul per tap is faster than
# patches from here on, and gathers nothing; below the other number patches are too narrow for
# int8 matmuls, and float ones of the same integers twice as fast.
SHIFT_FROM_CHANNELS = 1280
FLOAT_BELOW_CHANNELS = 32


class Kernel(NamedTuple):
    """A convolution's low-bit weights.

    Attributes:
      q: Codes `[kh, kw, ., o]`, as `fmt` stores them along the axis before the last.
      scale: Steps `[kh, kw, g, o]`; an axis of size 1 is shared.
      zero: Zero points, shaped as `scale`, or None.
      fmt: Storage of `q`.
    """

    q: Array
    scale: Float[Array, "#kh #kw g #o"]
    zero: Int[Array, "#kh #kw g #o"] | None
    fmt: Format

    def codes(self, channels: int) -> Int[Array, "kh kw i o"]:
        """The integers, without the padding of the channels."""
        return self.fmt.decode(self.q)[..., :channels, :]

    def matrix(self, channels: int) -> "Kernel":
        """The same as a matrix `[kh * kw * channels, o]`, and groups of all taps.

        Padding at the end of every tap would fall between the rows, so it is cut out first.
        """
        kh, kw, _, o = self.q.shape
        padded = self.fmt.pad > 0
        q = self.codes(channels) if padded else self.q

        def by_group(array: Array) -> Array:
            if array.shape[:3] == (1, 1, 1):
                return array.reshape(1, array.shape[-1])
            spread = jnp.broadcast_to(array, (kh, kw, *array.shape[2:]))
            return spread.reshape(-1, array.shape[-1])

        zero = None if self.zero is None else by_group(self.zero)
        fmt = Format(bits=self.fmt.bits) if padded else self.fmt
        return Kernel(q.reshape(-1, o), by_group(self.scale), zero, fmt)


def quant_conv(
    p: Int[Array, "b h w i"],
    x_scale: Float[Array, "#b #h #w gx"],
    x_zero: Int[Array, "#b #h #w gx"] | None,
    kernel: Kernel,
    *,
    strides: int,
    padding: Padding,
    dtype: Any = jnp.float32,
    implementation: Implementation = "auto",
) -> Float[Array, "b h2 w2 o"]:
    """Convolution of activation codes and weight codes, summed in float32.

    Every window is a row of the low-bit matmul (`quant_matmul_xla` has the formula).

    Args:
      p: Activation codes, int8.
      x_scale: Their steps: of all images, of an image or of a pixel, with `gx` groups of
        channels.
      x_zero: Their zero points, shaped as `x_scale`, or None.
      kernel: The weights.
      strides: Step between output pixels.
      padding: Pixels around the images, which stand for zeros.
      dtype: Of the result.
      implementation: Of the matmuls.

    Raises:
      NotImplementedError: If the implementation asked for cannot run here.
    """
    (kh, kw, _, _), i = kernel.q.shape, p.shape[3]
    per_pixel = _per_pixel(x_scale)
    # The barrier keeps XLA from rounding a pixel again for every tap that sees it.
    p = lax.optimization_barrier(p)
    settings: dict[str, Any] = {"strides": strides, "padding": padding, "dtype": dtype}

    def by_patches(p: Array) -> Array:
        return _by_patches(p, x_scale, x_zero, kernel, implementation, **settings)

    def scaled(dots: Array) -> Array:
        return (dots.astype(jnp.float32) * x_scale * kernel.scale.astype(jnp.float32)).astype(dtype)

    if kh * kw == 1:
        return by_patches(p)
    if strides == 1 and not per_pixel and _takes_windows(kernel, x_scale, i, implementation):
        return _by_windows(p, x_scale, x_zero, kernel, **settings)
    plain = kernel.scale.shape[:3] == (1, 1, 1) and x_scale.shape[-1] == 1 and not per_pixel
    if implementation != "auto" or not plain or kernel.zero is not None:
        return by_patches(p)
    if current_target().platform == "tpu":

        def by_native(p: Array) -> Array:
            image = pad_image(p, padding, x_zero)
            return scaled(native_dots(image, kernel.codes(i), strides, x_zero))

        return by_platform(p, tpu=by_native, default=by_patches)
    if x_zero is not None:
        return by_patches(p)
    if i >= SHIFT_FROM_CHANNELS:
        image = pad_image(p, padding, None)
        return scaled(shifted_dots(image, kernel.q, strides, kernel.fmt))
    if i < FLOAT_BELOW_CHANNELS and float_dots_are_exact(kh * kw * i, kernel.fmt.bits):
        by_floats = lambda p: scaled(float_dots(p, kernel.codes(i), strides, padding))
        return by_platform(p, cpu=by_floats, default=by_patches)
    return by_patches(p)


def _per_pixel(x_scale: Array) -> bool:
    """Whether pixels have steps of their own, or groups of an image's channels have."""
    return x_scale.shape[1:3] != (1, 1) or (x_scale.shape[3] > 1 and x_scale.shape[0] != 1)


def _by_patches(
    p: Array,
    x_scale: Array,
    x_zero: Array | None,
    kernel: Kernel,
    implementation: Implementation,
    *,
    strides: int,
    padding: Padding,
    dtype: Any,
) -> Array:
    (kh, kw, _, o), i = kernel.q.shape, p.shape[3]
    per_pixel = _per_pixel(x_scale)

    def patches_of(image: Array, border: Array | None) -> Array:
        return im2col(pad_image(image, padding, border), (kh, kw), strides)

    # Zeros around the image: the zero points, or 0 where every pixel has its own.
    patches = patches_of(p, None if per_pixel else _per_channel(x_zero, i))
    *image, k = patches.shape

    def per_row(array: Array) -> Array:
        groups = array.shape[-1]
        if per_pixel:
            return patches_of(array, None).reshape(-1, kh * kw * groups)
        if groups > 1 or array.size == 1:  # one for all rows, the same in every tap
            return jnp.tile(array.reshape(1, groups), (1, kh * kw if groups > 1 else 1))
        return jnp.broadcast_to(array, (*image, 1)).reshape(-1, 1)

    w = kernel.matrix(i)
    y = quant_matmul(
        patches.reshape(-1, k),
        per_row(x_scale),
        None if x_zero is None else per_row(x_zero),
        w.q,
        w.scale,
        w.zero,
        fmt=w.fmt,
        dtype=dtype,
        implementation=implementation,
    )
    return y.reshape(*image, o)


def _by_windows(
    p: Array,
    x_scale: Array,
    x_zero: Array | None,
    kernel: Kernel,
    *,
    strides: int,
    padding: Padding,
    dtype: Any,
) -> Array:
    def windows(p: Array, x_scale: Array, x_zero: Array | None, kernel: Kernel) -> Array:
        w = kernel.matrix(p.shape[3])
        return hopper.windows_matmul_hopper(
            pad_image(p, padding, _per_channel(x_zero, p.shape[3])),
            x_scale,
            x_zero,
            w.q,
            w.scale,
            w.zero,
            taps=(kernel.q.shape[0], kernel.q.shape[1]),
            fmt=w.fmt,
            dtype=dtype,
        )

    patches = functools.partial(
        _by_patches, implementation="xla", strides=strides, padding=padding, dtype=dtype
    )

    def of_arrays(form: Callable[..., Array]) -> Callable[..., Array]:
        return lambda p, x_scale, x_zero, q, scale, zero: form(
            p, x_scale, x_zero, Kernel(q, scale, zero, kernel.fmt)
        )

    operands = (p, x_scale, x_zero, kernel.q, kernel.scale, kernel.zero)
    return on_its_platform("hopper", of_arrays(windows), of_arrays(patches), operands)


def _takes_windows(kernel: Kernel, x_scale: Array, channels: int, implementation: str) -> bool:
    """Whether the kernel for Hopper that finds windows in place is to run."""
    kh, kw, groups, _ = kernel.scale.shape
    groups = max(groups, x_scale.shape[-1])  # of a tap
    if groups == 1 and kh * kw > 1:
        return False  # a tap's channels are a group: too large for most
    problem = Problem(None, channels, kernel.q.shape[3], groups, kernel.fmt, jnp.int8)
    return choose(implementation, problem).implementation == "hopper"


def _per_channel(small: Array | None, channels: int) -> Array | None:
    """Values of groups of channels, along the last axis, for every channel."""
    return None if small is None else jnp.repeat(small, channels // small.shape[-1], axis=-1)
