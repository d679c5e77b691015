"""Small nets whose features the metrics compare."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from qjax.core.layers import Conv, Dense
from qjax.core.typing import Array, Float
from qjax.models.config_values import value_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureNetConfig:
    """Sizes of a `FeatureNet`.

    Attributes:
      channels: Output channels of the three convolutions.
      num_features: Width of the penultimate layer.
      num_classes: Classes it was trained to tell apart.
    """

    channels: tuple[int, ...] = (48, 96, 128)
    num_features: int = 64
    num_classes: int = 10

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "FeatureNetConfig":
        """The config that `dataclasses.asdict` made, read back from JSON.

        Raises:
          ValueError: Naming keys that are missing, and values that it cannot have.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        wrong = [f"{name} is missing" for name in names if name not in config]
        if wrong := wrong + value_problems(cls, config):
            raise ValueError(f"The config of a feature net needs other values: {'; '.join(wrong)}.")
        values = {name: config[name] for name in names}
        return cls(**(values | {"channels": tuple(values["channels"])}))


class FeatureNet(nn.Module):
    """Class logits and penultimate features of images in [0, 1].

    Three 3x3 convolutions with ReLU, the first two of stride 2 or followed by a pooling of
    2, then one hidden layer. The hidden layer is narrow so that its covariance has full
    rank already with a few hundred samples, and the Frechet distance means something there.
    """

    config: FeatureNetConfig = FeatureNetConfig()

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b features"]]:
        x = images * 2 - 1
        for i, channels in enumerate(self.config.channels):
            x = nn.relu(Conv(channels, strides=2 if i == 0 else 1, name=f"conv_{i}")(x))
            if i:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        features = nn.relu(Dense(self.config.num_features, name="hidden")(x))
        return Dense(self.config.num_classes, name="logits")(features), features


def penultimate(params, config: FeatureNetConfig, images: Float[Array, "b h w c"]):
    """Predicted classes `[b]` and features `[b, features]` of images in [0, 1]."""
    logits, features = FeatureNet(config).apply({"params": params}, images)
    return jnp.argmax(logits, axis=-1), features
