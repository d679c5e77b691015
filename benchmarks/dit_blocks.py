"""Do blocks of DiT-XL/2 sample faster at low bits? `python benchmarks/dit_blocks.py`

A DiT of 2 blocks of the full width (1152 channels, 16 heads, 256 tokens) with random weights,
which samples 2 pictures in 5 steps of DDIM: in float32, and by the recipes without data,
quantization of the inputs included, in turn in one process. Writes
`benchmarks/results/dit_blocks.json`; `ratio` below 1 is faster than float.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
from _timing import interleaved, table, write

import qjax
from qjax import recipes
from qjax.models.dit import DiT, DiTConfig
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule

BLOCKS, PICTURES, STEPS = 2, 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    config = dataclasses.replace(DiTConfig.dit_xl_2(), num_layers=BLOCKS)
    network = DiT(config)
    side = config.sample_size
    x = jax.numpy.zeros((1, side, side, config.in_channels))
    zeros = jax.numpy.zeros((1,), "int32")
    params = network.init(jax.random.key(0), x, zeros, zeros)["params"]
    # Random everywhere: some layers of a new DiT are zeros.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    pipe = Pipeline.from_apply(
        network.apply,
        jax.tree.unflatten(tree, leaves),
        shape=(side, side, config.in_channels),
        sampler=DDIM(schedule=Schedule.linear(1000, 1e-4, 0.02), clip_sample=False),
        null_label=config.num_classes,
        num_labels=config.num_classes,
    )
    pipes = {"f32": pipe}
    pipes |= {name: qjax.quantize(pipe, recipes.by_name(name)) for name in recipes.DATA_FREE}
    settings = {"labels": [1, 2], "steps": STEPS, "key": jax.random.key(0)}
    calls = {name: functools.partial(one, **settings) for name, one in pipes.items()}
    shape = {"blocks": BLOCKS, "tokens": (side // config.patch_size) ** 2, "pictures": PICTURES}
    rows = [{**shape, "format": name, **result} for name, result in interleaved(calls).items()]
    print(table(rows))
    print(write("dit_blocks", rows, out=args.out))


if __name__ == "__main__":
    main()
