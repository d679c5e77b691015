"""Reconstruction: fit a block so that its output is what it was before quantization.

With `y` the block's output in float, on the inputs that the float network has, and `q` the
quantized block's, on the inputs that the quantized network has, the fitted arrays minimise

    E = mean over positions of sum over channels |q - y|^2
    L = E / E_0 + strength * mean over weights (1 - |2 h - 1|^beta)

`E_0` being the loss with rounding to nearest, and the last term, of the profile `adaround`
alone, being 0 in the first fifth of the iterations while beta falls from 20 to 2 afterwards.
The papers have L = E + 0.01 * sum over weights, whose balance depends on how large a block's
outputs are and on how many weights it has; `scaling="absolute"` is theirs.

The optimisation runs in chunks, one program each: `lax.scan` over iterations, its state
donated. Blocks of equal structure run the same program: on accelerators all at once under
`vmap`, on a CPU one after the other (`benchmarks/reconstruction.py` measured both).

References:
  Nagel et al., AdaRound, 2020, https://arxiv.org/abs/2004.10568; Li et al., BRECQ, 2021,
  https://arxiv.org/abs/2102.05426; Wei et al., QDrop, 2022, https://arxiv.org/abs/2203.05740;
  Li et al., Q-Diffusion, 2023, https://arxiv.org/abs/2302.04304.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from qjax.calibrate import adam_rows, rounding
from qjax.calibrate.fitted import LayerFormat, Profile, quantize_input, soft_kernel, with_kernels
from qjax.calibrate.simulate import simulated
from qjax.core.typing import Apply, Array, Int, Params, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How blocks are fitted.

    Attributes:
      iterations: Steps of the optimizer.
      batch: Items a step.
      weights: What is fitted of the weights.
      weight_rate: Adam's learning rate of it, at the start of a cosine decay to a tenth.
      act_rate: Of the logarithms of the inputs' scales; 0 leaves the ranges.
      rank: Of the profile `lora`.
      scaling: `"relative"` or `"absolute"`; the formulas head this file.
      strength: Of the rounding term: in `"relative"` scaling of its mean, else of its sum.
      warmup: Share of the iterations without it.
      drop: Share of the inputs' elements left in float, at random (QDrop); 0 for none.
      chunk: Iterations that run as one program; changes nothing of the result.
      clip: Largest global norm of the gradient of the weights; None for none.
    """

    iterations: int = 2000
    batch: int = 32
    weights: Profile = "adaround"
    weight_rate: float = 1e-2
    act_rate: float = 1e-3
    rank: int = 32
    scaling: Literal["relative", "absolute"] = "relative"
    strength: float = 1.0
    warmup: float = 0.2
    drop: float = 0.0
    chunk: int = 100
    clip: float | None = None

    def __post_init__(self):
        if self.iterations < 1 or self.batch < 1 or self.chunk < 1:
            raise ValueError(
                f"iterations, batch and chunk must be at least 1; got {self.iterations}, "
                f"{self.batch} and {self.chunk}."
            )
        if self.weights not in ("adaround", "lora", "latent", "nearest"):
            raise ValueError(
                f"weights must be adaround, lora, latent or nearest; got {self.weights!r}."
            )
        if self.scaling not in ("relative", "absolute"):
            raise ValueError(f"scaling must be relative or absolute; got {self.scaling!r}.")
        if not 0 <= self.drop < 1 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"drop and warmup must lie in [0, 1); got {self.drop} and {self.warmup}."
            )


class Problem(NamedTuple):
    """A block to be fitted: arrays only, so that alike blocks can be stacked.

    Attributes:
      params: The block's part of the float params.
      fixed: `fixed_of` every layer.
      args: Inputs of the block, `(args, kwargs)`, the items first.
      target: Its outputs in float.
      group: For every item the group of sampler steps it belongs to, int32 `[m]`.
      baseline: `E_0`.
    """

    params: Params
    fixed: dict[str, dict[str, Array]]
    args: Any
    target: Array
    group: Int[Array, " m"]
    baseline: Array


class Fitted(NamedTuple):
    """What is fitted, by layer: see `fitted.py`."""

    weights: dict[str, dict[str, Array]]
    acts: dict[str, dict[str, Array]]


class Carry(NamedTuple):
    """The state of an optimisation."""

    fitted: Fitted
    weights_state: Any
    acts_state: adam_rows.RowState


@dataclasses.dataclass(frozen=True)
class Runner:
    """How a block is run: what makes a program, so it is hashable.

    Attributes:
      module: The block's module; None for the network.
      apply: The network's function, if the block is the network.
      formats: Formats of its layers by relative path.
    """

    module: nn.Module | None
    apply: Apply | None
    formats: tuple[tuple[str, LayerFormat], ...]

    def __call__(
        self,
        params: Params,
        inputs: Any,
        kernels: Mapping[str, Array],
        quantize: Callable[[str, nn.Module, Array], Array],
    ) -> Array:
        """The output with these kernels, `quantize` for the inputs of quantized layers."""
        args, kwargs = inputs
        formats = dict(self.formats)

        def hook(path: str, module: nn.Module, x: Array) -> Array:
            fmt = formats.get(path)
            return x if fmt is None or fmt.act is None else quantize(path, module, x)

        variables = {"params": with_kernels(params, kernels)}
        with simulated(hook):
            if self.module is None:
                assert self.apply is not None
                return self.apply(variables, *args, **kwargs)
            return jnp.asarray(self.module.apply(variables, *args, **kwargs))


def output(
    runner: Runner,
    problem: Problem,
    fitted: Fitted,
    index: Int[Array, " b"],
    key: PRNGKeyArray | None = None,
    *,
    drop: float = 0.0,
) -> Array:
    """The quantized block's output on the items `index`.

    Args:
      runner: The block.
      problem: Its arrays.
      fitted: What is fitted.
      index: Items.
      key: For `drop`.
      drop: Share of the inputs' elements left in float.
    """
    formats = dict(runner.formats)
    kernels = {
        path: soft_kernel(fmt, problem.fixed[path], fitted.weights[path]).astype(
            _kernel_dtype(problem.params, path)
        )
        for path, fmt in formats.items()
    }
    group = problem.group[index]

    def quantize(path: str, module: nn.Module, x: Array) -> Array:
        act = formats[path].act
        assert act is not None
        rows = jax.tree.map(lambda table: table[group], fitted.acts.get(path))
        x_hat = quantize_input(x, act, module, rows)
        if drop == 0 or key is None:
            return x_hat
        number = list(formats).index(path)
        return rounding.mix(jax.random.fold_in(key, number), x, x_hat, probability=drop)

    inputs = jax.tree.map(lambda leaf: leaf[index], problem.args)
    return runner(problem.params, inputs, kernels, quantize)


def _kernel_dtype(params: Params, path: str) -> Any:
    node: Any = params
    for name in path.split("/") if path else ():
        node = node[name]
    return node["kernel"].dtype


def block_error(
    runner: Runner,
    problem: Problem,
    fitted: Fitted,
    index: Int[Array, " b"],
    key: PRNGKeyArray | None = None,
    *,
    drop: float = 0.0,
) -> Array:
    """`E` on the items `index`."""
    found = output(runner, problem, fitted, index, key, drop=drop)
    return rounding.block_loss(found, problem.target[index])


def start_optimizer(fitted: Fitted, groups: int, settings: FitSettings) -> Carry:
    """The state before the first iteration."""
    return Carry(
        fitted, _optimizer(settings).init(fitted.weights), adam_rows.init(fitted.acts, groups)
    )


def _optimizer(settings: FitSettings) -> optax.GradientTransformation:
    adam = optax.scale_by_adam()
    if settings.clip is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(settings.clip), adam)


def _chunk(
    runner: Runner,
    settings: FitSettings,
    length: int,
    carry: Carry,
    problem: Problem,
    first: Array,
    key: PRNGKeyArray,
) -> tuple[Carry, Array]:
    """`length` iterations from number `first`; the errors `E / E_0` come too."""
    optimizer = _optimizer(settings)
    items = problem.group.shape[0]
    rows = carry.acts_state.updates.shape[0]
    sizes = [v["v"].size for v in carry.fitted.weights.values() if "v" in v]

    def loss(fitted: Fitted, index: Array, key: PRNGKeyArray, number: Array):
        error = block_error(runner, problem, fitted, index, key, drop=settings.drop)
        relative = error / problem.baseline
        total = relative if settings.scaling == "relative" else error
        if sizes:
            beta, on = rounding.penalty_exponent(
                number, settings.iterations, warmup=settings.warmup
            )
            penalty = sum(
                rounding.rounding_penalty(leaf["v"], beta) for leaf in fitted.weights.values()
            )
            strength = settings.strength
            if settings.scaling == "relative":
                strength = strength / sum(sizes)
            total = total + strength * jnp.where(on, penalty, 0.0)
        return total, relative

    def step(carry: Carry, number: Array):
        index_key, drop_key = jax.random.split(jax.random.fold_in(key, number))
        index = jax.random.randint(index_key, (min(settings.batch, items),), 0, items)
        gradient, relative = jax.grad(loss, has_aux=True)(carry.fitted, index, drop_key, number)
        update, weights_state = optimizer.update(
            gradient.weights, carry.weights_state, carry.fitted.weights
        )
        # The cosine is of the number, not of Adam's count, which begins anew in every refresh.
        fraction = number.astype(jnp.float32) / settings.iterations
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * fraction))
        rate = settings.weight_rate * (0.1 + 0.9 * cosine)
        weights = jax.tree.map(lambda w, u: w - rate * u, carry.fitted.weights, update)
        acts, acts_state = carry.fitted.acts, carry.acts_state
        if settings.act_rate > 0 and acts:
            present = jnp.zeros((rows,), bool).at[problem.group[index]].set(True)
            change, acts_state = adam_rows.update(
                gradient.acts, acts_state, present, settings.act_rate * cosine
            )
            acts = adam_rows.apply(acts, change)
        return Carry(Fitted(weights, acts), weights_state, acts_state), relative

    return jax.lax.scan(step, carry, first + jnp.arange(length))


_STATIC = ("runner", "settings", "length")
_run_chunk = jax.jit(_chunk, static_argnames=_STATIC, donate_argnames="carry")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="carry")
def _run_chunks(runner, settings, length, carry, problem, first, key):
    """As `_run_chunk` for a stack of alike blocks."""
    one = functools.partial(_chunk, runner, settings, length)
    return jax.vmap(one, in_axes=(0, 0, None, 0))(carry, problem, first, key)


@functools.partial(jax.jit, static_argnames=("runner", "batch"))
def _errors(runner, problem, fitted, *, batch):
    items = problem.group.shape[0]
    batch = min(batch, items)
    starts = jnp.arange(0, items - batch + 1, batch)

    def one(start):
        return block_error(runner, problem, fitted, start + jnp.arange(batch))

    return jnp.mean(jax.lax.map(one, starts))


def mean_error(runner: Runner, problem: Problem, fitted: Fitted, *, batch: int) -> Array:
    """`E` over all items; of a last part that fills no batch nothing is counted."""
    return _errors(runner, problem, fitted, batch=batch)


def fit(
    runner: Runner,
    problems: Sequence[Problem],
    fitted: Sequence[Fitted],
    settings: FitSettings,
    keys: Sequence[PRNGKeyArray],
    *,
    span: tuple[int, int] | None = None,
    together: bool | None = None,
    on_chunk: Callable[[int, np.ndarray], None] | None = None,
) -> list[Fitted]:
    """Fit alike blocks.

    Args:
      runner: What they have in common.
      problems: One for each block.
      fitted: Where each begins.
      settings: How.
      keys: One for each block.
      span: First iteration and the one after the last, of `settings.iterations`; None for all.
      together: Whether all run at once under `vmap`; None: on accelerators.
      on_chunk: Called after every chunk of a block (or of all) with the iterations done and the
        errors `E / E_0` of the chunk's iterations.

    Returns:
      What was fitted, for each block.
    """
    if together is None:
        together = jax.default_backend() != "cpu"
    groups = int(max((int(jnp.max(p.group)) for p in problems), default=0)) + 1
    for one in fitted:
        for table in jax.tree.leaves(one.acts):
            groups = max(groups, table.shape[0])
    begin_at, end_at = (0, settings.iterations) if span is None else span
    lengths = [
        min(settings.chunk, end_at - done) for done in range(begin_at, end_at, settings.chunk)
    ]

    def loop(run, carry, problem, key):
        done = begin_at
        for length in lengths:
            carry, errors = run(runner, settings, length, carry, problem, jnp.int32(done), key)
            done += length
            if on_chunk is not None:
                on_chunk(done, np.asarray(errors))
        return carry.fitted

    # Donated below: what the caller holds must survive.
    begin = [start_optimizer(jax.tree.map(jnp.copy, one), groups, settings) for one in fitted]
    if together and len(problems) > 1:
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        found = loop(_run_chunks, stack(begin), stack(problems), jnp.stack(list(keys)))
        return [jax.tree.map(lambda a, i=i: a[i], found) for i in range(len(problems))]
    return [
        loop(_run_chunk, carry, problem, key)
        for carry, problem, key in zip(begin, problems, keys, strict=True)
    ]
