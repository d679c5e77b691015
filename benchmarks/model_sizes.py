"""Bytes of the published models in 16, 8 and 4 bits: `python benchmarks/model_sizes.py`

What `qjax.plan` says of the denoisers' shapes under the recipes `w8a8` and `w4a16`; there are no
weights in it. Scales, biases and what the recipes leave in 16 bits count. Writes
`benchmarks/results/model_sizes.json`.
"""

import argparse
from pathlib import Path
from typing import Any

from _timing import table, write

from qjax import recipes
from qjax.core.quantize import plan
from qjax.models.published import PUBLISHED, published_shapes


def sizes(name: str) -> dict[str, Any]:
    """One row: parameters, bytes in float16, W8 and W4, and the ratios."""
    params = published_shapes(name)
    w8, w4 = (plan(params, recipe().quant) for recipe in (recipes.w8a8, recipes.w4a16))
    return {
        "model": name,
        "parameters": w8.bytes_before // 2,
        "float16": w8.bytes_before,
        "w8": w8.bytes_after,
        "w4": w4.bytes_after,
        "w8_ratio": round(w8.bytes_after / w8.bytes_before, 4),
        "w4_ratio": round(w4.bytes_after / w4.bytes_before, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    rows = [sizes(name) for name in PUBLISHED]
    print(table(rows))
    print(write("model_sizes", rows, out=args.out))


if __name__ == "__main__":
    main()
