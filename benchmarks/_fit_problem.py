"""Blocks with random weights, taken as calibration takes them: what benchmarks of fits share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qjax.calibrate.fitted import (
    LayerFormat,
    fixed_of,
    format_of,
    quantized_kernels,
    start,
    with_kernels,
)
from qjax.calibrate.ranges import empty, observing, to_fitted
from qjax.calibrate.reconstruction import FitSettings, Fitted, Problem, Runner, mean_error
from qjax.calibrate.simulate import simulated
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.quantize import quantize
from qjax.core.typing import Array


def normal(rng: np.random.Generator, *shape: int) -> Array:
    """Standard normal float32."""
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def make(
    module: nn.Module,
    args: Sequence[Array],
    settings: FitSettings,
    *,
    bits: int = 4,
    act: ActSpec | None = None,
    floats: str = "(?!)",
    seed: int = 0,
    batch: int = 32,
) -> tuple[Runner, Problem, Fitted]:
    """A block with random weights at `bits` bits a channel, and where its fit begins.

    Its kernels are normal with variance 1 / fan-in; the ranges of its inputs, if any, are the
    extremes over the first `batch` items.

    Args:
      module: The block.
      args: What it is called with, items first.
      settings: Of the fit.
      bits: Of a weight; scales shrunken to the least error.
      act: How the layers' inputs are quantized.
      floats: Regular expression of the kernels that stay in float.
      seed: Of the weights.
      batch: Items at a time wherever all items are run.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *(a[:1] for a in args)))
    params = jax.tree.map(lambda leaf: _draw(rng, leaf.shape), shapes["params"])
    config = QuantConfig(
        rules=(Rule(pattern=floats, reason="not fitted"),),
        weight=WeightSpec(bits=bits, method="mse"),
        act=act,
        allow_unmatched=True,
    )
    kernels = quantized_kernels(quantize(params, config))
    formats = {path: format_of(q) for path, q in kernels.items()}
    fixed = {path: fixed_of(_at(params, path), q) for path, q in kernels.items()}
    runner = Runner(module, None, tuple(formats.items()))
    weights = {
        path: start(settings.weights, fmt, fixed[path], jax.random.key(seed), rank=settings.rank)
        for path, fmt in formats.items()
    }
    acts = _tables(module, params, [a[:batch] for a in args], formats)
    group = jnp.zeros((len(args[0]),), jnp.int32)
    target = _outputs(module, params, tuple(args), batch)
    problem = Problem(params, fixed, (tuple(args), {}), target, group, jnp.float32(1))
    nearest = Fitted({path: {} for path in formats}, acts)
    problem = problem._replace(baseline=mean_error(runner, problem, nearest, batch=batch))
    return runner, problem, Fitted(weights, acts)


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    if len(shape) == 1:  # a scale or a shift of a norm, or a bias
        return normal(rng, *shape) * 0.1 + 0.5
    return normal(rng, *shape) * float(np.prod(shape[:-1])) ** -0.5


def _at(params: Any, path: str) -> Array:
    for name in path.split("/"):
        params = params[name]
    return params["kernel"]


def _outputs(module: nn.Module, params: Any, args: tuple[Array, ...], batch: int) -> Array:
    run = jax.jit(lambda params, *args: module.apply({"params": params}, *args))
    parts = range(0, len(args[0]), batch)
    return jnp.concatenate([run(params, *(a[i : i + batch] for a in args)) for i in parts])


def _tables(
    module: nn.Module, params: Any, args: Sequence[Array], formats: dict[str, LayerFormat]
) -> dict[str, dict[str, Array]]:
    if not any(fmt.reads_rows for fmt in formats.values()):
        return {}

    @jax.jit
    def observe(params, *args):
        found: dict[str, Any] = {}
        hook = observing(formats, empty(formats), jnp.float32(0), "minmax", found)
        with simulated(hook):
            module.apply({"params": with_kernels(params, {})}, *args)
        return found

    return to_fitted([observe(params, *args)], formats)
