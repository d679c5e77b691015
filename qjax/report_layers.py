"""A params tree as the report tells it: every leaf, how it is stored, and why."""

import math
import re

from qjax.core.config import QuantConfig
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Params
from qjax.report_data import LayerResult


def layer_results(params: Params, config: QuantConfig | None = None) -> tuple[LayerResult, ...]:
    """Every leaf of a tree as it is stored, floats counted at 16 bits a value.

    Args:
      params: Arrays and QTensors.
      config: The rules they were quantized by, which give the reasons for the floats.
    """
    leaves = list(flatten(params))
    quantized = any(is_qtensor(leaf) for _, leaf in leaves)
    rows = []
    for path, leaf in leaves:
        shape = tuple(leaf.shape)
        size = 2 * math.prod(shape)
        low_bit = is_qtensor(leaf)
        reason = ""
        if not low_bit:
            reason = (
                _why_float(path, _kind(path, len(shape)), config)
                if quantized
                else "the model is not quantized"
            )
        rows.append(
            LayerResult(
                path=path,
                kind=_kind(path, len(shape)),
                shape=shape,
                weight_bits=leaf.bits if low_bit else None,
                act_bits=leaf.act.bits if low_bit and leaf.act else None,
                group_size=leaf.group_size if low_bit else None,
                bytes_float=size,
                bytes_quantized=leaf.nbytes_packed if low_bit else size,
                reason=reason,
            )
        )
    return tuple(rows)


def how_quantized(params: Params) -> str:
    """The formats in a tree in plain words: `"4-bit weights (groups of 64), ..."`."""
    leaves = [leaf for _, leaf in flatten(params) if is_qtensor(leaf)]
    if not leaves:
        return "not quantized"
    widths = {leaf.bits for leaf in leaves}
    acts = _either({leaf.act.bits for leaf in leaves if leaf.act is not None})
    groups = {leaf.group_size for leaf in leaves if leaf.group_size}
    shared = "one scale per channel"
    if groups:
        rest = any(leaf.group_size is None for leaf in leaves)
        shared = f"groups of {_either(groups)}" + (f", else {shared}" if rest else "")
    if len(widths) > 1:
        counts = [math.prod(leaf.shape) for leaf in leaves]
        bits = sum(n * leaf.bits for n, leaf in zip(counts, leaves, strict=True))
        shared = f"{bits / sum(counts):.2f} on average; {shared}"
    inputs = f"{acts}-bit activations" if acts else "activations in float"
    return f"{_either(widths)}-bit weights ({shared}), {inputs}"


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _kind(path: str, ndim: int) -> str:
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
        return "conv" if ndim == 4 else "dense"
    return {"bias": "bias", "scale": "norm", "embedding": "embedding"}.get(name, "other")


def _why_float(path: str, kind: str, config: QuantConfig | None) -> str:
    for rule in () if config is None else config.rules:
        if re.fullmatch(rule.pattern, path) and rule.kind in (None, kind):
            return rule.reason or f"rule {rule.pattern!r}"
    return "left in float by the config" if path.endswith("kernel") else "not a layer's kernel"
