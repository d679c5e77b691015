"""Attention that the model files share."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Dense
from qjax.core.typing import Array, Float
from qjax.models.resnet import GroupNorm


def dot_product_attention(
    query: Float[Array, "b q n k"], key: Float[Array, "b t n k"], value: Float[Array, "b t n k"]
) -> Float[Array, "b q n k"]:
    """`softmax(query key^T / sqrt(k)) value` for every head, the softmax in float32."""
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bqnk,btnk->bnqt", query * scale, key)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(value.dtype)
    return jnp.einsum("bnqt,btnk->bqnk", weights, value)


class AttentionBlock(nn.Module):
    """Self-attention among the pixels of an image, added to it.

    `(x + to_out(attention(norm(x)))) / output_scale`, the attention over the `h * w`
    pixels, `heads` heads wide. The UNets and the autoencoders place it after ResNet blocks.

    Attributes:
      heads: Number of heads.
      head_dim: Width of a head.
      groups: Groups of the normalisation; None for no normalisation.
      eps: Epsilon of the normalisation.
      output_scale: The sum is divided by it.
    """

    heads: int
    head_dim: int
    groups: int | None = 32
    eps: float = 1e-6
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = x.reshape(b, h * w, c)
        if self.groups is not None:
            tokens = GroupNorm(self.groups, self.eps, name="group_norm")(tokens)
        width = self.heads * self.head_dim
        query, key, value = (
            Dense(width, name=name)(tokens).reshape(b, h * w, self.heads, self.head_dim)
            for name in ("to_q", "to_k", "to_v")
        )
        out = dot_product_attention(query, key, value).reshape(b, h * w, width)
        out = Dense(c, name="to_out_0")(out).reshape(x.shape)
        return (x + out) / self.output_scale
