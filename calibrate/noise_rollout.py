"""Both networks side by side through the sampler, and the noise between them at every step.

At each step the float and the quantized network answer on the same samples, with guidance, and
the quantized one with its row of the step table. The samples go on with the float answer (the
authors' way), or with the quantized one, corrected by what this step's noise was found to be:
then later steps see the samples that the corrected sampler really makes.

References:
  He et al., PTQD, NeurIPS 2023, https://arxiv.org/abs/2305.10657.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.noise_statistics import Moments
from qjax.calibrate.parts import pack_tree, unpack_tree
from qjax.calibrate.rollout import Driver, Items
from qjax.core.steps import StepTable
from qjax.core.typing import Apply, Array, Float, Int, Params
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import Sampler, correct_prediction
from qjax.models.sampling import draw_noise, guided_prediction

__all__ = ["Carry", "NoiseRollout", "StepNoise", "pack_step", "unpack_step"]

Correct = Callable[[Moments, Mapping[str, np.ndarray]], Mapping[str, Array]]
"""Of a step's noise and the sampler's row, the row of the step table that corrects it."""

VALUES = 1024
"""Values of a step's answers and noise that are kept, for its distribution."""


class Sides(NamedTuple):
    """Both networks without their params: hashable."""

    teacher: Apply
    student: Apply
    guidance_channels: int | None


class Carry(NamedTuple):
    """What goes from step to step.

    Attributes:
      x_t: Samples `[n, h, w, c]`.
      state: The sampler's, items first.
    """

    x_t: Array
    state: Any


class StepNoise(NamedTuple):
    """What one step's noise was found to be.

    Attributes:
      moments: Over all items.
      e: Some values of the float answer, `[VALUES]` or as many as there are.
      d: The noise at the same places.
      channel: Of each.
    """

    moments: Moments
    e: Float[np.ndarray, " v"]
    d: Float[np.ndarray, " v"]
    channel: Int[np.ndarray, " v"]


@functools.partial(jax.jit, static_argnames=("sides",))
def _answers(sides, teacher, student, entries, x_t, t, told, null, scale):
    def answer(apply, variables):
        return guided_prediction(
            apply,
            variables,
            x_t,
            t,
            told,
            null,
            guidance_scale=scale,
            guidance_channels=sides.guidance_channels,
        )

    return (
        answer(sides.teacher, {"params": teacher}),
        answer(sides.student, {"params": student, **entries}),
    )


@functools.partial(jax.jit, static_argnames=("sampler",))
def _advance(sampler, row, state, x_t, prediction, keys, draw, correction):
    if correction is not None:
        row, prediction = correct_prediction(correction, row, prediction)
    noise = draw_noise(keys, x_t.shape[1:], draw=draw)
    return sampler.step(row, state, x_t, prediction, noise)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NoiseRollout:
    """The two networks, the sampler and the items; `step` takes one step of it.

    Attributes:
      sides: Both networks.
      teacher: Params of the float one.
      student: Params of the quantized one.
      table: Its step table, without a noise correction.
      sampler: The student's.
      rows: `sampler.rows(steps, eta=eta)`.
      items: Where to begin, and what both are told.
      guidance_scale: Weight of the guidance; None for none.
      batch: Items that run at once.
    """

    sides: Sides
    teacher: Params
    student: Params
    table: StepTable
    sampler: Sampler
    rows: Mapping[str, np.ndarray]
    items: Items
    guidance_scale: Array | None
    batch: int

    @classmethod
    def of(
        cls,
        teacher: Pipeline,
        student: Pipeline,
        table: StepTable,
        rows: Mapping[str, np.ndarray],
        items: Items,
        *,
        guidance_scale: float | None,
        batch: int,
    ) -> "NoiseRollout":
        """The roll-out of two pipelines of the same network and sampler."""
        return cls(
            sides=Sides(teacher.apply, student.apply, teacher.guidance_channels),
            teacher=teacher.params,
            student=student.params,
            table=table,
            sampler=student.sampler,
            rows=rows,
            items=items,
            guidance_scale=items.scale(guidance_scale),
            batch=batch,
        )

    def begin(self) -> Carry:
        """What the first step begins with."""
        x_T = self.items.x_T
        if "init_scale" in self.rows:
            x_T = x_T * self.rows["init_scale"][0]
        return Carry(x_T, self.sampler.init(x_T))

    def row(self, i: int) -> dict[str, Array]:
        """The sampler's coefficients of a step."""
        return {name: jnp.asarray(column[i]) for name, column in self.rows.items()}

    def step(
        self, i: int, carry: Carry, *, driver: Driver, correct: Correct | None = None
    ) -> tuple[Carry, StepNoise]:
        """One step: the noise of it, and the samples of the next.

        Args:
          i: Number of the step.
          carry: From the step before.
          driver: Whose answer moves the samples on.
          correct: What is corrected of the noise where that is the quantized network's; None
            for nothing.

        Raises:
          ValueError: If an answer is not finite.
        """
        row, entries = self.row(i), self.table.row(i) if self.table.entries else {}
        parts = range(0, len(carry.x_t), self.batch)
        pick = lambda tree, a: jax.tree.map(lambda leaf: leaf[a : a + self.batch], tree)
        moments, kept, moving = None, [], []
        c = carry.x_t.shape[-1]
        for a in parts:
            answers = _answers(
                self.sides,
                self.teacher,
                self.student,
                entries,
                pick(carry.x_t, a),
                row["t"],
                pick(self.items.told, a),
                pick(self.items.null, a),
                self.guidance_scale,
            )
            moving.append(answers[driver == "quantized"])
            e, q = (np.asarray(answer[..., :c], np.float64) for answer in answers)
            found = Moments.of(e, q - e)
            moments = found if moments is None else moments + found
            kept.append(_some(e, q - e, -(-VALUES // len(parts)), seed=(i, a)))
        assert moments is not None
        correction = None
        if driver == "quantized" and correct is not None:
            correction = correct(moments, {name: c[i] for name, c in self.rows.items()})
        moved = [
            _advance(
                self.sampler,
                row,
                pick(carry.state, a),
                pick(carry.x_t, a),
                answer,
                self.items.keys[a : a + self.batch],
                jnp.int32(i + 1),
                correction,
            )
            for a, answer in zip(parts, moving, strict=True)
        ]
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *moved)
        values = (np.concatenate(column)[:VALUES] for column in zip(*kept, strict=True))
        return Carry(*joined), StepNoise(moments, *values)


def _some(e: np.ndarray, d: np.ndarray, count: int, *, seed: Any) -> tuple[np.ndarray, ...]:
    """As many values of both, at the same random places, and their channels."""
    at = np.random.default_rng(seed).choice(e.size, min(count, e.size), replace=False)
    values = (one.ravel()[at].astype(np.float32) for one in (e, d))
    return *values, (at % e.shape[-1]).astype(np.int32)


def pack_step(carry: Carry, noises: list[StepNoise]) -> dict[str, Any]:
    """What is known after a step, as a flat dict for `Work.part`."""
    arrays: dict[str, Any] = {f"carry:{k}": v for k, v in pack_tree(carry).items()}
    sums = [dataclasses.astuple(one.moments)[1:] for one in noises]
    # Parts have no float64: its halves are kept.
    arrays["sums"] = np.asarray(sums, np.float64).view(np.uint32)
    arrays["count"] = np.asarray([one.moments.count for one in noises], np.int32)
    for i, one in enumerate(noises):
        arrays[f"e:{i}"], arrays[f"d:{i}"], arrays[f"channel:{i}"] = one[1:]
    return arrays


def unpack_step(arrays: Mapping[str, Array], like: Carry) -> tuple[Carry, list[StepNoise]]:
    """The inverse of `pack_step`, with a carry of the structure of `like`."""
    kept = {k.split(":")[1]: v for k, v in arrays.items() if k.startswith("carry:")}
    sums = np.asarray(arrays["sums"]).view(np.float64)
    noises = [
        StepNoise(
            Moments(int(n), *step),
            *(np.asarray(arrays[f"{name}:{i}"]) for name in ("e", "d", "channel")),
        )
        for i, (n, step) in enumerate(zip(np.asarray(arrays["count"]), sums, strict=True))
    ]
    return unpack_tree(kept, like), noises
