"""What quantizing did to every layer: to its weights, and to what the network answers.

Both are signal to quantization noise ratios in dB (`qjax.core.metrics.sqnr`). That of the weights
needs no data. That of the answers takes the float network at samples of its own roll-out and
replaces the weights of one layer at a time by what the quantized model stores for it
(`qjax.calibrate.sensitivity`); inputs of layers stay in float in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.calibrate.collect import Samples, with_null_half
from qjax.calibrate.fitted import KERNEL, with_kernels
from qjax.calibrate.sensitivity import Probe
from qjax.core import metrics
from qjax.core.layers import LOW_RANK
from qjax.core.qtensor import QTensor, is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Array, Float, Params
from qjax.models.pipeline import Pipeline


def weight_sqnr(floats: Params, variant: Pipeline) -> dict[str, float]:
    """SQNR in dB of every quantized leaf against the float one, by path.

    A low-rank branch beside a kernel counts as part of it. Leaves that cannot be compared are
    left out: those of a smoothed model, whose channels were scaled, those beside which a LoRA
    stands, and those that the float tree has not, or in another shape.
    """
    found = {}
    for path, leaf, stored in _comparable(floats, variant):
        reference = np.asarray(leaf, np.float32)
        found[path] = float(metrics.sqnr(_value(variant.params, path, stored), reference))
    return found


def output_sqnr(probe: Probe, variant: Pipeline) -> dict[str, float]:
    """SQNR in dB of the float network's answers with one layer's weights quantized, by path.

    Args:
      probe: The float network and its answers (`probe_of`).
      variant: The quantized pipeline; what `weight_sqnr` leaves out is left out here too.
    """
    found = {}
    for path, leaf, stored in _comparable(probe.params, variant):
        layer, _, name = path.rpartition("/")
        if name == KERNEL:
            kernel = jnp.asarray(_value(variant.params, path, stored), leaf.dtype)
            found[path] = probe.sqnr_of_params(with_kernels(probe.params, {layer: kernel}))
    return found


def probe_of(
    pipe: Pipeline,
    x_t: Float[np.ndarray, "s b h w c"],
    t: Float[np.ndarray, " s"],
    told: Any,
    null: Any,
) -> Probe:
    """The float network at samples of its roll-out, one batch a step.

    Args:
      pipe: The float pipeline.
      x_t: What went into every step.
      t: Timestep of every step.
      told: What the network is told of the samples.
      null: The unconditional half; None without guidance.

    Raises:
      ValueError: If the pipeline is quantized or reads a step table, or its answers are not
        finite.
    """
    table = pipe.step_table is not None and pipe.step_table.entries
    if table or any(is_qtensor(leaf) for _, leaf in flatten(pipe.params)):
        raise ValueError(
            "sensitivity is measured on a float pipeline without a step table; got a quantized "
            "one. Give the float model first, or leave sensitivity out."
        )
    samples: Sequence[Samples] = []
    group = jnp.zeros((x_t.shape[1],), jnp.int32)
    for x, time in zip(x_t, t, strict=True):
        times = jnp.full((len(x),), time, jnp.asarray(t).dtype)
        samples = [*samples, with_null_half(Samples(jnp.asarray(x), times, told, group), null)]
    return Probe.of(pipe.apply, pipe.params, samples)


def _comparable(floats: Params, variant: Pipeline) -> list[tuple[str, Array, QTensor]]:
    """Path, float leaf and stored leaf of what stands for the same numbers in both."""
    if variant.smoothed:
        return []
    known: Mapping[str, Any] = dict(flatten(floats))
    pairs = []
    for path, stored in flatten(variant.params):
        leaf = known.get(path)
        if not is_qtensor(stored) or leaf is None or is_qtensor(leaf):
            continue
        with_lora = bool(variant.loras) and _branch(variant.params, path) is not None
        if tuple(leaf.shape) == tuple(stored.shape) and not with_lora:
            pairs.append((path, leaf, stored))
    return pairs


def _value(params: Params, path: str, stored: QTensor) -> Float[np.ndarray, "..."]:
    """The weights that a stored kernel and the low-rank branch beside it stand for."""
    value = np.asarray(stored.dequantize(jnp.float32))
    branch = _branch(params, path)
    if branch is None:
        return value
    down, up, scale = (np.asarray(leaf, np.float32) for leaf in branch)
    return value + (down * scale) @ up


def _branch(params: Params, path: str) -> tuple[Any, ...] | None:
    """`LOW_RANK` leaves beside a kernel; None where there are none."""
    owner: Any = params
    for name in path.split("/")[:-1]:
        owner = owner[name]
    return tuple(owner[name] for name in LOW_RANK) if LOW_RANK[0] in owner else None
