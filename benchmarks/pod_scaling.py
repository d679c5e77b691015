"""How far does calibration on a pod scale? `JAX_PLATFORMS=cpu python benchmarks/pod_scaling.py`

The program that fits a transformer block of DiT-XL/2 (28 alike) is compiled for slices of v5e from
one chip to 256, by libtpu's compiler and without a TPU: operations, bytes of memory and bytes of
the collectives are the compiler's. Time is their roofline: on every chip, for each of its blocks and
each of its shards, the larger of operations over the chip's rate and bytes over its bandwidth, and
for each of its blocks what goes over the wire, over the bandwidth between chips. Efficiency is the
time of one chip over that of n, n times over. So it knows of uneven shares, of work that is done
many times and of the wire; not of latencies, and nothing was run. Writes
`benchmarks/results/pod_scaling.json` and `docs/pictures/pod_scaling.svg`.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import _timing

from qjax import plots, recipes, topology_plan
from qjax.calibrate import compile_ahead
from qjax.roofline import PEAKS

MODEL, ALIKE = "dit-xl-2-256", 28
SLICES = {1: "v5e:1x1", 4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
PEAK = PEAKS["TPU v5e"]
# Of a chip to its neighbours, 1,600 Gbit/s: Google Cloud's page of v5e.
WIRE = 200e9
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "pod_scaling.svg"

# Shards, and devices along data, of n devices; the others lie along blocks.
WAYS = {
    "data alone, 256 shards": (256, lambda n: n),
    "blocks alone, 8 shards": (8, lambda n: 1),
    "8 shards over up to 8 devices, then blocks": (8, lambda n: min(n, 8)),
}


def compiled(shards: int, data: int, devices: int) -> compile_ahead.Program:
    """The program that fits the blocks."""
    recipe = recipes.by_name("s2p_w4a8")
    stage = recipe.stages[0]
    fit = dataclasses.replace(stage.fit, batch=max(stage.fit.batch, shards))
    pairs = max(stage.pairs, shards)
    settings = dataclasses.replace(stage, steps=20, shards=shards, fit=fit, pairs=pairs)
    found: list[compile_ahead.Program] = []

    class Enough(Exception):
        """The first program is the block's."""

    def keep(program: compile_ahead.Program, done: int, total: int) -> None:
        found.append(program)
        raise Enough

    quant = dataclasses.replace(recipe.quant, float_dtype="bfloat16")
    try:
        compile_ahead.compile_ahead(
            topology_plan.network_of(MODEL),
            quant,
            settings,
            SLICES[devices],
            data=data,
            block=devices // data,
            on_program=keep,
        )
    except Enough:
        pass
    assert found[0].blocks == ALIKE
    return found[0]


def row_of(way: str, devices: int) -> dict[str, Any]:
    """Time of one iteration of all blocks, in parts."""
    shards, along = WAYS[way]
    data = along(devices)
    block = devices // data
    program = compiled(shards, data, devices)
    blocks_here = -(-ALIKE // block)
    shards_here = shards // data
    compute = max(program.flops / PEAK.float_operations, program.bytes_accessed / PEAK.bytes)
    wire = program.collective_bytes / WIRE if data > 1 else 0.0
    return {
        "way": way,
        "devices": devices,
        "data": data,
        "block": block,
        "blocks_of_a_device": blocks_here,
        "shards_of_a_device": shards_here,
        "flops": program.flops,
        "bytes_accessed": program.bytes_accessed,
        "collective_bytes": program.collective_bytes,
        "compute_ms": blocks_here * shards_here * compute * 1e3,
        "wire_ms": blocks_here * wire * 1e3,
        "hbm_bytes": program.hbm_bytes,
        "compile_seconds": program.seconds,
    }


def main() -> None:
    """Compile for every slice, and write table and picture."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for way in WAYS:
        alone = None
        for devices in SLICES:
            row = row_of(way, devices)
            time = row["compute_ms"] + row["wire_ms"]
            alone = time if alone is None else alone
            row["efficiency"] = alone / (devices * time)
            rows.append(row)
            print(_timing.table([row]), flush=True)
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
