"""Named settings, one function each, after the literature.

| recipe | weights | activations | source |
|---|---|---|---|
| `w8a8` | 8 bits, per output channel | 8 bits, dynamic per token | Nagel et al. 2021 |
| `w4a16` | 4 bits, groups of 64 or 128 | float | Frantar et al. 2022 |
| `w4a8` | 4 bits, groups of 64 or 128 | 8 bits, dynamic per token | Chen et al. 2025 (Q-DiT) |
| `s2p_w8a8` | 8 bits, per output channel | 8 bits, a range for every step | Li et al. 2024 |
| `s2p_w4a8` | 4 bits, groups of 64 or 128 | 8 bits, a range for every step | Li et al. 2024 |
| `ptqd_w8a8` | 8 bits, per output channel, AdaRound | 8 bits, a range for every step | He et al. 2023 (PTQD) |
| `ptqd_w4a8` | 4 bits, groups of 64 or 128, AdaRound | 8 bits, a range for every step | He et al. 2023 (PTQD) |
| `ptqd_mp` | as `ptqd_w4a8` | 4 or 8 bits, step by step | He et al. 2023 (PTQD) |
| `q_dit_w8a8`, `q_dit_w6a8`, `q_dit_w4a8` | 8, 6, 4 bits, groups of 128 or 64, zero points, GPTQ | 8 bits, dynamic per token and group | Chen et al. 2025 |
| `s2p_ptqd_w4a8`, `q_dit_s2p_ptqd_w4a8` | as `s2p_w4a8`, as `q_dit_w4a8` with the integers of `s2p_w4a8` | | two, and all three |

The first three are data-free (`DATA_FREE`); the others calibrate, for the sampler's settings of
their later use (`qjax.calibrate.run`, `qjax calibrate`). The layers next to the pixels and the
embedders stay in 16 bits: they hold few weights and their error reaches every pixel, or every
layer, directly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.gptq_stage import GPTQ
from qjax.calibrate.granularity_search import GranularitySearch
from qjax.calibrate.noise_correction import NoiseCorrection
from qjax.calibrate.recipe import Recipe, Stage
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.serial_parallel_settings import Fits
from qjax.calibrate.step_bits import StepBits
from qjax.calibrate.time_table import TimePrecalculation
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

# A table stands for them where they depend on the timestep alone; elsewhere they are few.
TIME = Rule(
    pattern=r"(.*/)?time_emb_proj/kernel",
    reason="projects the time vector: precalculated, or few weights",
)

# 128 divides the widths of DiT-XL/2 (1152, 4608), 64 those of Stable Diffusion (320, 960);
# narrower layers share one scale per output channel.
GROUP_SIZES = (128, 64, None)

DYNAMIC_A8 = ActSpec(bits=8, mode="dynamic", granularity="per_token")
PER_STEP_A8 = ActSpec(bits=8, mode="per_step", granularity="per_tensor", symmetric=False)


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


def s2p_w8a8(
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
    fits: Fits = "network",
) -> Recipe:
    """8-bit weights and activations, fitted serially and then in parallel; time precalculated.

    Args:
      steps: Steps of the sampler that it is fitted for; None: to be chosen with
        `with_settings(steps=...)` before it runs.
      guidance_scale: Weight of the guidance that it is fitted for; None for none.
      data: What it is calibrated on; None for 64 items of labels in turn.
      fits: `"network"` fits all layers at once, which needs memory for the gradients of the whole
        network; `"blocks"` one block at a time.

    References:
      Li et al., Efficiency Meets Fidelity, 2024, https://arxiv.org/abs/2412.06661; what of it is
      a reconstruction is in docs/methods.md.
    """
    weight = WeightSpec(bits=8, method="mse")
    return _serial_parallel("s2p_w8a8", weight, steps, guidance_scale, data, fits)


def s2p_w4a8(
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
    fits: Fits = "network",
) -> Recipe:
    """4-bit weights and 8-bit activations, likewise.

    Args:
      steps: As for `s2p_w8a8`.
      guidance_scale: Likewise.
      data: Likewise.
      fits: Likewise.

    References:
      As for `s2p_w8a8`: https://arxiv.org/abs/2412.06661.
    """
    return _serial_parallel("s2p_w4a8", _W4, steps, guidance_scale, data, fits)


def ptqd_w8a8(
    *,
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
) -> Recipe:
    """8-bit weights and activations, AdaRound block by block, and a corrected sampler.

    Args:
      steps: Steps of the sampler that it is fitted for; None: to be chosen with
        `with_settings(steps=...)` before it runs.
      eta: Share of fresh noise that it is fitted for.
      guidance_scale: Weight of the guidance that it is fitted for; None for none.
      data: What it is calibrated on; None for 64 items of labels in turn, 256 for
        the noise and 32 for bits by step.

    References:
      He et al., PTQD, NeurIPS 2023, https://arxiv.org/abs/2305.10657.
    """
    return _ptqd("ptqd_w8a8", WeightSpec(bits=8, method="mse"), steps, eta, guidance_scale, data)


def ptqd_w4a8(
    *,
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
) -> Recipe:
    """4-bit weights and 8-bit activations, likewise.

    Args:
      steps: As for `ptqd_w8a8`.
      eta: Likewise.
      guidance_scale: Likewise.
      data: Likewise.

    References:
      As for `ptqd_w8a8`: https://arxiv.org/abs/2305.10657.
    """
    return _ptqd("ptqd_w4a8", _W4, steps, eta, guidance_scale, data)


def ptqd_mp(
    *,
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
    mean_bits: float = 7.0,
) -> Recipe:
    """4-bit weights, and activations of 4 bits at some steps and 8 at the others.

    Args:
      steps: As for `ptqd_w8a8`.
      eta: Likewise.
      guidance_scale: Likewise.
      data: Likewise.
      mean_bits: Of the activations, over the steps; 7 is what the paper has at 20 steps.

    References:
      As for `ptqd_w8a8`: https://arxiv.org/abs/2305.10657, section 3.5.
    """
    shared = _for_run(steps, guidance_scale, data)
    bits = StepBits(mean_bits=mean_bits, **shared)
    return _ptqd("ptqd_mp", _W4, steps, eta, guidance_scale, data, bits)


def s2p_ptqd_w4a8(
    *,
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
) -> Recipe:
    """`s2p_w4a8`, and then the noise that is left corrected in the sampler as in `ptqd_w4a8`.

    Args:
      steps: As for `ptqd_w8a8`.
      eta: Likewise.
      guidance_scale: Likewise.
      data: Likewise.

    References:
      As for `s2p_w8a8` and `ptqd_w8a8`: https://arxiv.org/abs/2412.06661,
      https://arxiv.org/abs/2305.10657.
    """
    recipe = s2p_w4a8(steps=steps, guidance_scale=guidance_scale, data=data)
    return _then_corrected("s2p_ptqd_w4a8", recipe, steps, eta, guidance_scale, data)


def q_dit_s2p_ptqd_w4a8(
    *,
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
) -> Recipe:
    """All three: the groups and dynamic activations of `q_dit_w4a8`, weights trained as in
    `s2p_w4a8`, and the noise that is left corrected as in `ptqd_w4a8`.

    Serial-to-parallel takes the place of GPTQ: both choose the integers, and what is trained
    begins at the floats.

    Args:
      steps: As for `ptqd_w8a8`.
      eta: Likewise.
      guidance_scale: Likewise.
      data: Likewise.

    References:
      As for `q_dit_w8a8`, `s2p_w8a8` and `ptqd_w8a8`: https://arxiv.org/abs/2406.17343,
      https://arxiv.org/abs/2412.06661, https://arxiv.org/abs/2305.10657.
    """
    fitted = s2p_w4a8(steps=steps, guidance_scale=guidance_scale, data=data).stages[:1]
    recipe = dataclasses.replace(q_dit_w4a8(), stages=fitted)
    return _then_corrected("q_dit_s2p_ptqd_w4a8", recipe, steps, eta, guidance_scale, data)


def _then_corrected(
    name: str,
    recipe: Recipe,
    steps: int | None,
    eta: float,
    guidance_scale: float | None,
    data: CalibrationSet | None,
) -> Recipe:
    recipe = recipe.with_settings(eta=eta)
    correction = NoiseCorrection(eta=eta, **_for_run(steps, guidance_scale, data))
    return dataclasses.replace(recipe, name=name, stages=(*recipe.stages, correction))


def _ptqd(
    name: str,
    weight: WeightSpec,
    steps: int | None,
    eta: float,
    guidance_scale: float | None,
    data: CalibrationSet | None,
    *between: Stage,
) -> Recipe:
    shared = _for_run(steps, guidance_scale, data)
    # Blocks on the float network's samples, as Q-Diffusion has it, whose model PTQD corrects.
    rounding = SerialParallel(samples="float", **shared)
    recipe = dataclasses.replace(_recipe(name, weight, PER_STEP_A8), stages=(rounding, *between))
    return _then_corrected(name, recipe, steps, eta, guidance_scale, data)


def _for_run(
    steps: int | None, guidance_scale: float | None, data: CalibrationSet | None
) -> dict[str, Any]:
    """What all stages of a recipe are told; without data each takes its own."""
    shared: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale}
    return shared if data is None else shared | {"data": data}


def q_dit_w8a8(
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
    search: GranularitySearch | None = None,
) -> Recipe:
    """8-bit weights by GPTQ and 8-bit dynamic activations, both in the same groups.

    The adaLN layers' weights are quantized, their inputs are not; embedders and the last layer
    stay in 16 bits.

    Args:
      steps: Steps of the sampler whose samples the Hessians are taken of; None: to be chosen with
        `with_settings(steps=...)` before it runs.
      guidance_scale: Weight of the guidance there; None for none.
      data: What it is calibrated on; None for 64 items of labels in turn.
      search: Searches a group size for every layer first; None takes 128 (or 64) for all.

    References:
      Chen et al., Q-DiT, CVPR 2025, https://arxiv.org/abs/2406.17343.
    """
    return _q_dit(8, steps, guidance_scale, data, search)


def q_dit_w6a8(
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
    search: GranularitySearch | None = None,
) -> Recipe:
    """6-bit weights and 8-bit activations, as `q_dit_w8a8`.

    Args:
      steps: As there.
      guidance_scale: As there.
      data: As there.
      search: As there.

    References:
      As there: https://arxiv.org/abs/2406.17343.
    """
    return _q_dit(6, steps, guidance_scale, data, search)


def q_dit_w4a8(
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    data: CalibrationSet | None = None,
    search: GranularitySearch | None = None,
) -> Recipe:
    """4-bit weights and 8-bit activations, as `q_dit_w8a8`.

    Args:
      steps: As there.
      guidance_scale: As there.
      data: As there.
      search: As there.

    References:
      As there: https://arxiv.org/abs/2406.17343.
    """
    return _q_dit(4, steps, guidance_scale, data, search)


def _q_dit(
    bits: int,
    steps: int | None,
    guidance_scale: float | None,
    data: CalibrationSet | None,
    search: GranularitySearch | None,
) -> Recipe:
    name = f"q_dit_w{bits}a8"
    weight = WeightSpec(bits=bits, symmetric=False, granularity="per_group", group_size=GROUP_SIZES)
    act = ActSpec(
        bits=8, mode="dynamic", granularity="per_group", group_size=GROUP_SIZES, symmetric=False
    )
    quant = _recipe(name, weight, act).quant
    adaln = Rule(
        pattern=r"(.*/)?(final_)?modulation/kernel",
        weight=weight,
        reason="adaLN: its input, the conditioning, is one vector for all tokens",
    )
    rounding = GPTQ(**_for_run(steps, guidance_scale, data))
    stages = (rounding,) if search is None else (search, rounding)
    return Recipe(
        name=name, quant=dataclasses.replace(quant, rules=(*quant.rules, adaln)), stages=stages
    )


def _serial_parallel(
    name: str,
    weight: WeightSpec,
    steps: int | None,
    guidance_scale: float | None,
    data: CalibrationSet | None,
    fits: Fits,
) -> Recipe:
    quant = _recipe(name, weight, PER_STEP_A8).quant
    fit = FitSettings(weights="latent", iterations=600)
    shared = _for_run(steps, guidance_scale, data)
    stage = SerialParallel(fits=fits, refreshes=3, fit=fit, ranges="minmax", **shared)
    stages = (stage, TimePrecalculation(steps=steps))
    return Recipe(
        name=name, quant=dataclasses.replace(quant, rules=(*quant.rules, TIME)), stages=stages
    )


_W4 = WeightSpec(bits=4, granularity="per_group", group_size=GROUP_SIZES, method="mse")


def _recipe(name: str, weight: WeightSpec, act: ActSpec | None) -> Recipe:
    quant = QuantConfig(
        rules=EDGES, weight=weight, act=act, float_dtype="float16", allow_unmatched=True
    )
    return Recipe(name=name, quant=quant)


DATA_FREE: dict[str, Callable[[], Recipe]] = {"w8a8": w8a8, "w4a16": w4a16, "w4a8": w4a8}
"""Recipes that `qjax.quantize` can do alone."""

RECIPES: dict[str, Callable[..., Recipe]] = {
    **DATA_FREE,
    "s2p_w8a8": s2p_w8a8,
    "s2p_w4a8": s2p_w4a8,
    "ptqd_w8a8": ptqd_w8a8,
    "ptqd_w4a8": ptqd_w4a8,
    "ptqd_mp": ptqd_mp,
    "s2p_ptqd_w4a8": s2p_ptqd_w4a8,
    "q_dit_w8a8": q_dit_w8a8,
    "q_dit_w6a8": q_dit_w6a8,
    "q_dit_w4a8": q_dit_w4a8,
    "q_dit_s2p_ptqd_w4a8": q_dit_s2p_ptqd_w4a8,
}
"""All recipes by name."""


def by_name(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
      ValueError: If there is none of that name; the error lists them.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}.")
    return RECIPES[name]()
