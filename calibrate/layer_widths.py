"""The widths of a pipeline's layers: read from it, changed in it, and counted in bytes.

A layer's kernel is quantized by the settings of the pipeline's rules. At another width all else
stays as it is: who shares a scale, how ranges are found, how the input is quantized. A pipeline
whose layers have other widths has a rule for each of them, so that its rules still say how it
was made, and it can be saved, loaded, and made again from the floats.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.calibrate.blocks import subtree
from qjax.calibrate.fitted import KERNEL, quantized_kernels, with_kernels
from qjax.calibrate.requantize import method_of, spec_of
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.layers import LOW_RANK
from qjax.core.linen import BoxedQTensor
from qjax.core.plan import PlanEntry, kernel_axes
from qjax.core.qtensor import QTensor
from qjax.core.quantize import plan, quantize_leaf
from qjax.core.serialize import flatten
from qjax.core.steps import StepTable
from qjax.core.typing import Params
from qjax.models.pipeline import Pipeline
from qjax.models.saving import method_name

__all__ = ["LayerWeights", "float_params", "quantized_layers", "with_rules", "with_widths"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """How the weights of one layer are quantized, at whatever width.

    Attributes:
      path: The layer's, keys joined with `/`, without `/kernel`.
      weight: The settings; their bits are those of now.
      act: How the layer's input is quantized.
      scale_dtype: Dtype in which scales are stored.
    """

    path: str
    weight: WeightSpec
    act: ActSpec | None
    scale_dtype: Any

    @property
    def leaf(self) -> str:
        """Path of the kernel."""
        return _leaf(self.path)

    def rule(self, bits: int, *, reason: str = "") -> Rule:
        """The rule that quantizes this layer alone, with `bits` bits and else as it is now."""
        weight = dataclasses.replace(self.weight, bits=bits)
        return Rule(pattern=re.escape(self.leaf), weight=weight, act=self.act, reason=reason)

    def quantized(self, w: Any, bits: int, *, box: bool = False) -> QTensor:
        """The kernel `w`, or a `jax.ShapeDtypeStruct` of it, with `bits` bits."""
        config = QuantConfig(rules=(self.rule(bits),), scale_dtype=self.scale_dtype)
        return quantize_leaf(self.leaf, w, config, box=box)

    def stored_bytes(self, w: Any, bits: int) -> int:
        """Bytes that `w` takes with `bits` bits: padded integers, scales and zero points."""
        shape = jax.ShapeDtypeStruct(np.shape(w), jnp.float32)
        return self.quantized(shape, bits).nbytes_packed


def quantized_layers(pipe: Pipeline) -> dict[str, LayerWeights]:
    """The quantized layers of a pipeline, by path.

    Raises:
      ValueError: If nothing is quantized, something else than kernels of layers is, or the
        pipeline does not remember its rules.
    """
    kernels = quantized_kernels(pipe.params)
    if not kernels or pipe.quant is None:
        raise ValueError(
            "bits can be given to the layers of a quantized pipeline that remembers its rules; "
            f"got {len(kernels)} quantized layers and quant={pipe.quant}. Quantize it with a "
            "recipe whose rules quantize some."
        )
    layers = {}
    for path, q in kernels.items():
        leaf = _leaf(path)
        axes = kernel_axes(leaf, q.ndim)
        assert axes is not None  # or it would not be quantized
        weight, _ = spec_of(q, method_of(pipe.quant, leaf, q.shape), axes=axes)
        dtype = jnp.dtype(q.scale.dtype).name
        layers[path] = LayerWeights(path=path, weight=weight, act=q.act, scale_dtype=dtype)
    return layers


def with_widths(
    pipe: Pipeline, floats: Params, layers: Mapping[str, LayerWeights], bits: Mapping[str, int]
) -> Pipeline:
    """The pipeline with other integers where bits have changed, and a rule for each.

    They are rounded to nearest from the floats. Layers whose width stays keep their integers.
    Entries of the step table that hold statistics of the former quantization noise are left
    out; ranges of the layers' inputs stay.

    Args:
      pipe: A quantized pipeline.
      floats: The params that its integers stand for.
      layers: How its layers are quantized (`quantized_layers`).
      bits: The width of every layer, by path.
    """
    kernels: dict[str, QTensor] = {}
    rules: dict[str, Rule] = {}
    for path, old in quantized_kernels(pipe.params).items():
        if bits[path] == old.bits:
            continue
        layer, w = layers[path], subtree(floats, path)[KERNEL]
        new = layer.quantized(w, bits[path], box=isinstance(old, BoxedQTensor))
        kernels[path] = new.replace(dtype_name=old.dtype_name)
        rules[layer.leaf] = layer.rule(bits[path], reason=f"mixed precision: {old.bits} before")
    if not rules:
        return pipe
    assert pipe.quant is not None
    config = with_rules(pipe.quant, rules, _entries(floats, pipe.quant))
    method = method_name(config)
    return pipe.replace(
        params=with_kernels(pipe.params, kernels),
        quant=config,
        method=method,
        step_table=_still_true(pipe.step_table, method),
    )


def with_rules(
    config: QuantConfig, rules: Mapping[str, Rule], entries: Sequence[PlanEntry]
) -> QuantConfig:
    """The config with rules for single leaves put first.

    Rules that decided nothing but these leaves are left out, for a rule that decides nothing is
    an error.

    Args:
      config: Rules so far.
      rules: New ones, by the leaf that each is for.
      entries: All leaves of the model, as `plan` lists them.
    """
    still: set[int] = set()
    idle = set(range(len(config.rules)))
    for entry in entries:
        for i, rule in enumerate(config.rules):
            if re.fullmatch(rule.pattern, entry.path) and rule.kind in (None, entry.kind):
                idle.discard(i)
                if entry.path not in rules:
                    still.add(i)
                break
    kept = tuple(rule for i, rule in enumerate(config.rules) if i in still | idle)
    return dataclasses.replace(config, rules=(*rules.values(), *kept))


def float_params(floats: Params, params: Params) -> Params:
    """The float network that quantized params stand for.

    It has the leaves of `floats`, and what a stage has put beside the kernels of `params`.
    """
    own, added = dict(flatten(floats)), dict(flatten(params))
    beside = {path: leaf for path, leaf in added.items() if path not in own}
    return traverse_util.unflatten_dict({**own, **beside}, sep="/")


def _still_true(table: StepTable | None, method: str) -> StepTable | None:
    """The step table without what was fitted to another quantization."""
    if table is None:
        return None
    kept = {name: key for name, key in table.keys if key.method in (None, method)}
    for name in table.entries.keys() - kept.keys():
        table = table.drop(name)
    return table if table.entries else None


def _entries(floats: Params, config: QuantConfig) -> tuple[PlanEntry, ...]:
    """All leaves of the float model, but for branches beside them, and what rules say of them."""
    leaves = dict(flatten(floats))
    own = {path: leaf for path, leaf in leaves.items() if path.rsplit("/", 1)[-1] not in LOW_RANK}
    tree = traverse_util.unflatten_dict(own, sep="/")
    return plan(tree, dataclasses.replace(config, allow_unmatched=True)).entries


def _leaf(path: str) -> str:
    """Path of a layer's kernel."""
    return f"{path}/{KERNEL}" if path else KERNEL
