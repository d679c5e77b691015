"""A fit whose aim lies several sampler steps ahead: the sample, and not the network's answer.

From a sample that the quantized network has made, the float network goes on for `horizon` steps
and says where it arrives; the quantized network is fitted to arrive there, too, through the
same steps, guidance included. Errors count with the weight that the sampler gives them, and
those of one step may make up for those of another.

Samplers with a history are refused: what a step is given depends on steps before the sample.

References:
  Kim et al., AccuQuant, NeurIPS 2025, https://arxiv.org/abs/2510.20348 (errors over consecutive
  steps; its way to save memory is not used here, the steps are simply differentiated through).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.collect import Data, Pairs
from qjax.calibrate.reconstruction import Quantizing, Runner
from qjax.calibrate.rollout import Buffer, Items
from qjax.calibrate.simulate import simulated
from qjax.core.typing import Array, Float, Int, Params
from qjax.models.samplers import Sampler
from qjax.models.sampling import draw_noise, guided_prediction


@dataclasses.dataclass(frozen=True)
class Unrolled(Runner):
    """Runs the network for some steps of the sampler; its output is the sample after them.

    Attributes:
      sampler: The sampler.
      guidance_channels: As for `sampling.guided_prediction`.
    """

    sampler: Sampler | None = None
    guidance_channels: int | None = None

    def __call__(
        self, params: Params, inputs: Any, group: Int[Array, " b"], quantizing: Quantizing | None
    ) -> Float[Array, "b h w c"]:
        """The samples after the steps whose rows are in `inputs`; see `unrolled_data`."""
        (x_t, told, null, keys, steps, groups, rows, scale), _ = inputs
        del group  # of the first step alone
        for j in range(steps.shape[1]):
            row = {name: column[:, j] for name, column in rows.items()}
            x_t = self._step(
                params, x_t, told, null, keys, steps[:, j], groups[:, j], row, scale, quantizing
            )
        return x_t

    def groups(self, inputs: Any, group: Int[Array, " m"]) -> Int[Array, "m k"]:
        """The groups of all steps that an item goes through."""
        (_, _, _, _, _, groups, *_), _ = inputs
        return groups

    def _step(self, params, x_t, told, null, keys, step, group, row, scale, quantizing):
        assert self.apply is not None and self.sampler is not None
        both = group if null is None else jnp.concatenate([group, group])
        predict = functools.partial(
            guided_prediction,
            self.apply,
            {"params": params},
            x_t,
            row["t"],
            told,
            null,
            guidance_scale=None if null is None else scale[:, None, None, None],
            guidance_channels=self.guidance_channels,
        )
        if quantizing is None:
            prediction = predict()
        else:
            with simulated(self._hook(quantizing(both))):
                prediction = predict()

        sampler = self.sampler

        def move(row, x, prediction, key, number):
            noise = draw_noise(key[None], x.shape, draw=number + 1)
            one = lambda a: a[None]
            moved, _ = sampler.step(row, sampler.init(one(x)), one(x), one(prediction), noise)
            return moved[0]

        moved = jax.vmap(move)(row, x_t, prediction, keys, step)
        # A sample that is done already stays as it is.
        done = (step < 0)[:, None, None, None]
        return jnp.where(done, x_t, moved)


def require_no_history(sampler: Sampler) -> None:
    """That a step of the sampler depends on its sample alone.

    Raises:
      ValueError: If it keeps what earlier steps have predicted.
    """
    if jax.tree.leaves(sampler.init(jnp.zeros((1, 1, 1, 1)))):
        raise ValueError(
            f"horizon needs a sampler without a history of predictions; {type(sampler).__name__} "
            "keeps one. Use DDIM, DDPM or Euler, or horizon=0."
        )


def unrolled_data(
    apply: Unrolled,
    params: Params,
    buffer: Buffer,
    items: Items,
    rows: Mapping[str, np.ndarray],
    group: Int[np.ndarray, " s"],
    pairs: Pairs,
    *,
    horizon: int,
    guidance_scale: Array | None,
    batch: int,
) -> Data:
    """What the network is fitted to: samples of a roll-out, and where the float network arrives.

    Args:
      apply: The runner, which serves the float network too.
      params: Float params.
      buffer: The roll-out.
      items: Its items.
      rows: `sampler.rows(steps)`.
      group: For every step its group.
      pairs: Which samples.
      horizon: Steps.
      guidance_scale: Weight of the guidance; None for none.
      batch: Pairs that run at once.
    """
    steps = len(rows["t"])
    wanted = pairs.step[:, None] + np.arange(horizon)
    inside = np.minimum(wanted, steps - 1)
    take = lambda tree: jax.tree.map(lambda a: a[pairs.item], tree)
    m = len(pairs.step)
    columns = {
        name: jnp.asarray(np.asarray(column)[inside])
        for name, column in rows.items()
        if np.ndim(column) == 1 and len(column) == steps
    }
    scale = None if guidance_scale is None else jnp.broadcast_to(guidance_scale, (m,))
    args = (
        jnp.asarray(buffer.x_t[pairs.step, pairs.item]),
        take(items.told),
        take(items.null),
        items.keys[pairs.item],
        jnp.asarray(np.where(wanted < steps, inside, -1), jnp.int32),
        jnp.asarray(group[inside], jnp.int32),
        columns,
        scale,
    )
    inputs: Any = (args, {})
    first = jnp.asarray(group[pairs.step], jnp.int32)
    targets = _targets(apply, params, inputs, first, batch)
    return Data(inputs, targets, first)


@functools.partial(jax.jit, static_argnames=("apply",))
def _arrive(apply, params, inputs, group):
    return apply(params, inputs, group, None)


def _targets(apply: Unrolled, params: Params, inputs: Any, group: Array, batch: int) -> Array:
    parts: Sequence[Array] = [
        _arrive(
            apply,
            params,
            jax.tree.map(lambda a, s=start: a[s : s + batch], inputs),
            group[start : start + batch],
        )
        for start in range(0, len(group), batch)
    ]
    return jnp.concatenate(parts)
