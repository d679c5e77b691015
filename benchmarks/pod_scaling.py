"""How far does calibration on a pod scale? `JAX_PLATFORMS=cpu python benchmarks/pod_scaling.py`

The programs that fit a transformer block of DiT-XL/2 (28 alike) are compiled for slices of v5e from one
chip to 256, by libtpu's compiler and without a TPU. Operations, bytes of memory and bytes of the
collectives are the compiler's, which counts the body of a loop once; so the gradient of one shard is
compiled by itself, too. The time of an iteration, of all blocks, is

    blocks of a chip * (shards of a chip * gradient + rest + wire)

the gradient and the rest (soft weights, sums over shards, Adam) by the larger of operations over the
chip's rate and bytes over its bandwidth, the wire by the bandwidth between chips. Efficiency is the time
of one chip over that of n, n times over. It knows of uneven shares, of work that every chip does
again, and of the wire; not of latencies, and nothing was run. Writes
`benchmarks/results/pod_scaling.json` and `docs/pictures/pod_scaling.svg`.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _timing
import jax
import jax.numpy as jnp

from qjax import plots, recipes, topology_plan
from qjax.calibrate import compile_ahead, optimize
from qjax.calibrate.blocks import alike
from qjax.calibrate.reconstruction import Problem
from qjax.core.quantize import quantize
from qjax.roofline import PEAKS

QUANT = dataclasses.replace(recipes.by_name("s2p_w4a8").quant, float_dtype="bfloat16")
MODEL, ALIKE = "dit-xl-2-256", 28
CHIPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Slices by the chips that are used; the smallest that can be compiled for has four.
SLICES = {1: "2x2", 2: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 256: "16x16"}
PEAK = PEAKS["TPU v5e"]
# Of a chip to its neighbours, 1,600 Gbit/s: Google Cloud's page of v5e.
WIRE = 200e9
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "pod_scaling.svg"

# Shards, and the mesh of n chips: devices along data and along blocks.
WAYS: dict[str, tuple[int, Callable[[int], tuple[int, int]]]] = {
    "data alone, 32 shards": (32, lambda n: (min(n, 32), 1)),
    "blocks alone, 8 shards": (8, lambda n: (1, n)),
    "8 shards over up to 8 chips, then blocks": (8, lambda n: (min(n, 8), max(n // 8, 1))),
}


def settings_of(shards: int) -> Any:
    """The stage of the recipe with so many shards."""
    stage: Any = recipes.by_name("s2p_w4a8").stages[0]
    return dataclasses.replace(
        stage,
        steps=20,
        shards=shards,
        fit=dataclasses.replace(stage.fit, batch=max(stage.fit.batch, shards)),
        pairs=max(stage.pairs, shards),
        data=dataclasses.replace(stage.data, items=max(stage.data.items, shards)),
    )


@functools.cache
def whole(shards: int, data: int, block: int) -> compile_ahead.Program:
    """The program that fits the blocks."""
    found: list[compile_ahead.Program] = []

    class Enough(Exception):
        """The first program is the block's."""

    def keep(program: compile_ahead.Program, done: int, total: int) -> None:
        found.append(program)
        raise Enough

    with contextlib.suppress(Enough):
        compile_ahead.compile_ahead(
            topology_plan.network_of(MODEL),
            QUANT,
            settings_of(shards),
            f"v5e:{SLICES[data * block]}",
            data=data,
            block=block,
            count=data * block,
            on_program=keep,
        )
    assert found[0].blocks == ALIKE
    return found[0]


@functools.cache
def gradient(shards: int) -> dict[str, float]:
    """Operations and bytes of the gradient of one shard."""
    network, settings = topology_plan.network_of(MODEL), settings_of(shards)
    student, tables = compile_ahead.student_of(network, quantize(network.params, QUANT), 20)
    block = alike(compile_ahead.blocks_of(network, student))[0][0]
    params, fixed, carry, item = compile_ahead.fit_shapes(network, student, block, settings, tables)
    runner, size = student.runner(block), settings.fit.batch // shards

    def run(params, fixed, fitted, args, target, group, key):
        problem = Problem(params, fixed, args, target, group, jnp.float32(1))
        loss = lambda fitted: optimize.data_loss(
            runner, settings.fit, problem, fitted, jnp.arange(size), jax.random.wrap_key_data(key)
        )[0]
        return jax.grad(loss)(fitted)

    device = compile_ahead.topology_devices("v5e:2x2")[:1]
    place = jax.sharding.SingleDeviceSharding(device[0])
    put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    here = lambda tree: jax.tree.map(lambda a: put(a.shape, a.dtype), tree)
    items = jax.tree.map(lambda a: put((size, *a.shape[1:]), a.dtype), item)
    group, key = put((size,), jnp.int32), put((2,), jnp.uint32)
    arguments = (here(params), here(fixed), here(carry.fitted), *items, group, key)
    cost = jax.jit(run).lower(*arguments).compile(compiler_options=compile_ahead.QUICKLY)
    found = cost.cost_analysis()
    return {"flops": found["flops"], "bytes": found["bytes accessed"]}


def roofline_ms(flops: float, memory: float) -> float:
    """The least that a chip takes."""
    return 1e3 * max(flops / PEAK.float_operations, memory / PEAK.bytes)


def row_of(way: str, devices: int) -> dict[str, Any]:
    """Time of one iteration of all blocks, in parts."""
    shards, mesh = WAYS[way]
    data, block = mesh(devices)
    # Blocks are fitted without a word between chips: the program of a chip is that of one column.
    program, one = whole(shards, data, 1), gradient(shards)
    blocks, here = -(-ALIKE // block), shards // data
    return {
        "way": way,
        "devices": devices,
        "data": data,
        "block": block,
        "blocks_of_a_chip": blocks,
        "shards_of_a_chip": here,
        "gradient_ms": blocks * here * roofline_ms(one["flops"], one["bytes"]),
        "rest_ms": blocks
        * roofline_ms(
            max(program.flops - one["flops"], 0.0), max(program.bytes_accessed - one["bytes"], 0.0)
        ),
        "wire_ms": blocks * 1e3 * program.collective_bytes / WIRE if data > 1 else 0.0,
        "hbm_bytes": program.hbm_bytes,
        "compile_seconds": program.seconds,
    }


def main() -> None:
    """Compile for every slice, and write table and picture."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for way in WAYS:
        alone = None
        for devices in CHIPS:
            row = row_of(way, devices)
            time = row["gradient_ms"] + row["rest_ms"] + row["wire_ms"]
            alone = time if alone is None else alone
            row["efficiency"] = alone / (devices * time)
            rows.append(row)
        print(_timing.table(rows), flush=True)
    one, many = whole(8, 8, 1), whole(8, 8, 32)
    # What `row_of` takes for granted.
    assert (one.flops, one.collective_bytes) == (many.flops, many.collective_bytes)
    _timing.write("pod_scaling", rows)
    series = {
        way: (
            [row["devices"] for row in rows if row["way"] == way],
            [row["efficiency"] for row in rows if row["way"] == way],
        )
        for way in WAYS
    }
    document = plots.line_plot(
        series,
        title="Fitting the 28 blocks of DiT-XL/2 on v5e, by the compiled programs",
        x_label="chips",
        y_label="efficiency: time of one chip / (n x time of n)",
        log_x=True,
    )
    plots.save_plot(PICTURE, document)


if __name__ == "__main__":
    main()
