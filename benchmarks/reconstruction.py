"""How fast is the reconstruction of a block? `python benchmarks/reconstruction.py`

AdaRound of 4 bits, of three things, each in turn with what it is compared with:

- block: a DiT block (width 384, 6 heads, 64 tokens, batch 32; its four linears), as our chunk of
  iterations, as a plain jitted JAX step, and as a PyTorch loop (`_torch_adaround.py`; needs
  torch); and the rate of the same matmuls alone;
- alike: an iteration of eight such blocks, one after the other, under `lax.map` and under
  `vmap`, against eight of one block;
- conv: a ResNet block (320 channels, 16x16, batch 16) in our chunk, a `lax.scan`, against the
  plain jitted step, with the gradients that JAX writes, outside any loop.

GFLOP count what an iteration needs: forward, the gradient to every fitted kernel, and to every
activation that depends on one. Writes `benchmarks/results/reconstruction.json`; `ratio` is
against the first of each part. With `--part` the rows of the other parts are kept.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _fit_problem
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _timing import RESULTS, interleaved, table, write
from _torch_adaround import TorchFit

from qjax.calibrate import optimize, rounding
from qjax.calibrate.fitted import with_kernels
from qjax.calibrate.reconstruction import FitSettings, Fitted, Problem, Runner, soft_kernels
from qjax.core.typing import Array
from qjax.models.dit import DiTBlock, DiTConfig
from qjax.models.resnet import ResnetBlock

NAME = "reconstruction"
ITERATIONS, FIRST = 5, 1000  # in a timed call; from this number on the penalty counts
SETTINGS = FitSettings(iterations=2000, batch=32)
WIDTH, HEADS, TOKENS, ITEMS = 384, 6, 64, 128
CHANNELS, SIDE, CONV_BATCH, CONV_ITEMS = 320, 16, 16, 32
BLOCKS = 8

Made = tuple[Runner, Problem, Fitted]


def dit_block(seed: int = 0) -> Made:
    """A DiT block and its data."""
    config = DiTConfig(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
    )
    rng = np.random.default_rng(seed)
    args = (
        _fit_problem.normal(rng, ITEMS, TOKENS, WIDTH),
        _fit_problem.normal(rng, ITEMS, WIDTH),
    )
    return _fit_problem.make(
        DiTBlock(config), args, SETTINGS, floats="modulation/kernel", seed=seed
    )


def dit_matmuls() -> tuple[list[tuple[int, int, int]], float]:
    """`(m, k, n)` of an iteration's large matmuls, and the GFLOP of these and all others."""
    m, d, b = SETTINGS.batch * TOKENS, WIDTH, SETTINGS.batch
    layers = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    sizes = [(m, i, o) for i, o in layers] + [(i, m, o) for i, o in layers]
    sizes += [(m, o, i) for i, o in layers[1:]]  # what goes into qkv depends on nothing fitted
    attention = 6 * b * TOKENS * TOKENS * d  # forward 2, backward 4
    return sizes, 2e-9 * (sum(m * k * n for m, k, n in sizes) + attention + b * d * 6 * d)


def conv_gflop() -> float:
    """GFLOP of an iteration of the ResNet block: forward 2, to kernels 2, to an input 1."""
    return 2e-9 * 5 * 9 * CHANNELS**2 * CONV_BATCH * SIDE**2


def chunk(made: Made, settings: FitSettings) -> tuple[Callable[[], Array], float]:
    """`ITERATIONS` of ours, and the seconds that compiling took."""
    runner, problem, begin = made
    begin = jax.tree.map(jnp.copy, begin)
    carry = optimize.start_optimizer(begin, 1, settings, runner, problem)
    rest = (problem, jnp.int32(FIRST), jax.random.key(0))
    start = time.perf_counter()
    optimize._run_chunk.lower(runner, settings, ITERATIONS, carry, *rest).compile()
    seconds, state = time.perf_counter() - start, [carry]

    def call() -> Array:
        state[0], errors = optimize._run_chunk(runner, settings, ITERATIONS, state[0], *rest)
        return errors

    return call, seconds


def plain(made: Made, settings: FitSettings) -> tuple[Callable[[], Array], float]:
    """The same iterations as calls of a plain jitted step, and the seconds of its compilation."""
    runner, problem, begin = made
    adam = optax.adam(settings.rate)
    module = runner.module
    assert module is not None

    def loss(weights: Any, index: Array, beta: Array) -> Array:
        kernels = soft_kernels(runner, problem.params, problem.fixed, Fitted(weights, {}))
        params = with_kernels(problem.params, kernels)
        args = [a[index] for a in problem.args[0]]
        answer = jnp.asarray(module.apply({"params": params}, *args))
        error = rounding.block_loss(answer, problem.target[index]) / problem.baseline
        v = [leaf["v"] for leaf in weights.values()]
        penalty = sum(rounding.rounding_penalty(leaf, beta) for leaf in v)
        return error + settings.strength / sum(leaf.size for leaf in v) * penalty

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, key: Array, beta: Array) -> tuple[Any, Any, Array]:
        index = jax.random.randint(key, (settings.batch,), 0, problem.group.shape[0])
        error, gradient = jax.value_and_grad(loss)(weights, index, beta)
        update, state = adam.update(gradient, state)
        return optax.apply_updates(weights, update), state, error

    weights = jax.tree.map(jnp.copy, begin.weights)
    state = [weights, adam.init(weights)]
    rest = (jax.random.key(0), jnp.float32(7))
    start = time.perf_counter()
    compiled = step.lower(*state, *rest).compile()
    seconds = time.perf_counter() - start

    def call() -> Array:
        for _ in range(ITERATIONS):
            *state[:], error = compiled(*state, *rest)
        return error

    return call, seconds


def torch_loop(made: Made) -> Callable[[], Array]:
    """The same iterations of the PyTorch loop."""
    fit = TorchFit.of(*made, SETTINGS)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, ITEMS, SETTINGS.batch) for _ in range(ITERATIONS)]
    return lambda: jnp.float32(list(fit.run(batches, FIRST))[-1])


def matmuls(sizes: list[tuple[int, int, int]]) -> Callable[[], list[Array]]:
    """The matmuls of an iteration alone, one program."""
    rng = np.random.default_rng(0)
    pairs = [(_fit_problem.normal(rng, m, k), _fit_problem.normal(rng, k, n)) for m, k, n in sizes]
    run = jax.jit(lambda pairs: [a @ b for a, b in pairs])
    return lambda: run(pairs)


def block_rows() -> list[dict[str, Any]]:
    """The part `block`."""
    made, (sizes, gflop) = dit_block(), dit_matmuls()
    ours, compile_ours = chunk(made, SETTINGS)
    theirs, compile_plain = plain(made, SETTINGS)
    calls = {"torch": torch_loop(made), "chunk": ours, "plain jit": theirs}
    found = interleaved({**calls, "matmuls alone": matmuls(sizes)})
    alone = found.pop("matmuls alone")
    rate = 2e-6 * sum(m * k * n for m, k, n in sizes) / alone["ms"]
    seconds = {"torch": 0.0, "chunk": compile_ours, "plain jit": compile_plain}
    total = {name: seconds[name] + 2 * found[name]["ms"] / ITERATIONS for name in calls}
    return [
        {
            "part": "block",
            "variant": name,
            "ms": found[name]["ms"] / ITERATIONS,
            "ratio": found[name]["ratio"],
            "torch_over_this": 1 / found[name]["ratio"],
            "compile_s": seconds[name],
            "torch_over_this_2000_iterations_and_compile": total["torch"] / total[name],
            "gflop": gflop,
            "gflop_per_s": gflop * ITERATIONS / found[name]["ms"] * 1e3,
            "matmul_gflop_per_s": rate,
            "share_of_matmul_rate": gflop * ITERATIONS / found[name]["ms"] * 1e3 / rate,
        }
        for name in calls
    ]


def alike_rows() -> list[dict[str, Any]]:
    """The part `alike`: an iteration of eight blocks, their state kept between calls."""
    made = [dit_block(seed) for seed in range(BLOCKS)]
    runner, problems = made[0][0], [m[1] for m in made]
    keys = list(jax.random.split(jax.random.key(0), BLOCKS))
    first = jnp.int32(FIRST)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    together, key = stack(problems), jnp.stack(keys)

    def carries() -> list[optimize.Carry]:
        return [
            optimize.start_optimizer(jax.tree.map(jnp.copy, m[2]), 1, SETTINGS, runner, m[1])
            for m in made
        ]

    @functools.partial(jax.jit, donate_argnums=0)
    def mapped(carry: optimize.Carry, problems: Problem, keys: Array) -> Any:
        def one(args: tuple[optimize.Carry, Problem, Array]) -> Any:
            carry, problem, key = args
            return optimize._chunk(runner, SETTINGS, 1, carry, problem, first, key)

        return jax.lax.map(one, (carry, problems, keys))

    alone, each = carries()[:1], carries()
    at_once = {"map": stack(carries()), "vmap": stack(carries())}

    def serial() -> Array:
        for _ in range(BLOCKS):
            alone[0], errors = optimize._run_chunk(
                runner, SETTINGS, 1, alone[0], problems[0], first, keys[0]
            )
        return errors

    def loop() -> Array:
        for i in range(BLOCKS):
            each[i], errors = optimize._run_chunk(
                runner, SETTINGS, 1, each[i], problems[i], first, keys[i]
            )
        return errors

    def under_map() -> Array:
        at_once["map"], errors = mapped(at_once["map"], together, key)
        return errors

    def under_vmap() -> Array:
        at_once["vmap"], errors = optimize._run_chunks(
            runner, SETTINGS, 1, at_once["vmap"], together, first, key
        )
        return errors

    before = optimize._run_chunk._cache_size()
    jax.block_until_ready(loop())
    programs = optimize._run_chunk._cache_size() - before
    calls = {"one block, 8 times": serial, "loop": loop, "map": under_map, "vmap": under_vmap}
    return [
        {
            "part": "alike",
            "variant": name,
            "blocks": BLOCKS,
            "ms": one["ms"],
            "ratio": one["ratio"],
            "programs_compiled_by_loop": programs,
        }
        for name, one in interleaved(calls).items()
    ]


def conv_rows() -> list[dict[str, Any]]:
    """The part `conv`."""
    settings = FitSettings(iterations=2000, batch=CONV_BATCH)
    rng = np.random.default_rng(0)
    args = (
        _fit_problem.normal(rng, CONV_ITEMS, SIDE, SIDE, CHANNELS),
        _fit_problem.normal(rng, CONV_ITEMS, 1280),
    )
    made = _fit_problem.make(ResnetBlock(CHANNELS), args, settings, batch=CONV_BATCH)
    step, compile_plain = plain(made, settings)
    ours, compile_ours = chunk(made, settings)
    seconds = {"plain jit": compile_plain, "chunk": compile_ours}
    return [
        {
            "part": "conv",
            "variant": name,
            "ms": one["ms"] / ITERATIONS,
            "ratio": one["ratio"],
            "rate_of_plain_jit": 1 / one["ratio"],
            "compile_s": seconds[name],
            "gflop": conv_gflop(),
            "gflop_per_s": conv_gflop() * ITERATIONS / one["ms"] * 1e3,
        }
        for name, one in interleaved({"plain jit": step, "chunk": ours}).items()
    ]


PARTS = {"block": block_rows, "alike": alike_rows, "conv": conv_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    path = args.out or RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if args.part and path.exists() else []
    for part in args.part or PARTS:
        new = PARTS[part]()
        print(table(new), flush=True)
        rows = [row for row in rows if row["part"] != part] + new
    print(write(NAME, rows, out=args.out))


if __name__ == "__main__":
    main()
