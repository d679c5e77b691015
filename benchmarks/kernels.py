"""What do the kernels reach of an accelerator? `python benchmarks/kernels.py`

The low-bit matmuls as the layers of DiT-XL/2 and Stable Diffusion XL call them, in turn with
XLA's matmul of bfloat16 in one process: the quantization of the input in front, the cast to
bfloat16 behind. `--implementations` are those of `qjax.kernels.quant_matmul`; one that cannot
run is a row without a time, and says why.

A call repeats the operation inside one program, each on the input that the one before has
touched, so that what starting a program takes does not count. Shares are of the peaks that the
makers state for dense int8 (bfloat16 for float activations), and of the memory's bandwidth for
input, stored weights and output. Writes `benchmarks/results/kernels_<platform>.json`.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matmul
from _timing import RESULTS, interleaved, table, write

from qjax.core import ops
from qjax.core.typing import Array
from qjax.kernels.quant_matmul import prefer

SHAPES = {
    "square": ((8192, 8192, 8192),),
    "dit-xl/2, 32 images": ((16384, 1152, 3456), (16384, 1152, 4608), (16384, 4608, 1152)),
    "sdxl": ((4096, 1280, 1280), (4096, 1280, 10240), (4096, 5120, 1280), (16384, 640, 5120)),
    "few rows": ((1, 4608, 1152), (16, 1152, 4608), (16, 5120, 1280)),
}
# Dense tera-operations of int8 and of bfloat16 a second, and terabytes a second.
PEAKS = {
    "H100": (1979, 989, 3.35),
    "H200": (1979, 989, 4.8),
    "TPU v4": (275, 275, 1.2),
    "TPU v5 lite": (394, 197, 0.82),
    "TPU v5": (918, 459, 2.77),
    "TPU v6 lite": (1836, 918, 1.64),
}
REPEATS = 10


def peaks() -> tuple[float, float, float] | None:
    """Those of this device, of the longest name that fits."""
    kind = jax.devices()[0].device_kind
    known = sorted((name for name in PEAKS if name in kind), key=len)
    return PEAKS[known[-1]] if known else None


def repeated(operation: Callable[[Array, Any], Array], implementation: str | None) -> Callable:
    """A jitted function that runs the operation `REPEATS` times, each after the other."""

    def run(x: Array, w: Any) -> Array:
        def again(_: Any, x: Array) -> Array:
            y = operation(x, w)
            return x.at[0, 0].add(jnp.where(jnp.isnan(y[0, 0]), y[0, 0], 0).astype(x.dtype))

        return jax.lax.fori_loop(0, REPEATS, again, x)

    jitted = jax.jit(run)

    def call(x: Array, w: Any) -> Array:
        if implementation is None:
            return jitted(x, w)
        with prefer(implementation):  # type: ignore[arg-type]
            return jitted(x, w)

    return call


def stored_bytes(weight: Any) -> int:
    """Bytes of a weight as it lies in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weight))


def measure(m: int, k: int, n: int, implementations: list[str], rounds: int) -> list[dict]:
    """All formats and implementations of one shape."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.float32) / k**0.5
    calls = {"bf16": functools.partial(repeated(jnp.matmul, None), x, w.astype(jnp.bfloat16))}
    notes, weights = {}, {"bf16": w.astype(jnp.bfloat16)}
    for (name, formats), implementation in itertools.product(
        matmul.FORMATS.items(), implementations
    ):
        weight = matmul.quantize(w, *formats)
        label = f"{name} {implementation}"
        weights[label] = weight
        call = functools.partial(repeated(ops.matmul, implementation), x, weight)
        try:
            jax.block_until_ready(call())
            calls[label] = call
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            notes[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    found, known = interleaved(calls, rounds=rounds), peaks()
    rows = []
    for label, weight in weights.items():
        row: dict[str, Any] = {"m": m, "k": k, "n": n, "format": label}
        if label in notes:
            rows.append(row | {"failed": notes[label]})
            continue
        seconds = found[label]["ms"] / 1e3 / REPEATS
        row |= {"us": seconds * 1e6, "over_bf16": found[label]["ratio"]}
        if known is not None:
            peak = known[0] if "a8" in label else known[1]
            moved = 2 * m * k + 2 * m * n + stored_bytes(weight)
            row |= {
                "of_peak": 2 * m * k * n / seconds / 1e12 / peak,
                "of_bandwidth": moved / seconds / 1e12 / known[2],
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=["xla", "hopper"])
    parser.add_argument("--sets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    platform = jax.devices()[0].platform
    rows: list[dict] = []
    for name in args.sets:
        for shape in SHAPES[name]:
            found = measure(*shape, args.implementations, args.rounds)
            print(f"{name} {shape}", table([r for r in found if "us" in r]), sep="\n", flush=True)
            for row in (r for r in found if "failed" in r):
                print(f"{row['format']}: {row['failed']}", flush=True)
            rows += [{"set": name, **row} for row in found]
            write("kernels", rows, out=args.out or RESULTS / f"kernels_{platform}.json")


if __name__ == "__main__":
    main()
