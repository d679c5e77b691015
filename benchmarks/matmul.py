"""Is a low-bit matmul faster than the float one? `python benchmarks/matmul.py`

`ops.matmul` of each format, the quantization of the input included, and the float32 matmul,
in turn in one process; the layers are those of DiT-XL/2. Writes
`benchmarks/results/matmul.json` and prints the table; `ratio` below 1 is faster than float.
W4A16 computes in float with weights it dequantizes first: it saves memory, not time.
"""

import argparse
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import interleaved, table, write

from qjax.core import ops
from qjax.core.config import ActSpec, WeightSpec
from qjax.core.qtensor import from_codes
from qjax.core.quantizers import quantize_weight

ROWS = (64, 256, 512, 2048)
LAYERS = ((1152, 1152), (1152, 3456), (1152, 4608), (4608, 1152))

PER_CHANNEL = WeightSpec(bits=4)
GROUPS = WeightSpec(bits=4, granularity="per_group", group_size=128)
FORMATS = {
    "w8a8": (WeightSpec(bits=8), ActSpec()),
    "w4a8": (PER_CHANNEL, ActSpec()),
    "w4a8 g128": (GROUPS, ActSpec()),
    "w4a16": (PER_CHANNEL, None),
    "w4a16 g128": (GROUPS, None),
}


def quantize(w, spec: WeightSpec, act: ActSpec | None):
    codes = quantize_weight(w, spec, group_size=spec.group_size)
    layout = "native" if spec.bits == 8 else "packed"
    return from_codes(*codes, bits=spec.bits, act=act, layout=layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    run = jax.jit(ops.matmul)
    results = []
    for m, (k, n) in itertools.product(ROWS, LAYERS):
        x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
        w = jnp.asarray(rng.standard_normal((k, n)) / k**0.5, jnp.float32)
        weights = {"f32": w} | {name: quantize(w, *fmt) for name, fmt in FORMATS.items()}
        calls = {name: functools.partial(run, x, weight) for name, weight in weights.items()}
        rows = [
            {"m": m, "k": k, "n": n, "format": name, **result}
            for name, result in interleaved(calls).items()
        ]
        print(table(rows), flush=True)
        results += rows
    print(write("matmul", results, out=args.out))


if __name__ == "__main__":
    main()
