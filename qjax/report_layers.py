"""A params tree as the report tells it: every leaf, how it is stored, and why."""

import math

from qjax.core.config import QuantConfig
from qjax.core.describe import how_quantized as how_quantized
from qjax.core.describe import leaf_kind, why_float
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
                why_float(path, leaf_kind(path, len(shape)), config)
                if quantized
                else "the model is not quantized"
            )
        rows.append(
            LayerResult(
                path=path,
                kind=leaf_kind(path, len(shape)),
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
