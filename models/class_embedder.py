"""ClassEmbedder: a class as a text of one token, what class-conditional latent diffusion reads.

    token = table[label]                                        [b, 1, d]

The last row of the table stands for no class. The checkpoint's one key is that of the
`cond_stage_model` of latent diffusion on ImageNet (1,001 rows, 512 wide).

References:
  Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022,
  https://arxiv.org/abs/2112.10752, section D.1 and table 13.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from qjax.core.typing import Array, Float, Int
from qjax.models.config_values import value_problems
from qjax.models.convert import Target

CLASS_NAME = "ClassEmbedder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassEmbedderConfig:
    """Settings of a `ClassEmbedder`.

    Attributes:
      num_classes: Classes, without the one for none.
      embed_dim: Width of a token: `cross_attention_dim` of the UNet.
    """

    num_classes: int
    embed_dim: int

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "ClassEmbedderConfig":
        """The settings in a `config.json`; keys that start with `_` are notes.

        Raises:
          ValueError: Naming keys that are missing, unknown or no positive whole numbers.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        names = {field.name for field in dataclasses.fields(cls)}
        wrong = sorted(names ^ given.keys()) + [
            f"{key}={value!r}"
            for key, value in given.items()
            if key in names and value_problems(cls, {key: value})
        ]
        if wrong:
            raise ValueError(
                f"{CLASS_NAME} needs {' and '.join(sorted(names))}, positive whole numbers; "
                f"missing, unknown or wrong: {', '.join(wrong)}."
            )
        return cls(**given)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` that `from_diffusers` reads."""
        return {"_class_name": CLASS_NAME} | dataclasses.asdict(self)


class ClassEmbedder(nn.Module):
    """Tokens `[b, 1, d]` of classes `[b]`; `config.num_classes` stands for none."""

    config: ClassEmbedderConfig

    @nn.compact
    def __call__(self, labels: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        config = self.config
        table = nn.Embed(config.num_classes + 1, config.embed_dim, name="embedding")
        return table(labels)[:, None]


def checkpoint_keys(config: ClassEmbedderConfig) -> dict[str, Target]:
    """The key of the checkpoint: path and shape."""
    shape = (config.num_classes + 1, config.embed_dim)
    return {"embedding.weight": Target(("embedding", "embedding"), shape)}
