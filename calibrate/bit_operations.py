"""Bit operations (BOPs): what a denoising step costs, by the bits of what is multiplied.

    BOPs = sum over layers of  m_l b_w b_a

with m_l the multiplications of a layer in one evaluation of the network for one item, b_w the
bits of its weights and b_a those of its inputs, 32 each where a layer is left in float. It is
the count of the papers on diffusion models, whose gain is the ratio to 32 bits everywhere. Only
convolutions and dense layers count, not the products within attention; what groups cost besides
is counted in `genome.py`.

References:
  He et al., PTQD, NeurIPS 2023, https://arxiv.org/abs/2305.10657 (a gain of 19.96 at W4A8);
  van Baalen et al., Bayesian Bits, 2020, https://arxiv.org/abs/2005.07093 (the count).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.fitted import KERNEL, quantized_kernels, with_kernels
from qjax.calibrate.genome_space import macs_of_layers
from qjax.calibrate.recipe_file import kernel_shapes
from qjax.models.pipeline import Pipeline

__all__ = ["LayerOperations", "bops", "gain", "gain_of_share", "operations_of"]

FLOAT = 32


@dataclasses.dataclass(frozen=True)
class LayerOperations:
    """One layer.

    Attributes:
      macs: Multiplications in one evaluation for one item.
      weight_bits: Of its weights; 32 in float.
      act_bits: Of its input; 32 in float.
      by_step: Whether the bits of its input are a row's, and may differ from step to step.
    """

    macs: int
    weight_bits: int = FLOAT
    act_bits: int = FLOAT
    by_step: bool = False


def operations_of(pipe: Pipeline, told: Any) -> dict[str, LayerOperations]:
    """Every layer that a denoising step runs, by path.

    Args:
      pipe: Float or quantized.
      told: What the network is told of one item, as `Pipeline.condition` gives it.
    """
    quantized = quantized_kernels(pipe.params)
    paths = [path.removesuffix(KERNEL).removesuffix("/") for path in kernel_shapes(pipe.params)]
    # Without `act` the layers run as they do with ranges, which there may not be yet.
    bare = {path: q.replace(act=None) for path, q in quantized.items()}
    rows = pipe.step_table.row(0) if pipe.step_table and pipe.step_table.entries else {}
    variables = {"params": with_kernels(pipe.params, bare), **rows}
    x, t = jnp.zeros((1, *pipe.shape)), jnp.zeros((1,), jnp.int32)
    macs = macs_of_layers(lambda: pipe.apply(variables, x, t, told), paths, items=1)
    found = {path: LayerOperations(macs[path]) for path in paths}
    for path, q in quantized.items():
        found[path] = LayerOperations(macs[path], q.bits)
        if q.act is not None:
            by_step = q.act.mode == "per_step"
            found[path] = LayerOperations(macs[path], q.bits, q.act.bits, by_step)
    return found


def bops(layers: Sequence[LayerOperations], act_bits: int | None = None) -> int:
    """BOPs of one evaluation for one item.

    Args:
      layers: All layers of the network.
      act_bits: Of the inputs whose bits are a row's; None for their own.
    """
    return sum(
        one.macs * one.weight_bits * (act_bits if act_bits and one.by_step else one.act_bits)
        for one in layers
    )


def gain(layers: Sequence[LayerOperations], schedule: Sequence[int]) -> float:
    """How many times fewer BOPs a run takes than one at 32 bits.

    Args:
      layers: All layers.
      schedule: Bits of the inputs at every step of the run, for the layers whose bits are a row's.
    """
    whole = sum(one.macs for one in layers) * FLOAT * FLOAT
    return float(whole / np.mean([bops(layers, bits) for bits in schedule]))


def gain_of_share(share: float, weight_bits: int, act_bits: float) -> float:
    """The gain of a network of which a share of the multiplications stays in float.

    Args:
      share: Of the multiplications, 0 to 1.
      weight_bits: Of the others.
      act_bits: Of the others' inputs, on average over the steps.
    """
    return 1 / (share + (1 - share) * weight_bits * act_bits / FLOAT**2)
