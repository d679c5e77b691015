"""Packing: every value comes back, in exactly the bytes that were promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qjax.kernels import packing

BITS = tuple(packing.PLANES)

# Channels of real layers, and what breaks blocks: 1, primes, sizes below a byte.
SIZES = (1, 3, 8, 64, 251, 257, 320, 1152)


def random_codes(shape, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return np.random.default_rng(0).integers(low, high, shape).astype(np.int8)


@functools.partial(jax.jit, static_argnames="bits")
def round_trip(codes, bits):
    block, _, pad = packing.packed_size(codes.shape[-2], bits)
    return packing.unpack(packing.pack(codes, bits=bits), bits=bits, block=block, pad=pad)


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_gives_back_what_was_packed(bits):
    codes = [random_codes((size, 3), bits) for size in SIZES]
    back = jax.jit(lambda codes: [round_trip(part, bits) for part in codes])(codes)
    jax.tree.map(np.testing.assert_array_equal, back, codes)


@given(st.data(), st.sampled_from(BITS))
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_back_any_values(data, bits):
    codes = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = data.draw(hnp.arrays(np.int8, (37, 2), elements=codes))
    np.testing.assert_array_equal(round_trip(values, bits), values)


@given(size=st.integers(1, 20_000), bits=st.sampled_from(BITS))
def test_a_value_takes_its_bits_and_no_more(size, bits):
    block, length, pad = packing.packed_size(size, bits)
    assert length * 8 == (size + pad) * bits
    assert (size + pad) % block == 0
    assert 0 <= pad < block <= packing.MAX_BLOCK
    assert size % 32 or not pad


@pytest.mark.parametrize("bits", BITS)
def test_packing_makes_as_many_bytes_as_announced(bits):
    shapes = [
        jax.eval_shape(
            functools.partial(packing.pack, bits=bits), jax.ShapeDtypeStruct((size, 2), jnp.int8)
        )
        for size in SIZES
    ]
    lengths = [packing.packed_size(size, bits)[1] for size in SIZES]
    assert [shape.shape for shape in shapes] == [(length, 2) for length in lengths]
    assert {shape.dtype for shape in shapes} == {jnp.dtype(jnp.uint8)}


def test_bytes_of_four_bits_hold_the_two_halves_of_a_block():
    """The layout that the docstring, and kernels that unpack by themselves, rely on."""
    codes = random_codes((512, 5), 4)
    packed = np.asarray(packing.pack(jnp.asarray(codes), bits=4)).reshape(2, 128, 5)
    halves = (codes.astype(int) + 8).reshape(2, 2, 128, 5)
    np.testing.assert_array_equal(packed & 15, halves[:, 0])
    np.testing.assert_array_equal(packed >> 4, halves[:, 1])


def test_bytes_of_three_bits_hold_a_plane_of_two_and_a_plane_of_one():
    codes = random_codes((16, 1), 3)
    stored = (codes.astype(int) + 4).reshape(16)
    low = [sum((stored[j + 4 * k] & 3) << 2 * k for k in range(4)) for j in range(4)]
    high = [sum((stored[j + 2 * k] >> 2) << k for k in range(8)) for j in range(2)]
    packed = packing.pack(jnp.asarray(codes), bits=3)
    np.testing.assert_array_equal(packed[:, 0], low + high)


@pytest.mark.parametrize("bits", BITS)
def test_blocks_unpack_by_themselves(bits):
    """So that a shard, or a piece in a kernel, needs nothing of its neighbours."""
    codes = random_codes((512, 4), bits)

    @jax.jit
    def second_block(codes):
        packed = packing.pack(codes, bits=bits)[256 * bits // 8 :]
        return packing.unpack(packed, bits=bits, block=256)

    np.testing.assert_array_equal(second_block(codes), codes[256:])


@pytest.mark.parametrize("bits", (3, 4))
def test_leading_axes_are_packed_each_for_itself(bits):
    codes = jnp.asarray(random_codes((3, 40, 5), bits))
    pack = functools.partial(packing.pack, bits=bits)
    np.testing.assert_array_equal(jax.jit(pack)(codes), jax.jit(jax.vmap(pack))(codes))
    np.testing.assert_array_equal(round_trip(codes, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_format_decodes_what_it_describes(bits):
    codes = jnp.asarray(random_codes((100, 3), bits))
    block, _, pad = packing.packed_size(100, bits)
    packed = packing.Format(bits=bits, block=block, pad=pad, packed=True)
    native = packing.Format(bits=bits)
    stored = jax.jit(functools.partial(packing.pack, bits=bits))(codes)
    np.testing.assert_array_equal(jax.jit(packed.decode)(stored)[:100], codes)
    np.testing.assert_array_equal(native.decode(codes), codes)
    assert packed.widens
    assert native.widens == (bits <= 4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("reads", ("sum of squares", "distance"))
def test_packed_and_unpacked_in_one_program_codes_keep_their_signs(bits, reads):
    """XLA:CPU of jax 0.10 to 0.12 lost them where the differences were of unsigned bytes."""
    rng = np.random.default_rng(bits)
    codes = jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (256, 128)), jnp.int8)
    block, _, pad = packing.packed_size(256, bits)

    @jax.jit
    def program(codes):
        packed = packing.pack(codes, bits=bits)
        back = packing.unpack(packed, bits=bits, block=block, pad=pad).astype(jnp.float32)
        if reads == "distance":
            return jnp.max(jnp.abs(back - codes.astype(jnp.float32)))
        return jnp.sum(jnp.square(back))

    expected = 0 if reads == "distance" else np.sum(np.square(np.asarray(codes, np.int64)))
    assert float(program(codes)) == pytest.approx(float(expected), rel=1e-6)
