"""The serial roll-out: a quantized sampler run on calibration items, its ranges fitted on the way.

Step i runs the network on the noisy samples that the quantized network itself has made in the
steps before, fits the ranges of step i on them, layer by layer, and goes on with the quantized
prediction. Samples and the sampler's history are kept from step to step, so T steps cost T
forward passes of every item and not T (T + 1) / 2.

What is kept are the samples of every step and not activations: those of the blocks are computed
again when they are needed (`capture.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.fitted import LayerFormat
from qjax.calibrate.ranges import DECAY, Method, Range, empty, observing, union
from qjax.calibrate.simulate import simulated
from qjax.core.typing import Apply, Array, Float, Int, Params, PRNGKeyArray
from qjax.models.samplers import Sampler
from qjax.models.sampling import draw_noise, guided_prediction

Driver = Literal["quantized", "float"]


class Items(NamedTuple):
    """The calibration items, all arrays with the items first.

    Attributes:
      x_T: Standard normal noise to begin with.
      told: What the network is told of each.
      null: The unconditional half; None without guidance.
      keys: Of the noise of the steps.
    """

    x_T: Float[Array, "n h w c"]
    told: Any
    null: Any
    keys: PRNGKeyArray

    def scale(self, guidance_scale: float | None) -> Array | None:
        """The weight of guidance by two halves; None without an unconditional half."""
        return None if self.null is None else jnp.float32(guidance_scale)


class Network(NamedTuple):
    """A network as the sampler runs it: hashable, arrays apart.

    Attributes:
      apply: `apply(variables, x_t, t, told)`.
      sampler: The sampler.
      guidance_channels: As for `sampling.guided_prediction`.
      formats: Of the quantized layers; empty for a float network.
      method: How ranges are found.
    """

    apply: Apply
    sampler: Sampler
    guidance_channels: int | None
    formats: tuple[tuple[str, LayerFormat], ...]
    method: Method = "minmax"


class Buffer(NamedTuple):
    """What a roll-out leaves.

    Attributes:
      x_t: The samples that went into every step, `[s, n, h, w, c]`, host memory.
      x_0: The last ones.
      ranges: The fitted ranges of every group of steps.
      forwards: Evaluations of the network on one item, both halves counted as one.
    """

    x_t: np.ndarray
    x_0: np.ndarray
    ranges: list[dict[str, Range]]
    forwards: int


def one_step(network, params, x_t, state, row, told, null, keys, step, prior, decay, scale):
    """Samples one step on, the sampler's state, and the ranges of what the layers were given.

    Args:
      network: What runs.
      params: Its params.
      x_t: Samples.
      state: What the sampler remembers of them.
      row: Of `sampler.rows`.
      told: What the network is told of the samples.
      null: The unconditional half, or None.
      keys: Of their noise.
      step: Number of the step.
      prior: Ranges so far.
      decay: Their weight, as for `ranges.observing`.
      scale: Weight of the guidance, or None.
    """
    found: dict[str, Range] = {}
    hook = observing(dict(network.formats), prior, decay, network.method, found)
    with simulated(hook):
        prediction = guided_prediction(
            network.apply,
            {"params": params},
            x_t,
            row["t"],
            told,
            null,
            guidance_scale=scale,
            guidance_channels=network.guidance_channels,
        )
    noise = draw_noise(keys, x_t.shape[1:], draw=step + 1)
    x_prev, state = network.sampler.step(row, state, x_t, prediction, noise)
    return x_prev, state, found


_step = jax.jit(one_step, static_argnames=("network",))


def roll_out(
    network: Network,
    params: Params,
    items: Items,
    rows: Mapping[str, np.ndarray],
    *,
    group: Int[np.ndarray, " s"],
    guidance_scale: Array | None = None,
    batch: int = 64,
    ranges: Sequence[Mapping[str, Range]] | None = None,
    driver: tuple[Network, Params] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Buffer:
    """Run the sampler on the items and fit the ranges of every group of steps.

    Args:
      network: The quantized network.
      params: Its params: QTensors without `act`, or float kernels of the same values.
      items: Where to begin, and what the network is told.
      rows: `sampler.rows(steps)`.
      group: For every step the group that shares its ranges: 0 first, never falling.
      guidance_scale: Weight of the guidance; None for none.
      batch: Items that run at once.
      ranges: Ranges to use as they are, one for each group; None fits them.
      driver: Another network, which makes the samples in place of `network` (the float one, for
        the methods that calibrate on its samples).
      on_step: Progress: called with the number of every step that is done.

    Returns:
      Samples, ranges and the count of forward passes.
    """
    steps, n = len(rows["t"]), len(items.x_T)
    x_T = items.x_T * rows["init_scale"][0] if "init_scale" in rows else items.x_T
    parts = [slice(start, min(start + batch, n)) for start in range(0, n, batch)]
    pick = lambda tree, part: jax.tree.map(lambda a: a[part], tree)
    x = [x_T[part] for part in parts]
    states = [network.sampler.init(one) for one in x]
    formats = dict(network.formats)
    fitted: list[dict[str, Range]] = []
    samples, forwards = [], 0
    nothing = empty(formats)

    def run(which: Network, params: Params, p: int, i: int, prior: Any, decay: float):
        nonlocal forwards
        part = parts[p]
        forwards += part.stop - part.start
        row = {name: jnp.asarray(column[i]) for name, column in rows.items()}
        return _step(
            which,
            params,
            x[p],
            states[p],
            row,
            pick(items.told, part),
            pick(items.null, part),
            items.keys[part],
            jnp.int32(i),
            prior,
            jnp.float32(decay),
            guidance_scale,
        )

    for i in range(steps):
        samples.append(np.concatenate([np.asarray(one) for one in x]))
        first = i == 0 or group[i] != group[i - 1]
        if ranges is not None:
            prior = dict(ranges[group[i]])
        else:
            # Where a single part is all, its range and its step take one pass.
            prior = nothing
            watch = bool(nothing) and (len(parts) > 1 or driver is not None or not first)
            for p in range(len(parts)) if watch else ():
                *_, prior = run(network, params, p, i, prior, 0.0 if p == 0 else DECAY)
            if not first:
                prior = union(fitted[-1], prior)
        once = ranges is None and first and len(parts) == 1 and driver is None
        moved = []
        for p in range(len(parts)):
            if driver is None:
                moved.append(run(network, params, p, i, prior, 0.0 if once else 1.0))
            else:
                moved.append(run(driver[0], driver[1], p, i, {}, 1.0))
        if ranges is None:
            here = moved[0][2] if once else prior
            if first:
                fitted.append(here)
            else:
                fitted[-1] = here
        x = [one[0] for one in moved]
        states = [one[1] for one in moved]
        if on_step is not None:
            on_step(i + 1)
    done = [dict(one) for one in ranges] if ranges is not None else fitted
    x_0 = np.concatenate([np.asarray(one) for one in x])
    return Buffer(np.stack(samples), x_0, done, forwards)


def shared_steps(steps: int, groups: int | None) -> Int[np.ndarray, " s"]:
    """For every step its group, of `groups` contiguous ones of nearly equal length.

    Raises:
      ValueError: If there are more groups than steps.
    """
    groups = steps if groups is None else groups
    if not 1 <= groups <= steps:
        raise ValueError(f"groups of steps must be between 1 and {steps}; got {groups}.")
    return (np.arange(steps) * groups // steps).astype(np.int32)


def staleness(new: Buffer, old: Buffer) -> Float[np.ndarray, " s"]:
    """How far the samples of every step have moved: `|new - old| / |old|`."""
    axes = tuple(range(1, new.x_t.ndim))
    norm = lambda x: np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=axes))
    return norm(new.x_t - old.x_t) / norm(old.x_t)
