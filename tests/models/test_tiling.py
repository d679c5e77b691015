"""Tiles and slices: the same as diffusers', the same as the whole where they can be, smaller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import array, assert_close, from_torch, to_torch

from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.autoencoder_kl import AutoencoderKL, checkpoint_keys
from qjax.models.convert import convert
from qjax.models.tiling import one_at_a_time, tiled

# Tiles of 8 latents, or of 16 pixels.
TINY = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "sample_size": 16,
}
TILE = 8
# Heights and widths in latents: barely too large, with edges of one pixel and of nearly a tile.
SIZES = [(8, 9), (12, 8), (13, 19), (14, 20), (25, 11)]


@functools.cache
def tiny_model():
    """A model with random weights everywhere, and the tensors of its checkpoint."""
    config = AutoencoderKLConfig.from_diffusers(TINY)
    rng, targets = np.random.default_rng(0), checkpoint_keys(config)
    tensors = {
        key: rng.normal(0, 0.2, target.shape).astype(np.float32) for key, target in targets.items()
    }
    return AutoencoderKL(config), convert(tensors, targets), tensors


def reference_model():
    """Diffusers' model with the same weights; everything larger than a tile is tiled."""
    torch = pytest.importorskip("torch")
    import diffusers

    _, _, tensors = tiny_model()
    theirs = diffusers.AutoencoderKL.from_config(TINY).eval()
    theirs.load_state_dict({key: torch.tensor(w) for key, w in tensors.items()})
    theirs.enable_tiling()
    return theirs


def apply(method):
    model, params, _ = tiny_model()
    return functools.partial(model.apply, {"params": params}, method=method)


def tiled_by(function, **settings):
    """`tiled`, compiled."""
    return jax.jit(functools.partial(tiled, function, **settings))


def centred_and_doubled(x):
    """Twice as large, less the mean of the tile: tiles differ where they overlap."""
    x = x - jnp.mean(x, axis=(1, 2), keepdims=True)
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


# Tiles


@pytest.mark.quick_cases("size0", "size2", "size4")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("size", SIZES)
def test_tiles_and_their_blending_are_those_of_diffusers(size):
    torch = pytest.importorskip("torch")

    class CentredAndDoubled(torch.nn.Module):
        def forward(self, x):
            x = x - x.mean((2, 3), keepdim=True)
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    theirs = reference_model()
    theirs.decoder, theirs.post_quant_conv = CentredAndDoubled(), torch.nn.Identity()
    z = array(2, *size, 4)
    ours = tiled_by(centred_and_doubled, tile=TILE)(z)
    assert_close(ours, from_torch(theirs.decode(to_torch(z)).sample))
    assert np.abs(ours - jax.jit(centred_and_doubled)(z)).max() > 0.1  # not that of the whole


@pytest.mark.torch_oracle
def test_tiled_decode_agrees_with_diffusers():
    assert tiny_model()[0].config.latent_tile == TILE
    z = array(2, 14, 20, 4)
    ours = tiled_by(apply("decode"), tile=TILE)(z)
    assert_close(ours, from_torch(reference_model().decode(to_torch(z)).sample))


@pytest.mark.torch_oracle
def test_tiled_encode_agrees_with_diffusers():
    x = array(1, 28, 40, 3)
    ours = tiled_by(apply("moments"), tile=2 * TILE)(x)
    expected = reference_model().encode(to_torch(x)).latent_dist.parameters
    assert_close(ours, from_torch(expected))


@pytest.mark.parametrize(
    ("size", "overlap"), [*zip(SIZES, [0, 1, None, 3, 4], strict=True), ((9, 9), 4)]
)
def test_what_sees_one_pixel_at_a_time_is_the_same_in_tiles(size, overlap):
    x = array(1, *size, 2)
    grown = lambda x: jnp.repeat(jnp.repeat(x, 3, axis=1), 2, axis=2)
    ours = tiled_by(grown, tile=TILE, overlap=overlap)(x)
    expected = x.repeat(3, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_what_fits_into_one_tile_is_left_whole():
    x = array(2, 8, 5, 2)
    seen = []
    assert tiled(lambda tile: seen.append(tile) or tile, x, tile=TILE) is x
    assert seen == [x]


def test_alike_tiles_share_a_program():
    sizes = []

    def function(x):
        sizes.append(x.shape[1:3])
        return x

    x = array(1, 38, 44, 1)
    np.testing.assert_allclose(tiled_by(function, tile=8)(x), x, rtol=1e-5)
    assert sorted(sizes) == [(2, 2), (2, 8), (8, 2), (8, 8)]


def test_gradient_of_tiles_is_that_of_the_whole():
    x, weights = array(1, 13, 11, 2), array(1, 13, 11, 2, seed=1)
    loss = lambda x: jnp.vdot(weights, tiled(jnp.sin, x, tile=TILE))
    of_tiles = jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(of_tiles, weights * np.cos(x), rtol=1e-4, atol=1e-5)


def test_tiles_work_under_vmap():
    x = array(4, 13, 11, 2)
    function = functools.partial(tiled, centred_and_doubled, tile=TILE)
    stacked = jax.jit(jax.vmap(function))(x.reshape(2, 2, 13, 11, 2))
    expected = np.asarray(jax.jit(function)(x))
    assert_close(stacked.reshape(expected.shape), expected)


def test_tiles_keep_the_dtype():
    x = jax.ShapeDtypeStruct((1, 13, 11, 2), jnp.bfloat16)
    result = jax.eval_shape(functools.partial(tiled, centred_and_doubled, tile=TILE), x)
    assert (result.shape, result.dtype) == ((1, 26, 22, 2), jnp.bfloat16)


@pytest.mark.parametrize("overlap", [-1, 5])
def test_overlap_of_more_than_half_a_tile_raises(overlap):
    with pytest.raises(ValueError, match=rf"overlap from 0 to half .* overlap={overlap}\. Use"):
        tiled(jnp.sin, array(1, 9, 9, 1), tile=TILE, overlap=overlap)


def test_overlap_between_two_pixels_of_the_result_raises():
    halved = lambda x: x[:, ::2, ::2]
    x = jax.ShapeDtypeStruct((1, 15, 15, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"whole at the scale 1/2 .* got 1\. Use multiples of 2"):
        jax.eval_shape(functools.partial(tiled, halved, tile=TILE, overlap=1), x)


# Slices


def test_one_image_at_a_time_gives_what_the_batch_gives():
    z, decode = array(3, 8, 4, 4), apply("decode")
    together = jax.jit(decode)(z)
    one_by_one = jax.jit(functools.partial(one_at_a_time, decode))(z)
    assert_close(one_by_one, np.asarray(together))


def test_one_image_at_a_time_takes_functions_of_many_results():
    double, total = one_at_a_time(lambda x: (2 * x, x.sum((1, 2, 3))), array(3, 2, 2, 1))
    assert np.array_equal(double, 2 * array(3, 2, 2, 1))
    np.testing.assert_allclose(total, array(3, 2, 2, 1).sum((1, 2, 3)), rtol=1e-5)


# Memory


def temporary_bytes(function, *shape):
    program = jax.jit(function).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_slices_and_tiles_need_less_memory():
    decode, shape = apply("decode"), (6, 40, 40, 4)
    whole_batch = temporary_bytes(decode, *shape)
    slices = temporary_bytes(functools.partial(one_at_a_time, decode), *shape)
    assert slices < whole_batch / 4
    tiles = temporary_bytes(functools.partial(tiled, decode, tile=2 * TILE), *shape)
    assert tiles < whole_batch / 4
