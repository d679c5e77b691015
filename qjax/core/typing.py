"""Shape letters and array aliases, defined once.

`b` batch, `h` height, `w` width, `c` channels, `t` tokens, `d` model width, `n` heads,
`k` head width, `i` input features, `o` output features, `g` groups, `s` sampling steps.
Images are `[b, h, w, c]`; weights `[i, o]`, convolutions `[h, w, i, o]`, as Flax stores them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

__all__ = [
    "Apply",
    "Array",
    "Bool",
    "Float",
    "Int",
    "PRNGKeyArray",
    "Params",
    "Shaped",
    "UInt8",
]

# A tree of arrays and QTensors, nested as Flax nests it.
Params = Mapping[str, Any]

# `apply({"params": ..., "quant": row}, x_t, t, labels) -> prediction`
# An array comes back; Flax itself types what `apply` returns as anything.
Apply = Callable[..., Any]
