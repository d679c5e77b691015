"""How long does GPTQ take, and how near do layers come? `python benchmarks/gptq.py`

- Kernels of DiT-XL/2's sizes at 4 bits, groups of 128 with zero points, from inputs with
  correlated channels: seconds to compile, median seconds of `--rounds` runs, and the error of
  the outputs over that of rounding to nearest.
- Every layer of the shipped DiT at 4 and 3 bits, groups of 32: the same ratio on the Hessian of
  its own inputs, as the stage reports it.

Writes `benchmarks/results/gptq.json`.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from _timing import interleaved, table, write

import qjax
from qjax import recipes
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.gptq import gptq, output_error
from qjax.calibrate.gptq_stage import GPTQ
from qjax.calibrate.recipe import Recipe, run
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.quantizers import Codes, quantize_weight, to_floats

NAME = "gptq"
SIZES = ((1152, 1152), (1152, 4608), (4608, 1152))
GROUP = 128
SPEC = WeightSpec(bits=4, symmetric=False, granularity="per_group", group_size=GROUP)


def hessian(size: int, key: jax.Array) -> jax.Array:
    """`X^T X` of 2,048 rows whose channels are mixtures of an eighth as many."""
    mixed, own = jax.random.split(key)
    few = jax.random.normal(mixed, (2048, size // 8))
    mixture = jax.random.normal(own, (size // 8, size)) / (size / 8) ** 0.5
    x = few @ mixture + 0.1 * jax.random.normal(own, (2048, size))
    return x.T @ x


def floats(codes: Codes) -> jax.Array:
    """The kernel that codes in groups stand for."""
    assert codes.zero_point is not None
    scale, zero = (jnp.repeat(a, GROUP, axis=0) for a in (codes.scale, codes.zero_point))
    return to_floats(Codes(codes.codes, scale, zero))


def speed(inputs: int, outputs: int, rounds: int) -> dict:
    """One kernel, alone."""
    keys = jax.random.split(jax.random.key(0))
    w, h = jax.random.normal(keys[0], (inputs, outputs)) / inputs**0.5, hessian(inputs, keys[1])
    call = jax.jit(functools.partial(gptq, spec=SPEC, group_size=GROUP))
    start = time.perf_counter()
    codes = jax.block_until_ready(call(w, h))
    first = time.perf_counter() - start
    found = interleaved({"gptq": lambda: call(w, h)}, rounds=rounds)["gptq"]["ms"] / 1e3
    nearest = quantize_weight(w, SPEC, group_size=GROUP)
    errors = [output_error(w, floats(one), h) for one in (codes, nearest)]
    return {
        "kernel": f"{inputs}x{outputs}",
        "bits": SPEC.bits,
        "compile_s": round(first - found, 2),
        "seconds": round(found, 3),
        "error_over_nearest": float(errors[0] / errors[1]),
    }


def layers(bits: int) -> list[dict]:
    """The stage's own report on the shipped transformer."""
    weight = WeightSpec(bits=bits, symmetric=False, granularity="per_group", group_size=32)
    act = ActSpec(mode="dynamic", granularity="per_group", group_size=32, symmetric=False)
    quant = QuantConfig(rules=recipes.EDGES, weight=weight, act=act, allow_unmatched=True)
    stage = GPTQ(steps=10, guidance_scale=2.0, data=CalibrationSet(items=64))
    events: list[dict] = []
    recipe = Recipe(quant=quant, stages=(stage,), name=NAME)
    run(qjax.load("fashion-dit"), recipe, seed=0, on_event=events.append)
    return [
        {
            "layer": event["layer"],
            "bits": bits,
            "error_over_nearest": event["gptq"] / event["nearest"],
            "taken": event["taken"],
        }
        for event in events
        if event["event"] == "layer"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    rows = [speed(*size, args.rounds) for size in SIZES]
    print(table(rows), flush=True)
    for bits in (4, 3):
        found = layers(bits)
        print(table(found), flush=True)
        worse = [row["layer"] for row in found if row["error_over_nearest"] > 1]
        print(f"{bits} bits: {len(found)} layers, worse than to nearest: {worse or 'none'}")
        rows += found
    print(write(NAME, rows, out=args.out))


if __name__ == "__main__":
    main()
