"""Low-bit convolutions: the same integers by patches, by shifts and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kernels import packing
from qjax.kernels.packing import Format
from qjax.kernels.quant_conv_xla import (
    explicit_padding,
    float_dots,
    float_dots_are_exact,
    im2col,
    native_dots,
    pad_image,
    shifted_dots,
    weight_conv_xla,
)

# Kernel, strides, padding: those of the UNets and autoencoders, and ragged ones.
GEOMETRIES = [
    ((3, 3), 1, ((1, 1), (1, 1))),
    ((3, 3), 2, ((1, 1), (1, 1))),
    ((3, 3), 2, ((0, 1), (0, 1))),  # the downsampling of AutoencoderKL
    ((1, 1), 1, ((0, 0), (0, 0))),
    ((1, 1), 2, ((0, 0), (0, 0))),
    ((4, 2), 3, ((2, 0), (1, 3))),
]


def convolve(x, q, strides, padding, zero=0):
    """The convolution in int64 or float64, pixel by pixel; padded with `zero`."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=zero)
    kh, kw, _, o = q.shape
    h, w = (x.shape[1] - kh) // strides + 1, (x.shape[2] - kw) // strides + 1
    y = np.zeros((x.shape[0], h, w, o), np.result_type(x, q))
    for row in range(h):
        for column in range(w):
            top, left = row * strides, column * strides
            window = x[:, top : top + kh, left : left + kw]
            y[:, row, column] = np.einsum("bhwi,hwio->bo", window, q)
    return y


def draw(kernel, i=5, o=3, bits=8):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (2, 7, 9, i)).astype(np.int8)
    q = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (*kernel, i, o)).astype(np.int8)
    return x, q


@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
def test_all_forms_give_the_integers_of_the_definition(kernel, strides, padding):
    x, q = draw(kernel)

    @jax.jit
    def all_forms(x, q):
        padded = pad_image(x, padding, None)
        patches = im2col(padded, kernel, strides)
        dot = functools.partial(jnp.matmul, preferred_element_type=jnp.int32)
        return (
            dot(patches, q.reshape(-1, q.shape[-1])),
            shifted_dots(padded, q, strides, Format(bits=8)),
            float_dots(x, q, strides, padding),
            native_dots(padded, q, strides),
        )

    wanted = convolve(x.astype(np.int64), q.astype(np.int64), strides, padding)
    for result in all_forms(x, q):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES[:3])
def test_codes_padded_with_their_zero_point_are_floats_padded_with_zero(kernel, strides, padding):
    """One zero point per image: what is subtracted after the sum leaves nothing of the border."""
    x, q = draw(kernel)
    zero_point = np.array([-37, 90], np.int64)[:, None, None, None]
    x64, q64 = x.astype(np.int64), q.astype(np.int64)

    @jax.jit
    def corrected(x, q):
        codes = pad_image(x, padding, jnp.asarray(zero_point, jnp.int32))
        taps = jnp.sum(q, axis=(0, 1, 2), dtype=jnp.int32)
        zero = jnp.asarray(zero_point, jnp.int32)
        return (
            shifted_dots(codes, q, strides, Format(bits=8)) - zero * taps,
            native_dots(codes, q, strides, zero),
        )

    wanted = convolve(x64 - zero_point, q64, strides, padding)
    for result in corrected(x, q):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("kernel, strides, padding", GEOMETRIES)
@pytest.mark.parametrize("groups", (1, 3))
def test_the_convolution_of_floats_dequantizes(kernel, strides, padding, groups):
    _, q = draw(kernel, i=36, o=70, bits=4)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 7, 9, 36)).astype(np.float32)
    lead = kernel if groups > 1 else (1, 1)
    scale = rng.uniform(0.01, 0.1, (*lead, groups, 70)).astype(np.float32)
    zero = rng.integers(-8, 8, scale.shape).astype(np.int8)
    block, _, pad = packing.packed_size(36, 4)
    fmt = Format(bits=4, block=block, pad=pad, packed=True)

    @jax.jit
    def run(x, q):
        packed = packing.pack(q, bits=4)
        image = pad_image(x, padding, None)
        return weight_conv_xla(image, packed, scale, zero, strides=strides, fmt=fmt)

    spread = lambda small: np.repeat(
        np.broadcast_to(small, (*kernel, *small.shape[2:])), 36 // groups, 2
    )
    weights = (q.astype(np.float64) - spread(zero)) * spread(scale)
    wanted = convolve(x.astype(np.float64), weights, strides, padding)
    magnitude = convolve(np.abs(x).astype(np.float64), np.abs(weights), strides, padding)
    # Sums of up to 36 * 9 float32 products, in the order of the loop.
    assert (np.abs(run(x, q) - wanted) <= 36 * 9 * 2**-24 * magnitude).all()


@pytest.mark.parametrize("bits", (4, 8))
def test_float_sums_are_exact_as_far_as_claimed(bits):
    """The largest number of largest products; one more would not be sure."""
    terms = 2 ** (24 - 7 - (bits - 1))
    assert float_dots_are_exact(terms, bits)
    assert not float_dots_are_exact(terms + 1, bits)
    x = np.full((1, 1, 1, terms), -128, np.int8)
    q = np.full((1, 1, terms, 1), -(2 ** (bits - 1)), np.int8)
    q[0, 0, -1], x[..., -1] = 1, -1
    wanted = convolve(x.astype(np.int64), q.astype(np.int64), 1, ((0, 0), (0, 0)))
    np.testing.assert_array_equal(
        np.asarray(float_dots(x, q, 1, ((0, 0), (0, 0))), np.int64), wanted
    )


@pytest.mark.parametrize("strides", (1, 2, 3))
@pytest.mark.parametrize("padding", ("SAME", "VALID"))
def test_named_padding_is_that_of_xla(padding, strides):
    x, q = np.ones((1, 7, 10, 2), np.float32), np.ones((3, 4, 2, 1), np.float32)
    pads = explicit_padding(padding, (7, 10), (3, 4), strides)
    wanted = jax.eval_shape(
        lambda x, q: jax.lax.conv_general_dilated(
            x, q, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        q,
    )
    assert convolve(x, q, strides, pads).shape == wanted.shape
    assert explicit_padding(pads, (7, 10), (3, 4), strides) == pads
