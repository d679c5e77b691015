"""CLIP's vision tower: what a picture is, in the space of CLIP's texts.

A picture is cut into patches; each becomes a token, before them stands one of the whole; the
layers are those of the text towers (`text_encoders/clip.py`) with every token visible to all.
Parameters carry the names of transformers' `CLIPModel`, its `pre_layrnorm` included.

References:
  Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021,
  https://arxiv.org/abs/2103.00020, section 2.4.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv, Dense
from qjax.core.typing import Array, Float
from qjax.models.config_values import value_problems
from qjax.models.convert import Target, same
from qjax.models.text_encoders.clip import Encoder, LayerNorm
from qjax.models.text_encoders.clip_config import ACTIVATIONS
from qjax.models.unet2d_keys import keys_of_params

__all__ = ["CLIPVisionConfig", "CLIPVisionModelWithProjection", "checkpoint_keys"]

MOST_PATCHES = 2**16  # ViT-L/14 at 336 pixels has 576
CLASS_TOKEN = ("vision_model", "embeddings", "class_embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Sizes of a CLIP vision tower; the defaults are those of transformers (ViT-B/32).

    Attributes:
      hidden_size: Width of a token, `d`.
      intermediate_size: Width inside an MLP.
      projection_dim: Width of the image embedding.
      num_hidden_layers: Layers.
      num_attention_heads: Attention heads; must divide `hidden_size`.
      image_size: Side of the pictures in pixels.
      patch_size: Side of a patch in pixels.
      hidden_act: A key of `ACTIVATIONS`.
      layer_norm_eps: Epsilon of every normalisation.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if wrong := value_problems(type(self), dataclasses.asdict(self)):
            raise ValueError(f"a CLIP vision tower cannot have {'; '.join(wrong)}.")
        if self.hidden_size % self.num_attention_heads or self.image_size < self.patch_size:
            raise ValueError(
                "num_attention_heads must divide hidden_size, and a patch fit into a picture; got "
                f"{self.num_attention_heads} and {self.hidden_size}, {self.patch_size} and "
                f"{self.image_size}."
            )
        if (self.image_size // self.patch_size) ** 2 > MOST_PATCHES:
            raise ValueError(
                f"a picture may have {MOST_PATCHES:,} patches; got image_size={self.image_size}, "
                f"patch_size={self.patch_size}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}."
            )

    @classmethod
    def from_transformers(
        cls, config: Mapping[str, Any], projection_dim: int
    ) -> "CLIPVisionConfig":
        """The settings in `vision_config` of a `CLIPModel`, whose own width the projection has.

        Raises:
          ValueError: If a setting has a value that this port does not follow.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"vision_config must be a mapping; got {config!r:.80}.")
        names = {field.name for field in dataclasses.fields(cls)}
        if config.get("num_channels", 3) != 3:
            raise ValueError(f"num_channels must be 3; got {config['num_channels']!r}.")
        values = {key: value for key, value in config.items() if key in names}
        return cls(**{**values, "projection_dim": projection_dim})


class VisionEmbeddings(nn.Module):
    """A token for each patch and one for the whole, each with its place."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b t d"]:
        size, d = self.config.patch_size, self.config.hidden_size
        patches = Conv(d, (size, size), size, "VALID", use_bias=False, name="patch_embedding")(
            images
        )
        patches = patches.reshape(images.shape[0], -1, d)
        init = nn.initializers.normal(0.02)
        whole = self.param("class_embedding", init, (d,)).astype(patches.dtype)
        whole = jnp.broadcast_to(whole, (images.shape[0], 1, d))
        tokens = jnp.concatenate([whole, patches], axis=1)
        count = tokens.shape[1]
        places = nn.Embed(count, d, embedding_init=init, name="position_embedding")
        return tokens + places(jnp.arange(count)).astype(tokens.dtype)


class VisionTransformer(nn.Module):
    """Everything but the projection; gives the normalised state of the first token."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        config = self.config
        h = VisionEmbeddings(config, name="embeddings")(images)
        h = LayerNorm(config.layer_norm_eps, name="pre_layrnorm")(h)
        visible = jnp.ones((1, 1, h.shape[1], h.shape[1]), jnp.bool_)
        h = Encoder(config, name="encoder")(h, visible)[-1]
        return LayerNorm(config.layer_norm_eps, name="post_layernorm")(h[:, 0])


class CLIPVisionModelWithProjection(nn.Module):
    """Image embeddings, not normalised, of pictures that are resized and scaled for CLIP."""

    config: CLIPVisionConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """The embeddings.

        Raises:
          ValueError: If the pictures are not `image_size` on both sides.
        """
        side = self.config.image_size
        if images.shape[1:] != (side, side, 3):
            raise ValueError(f"images must be [b, {side}, {side}, 3]; got {images.shape}.")
        pooled = VisionTransformer(self.config, name="vision_model")(images)
        width = self.config.projection_dim
        return Dense(width, use_bias=False, name="visual_projection")(pooled)


def checkpoint_keys(config: CLIPVisionConfig) -> dict[str, Target]:
    """For every key of the vision tower and its projection: path, shape there, transform."""
    example = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    model = CLIPVisionModelWithProjection(config)
    params = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    targets = keys_of_params(params)
    numbered = {re.sub(r"\.layers_(\d+)\.", r".layers.\1.", key): t for key, t in targets.items()}
    # A parameter of the module itself, which is no weight of a layer.
    numbered.pop("vision_model.embeddings.weight", None)
    numbered[".".join(CLASS_TOKEN)] = Target(CLASS_TOKEN, (config.hidden_size,), same)
    return numbered
