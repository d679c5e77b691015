"""A quantized tree in words: its formats, and why a leaf is in float."""

import math
import re

from qjax.core.config import QuantConfig
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten
from qjax.core.typing import Params


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


def leaf_kind(path: str, ndim: int) -> str:
    """What a leaf is: `"conv"`, `"dense"`, `"bias"`, `"norm"`, `"embedding"` or `"other"`."""
    name = path.rsplit("/", 1)[-1]
    if name == "kernel":
        return "conv" if ndim == 4 else "dense"
    return {"bias": "bias", "scale": "norm", "embedding": "embedding"}.get(name, "other")


def why_float(path: str, kind: str, config: QuantConfig | None) -> str:
    """Why a leaf of a quantized tree is in float.

    Args:
      path: Keys joined with `/`.
      kind: As `leaf_kind` gives it.
      config: The rules of the tree; None if they are not known.
    """
    for rule in () if config is None else config.rules:
        if re.fullmatch(rule.pattern, path) and rule.kind in (None, kind):
            return rule.reason or f"rule {rule.pattern!r}"
    return "left in float by the config" if path.endswith("kernel") else "not a layer's kernel"
