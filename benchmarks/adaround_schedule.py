"""How soon is a block as good as published AdaRound makes it? `python benchmarks/adaround_schedule.py`

Block 2 of the shipped DiT at 3 bits a channel, its inputs in float, on samples that the network
so quantized has drawn. Every schedule is judged by the loss of the HARDENED block, its
integers, on held-out samples, over that of rounding to nearest:

- published: 20,000 iterations of AdaRound, Adam at a constant 1e-3, 32 items, 0.01 times the
  summed rounding term from a fifth on, its exponent from 20 to 2 (AdaRound, BRECQ, Q-Diffusion);
- adaround: `FitSettings()` with fewer iterations: ten times the rate with cosine decay,
  scale-free terms;
- latent: the kernel itself learned through the rounding (`weights="latent"`);
- gptq + latent: the same from GPTQ's rounding.

Of each of ours the iteration that counts is chosen by a validation set of its own (early stop).
Seconds are those of compiling and of GPTQ plus iterations times their median duration, the
schedules' programs timed in turn (`--time`, on an idle machine, after a run without it). Writes
`benchmarks/results/adaround_schedule.json` and `docs/pictures/adaround_schedule.svg`.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _timing import RESULTS, interleaved, table, write

import qjax
from qjax import recipes
from qjax.calibrate import optimize, rounding
from qjax.calibrate.blocks import alike
from qjax.calibrate.collect import collect
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import hardened_weights
from qjax.calibrate.fitted import start as fitted_start
from qjax.calibrate.gptq import gptq
from qjax.calibrate.recipe import quantize_pipeline
from qjax.calibrate.reconstruction import (
    FitSettings,
    Fitted,
    Problem,
    Runner,
    block_error,
    mean_error,
)
from qjax.calibrate.serial_parallel import Calibration, SerialParallelSettings
from qjax.calibrate.simulate import simulated
from qjax.calibrate.work import Work
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.quantizers import to_floats
from qjax.core.typing import Array
from qjax.plots import line_plot, save_plot
from qjax.zoo import FOLDER

NAME = "adaround_schedule"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / f"{NAME}.svg"
MODEL, BLOCK, BITS = "fashion-dit", "blocks_2", 3
STEPS, ITEMS, PAIRS, BATCH = 10, 32, 320, 32
VALIDATION, TEST = 64, 128
PUBLISHED = FitSettings(
    iterations=20_000, weight_rate=1e-3, scaling="absolute", strength=0.01, batch=32
)
OURS = {
    "gptq + latent 500": FitSettings(iterations=500, weights="latent", weight_rate=1e-2),
    "adaround 2000": FitSettings(iterations=2000),
    "adaround 3500": FitSettings(iterations=3500),
    "latent 2500": FitSettings(iterations=2500, weights="latent", weight_rate=1e-2),
}
WEIGHT = WeightSpec(bits=BITS, method="mse")


class Task(NamedTuple):
    """The block, its data in three parts, and its layers' `X^T X` on the first."""

    runner: Runner
    train: Problem
    validation: Problem
    test: Problem
    hessians: dict[str, Array]


def task() -> Task:
    """Block and data, by the same phases as a calibration has."""
    pipe = qjax.load(FOLDER / MODEL)
    rules = QuantConfig(rules=recipes.EDGES, weight=WEIGHT, act=None, allow_unmatched=True)
    settings = SerialParallelSettings(
        steps=STEPS, guidance_scale=2.0, data=CalibrationSet(items=ITEMS), pairs=PAIRS, batch=64
    )
    run = Calibration(pipe, quantize_pipeline(pipe, rules), settings, jax.random.key(0), Work())
    samples = run.samples(run.roll_out("first"), run.pairs(0))
    blocks = run.student.blocks(samples[0].x_t, samples[0].t, samples[0].told)
    groups = alike(blocks)
    number, place = next(
        (g, i) for g, group in enumerate(groups) for i, b in enumerate(group) if b.path == BLOCK
    )
    block = groups[number][place]
    teacher = (run.teacher.apply, run.teacher.params)
    data = collect(run.student, teacher, groups, {number: place}, samples, {}, memory_gib=2.0)
    inputs, target, group = data[number]
    fixed = run.student.fixed(block)
    params = run.student.block_params(block, fixed)
    runner = run.student.runner(block)
    # Both halves of guidance of a sample are in one batch; the parts are of different batches.
    ends = [0, len(target) - VALIDATION - TEST, len(target) - TEST, len(target)]

    def part(first: int, last: int) -> Problem:
        cut = lambda tree: jax.tree.map(lambda a: a[first:last], tree)
        found = Problem(params, fixed, cut(inputs), target[first:last], group[first:last], _one())
        nearest = Fitted({layer: {} for layer, _ in runner.formats}, {})
        return found._replace(baseline=mean_error(runner, found, nearest, batch=BATCH))

    train, validation, test = (part(a, b) for a, b in itertools.pairwise(ends))
    return Task(runner, train, validation, test, _hessians(runner, train))


def _one() -> Array:
    return jnp.float32(1)


def _hessians(runner: Runner, problem: Problem) -> dict[str, Array]:
    """`X^T X` of what goes into the block's layers, all in float, over all items."""
    names = [path for path, _ in runner.formats]
    assert runner.module is not None

    @jax.jit
    def run(params: Any, inputs: Any) -> dict[str, Array]:
        found = {}

        def hook(path: str, module: Any, x: Array) -> Array:
            if path in names:
                rows = x.reshape(-1, x.shape[-1])
                found[path] = rows.T @ rows
            return x

        args, kwargs = inputs
        with simulated(hook):
            runner.module.apply({"params": params}, *args, **kwargs)
        return found

    return run(problem.params, problem.args)


def begin(given: Task, settings: FitSettings, start: str = "float") -> Fitted:
    """Where a schedule begins: at the float kernels, or at GPTQ's."""
    weights: dict[str, dict[str, Array]] = {}
    for path, fmt in given.runner.formats:
        fixed = given.train.fixed[path]
        if settings.weights == "adaround" or start == "float":
            key = jax.random.key(0)
            weights[path] = fitted_start(settings.weights, fmt, fixed, key, rank=settings.rank)
        else:
            codes = gptq(fixed["w"], given.hessians[path], WEIGHT, scale_dtype=jnp.float32)
            weights[path] = {"w": to_floats(codes)}
    # Schedules use up what they begin with.
    return Fitted(jax.tree.map(jnp.copy, weights), {})


@functools.partial(jax.jit, static_argnames=("runner", "length"), donate_argnames="state")
def published(
    runner: Runner, length: int, state: Any, problem: Problem, first: Array, key: Array
) -> Any:
    """`length` iterations as published; `state` is what is fitted and Adam's moments."""
    adam = optax.adam(PUBLISHED.rate)

    def loss(weights: Any, index: Array, number: Array) -> Array:
        error = block_error(runner, problem, Fitted(weights, {}), index)
        beta, on = rounding.penalty_exponent(number, PUBLISHED.iterations)
        penalty = sum(rounding.rounding_penalty(leaf["v"], beta) for leaf in weights.values())
        return error + PUBLISHED.strength * jnp.where(on, penalty, 0.0)

    def step(state: Any, number: Array) -> tuple[Any, None]:
        weights, moments = state
        items = problem.group.shape[0]
        index = jax.random.randint(jax.random.fold_in(key, number), (PUBLISHED.batch,), 0, items)
        gradient = jax.grad(loss)(weights, index, number)
        update, moments = adam.update(gradient, moments)
        return (optax.apply_updates(weights, update), moments), None

    return jax.lax.scan(step, state, first + jnp.arange(length))[0]


Advance = Callable[[int, int], Fitted]


def schedules(
    given: Task, only: Collection[str] | None = None
) -> dict[str, tuple[FitSettings, Advance]]:
    """By name the settings, and a function that goes from one iteration on to another."""
    found: dict[str, tuple[FitSettings, Advance]] = {}
    key = jax.random.key(1)
    start = begin(given, PUBLISHED).weights
    state = [(start, optax.adam(PUBLISHED.rate).init(start))]

    def advance(first: int, last: int) -> Fitted:
        args = (given.train, jnp.int32(first), key)
        state[0] = published(given.runner, last - first, state[0], *args)
        return Fitted(state[0][0], {})

    found["published 20000"] = (PUBLISHED, advance)
    for name, settings in OURS.items():
        fitted = begin(given, settings, "gptq" if name.startswith("gptq") else "float")
        carry = [optimize.start_optimizer(fitted, 1, settings, given.runner, given.train)]

        def go(first: int, last: int, settings=settings, carry=carry) -> Fitted:
            span = (first, last)
            carry[0] = optimize.go_on(given.runner, given.train, carry[0], settings, key, span)
            return carry[0].fitted

        found[name] = (settings, go)
    return {name: one for name, one in found.items() if not only or name in only}


def judge(given: Task, fitted: Fitted) -> dict[str, float]:
    """Losses of the integers over those of rounding to nearest."""
    hard = Fitted({path: hardened_weights(one) for path, one in fitted.weights.items()}, {})
    return {
        name: float(mean_error(given.runner, data, hard, batch=BATCH) / data.baseline)
        for name, data in (("validation", given.validation), ("test", given.test))
    }


def curve(given: Task, name: str, settings: FitSettings, advance: Advance) -> dict[str, Any]:
    """A schedule's losses against iterations."""
    every = max(settings.iterations // 20, 25)
    fitted = begin(given, settings, "gptq" if name.startswith("gptq") else "float")
    points = [{"iteration": 0, **judge(given, fitted)}]
    spent = 0.0
    for done in range(0, settings.iterations, every):
        begun = time.perf_counter()
        fitted = jax.block_until_ready(advance(done, done + every))
        spent += time.perf_counter() - begun
        points.append({"iteration": done + every, **judge(given, fitted)})
    best = min(points, key=lambda point: point["validation"])
    print(f"{name}: {spent:.0f} s, last {points[-1]}, best {best}", flush=True)
    return {"schedule": name, "iterations": settings.iterations, "points": points, "best": best}


def timed(given: Task, rows: list[dict[str, Any]], rounds: int = 7) -> list[dict[str, Any]]:
    """The rows with seconds: of compiling, of an iteration, and until the published loss."""
    every = 10
    programs = schedules(given)
    compile_s, calls = {}, {}
    for name, (_, advance) in programs.items():
        begun = time.perf_counter()
        jax.block_until_ready(advance(0, every))
        compile_s[name] = time.perf_counter() - begun
        calls[name] = functools.partial(lambda go: go(every, 2 * every).weights, advance)
    found = interleaved(calls, rounds=rounds)
    latent = FitSettings(weights="latent")
    jax.block_until_ready(begin(given, latent, "gptq"))
    begun = time.perf_counter()
    jax.block_until_ready(begin(given, latent, "gptq"))
    gptq_s = time.perf_counter() - begun
    target = rows[0]["points"][-1]["test"]
    timed_rows = []
    for row in rows:
        name = row["schedule"]
        each = found[name]["ms"] / every / 1e3
        fixed = max(compile_s[name] - every * each, 0.0)
        fixed += gptq_s if name.startswith("gptq") else 0.0
        seconds = lambda point, fixed=fixed, each=each: fixed + each * point["iteration"]
        there = [point for point in row["points"] if point["test"] <= target]
        timed_rows.append(
            {
                **row,
                "ms_per_iteration": each * 1e3,
                "compile_and_start_s": fixed,
                "points": [{**point, "s": seconds(point)} for point in row["points"]],
                "s_to_published_loss": seconds(there[0]) if there else None,
                "test_at_early_stop": row["best"]["test"],
            }
        )
    whole = timed_rows[0]["points"][-1]["s"]
    for row in timed_rows:
        reached = row["s_to_published_loss"]
        row["share_of_published_time"] = None if reached is None else reached / whole
    return timed_rows


def draw(rows: list[dict[str, Any]]) -> None:
    """The losses against seconds."""
    series: Mapping[str, Any] = {
        row["schedule"]: (
            [point["s"] for point in row["points"][1:]],
            [point["test"] for point in row["points"][1:]],
        )
        for row in rows
    }
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    document = line_plot(
        series,
        title=f"AdaRound of {MODEL} {BLOCK} at {BITS} bits",
        x_label="seconds, compilation included",
        y_label="held-out loss of the integers, over that of rounding to nearest",
        log_x=True,
        log_y=True,
    )
    save_plot(PICTURE, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="time what a run before has found")
    parser.add_argument("--only", action="append", help="schedules to run; keeps the other rows")
    parser.add_argument("--out", type=Path, help="where to write; default benchmarks/results")
    args = parser.parse_args()
    path = args.out or RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    given = task()
    if not args.time:
        known = {row["schedule"]: row for row in rows}
        for name, (settings, advance) in schedules(given, args.only).items():
            known[name] = curve(given, name, settings, advance)
            rows = [known[name] for name in ("published 20000", *OURS) if name in known]
            print(write(NAME, rows, out=args.out))
        return
    rows = timed(given, rows)
    plain = ("schedule", "ms_per_iteration", "compile_and_start_s", "s_to_published_loss")
    print(table([{k: row[k] for k in (*plain, "share_of_published_time")} for row in rows]))
    draw(rows)
    print(write(NAME, rows, out=args.out))


if __name__ == "__main__":
    main()
