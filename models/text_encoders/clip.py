"""The text towers of CLIP and OpenCLIP, which read the prompts of Stable Diffusion.

A causal transformer on tokens with learned positions; every layer computes

    h <- h + attention(norm(h))
    h <- h + mlp(norm(h))

and a last normalisation follows. The text as a whole is the state of its end token
(`pooled`), in some models mapped to the space shared with images (`text_embeds`). What the
diffusion models attend to:

| model | tower | states |
|---|---|---|
| Stable Diffusion 1 | `clip_l` | `last_hidden_state` |
| Stable Diffusion 2 | `openclip_h`, which ends a layer early | `last_hidden_state` |
| Stable Diffusion XL | `clip_l`, `openclip_bigg` | `hidden_states[-2]`, not normalised |

Stable Diffusion XL also takes the `text_embeds` of its second tower. Parameters carry the
names that transformers gives them.

References:
  Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
  2021, https://arxiv.org/abs/2103.00020, section 2.4.
  Cherti et al., Reproducible Scaling Laws for Contrastive Language-Image Learning, 2022,
  https://arxiv.org/abs/2212.07143, for OpenCLIP.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Dense
from qjax.core.typing import Array, Bool, Float, Int, Shaped
from qjax.models.dit import layer_norm
from qjax.models.text_encoders.clip_config import (
    ACTIVATIONS,
    LEGACY_EOS_TOKEN_ID,
    CLIPTextConfig,
    CLIPTowerConfig,
)

__all__ = [
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTextOutput",
    "text_encoder",
]


class CLIPTextOutput(NamedTuple):
    """What a text tower says of `b` texts of `t` tokens.

    Attributes:
      last_hidden_state: `[b, t, d]`, normalised.
      pooled: `[b, d]`: of these the state at the end of each text.
      text_embeds: `[b, projection_dim]`: `pooled`, projected; None without a projection.
      hidden_states: The `[b, t, d]` that `hidden_layers` asked for, in its order, none of them
        normalised; 0 is the sum of the embeddings, `i` what layer `i` (counted from 1) gives.
    """

    last_hidden_state: Float[Array, "b t d"]
    pooled: Float[Array, "b d"]
    text_embeds: Float[Array, "b p"] | None
    hidden_states: tuple[Float[Array, "b t d"], ...]


def visible_tokens(
    t: int, attention_mask: Shaped[Array, "b t"] | None = None
) -> Bool[Array, "b 1 t t"]:
    """Whether the token of a row may look at that of a column: none after it, none masked.

    Args:
      t: Number of tokens.
      attention_mask: 0 where a token is not to be looked at; None: all are.
    """
    causal = jnp.tril(jnp.ones((1, 1, t, t), jnp.bool_))
    if attention_mask is None:
        return causal
    return causal & attention_mask.astype(jnp.bool_)[:, None, None, :]


def masked_attention(
    query: Float[Array, "b q n k"],
    key: Float[Array, "b t n k"],
    value: Float[Array, "b t n k"],
    visible: Bool[Array, "b 1 q t"],
) -> Float[Array, "b q n k"]:
    """`softmax(query key^T / sqrt(k)) value` among visible tokens, the softmax in float32.

    A token that sees none weighs all tokens equally, so that nothing becomes NaN.
    """
    scores = jnp.einsum("bqnk,btnk->bnqt", query * query.shape[-1] ** -0.5, key)
    scores = jnp.where(visible, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnqt,btnk->bqnk", weights, value)


def end_of_text(input_ids: Int[Array, "b t"], eos_token_id: int) -> Int[Array, " b"]:
    """Place of the first end token of each text, 0 where there is none.

    The id 2 stands in configs whose end token has in truth the largest id of the
    vocabulary; with it, the place of the largest id of the text is given.
    """
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == eos_token_id, axis=-1)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, result in `x.dtype`.

    Attributes:
      eps: Added to the variance.
    """

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        y = layer_norm(x.astype(jnp.float32), self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Embeddings(nn.Module):
    """A vector for each token plus one for its place."""

    config: CLIPTextConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, input_ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        config, init = self.config, nn.initializers.normal(0.02)
        sizes = {"token": config.vocab_size, "position": config.max_position_embeddings}
        tables = {
            name: nn.Embed(size, config.hidden_size, embedding_init=init, name=f"{name}_embedding")
            for name, size in sizes.items()
        }
        tokens = tables["token"](input_ids)
        dtype = tokens.dtype if self.dtype is None else self.dtype
        positions = tables["position"](jnp.arange(input_ids.shape[1]))
        return tokens.astype(dtype) + positions.astype(dtype)


class Attention(nn.Module):
    """Multi-head self-attention among visible tokens."""

    config: CLIPTowerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], visible: Bool[Array, "b 1 t t"]
    ) -> Float[Array, "b t d"]:
        b, t, d = x.shape
        heads = self.config.num_attention_heads
        query, key, value = (
            Dense(d, name=name)(x).reshape(b, t, heads, d // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = masked_attention(query, key, value, visible).reshape(b, t, d)
        return Dense(d, name="out_proj")(out)


class MLP(nn.Module):
    """Two layers with an activation in between."""

    config: CLIPTowerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        h = Dense(self.config.intermediate_size, name="fc1")(x)
        return Dense(x.shape[-1], name="fc2")(ACTIVATIONS[self.config.hidden_act](h))


class EncoderLayer(nn.Module):
    """Attention and MLP, each on the normalised states and added to them."""

    config: CLIPTowerConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "b t d"], visible: Bool[Array, "b 1 t t"]
    ) -> Float[Array, "b t d"]:
        config, eps = self.config, self.config.layer_norm_eps
        h = h + Attention(config, name="self_attn")(LayerNorm(eps, name="layer_norm1")(h), visible)
        return h + MLP(config, name="mlp")(LayerNorm(eps, name="layer_norm2")(h))


class Encoder(nn.Module):
    """The layers one after the other; gives the states before, between and after them."""

    config: CLIPTowerConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "b t d"], visible: Bool[Array, "b 1 t t"]
    ) -> list[Float[Array, "b t d"]]:
        states = [h]
        for i in range(self.config.num_hidden_layers):
            states.append(EncoderLayer(self.config, name=f"layers_{i}")(states[-1], visible))
        return states


class TextTransformer(nn.Module):
    """Everything but the projection."""

    config: CLIPTextConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Shaped[Array, "b t"] | None,
        hidden_layers: Sequence[int] | None,
    ) -> CLIPTextOutput:
        config = self.config
        _check_input(config, input_ids, attention_mask)
        h = Embeddings(config, self.dtype, name="embeddings")(input_ids)
        visible = visible_tokens(input_ids.shape[1], attention_mask)
        states = Encoder(config, name="encoder")(h, visible)
        last = LayerNorm(config.layer_norm_eps, name="final_layer_norm")(states[-1])
        end = end_of_text(input_ids, config.eos_token_id)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, pooled, None, _select(states, hidden_layers))


class CLIPTextModel(nn.Module):
    """States and pooled state of texts, without a projection.

    Attributes:
      config: Sizes, with `with_projection=False`.
      dtype: Float dtype of the computation; None computes in that of the token table.
    """

    config: CLIPTextConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Shaped[Array, "b t"] | None = None,
        *,
        hidden_layers: Sequence[int] | None = (),
    ) -> CLIPTextOutput:
        """Read `b` texts; under `jit`, what nobody uses of the output is not computed.

        Args:
          input_ids: Ids below `vocab_size`; others give NaN.
          attention_mask: 0 at tokens that no token may look at; None, as all Stable Diffusions
            have it: every token sees all before it, padding too.
          hidden_layers: Which `hidden_states` to give, -2 for those before the last layer;
            None for all, from the embeddings on.

        Raises:
          ValueError: If there are more tokens than positions, a mask of another shape, or no
            such layer.
          TypeError: If the ids are no integers.
        """
        _check_projection(self.config, wanted=False)
        tower = TextTransformer(self.config, self.dtype, name="text_model")
        return tower(input_ids, attention_mask, hidden_layers)


class CLIPTextModelWithProjection(nn.Module):
    """As `CLIPTextModel`, with the pooled state projected to `text_embeds`.

    Attributes:
      config: Sizes, with `with_projection=True`.
      dtype: Float dtype of the computation; None computes in that of the token table.
    """

    config: CLIPTextConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Shaped[Array, "b t"] | None = None,
        *,
        hidden_layers: Sequence[int] | None = (),
    ) -> CLIPTextOutput:
        """As `CLIPTextModel`."""
        _check_projection(self.config, wanted=True)
        assert self.config.projection_dim is not None  # the config sees to it
        tower = TextTransformer(self.config, self.dtype, name="text_model")
        output = tower(input_ids, attention_mask, hidden_layers)
        projection = Dense(self.config.projection_dim, use_bias=False, name="text_projection")
        return output._replace(text_embeds=projection(output.pooled))


def text_encoder(
    config: CLIPTextConfig, dtype: jnp.dtype | None = None
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The model that `config.with_projection` asks for."""
    model = CLIPTextModelWithProjection if config.with_projection else CLIPTextModel
    return model(config, dtype)


def _select(
    states: Sequence[Float[Array, "b t d"]], hidden_layers: Sequence[int] | None
) -> tuple[Float[Array, "b t d"], ...]:
    if hidden_layers is None:
        return tuple(states)
    wrong = [i for i in hidden_layers if not -len(states) <= i < len(states)]
    if wrong:
        raise ValueError(
            f"hidden_layers must lie between {-len(states)} and {len(states) - 1}; got "
            f"{', '.join(map(str, wrong))}."
        )
    return tuple(states[i] for i in hidden_layers)


def _check_projection(config: CLIPTextConfig, *, wanted: bool) -> None:
    if config.with_projection != wanted:
        raise ValueError(
            f"this class needs a config with_projection={wanted}; got "
            f"with_projection={config.with_projection}. Let text_encoder(config) choose the class."
        )


def _check_input(config: CLIPTextConfig, input_ids: Array, attention_mask: Array | None) -> None:
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise TypeError(f"input_ids must be integers; got {input_ids.dtype}.")
    longest = config.max_position_embeddings
    if input_ids.ndim != 2 or not 1 <= input_ids.shape[1] <= longest:
        raise ValueError(
            f"input_ids must be [b, t] with t from 1 to max_position_embeddings={longest}; got "
            f"{input_ids.shape}. Cut longer texts, as encode_prompts does."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            "attention_mask must have the shape of input_ids; got "
            f"{attention_mask.shape} for {input_ids.shape}."
        )
