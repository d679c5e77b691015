"""A fit online: samples move through the sampler while the network that moves them is fitted.

A register has slots, each with samples at one step of the sampler. After every few iterations
all samples move on by one step, with the quantized network as it is then, guidance included;
what has arrived at the end leaves, and new noise comes in at step 0.

| slots | what it is |
|---|---|
| one for every step | all steps are in every batch: the fit goes on in parallel while the samples, always the network's own, move serially (the name of the method, taken literally) |
| one | a batch is of one step, and the steps follow each other: serial alone (EfficientDM, but on the network's own samples) |

References:
  Li et al., Efficiency Meets Fidelity, 2024, https://arxiv.org/abs/2412.06661 (a reading of the
  abstract; docs/methods.md); He et al., EfficientDM, 2024, https://arxiv.org/abs/2310.03270.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.collect import Data, Samples, collect_whole, quantizing, with_null_half
from qjax.calibrate.fitted import with_kernels
from qjax.calibrate.reconstruction import Fitted, Problem, Runner, soft_kernels
from qjax.calibrate.rollout import Items, Network
from qjax.calibrate.simulate import simulated
from qjax.core.typing import Apply, Array, Float, Int, Params, PRNGKeyArray
from qjax.models.sampling import draw_noise, guided_prediction


class Slot(NamedTuple):
    """Samples of one step of the sampler.

    Attributes:
      x_t: The samples.
      state: What the sampler remembers of them.
      step: The step they are at.
      items: What the network is told of them, and the keys of their noise.
    """

    x_t: Float[Array, "b h w c"]
    state: Any
    step: int
    items: Items


@dataclasses.dataclass(frozen=True)
class Register:
    """What stays the same while samples move.

    Attributes:
      network: The quantized network and its sampler.
      runner: As `student.runner` of the whole network.
      rows: `sampler.rows(steps)`.
      group: For every step its group.
      scale: Weight of the guidance; None for none.
      items: What the slots' samples are told, in turn; a slot has `len / slots` of them.
      slots: How many.
    """

    network: Network
    runner: Runner
    rows: Mapping[str, np.ndarray]
    group: Int[np.ndarray, " s"]
    scale: Array | None
    items: Items
    slots: int

    def __post_init__(self):
        if self.slots not in (1, self.steps):
            raise ValueError(
                f"a register has one slot, or one for each of the {self.steps} steps; got "
                f"{self.slots}."
            )
        if len(self.items.x_T) % self.slots:
            raise ValueError(
                f"items must be a multiple of the register's {self.slots} slots; got "
                f"{len(self.items.x_T)}."
            )

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return len(self.rows["t"])

    def enter(self, lane: int, count: int) -> Slot:
        """A slot at step 0: the items of a lane with noise that no other entry has.

        Args:
          lane: Which items.
          count: Entries so far.
        """
        size = len(self.items.x_T) // self.slots
        part = slice(lane * size, (lane + 1) * size)
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.items.keys[part], count)
        told, null = jax.tree.map(lambda a: a[part], (self.items.told, self.items.null))
        x = draw_noise(keys, self.items.x_T.shape[1:])
        if "init_scale" in self.rows:
            x = x * self.rows["init_scale"][0]
        return Slot(x, self.network.sampler.init(x), 0, Items(x, told, null, keys))

    def fill(self, problem: Problem, fitted: Fitted) -> list[Slot]:
        """Slots at steps 0, 1, ..., the network moving them there."""
        slots = [self.enter(0, 0)]
        for lane in range(1, self.slots):
            slots = [self.move(slot, problem, fitted) for slot in slots]
            slots.append(self.enter(lane, lane))
        return slots[::-1]

    def shift(self, slots: list[Slot], problem: Problem, fitted: Fitted, count: int) -> list[Slot]:
        """All slots one step on; the one that has arrived begins anew.

        Args:
          slots: In the order of their steps.
          problem: For what is fitted.
          fitted: The network as it is.
          count: Shifts so far.
        """
        moved = [self.move(slot, problem, fitted) for slot in slots]
        last = moved.pop() if moved[-1].step == self.steps else None
        if last is None:
            return moved
        # The items of the slot that has left, with noise of their own.
        return [self.enter(count % self.slots, self.slots + count), *moved]

    def move(self, slot: Slot, problem: Problem, fitted: Fitted) -> Slot:
        """A slot one step on."""
        row = {name: jnp.asarray(column[slot.step]) for name, column in self.rows.items()}
        x_t, state = _move(
            self.network,
            self.runner,
            problem.params,
            problem.fixed,
            fitted,
            slot.x_t,
            slot.state,
            slot.items,
            row,
            jnp.int32(slot.step),
            jnp.int32(self.group[slot.step]),
            self.scale,
        )
        return Slot(x_t, state, slot.step + 1, slot.items)

    def data(self, slots: list[Slot], teacher: tuple[Apply, Params]) -> Data:
        """What the network is fitted to while samples are where they are."""
        join = lambda *leaves: jnp.concatenate(leaves)
        size = len(slots[0].x_t)
        step = np.repeat([slot.step for slot in slots], size)
        x_t = jnp.concatenate([slot.x_t for slot in slots])
        t = jnp.asarray(np.asarray(self.rows["t"])[step])
        group = jnp.asarray(self.group[step])
        told, null = jax.tree.map(join, *((slot.items.told, slot.items.null) for slot in slots))
        return collect_whole(teacher, [with_null_half(Samples(x_t, t, told, group), null)])


@functools.partial(jax.jit, static_argnames=("network", "runner"))
def _move(
    network, runner, params, fixed, fitted, x_t, state, items: Items, row, step, group, scale
):
    b = x_t.shape[0] * (1 if items.null is None else 2)
    groups = jnp.broadcast_to(group, (b,))

    kernels = soft_kernels(runner, params, fixed, fitted)
    with simulated(quantizing(dict(runner.formats), fitted.acts, groups)):
        prediction = guided_prediction(
            network.apply,
            {"params": with_kernels(params, kernels)},
            x_t,
            row["t"],
            items.told,
            items.null,
            guidance_scale=scale,
            guidance_channels=network.guidance_channels,
        )
    noise = draw_noise(items.keys, x_t.shape[1:], draw=step + 1)
    return network.sampler.step(row, state, x_t, prediction, noise)


OnShift = Callable[[int, Fitted, list[Slot]], None]


def fit_online(
    register: Register,
    problem: Problem,
    begin: Fitted,
    train: Callable[[Any, Problem, int, int], Any],
    carry: Any,
    teacher: tuple[Apply, Params],
    *,
    iterations: int,
    every: int,
    on_shift: OnShift | None = None,
) -> Any:
    """Train and shift in turn.

    Args:
      register: The register.
      problem: With what does not move: params, kernels, baseline.
      begin: What is fitted, at the beginning.
      train: `train(carry, problem, first, length) -> carry`, whose `fitted` moves the samples.
      carry: The optimizer's state.
      teacher: Function and params of the float network.
      iterations: All of them.
      every: Iterations between two shifts.
      on_shift: Called before every shift with the iterations done, what is fitted, and the
        slots.

    Returns:
      The optimizer's last state.
    """
    slots = register.fill(problem, begin)
    for count, first in enumerate(range(0, iterations, every)):
        data = register.data(slots, teacher)
        here = problem._replace(args=data.inputs, target=data.target, group=data.group)
        carry = train(carry, here, first, min(every, iterations - first))
        if on_shift is not None:
            on_shift(min(first + every, iterations), carry.fitted, slots)
        slots = register.shift(slots, here, carry.fitted, count)
    return carry


def lanes(key: PRNGKeyArray, items: Items, count: int) -> Items:
    """`count` items of a set, in turn, with noise of another key than the set's own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))
    turn = np.arange(count) % len(items.x_T)
    x_T, told, null = jax.tree.map(lambda a: a[turn], (items.x_T, items.told, items.null))
    return Items(x_T, told, null, keys)
