"""DiT: a diffusion transformer on image patches, conditioned through adaLN-zero.

An image is cut into patches, each patch becomes a token, and every block computes

    h <- h + gate_1 * attention(scale_1(norm(h)))
    h <- h + gate_2 * mlp(scale_2(norm(h)))

where the six shift, scale and gate vectors come from one linear map of the sum of the
timestep and the class embedding. The same class reads two published layouts: that of
diffusers' `DiTTransformer2DModel`, and that of the authors' release.

The two differ in one number each of two places, and both are kept: diffusers spaces the
sinusoid frequencies as `i / (n - 1)` (`freq_shift=1`) and uses `norm_eps` in the second
normalisation of a block, the authors `i / n` (`freq_shift=0`) and 1e-6.

References:
  Peebles and Xie, Scalable Diffusion Models with Transformers, 2023,
  https://arxiv.org/abs/2212.09748.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.core.layers import Conv, Dense
from qjax.core.typing import Array, Float, Int, Params
from qjax.models.attention import dot_product_attention
from qjax.models.config_values import value_problems
from qjax.models.embeddings import timestep_embedding
from qjax.models.time_rows import at_paths, time_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a DiT.

    Attributes:
      sample_size: Height and width of the input.
      patch_size: Height and width of a patch; must divide `sample_size`.
      in_channels: Channels of the input.
      out_channels: Channels of the output; twice `in_channels` with a learned variance.
      num_layers: Number of blocks.
      num_heads: Attention heads.
      head_dim: Width of a head; the model's width is `num_heads * head_dim`.
      num_classes: Classes; label `num_classes` is the null class.
      norm_eps: Epsilon of a block's second normalisation (the others use 1e-6).
      freq_shift: 1 as in diffusers, 0 as in the authors' release.
    """

    sample_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    num_classes: int = 1000
    norm_eps: float = 1e-5
    freq_shift: int = 1

    def __post_init__(self):
        if self.sample_size % self.patch_size:
            raise ValueError(
                "patch_size must divide sample_size; got "
                f"patch_size={self.patch_size}, sample_size={self.sample_size}."
            )
        if self.width % 4:
            raise ValueError(
                "num_heads * head_dim must be a multiple of 4, for the two-dimensional "
                f"position embedding; got {self.num_heads} * {self.head_dim}."
            )

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.num_heads * self.head_dim

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "DiTConfig":
        """The config of a diffusers `DiTTransformer2DModel`.

        Raises:
          ValueError: Naming every key whose value this port does not have.
        """
        required = {
            "norm_type": "ada_norm_zero",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_elementwise_affine": False,
        }
        ignored = {"dropout", "norm_num_groups", "upcast_attention"}
        renamed = {
            "num_attention_heads": "num_heads",
            "attention_head_dim": "head_dim",
            "num_embeds_ada_norm": "num_classes",
        }
        direct = {"sample_size", "patch_size", "in_channels", "out_channels", "num_layers"}
        direct |= {"norm_eps"}
        defaults = {"out_channels": config.get("in_channels", cls.in_channels)}
        wrong = [
            f"{key}={config[key]!r} (only {value!r})"
            for key, value in required.items()
            if key in config and config[key] != value
        ]
        known = required.keys() | ignored | renamed.keys() | direct
        wrong += [
            f"{key}={value!r} (unknown)"
            for key, value in config.items()
            if key not in known and not key.startswith("_") and value is not None
        ]
        fields = {new: config[old] for old, new in renamed.items() if old in config}
        fields |= {key: config[key] for key in direct if config.get(key) is not None}
        wrong += value_problems(cls, defaults | fields)
        if wrong:
            raise ValueError(
                "The DiT port cannot reproduce these config values: " + ", ".join(wrong) + "."
            )
        return cls(**(defaults | fields))

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` that diffusers' `DiTTransformer2DModel` reads."""
        if self.freq_shift != 1:
            raise ValueError(
                "diffusers' DiT has freq_shift=1 built in; got "
                f"freq_shift={self.freq_shift}, which its layout cannot express."
            )
        return {
            "_class_name": "DiTTransformer2DModel",
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": self.head_dim,
            "dropout": 0.0,
            "in_channels": self.in_channels,
            "norm_elementwise_affine": False,
            "norm_eps": self.norm_eps,
            "norm_num_groups": 32,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": self.num_heads,
            "num_embeds_ada_norm": self.num_classes,
            "num_layers": self.num_layers,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "sample_size": self.sample_size,
            "upcast_attention": False,
        }

    @classmethod
    def dit_xl_2(cls, *, image_size: int = 256) -> "DiTConfig":
        """DiT-XL/2 on the 8x smaller latents of `image_size` images (Table 1)."""
        return cls(sample_size=image_size // 8)


def position_embedding(width: int, side: int) -> Float[np.ndarray, "t d"]:
    """Fixed 2-D sine-cosine embedding of `side**2` tokens, row by row.

    The first half of the channels encodes the column, the second the row, each as sines
    followed by cosines of frequencies `10000**(-j / (width / 4))`.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    halves = []
    for coordinate in (column, row):
        angle = coordinate.reshape(-1, 1) * frequencies
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def modulate(
    x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b t d"]:
    """`x * (1 + scale) + shift`, the same for all tokens of an image."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(x: Float[Array, "b t d"], eps: float) -> Float[Array, "b t d"]:
    """Normalise the last axis in float32, without a learned scale or shift."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class Conditioning(nn.Module):
    """Timestep embedding plus class embedding, `[b, d]`.

    Where the row of a time table has the first, it is read there (`time_rows.py`).
    """

    config: DiTConfig
    dtype: jnp.dtype | None = None

    def setup(self):
        config, init = self.config, nn.initializers.normal(0.02)
        self.time_in = Dense(config.width, kernel_init=init)
        self.time_out = Dense(config.width, kernel_init=init)
        self.label = nn.Embed(config.num_classes + 1, config.width, embedding_init=init)

    def __call__(self, t: Array, labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        h = time_row(self, "time_out", self.dtype or jnp.float32)
        h = self.of_time(t) if h is None else h
        return h + self.label(labels).astype(h.dtype)

    def of_time(self, t: Array) -> Float[Array, "b d"]:
        """The part that depends on the timestep alone."""
        shift = self.config.freq_shift
        h = timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
        h = h if self.dtype is None else h.astype(self.dtype)
        return self.time_out(nn.silu(self.time_in(h)))


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for query, key and value."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        config = self.config
        b, t, d = x.shape
        init = nn.initializers.xavier_uniform()
        qkv = Dense(3 * d, kernel_init=init, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(b, t, 3 * config.num_heads, config.head_dim), 3, axis=2)
        out = dot_product_attention(q, k, v).reshape(b, t, d)
        return Dense(d, kernel_init=init, name="proj")(out)


class Mlp(nn.Module):
    """Two layers, four times as wide in between, with the tanh form of GELU."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        init = nn.initializers.xavier_uniform()
        h = Dense(4 * x.shape[-1], kernel_init=init, name="fc1")(x)
        return Dense(x.shape[-1], kernel_init=init, name="fc2")(nn.gelu(h, approximate=True))


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self, h: Float[Array, "b t d"], conditioning: Float[Array, "b d"]
    ) -> Float[Array, "b t d"]:
        zeros = nn.initializers.zeros_init()
        modulation = Dense(6 * h.shape[-1], kernel_init=zeros, name="modulation")
        vectors = modulation(nn.silu(conditioning))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(vectors, 6, axis=-1)
        x = modulate(layer_norm(h, 1e-6), shift_1, scale_1)
        h = h + gate_1[:, None] * Attention(self.config, name="attn")(x)
        x = modulate(layer_norm(h, self.config.norm_eps), shift_2, scale_2)
        return h + gate_2[:, None] * Mlp(name="mlp")(x)


class DiT(nn.Module):
    """Prediction `[b, h, w, out_channels]` for noisy images, timesteps and labels.

    With a learned variance the first `in_channels` channels are the prediction of the
    noise and the others the interpolation weights of the variance.

    Attributes:
      config: Sizes.
      dtype: Float dtype of the computation; None computes in the input's dtype.
    """

    config: DiTConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Array, labels: Int[Array, " b"]
    ) -> Float[Array, "b h w o"]:
        config, p = self.config, self.config.patch_size
        b, h, w, _ = x_t.shape
        if h != w or h % p:
            raise ValueError(
                f"DiT takes square images whose side patch_size={p} divides; got {x_t.shape}."
            )
        side = h // p
        dtype = x_t.dtype if self.dtype is None else self.dtype
        conditioning = Conditioning(config, dtype, name="conditioning")(t, labels)
        tokens = Conv(
            config.width,
            (p, p),
            strides=p,
            padding="VALID",
            kernel_init=nn.initializers.xavier_uniform(),
            name="patch_embed",
        )(x_t.astype(dtype)).reshape(b, side * side, config.width)
        tokens = tokens + jnp.asarray(position_embedding(config.width, side), dtype)
        for i in range(config.num_layers):
            tokens = DiTBlock(config, name=f"blocks_{i}")(tokens, conditioning)

        zeros = nn.initializers.zeros_init()
        modulation = Dense(2 * config.width, kernel_init=zeros, name="final_modulation")
        shift, scale = jnp.split(modulation(nn.silu(conditioning)), 2, axis=-1)
        tokens = modulate(layer_norm(tokens, 1e-6), shift, scale)
        patches = Dense(p * p * config.out_channels, kernel_init=zeros, name="final_linear")(tokens)
        grid = patches.reshape(b, side, side, p, p, config.out_channels)
        return jnp.einsum("bhwpqc->bhpwqc", grid).reshape(b, h, w, config.out_channels)

    @nn.nowrap
    def time_layers(self) -> tuple[str, ...]:
        """Paths of the layers that are of t alone; what modulates the blocks is not."""
        return ("conditioning/time_in", "conditioning/time_out")

    @nn.nowrap
    def time_table(self, params: Params, t: Float[Array, " s"]) -> dict[str, Any]:
        """The rows of timesteps `t`, computed in float32."""
        conditioning = Conditioning(self.config)
        time = conditioning.apply({"params": params["conditioning"]}, t, method="of_time")
        return at_paths([("conditioning/time_out", time)])
