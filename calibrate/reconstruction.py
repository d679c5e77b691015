"""Reconstruction: fit a block so that its output is what it was before quantization.

With `y` the block's output in float, on the inputs that the float network has, and `q` the
quantized block's, on the inputs that the quantized network has, the fitted arrays minimise

    E = mean over positions of sum over channels |q - y|^2
    L = E / E_0 + strength * mean over weights (1 - |2 h - 1|^beta)

`E_0` being the loss with rounding to nearest, and the last term, of the profile `adaround`
alone, being 0 in the first fifth of the iterations while beta falls from 20 to 2 afterwards.
The papers have L = E + 0.01 * sum over weights, whose balance depends on how large a block's
outputs are and on how many weights it has; `scaling="absolute"` is theirs. The default strength
is what theirs comes to in a block of some 10^5 weights: at a hundredth of it most roundings of
short fits stay undecided, and what is fitted is lost when they become integers.

For the whole network `E` may also count what is left of the blocks' outputs (distillation), or
be taken several sampler steps later (`trajectory.py`). The optimisation itself is in
`optimize.py`.

References:
  Nagel et al., AdaRound, 2020, https://arxiv.org/abs/2004.10568; Li et al., BRECQ, 2021,
  https://arxiv.org/abs/2102.05426; Wei et al., QDrop, 2022, https://arxiv.org/abs/2203.05740;
  Li et al., Q-Diffusion, 2023, https://arxiv.org/abs/2302.04304.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from qjax.calibrate import rounding
from qjax.calibrate.fitted import (
    LayerFormat,
    Profile,
    nearest_weights,
    quantize_input,
    soft_kernel,
    with_kernels,
)
from qjax.calibrate.simulate import Hook, simulated
from qjax.core.typing import Apply, Array, Int, Params, PRNGKeyArray

RATES = {"adaround": 3e-2, "lora": 5e-3, "latent": 5e-3, "nearest": 0.0}
"""Learning rates by profile: of `v`, or in steps of the layer's grid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How blocks are fitted.

    Attributes:
      iterations: Steps of the optimizer.
      batch: Items a step.
      weights: What is fitted of the weights.
      weight_rate: Adam's learning rate of it, at the start of a cosine decay to a tenth: of `v`
        itself with `adaround`, in mean steps of the layer's grid with `latent` and `lora` (as
        EfficientDM scales it); None takes 0.03 and 0.005.
      act_rate: Of the logarithms of the inputs' scales; 0 leaves the ranges.
      rank: Of the profile `lora`.
      scaling: `"relative"` or `"absolute"`; the formulas head this file.
      strength: Of the rounding term: in `"relative"` scaling of its mean, else of its sum.
      warmup: Share of the iterations without it.
      drop: Share of the inputs' elements left in float, at random (QDrop); 0 for none.
      order: Which items an iteration sees: `"shuffled"` from all sampler steps, `"serial"` from
        one step, the steps taking turns in the sampler's order.
      distillation: Weight of the relative errors of the blocks' outputs, averaged over the
        blocks, where the whole network is fitted; 0 for none.
      only: Regular expression that a layer's path must hold for its weights to be fitted; others
        keep theirs. Empty for all.
      freeze: A layer is fitted no further once the share of its codes that change in 100
        iterations, averaged (decay 0.5), is below this; 0 never.
      chunk: Iterations that run as one program; changes nothing of the result.
      clip: Largest global norm of the gradient of the weights; None for none.
    """

    iterations: int = 2000
    batch: int = 32
    weights: Profile = "adaround"
    weight_rate: float | None = None
    act_rate: float = 1e-3
    rank: int = 32
    scaling: Literal["relative", "absolute"] = "relative"
    strength: float = 1000.0
    warmup: float = 0.2
    drop: float = 0.0
    order: Literal["shuffled", "serial"] = "shuffled"
    distillation: float = 0.0
    only: str = ""
    freeze: float = 0.0
    chunk: int = 100
    clip: float | None = None

    def __post_init__(self):
        if self.iterations < 1 or self.batch < 1 or self.chunk < 1:
            raise ValueError(
                f"iterations, batch and chunk must be at least 1; got {self.iterations}, "
                f"{self.batch} and {self.chunk}."
            )
        for name, allowed in (
            ("weights", tuple(RATES)),
            ("scaling", ("relative", "absolute")),
            ("order", ("shuffled", "serial")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}."
                )
        for name, most in (("drop", 1.0), ("warmup", 1.0), ("freeze", 1.0)):
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if self.distillation < 0:
            raise ValueError(f"distillation must be at least 0; got {self.distillation}.")
        try:
            re.compile(self.only)
        except re.error as error:
            raise ValueError(
                f"only must be a regular expression; got {self.only!r}: {error}."
            ) from None

    @property
    def rate(self) -> float:
        """The learning rate of the weights."""
        return RATES[self.weights] if self.weight_rate is None else self.weight_rate


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


def nearest(problem: Problem, begin: Fitted) -> Fitted:
    """Fitted arrays that stand for rounding to nearest, of the structure of `begin`."""
    weights = {path: nearest_weights(problem.fixed[path], w) for path, w in begin.weights.items()}
    return Fitted(weights, begin.acts)


Quantizing = Callable[[Int[Array, " b"]], Callable[[str, nn.Module, Array], Array]]
"""Makes the function that quantizes the layers' inputs, of the groups of steps of the items."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """How a block is run: what makes a program, so it is hashable.

    Attributes:
      module: The block's module; None for the network.
      apply: The network's function, if the block is the network.
      formats: Formats of its layers by relative path.
      watched: Paths of the blocks whose outputs count, too, if the block is the network.
    """

    module: nn.Module | None
    apply: Apply | None
    formats: tuple[tuple[str, LayerFormat], ...]
    watched: tuple[str, ...] = ()

    def __call__(
        self, params: Params, inputs: Any, group: Int[Array, " b"], quantizing: Quantizing | None
    ) -> Array:
        """The output with these params; `quantizing` for the inputs of quantized layers."""
        args, kwargs = inputs
        with contextlib.ExitStack() as stack:
            if quantizing is not None:
                stack.enter_context(simulated(self._hook(quantizing(group))))
            if self.module is None:
                assert self.apply is not None
                return self.apply({"params": params}, *args, **kwargs)
            return jnp.asarray(self.module.apply({"params": params}, *args, **kwargs))

    def groups(self, inputs: Any, group: Int[Array, " m"]) -> Int[Array, "m ..."]:
        """The groups of steps whose ranges an item passes: its own."""
        del inputs
        return group

    def _hook(self, quantize: Callable[[str, nn.Module, Array], Array]) -> Hook:
        formats = dict(self.formats)

        def hook(path: str, module: nn.Module, x: Array) -> Array:
            fmt = formats.get(path)
            return x if fmt is None or fmt.act is None else quantize(path, module, x)

        return hook


def soft_kernels(
    runner: Runner,
    params: Params,
    fixed: Mapping[str, Mapping[str, Array]],
    fitted: Fitted,
) -> dict[str, Array]:
    """The float kernels that the layers of a block compute with while it is fitted."""
    return {
        path: soft_kernel(fmt, fixed[path], fitted.weights[path]).astype(
            _kernel_dtype(params, path)
        )
        for path, fmt in runner.formats
    }


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

    def quantizing(group: Array) -> Callable[[str, nn.Module, Array], Array]:
        def quantize(path: str, module: nn.Module, x: Array) -> Array:
            act = formats[path].act
            assert act is not None
            rows = jax.tree.map(lambda table: table[group], fitted.acts.get(path))
            x_hat = quantize_input(x, act, module, rows)
            if drop == 0 or key is None:
                return x_hat
            number = list(formats).index(path)
            return rounding.mix(jax.random.fold_in(key, number), x, x_hat, probability=drop)

        return quantize

    params = with_kernels(
        problem.params, soft_kernels(runner, problem.params, problem.fixed, fitted)
    )
    inputs = jax.tree.map(lambda leaf: leaf[index], problem.args)
    return runner(params, inputs, problem.group[index], quantizing)


def _kernel_dtype(params: Params, path: str) -> Any:
    node: Any = params
    for name in path.split("/") if path else ():
        node = node[name]
    return node["kernel"].dtype


def distillation_error(
    runner: Runner,
    problem: Problem,
    fitted: Fitted,
    index: Int[Array, " b"],
    key: PRNGKeyArray | None = None,
    *,
    drop: float = 0.0,
) -> tuple[Array, Array]:
    """`E` on the items `index`, and the mean relative error of the watched blocks' outputs.

    The float network runs along, on the same items, to know what those were.
    """
    with outputs_of(runner.watched) as found:
        answer = output(runner, problem, fitted, index, key, drop=drop)
    floats = with_kernels(
        problem.params,
        {
            path: problem.fixed[path]["w"].astype(_kernel_dtype(problem.params, path))
            for path, _ in runner.formats
        },
    )
    inputs = jax.tree.map(lambda leaf: leaf[index], problem.args)
    with outputs_of(runner.watched) as wanted:
        runner(floats, inputs, problem.group[index], None)
    pairs = zip(found, jax.lax.stop_gradient(wanted), strict=True)
    errors = [rounding.relative_loss(one, other) for one, other in pairs]
    return rounding.block_loss(answer, problem.target[index]), jnp.mean(jnp.stack(errors))


@contextlib.contextmanager
def outputs_of(paths: tuple[str, ...]) -> Iterator[list[Array]]:
    """Within it, the outputs of the modules at `paths` are added to the list it gives."""
    found: list[Array] = []

    def watch(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        answer = next_fun(*args, **kwargs)
        if "/".join(context.module.path) in paths and context.method_name == "__call__":
            found.append(answer)
        return answer

    with nn.intercept_methods(watch):
        yield found


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
