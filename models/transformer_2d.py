"""The spatial transformer: what lets a UNet's image look at itself and at a text.

The pixels of an image become tokens `h`, which pass through blocks of three residual steps,

    h <- h + attention(norm1(h), norm1(h))
    h <- h + attention(norm2(h), text)
    h <- h + W_2 (a * gelu(g)),    [a, g] = W_1 norm3(h)

and are added to the image again. The function is that of diffusers' `Transformer2DModel` on
images, with its names for parameters (`transformer_blocks.0.attn1.to_q` is
`transformer_blocks_0/attn1/to_q` here).

References:
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752, section 3.3 and appendix E.2.1.
  Shazeer, GLU Variants Improve Transformer, 2020, https://arxiv.org/abs/2002.05202, for GEGLU.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv, Dense
from qjax.core.typing import Array, Float, Shaped
from qjax.models.attention import dot_product_attention
from qjax.models.resnet import GroupNorm

MASKED_SCORE = -10000.0
"""What a masked token's score is lowered by; diffusers' value."""


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32, the result in `x.dtype`.

    Attributes:
      eps: Added to the variance.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        scale, bias = (p.astype(jnp.float32) for p in (scale, bias))
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.eps) * scale + bias
        return y.astype(x.dtype)


def mask_as_channel(
    query: Float[Array, "b q n k"], key: Float[Array, "b t n k"], mask: Shaped[Array, "b t"]
) -> tuple[Float[Array, "b q n k2"], Float[Array, "b t n k2"]]:
    """Query and key with one more channel, which lowers the scores of masked tokens.

    A bias of the scores that depends on the key alone is a product of a constant channel of
    the query and a channel of the key, so that attention needs no other input. It divides
    scores by the root of the width, here `k + 1` and not `k`, which the query makes up for.

    Args:
      query: Queries.
      key: Keys.
      mask: True or 1 for tokens that are looked at, False or 0 for the others.
    """
    k = query.shape[-1]
    bias = jnp.where(mask.astype(bool), 0.0, MASKED_SCORE).astype(key.dtype)
    bias = jnp.broadcast_to(bias[:, :, None, None], (*key.shape[:-1], 1))
    constant = jnp.full((*query.shape[:-1], 1), (k + 1) ** 0.5, query.dtype)
    query = query * ((k + 1) / k) ** 0.5
    return (
        jnp.concatenate([query, constant], axis=-1),
        jnp.concatenate([key, bias], axis=-1),
    )


class Attention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves.

    Attributes:
      heads: Number of heads.
      head_dim: Width of a head.
      upcast: Whether queries and keys are multiplied in float32; the softmax always is.
    """

    heads: int
    head_dim: int
    upcast: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b t c"] | None = None,
        mask: Shaped[Array, "b t"] | None = None,
    ) -> Float[Array, "b q d"]:
        """The context is `x` itself if None; `mask` is as for `mask_as_channel`."""
        width = self.heads * self.head_dim
        context = x if context is None else context
        query, key, value = (
            Dense(width, use_bias=False, name=name)(tokens).reshape(
                *tokens.shape[:-1], self.heads, self.head_dim
            )
            for name, tokens in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        if self.upcast:
            query, key = query.astype(jnp.float32), key.astype(jnp.float32)
        if mask is not None:
            query, key = mask_as_channel(query, key, mask)
        out = dot_product_attention(query, key, value).reshape(*x.shape[:-1], width)
        return Dense(x.shape[-1], name="to_out_0")(out)


class GEGLU(nn.Module):
    """`a * gelu(g)`, both halves of one linear map of `x`.

    Attributes:
      features: Output width, half that of the linear map.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b o"]:
        a, g = jnp.split(Dense(2 * self.features, name="proj")(x), 2, axis=-1)
        return a * nn.gelu(g, approximate=False)


class FeedForward(nn.Module):
    """`GEGLU`, four times as wide as the tokens, and a linear map back."""

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        d = x.shape[-1]
        return Dense(d, name="net_2")(GEGLU(4 * d, name="net_0")(x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each normalised first and added.

    Attributes:
      heads: Number of heads.
      head_dim: Width of a head.
      only_cross_attention: Whether the first attention, too, is to the text.
      upcast: As for `Attention`.
    """

    heads: int
    head_dim: int
    only_cross_attention: bool = False
    upcast: bool = False

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b t d"],
        text: Float[Array, "b t2 c"],
        mask: Shaped[Array, "b t2"] | None = None,
    ) -> Float[Array, "b t d"]:
        attn1, attn2 = (
            Attention(self.heads, self.head_dim, self.upcast, name=name)
            for name in ("attn1", "attn2")
        )
        # A mask belongs to the second attention even where the first is to the text as well.
        context = text if self.only_cross_attention else None
        h = h + attn1(LayerNorm(name="norm1")(h), context)
        h = h + attn2(LayerNorm(name="norm2")(h), text, mask)
        return h + FeedForward(name="ff")(LayerNorm(name="norm3")(h))


class Transformer2DModel(nn.Module):
    """Transformer blocks on the pixels of an image, added to it.

    Attributes:
      heads: Number of heads.
      head_dim: Width of a head; a token is `heads * head_dim` wide.
      depth: Number of transformer blocks.
      groups: Groups of the normalisation; must divide the channels.
      linear: Whether the first and last projection are linear maps rather than 1x1
        convolutions; the function is the same.
      only_cross_attention: As for `BasicTransformerBlock`.
      upcast: As for `Attention`.
    """

    heads: int
    head_dim: int
    depth: int = 1
    groups: int = 32
    linear: bool = False
    only_cross_attention: bool = False
    upcast: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: Float[Array, "b t d"],
        mask: Shaped[Array, "b t"] | None = None,
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        width = self.heads * self.head_dim

        def project(features: int, name: str) -> nn.Module:
            if self.linear:
                return Dense(features, name=name)
            return Conv(features, (1, 1), padding="VALID", name=name)

        tokens = project(width, "proj_in")(GroupNorm(self.groups, 1e-6, name="norm")(x))
        tokens = tokens.reshape(b, h * w, width)
        for i in range(self.depth):
            block = BasicTransformerBlock(
                self.heads,
                self.head_dim,
                self.only_cross_attention,
                self.upcast,
                name=f"transformer_blocks_{i}",
            )
            tokens = block(tokens, text, mask)
        return x + project(c, "proj_out")(tokens.reshape(b, h, w, width))
