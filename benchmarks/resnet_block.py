"""Is a ResNet block of Stable Diffusion faster at W8A8? `python benchmarks/resnet_block.py`

The blocks of the UNet of Stable Diffusion v1-4 at every size, at 64x64 latents and a guided
batch (2), with the float kernels and with the recipe `w8a8`, quantization of the inputs
included, in turn in one process. Writes `benchmarks/results/resnet_block.json`; `ratio` below 1 is
faster than float.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _timing import interleaved, table, write

import qjax
from qjax.models.resnet import ResnetBlock

# Side of the image, input and output channels: down blocks, the first of the up blocks, and 320
# channels at 32x32, which is none of them.
BLOCKS = (
    (64, 320, 320),
    (32, 320, 320),
    (32, 320, 640),
    (32, 640, 640),
    (16, 1280, 1280),
    (16, 2560, 1280),
)
BATCH, TIME = 2, 1280


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    results = []
    for side, i, o in BLOCKS:
        block = ResnetBlock(o)
        x, time = normal(BATCH, side, side, i), normal(BATCH, TIME)
        params = block.init(jax.random.key(0), x, time)["params"]
        run = jax.jit(lambda params, x, time, block=block: block.apply({"params": params}, x, time))
        variants = {"f32": params}
        for name in ("w8a8", "w4a8"):
            variants[name] = qjax.quantize(params, qjax.recipes.by_name(name))
        calls = {name: functools.partial(run, tree, x, time) for name, tree in variants.items()}
        shape = {"side": side, "i": i, "o": o}
        rows = [{**shape, "format": name, **result} for name, result in interleaved(calls).items()]
        print(table(rows), flush=True)
        results += rows
    print(write("resnet_block", results, out=args.out))


if __name__ == "__main__":
    main()
