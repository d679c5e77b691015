"""Named settings, one function each, after the literature.

| recipe | weights | activations | source |
|---|---|---|---|
| `w8a8` | 8 bits, per output channel | 8 bits, dynamic per token | Nagel et al. 2021 |
| `w4a16` | 4 bits, groups of 64 or 128 | float | Frantar et al. 2022 |
| `w4a8` | 4 bits, groups of 64 or 128 | 8 bits, dynamic per token | Chen et al. 2025 (Q-DiT) |

All three are data-free. The layers next to the pixels and the embedders stay in 16 bits:
they hold few weights and their error reaches every pixel, or every layer, directly.
"""

from collections.abc import Callable

from qjax.calibrate.recipe import Recipe
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec

# Layers at the edge of the network, by the names they have in the models here.
EDGES = (
    Rule(
        pattern=r"(.*/)?(conv_in|conv_out|patch_embed|final_linear)/kernel",
        reason="next to the pixels: few weights, and its error reaches every pixel",
    ),
    Rule(
        pattern=r"(.*/)?(conditioning|time_embedding|time_proj|class_embedding|add_embedding)/.*kernel",
        reason="embeds time and class: few weights, and its error reaches every layer",
    ),
)

# 128 divides the widths of DiT-XL/2 (1152, 4608), 64 those of Stable Diffusion (320, 960);
# narrower layers share one scale per output channel.
GROUP_SIZES = (128, 64, None)

DYNAMIC_A8 = ActSpec(bits=8, mode="dynamic", granularity="per_token")


def w8a8() -> Recipe:
    """8-bit weights per output channel and 8-bit dynamic activations per token.

    References:
      Nagel et al., A White Paper on Neural Network Quantization, 2021,
      https://arxiv.org/abs/2106.08295.
    """
    return _recipe("w8a8", WeightSpec(bits=8), DYNAMIC_A8)


def w4a16() -> Recipe:
    """4-bit weights in groups of 128 or 64, the range by search; activations in float.

    References:
      Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323 (grouped 4-bit weights; the
      rounding here is to nearest).
    """
    return _recipe("w4a16", _W4, None)


def w4a8() -> Recipe:
    """4-bit weights in groups of 128 or 64 and 8-bit dynamic activations per token.

    References:
      Chen et al., Q-DiT, CVPR 2025, https://arxiv.org/abs/2406.17343 (group quantization and
      dynamic activations; without its search and GPTQ).
    """
    return _recipe("w4a8", _W4, DYNAMIC_A8)


_W4 = WeightSpec(bits=4, granularity="per_group", group_size=GROUP_SIZES, method="mse")


def _recipe(name: str, weight: WeightSpec, act: ActSpec | None) -> Recipe:
    quant = QuantConfig(
        rules=EDGES, weight=weight, act=act, float_dtype="float16", allow_unmatched=True
    )
    return Recipe(name=name, quant=quant)


RECIPES: dict[str, Callable[[], Recipe]] = {"w8a8": w8a8, "w4a16": w4a16, "w4a8": w4a8}


def by_name(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
      ValueError: If there is none of that name; the error lists them.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}.")
    return RECIPES[name]()
