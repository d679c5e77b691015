"""Do blocks of the published sizes reconstruct in 8 GiB? `python benchmarks/full_size_blocks.py`

Twenty iterations of AdaRound at W4A8, a range for every input, on random weights and inputs:

- a ResNet block of Stable Diffusion v1-4: 320 channels at 64x64, 8 items, 4 an iteration;
- a transformer block of Stable Diffusion XL: 1280 wide, 1024 tokens, a text of 77 x 2048; 4
  items, 2 an iteration;
- a block of DiT-XL/2: 1152 wide, 256 tokens; 8 items, 4 an iteration.

Each in a process of its own, whose `ru_maxrss` is the peak: interpreter, JAX, the float block,
data, Adam and activations together. Writes `benchmarks/results/full_size_blocks.json`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _fit_problem
import jax
import numpy as np
from _timing import table, write
from flax import linen as nn
from full_size import _peak_bytes

from qjax.calibrate.optimize import fit
from qjax.calibrate.reconstruction import FitSettings
from qjax.core.config import ActSpec
from qjax.models.dit import DiTBlock, DiTConfig
from qjax.models.resnet import ResnetBlock
from qjax.models.transformer_2d import BasicTransformerBlock

NAME = "full_size_blocks"
ITERATIONS = 20
ACT = ActSpec(bits=8, mode="per_step", granularity="per_tensor", symmetric=False)

# The block, shapes of its inputs without items, items, and items an iteration.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int, int]] = {
    "sd1.4 resnet": (lambda: ResnetBlock(320), ((64, 64, 320), (1280,)), 8, 4),
    "sdxl transformer": (lambda: BasicTransformerBlock(20, 64), ((1024, 1280), (77, 2048)), 4, 2),
    "dit-xl/2": (lambda: DiTBlock(DiTConfig.dit_xl_2()), ((256, 1152), (1152,)), 8, 4),
}


def measure(name: str) -> dict[str, Any]:
    """Fit one block in this process: sizes, seconds, errors and the peak of memory."""
    build, shapes, items, batch = BLOCKS[name]
    # Twenty iterations are too few to decide roundings: a weak term and small steps.
    settings = FitSettings(
        iterations=ITERATIONS, batch=batch, chunk=10, strength=0.1, weight_rate=1e-3
    )
    rng = np.random.default_rng(0)
    args = tuple(_fit_problem.normal(rng, items, *shape) for shape in shapes)
    runner, problem, begin = _fit_problem.make(build(), args, settings, act=ACT, batch=batch)
    errors: list[float] = []
    start = time.perf_counter()
    (fitted,) = fit(
        runner,
        [problem],
        [begin],
        settings,
        [jax.random.key(0)],
        on_chunk=lambda done, found: errors.extend(map(float, found)),
    )
    jax.block_until_ready(fitted)
    return {
        "block": name,
        "inputs": " ".join("x".join(map(str, shape)) for shape in shapes),
        "items": items,
        "batch": batch,
        "layers": len(runner.formats),
        "weights": sum(int(np.prod(fmt.shape)) for _, fmt in runner.formats),
        "iterations": len(errors),
        "first_error": errors[0],
        "last_error": errors[-1],
        "seconds_with_compilation": round(time.perf_counter() - start, 1),
        "peak_bytes": _peak_bytes(),
    }


def measure_alone(name: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--block", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", choices=tuple(BLOCKS), help="fit it here and print the row")
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    if args.block:
        print(json.dumps(measure(args.block)))
        return
    rows = [measure_alone(name) for name in BLOCKS]
    print(table(rows))
    print(write(NAME, rows, out=args.out))


if __name__ == "__main__":
    main()
