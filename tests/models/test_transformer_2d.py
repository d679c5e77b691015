"""The spatial transformer against diffusers' on the same random weights, from the inside out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import array, assert_close, randomize, to_torch, with_weights_of

from qjax.models.attention import dot_product_attention
from qjax.models.transformer_2d import (
    Attention,
    BasicTransformerBlock,
    FeedForward,
    LayerNorm,
    Transformer2DModel,
    mask_as_channel,
)

SHAPES = [(1, 4, 4), (3, 2, 5), (2, 7, 3)]  # batch, height, width
TEXT_TOKENS, TEXT_WIDTH, WIDTH = 5, 6, 8


def text_for(b):
    """A text, and a mask that leaves every image other tokens, at least two."""
    mask = np.arange(TEXT_TOKENS) <= 1 + np.arange(b)[:, None]
    return array(b, TEXT_TOKENS, TEXT_WIDTH, seed=1), mask


def masked_scores(mask):
    """The bias that diffusers makes of a mask before it comes to attention."""
    return (1 - to_torch(mask.astype(np.float32)))[:, None] * -10000.0


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    from diffusers.models import attention

    return attention


# Layers


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (2, 4, 16)])
def test_layer_norm_agrees_with_torch(shape):
    torch = pytest.importorskip("torch")
    theirs = randomize(torch.nn.LayerNorm(shape[-1], eps=1e-3))
    x = array(*shape) * 3 + 10
    assert_close(with_weights_of(theirs, LayerNorm(1e-3), x)(x), theirs(to_torch(x)))


def test_layer_norm_keeps_the_dtype_and_takes_statistics_in_float32():
    x = jnp.asarray(array(4, 64) + 100, jnp.bfloat16)
    variables = LayerNorm().init(jax.random.key(0), x)
    half = LayerNorm().apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables), x)
    full = LayerNorm().apply(variables, x.astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=2**-8)


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("to_text", [False, True])
def test_attention_agrees_with_diffusers(reference, shape, to_text):
    b, h, w = shape
    x, (text, mask) = array(b, h * w, WIDTH), text_for(b)
    context = (text, mask) if to_text else ()
    theirs = randomize(
        reference.Attention(
            query_dim=WIDTH,
            cross_attention_dim=TEXT_WIDTH if to_text else None,
            heads=2,
            dim_head=3,
        )
    )
    ours = with_weights_of(theirs, Attention(2, 3), x, *context)
    told = (to_torch(text), masked_scores(mask)) if to_text else ()
    assert_close(ours(x, *context), theirs(to_torch(x), *told))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", [(1, 4), (3, 5, 8), (2, 2, 12)])
def test_feed_forward_agrees_with_diffusers(reference, shape):
    theirs, x = randomize(reference.FeedForward(shape[-1])), array(*shape)
    assert_close(with_weights_of(theirs, FeedForward(), x)(x), theirs(to_torch(x)))


def masked_and_plain(b=2, q=3, t=TEXT_TOKENS, n=2, k=4):
    query, key, value = array(b, q, n, k), array(b, t, n, k, seed=1), array(b, t, n, k, seed=2)
    return query, key, value, text_for(b)[1]


def test_mask_that_keeps_all_tokens_changes_nothing():
    query, key, value, mask = masked_and_plain()
    kept = dot_product_attention(*mask_as_channel(query, key, np.ones_like(mask)), value)
    np.testing.assert_allclose(kept, dot_product_attention(query, key, value), atol=1e-6)


def test_masked_tokens_have_no_influence():
    query, key, value, mask = masked_and_plain()
    noise = 100 * array(*key.shape, seed=3) * ~mask[:, :, None, None]
    masked = dot_product_attention(*mask_as_channel(query, key, mask), value)
    moved = dot_product_attention(*mask_as_channel(query, key + noise, mask), value + noise)
    assert np.array_equal(masked, moved)
    alone = dot_product_attention(query[:1], key[:1, :2], value[:1, :2])
    np.testing.assert_allclose(masked[:1], alone, atol=1e-6)


def test_mask_of_ones_and_zeros_is_that_of_booleans():
    query, key, _, mask = masked_and_plain()
    assert np.array_equal(
        mask_as_channel(query, key, mask)[1], mask_as_channel(query, key, mask.astype(np.int32))[1]
    )


def test_upcast_attention_is_nearer_to_float32_in_bfloat16():
    x, width = array(2, 16, WIDTH), 2 * 16
    kernel = lambda seed, i, o: {"kernel": array(i, o, seed=seed)}
    params = {
        name: kernel(seed, WIDTH, width) for seed, name in enumerate(("to_q", "to_k", "to_v"))
    }
    params["to_out_0"] = kernel(3, width, WIDTH) | {"bias": np.zeros(WIDTH, np.float32)}
    full = jax.jit(Attention(2, 16).apply)({"params": params}, x)

    def error(upcast):
        half = jax.jit(Attention(2, 16, upcast).apply)({"params": params}, jnp.bfloat16(x))
        assert half.dtype == jnp.bfloat16
        return np.abs(np.asarray(half, np.float32) - full).mean()

    assert 0 < error(True) < error(False)


# Blocks


@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_transformer_block_agrees_with_diffusers(reference, shape, only_cross_attention):
    b, h, w = shape
    theirs = randomize(
        reference.BasicTransformerBlock(
            dim=WIDTH,
            num_attention_heads=2,
            attention_head_dim=4,
            cross_attention_dim=TEXT_WIDTH,
            only_cross_attention=only_cross_attention,
        )
    )
    x, (text, mask) = array(b, h * w, WIDTH), text_for(b)
    block = BasicTransformerBlock(2, 4, only_cross_attention)
    ours = with_weights_of(theirs, block, x, text, mask)
    told = {"encoder_hidden_states": to_torch(text), "encoder_attention_mask": masked_scores(mask)}
    assert_close(ours(x, text, mask), theirs(to_torch(x), **told))


@pytest.mark.quick_cases("False-4-shape0", "True-4-shape1", "False-3-shape2")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("linear", "head_dim"), [(False, 4), (True, 4), (False, 3)])
def test_transformer_agrees_with_diffusers(shape, linear, head_dim):
    pytest.importorskip("torch")
    from diffusers import Transformer2DModel as Reference

    theirs = randomize(
        Reference(
            num_attention_heads=2,
            attention_head_dim=head_dim,
            in_channels=WIDTH,
            num_layers=2,
            norm_num_groups=4,
            cross_attention_dim=TEXT_WIDTH,
            use_linear_projection=linear,
        )
    )
    x, (text, mask) = array(*shape, WIDTH), text_for(shape[0])
    model = Transformer2DModel(2, head_dim, depth=2, groups=4, linear=linear)
    ours = with_weights_of(theirs, model, x, text, mask)
    told = {"encoder_hidden_states": to_torch(text), "encoder_attention_mask": to_torch(mask)}
    assert_close(ours(x, text, mask), theirs(to_torch(x), **told, return_dict=False)[0])


def test_linear_projections_are_1x1_convolutions():
    x, (text, _) = array(2, 4, 3, WIDTH), text_for(2)
    model = Transformer2DModel(2, 4, groups=4)
    params = jax.jit(model.init)(jax.random.key(0), x, text)["params"]
    flat = {
        name: {"kernel": params[name]["kernel"][0, 0], "bias": params[name]["bias"]}
        for name in ("proj_in", "proj_out")
    }
    linear = jax.jit(model.clone(linear=True).apply)({"params": params | flat}, x, text)
    convolved = jax.jit(model.apply)({"params": params}, x, text)
    np.testing.assert_allclose(linear, convolved, atol=1e-5)


def test_transformer_without_blocks_is_two_projections():
    x, (text, _) = array(1, 2, 3, WIDTH), text_for(1)
    model = Transformer2DModel(2, 4, depth=0, groups=4)
    params = jax.eval_shape(model.init, jax.random.key(0), x, text)["params"]
    assert params.keys() == {"norm", "proj_in", "proj_out"}
