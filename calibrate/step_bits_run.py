"""A run of `StepBits`: ranges of every width, errors of every step, a schedule.

What the phases are is told in `step_bits.py`; ranges and errors are parts of the work.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.calibrate.bit_operations import gain, operations_of
from qjax.calibrate.noise_correction import ENTRY
from qjax.calibrate.noise_rollout import NoiseRollout
from qjax.calibrate.ranges import to_fitted, to_rows
from qjax.calibrate.recipe import State
from qjax.calibrate.rollout import Network, roll_out
from qjax.calibrate.step_bits import StepBits
from qjax.calibrate.step_schedule import bounded_schedule, budget_schedule, ratio_schedule
from qjax.calibrate.student import Student
from qjax.calibrate.work import Work
from qjax.core.metrics import relative_l2
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Array, Float, PRNGKeyArray
from qjax.models.pipeline import Pipeline
from qjax.models.sampling import sample_jit

__all__ = ["StepBitsRun", "noise_after", "scheduled"]


def scheduled(rows: Mapping[int, Any], schedule: Sequence[int]) -> Any:
    """The entry `"quant"` whose steps have the rows of the bits that a schedule gives them.

    Args:
      rows: Entries of every width, `[s, ...]` each.
      schedule: Bits of every step.
    """
    widths = list(rows)
    number = jnp.asarray([widths.index(b) for b in schedule])
    steps = jnp.arange(len(schedule))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[number, steps], *rows.values())


class StepBitsRun:
    """One run: what stays the same through it."""

    def __init__(self, settings: StepBits, state: State, key: PRNGKeyArray, work: Work):
        self.settings, self.state, self.work = settings, state, work
        steps = settings.check(state.teacher)
        teacher, student = state.teacher, state.student
        self.rows = teacher.sampler.rows(steps, eta=settings.eta)
        self.calls = len(self.rows["t"])
        table = student.step_table or StepTable()
        self.table = table.drop(ENTRY) if ENTRY in table.entries else table
        self.timesteps = TableKey(timesteps=tuple(np.asarray(self.rows["t"]).tolist()))
        self.table.check(self.timesteps)
        scale = settings.guidance_scale
        self.items = settings.data.draw(teacher, jax.random.fold_in(key, 0), guidance_scale=scale)
        self.scale = self.items.scale(scale)
        self.inner = Student.of(student, teacher.params if state.floats is None else state.floats)
        self.formats = {
            path: fmt
            for path, fmt in self.inner.formats.items()
            if fmt.act is not None and fmt.act.mode == "per_step"
        }
        if not self.formats:
            raise ValueError(
                "bits by step are rows of the step table, and no quantized layer reads its range "
                "from there. Use ActSpec(mode='per_step') in the recipe's rules."
            )
        self.widths: dict[int, Any] = {}
        self.reference: Array | None = None
        self.parts: dict[str, int] = {}
        ranges = sum(not self.has_ranges(bits) for bits in settings.choices)
        self.measured = ranges + (settings.bits is None)

    def run(self) -> State:
        """Ranges of every width, a schedule, and what it comes to."""
        self.widths.update({bits: self.rows_of(bits) for bits in self.settings.choices})
        schedule = self.schedule()
        self.report(schedule)
        table = self.table_with(scheduled(self.widths, schedule))
        return dataclasses.replace(self.state, student=self.state.student.replace(step_table=table))

    def has_ranges(self, bits: int) -> bool:
        """Whether a stage before has fitted ranges of this width."""
        held = {fmt.act.bits for fmt in self.formats.values() if fmt.act is not None}
        return "quant" in self.table.entries and held == {bits}

    def rows_of(self, bits: int) -> dict[str, Any]:
        """The entry `"quant"` with this many bits at all steps."""
        if self.has_ranges(bits):
            return self.table.entries["quant"]
        formats = dict(self.inner.formats)
        for path, fmt in self.formats.items():
            assert fmt.act is not None
            formats[path] = dataclasses.replace(fmt, act=dataclasses.replace(fmt.act, bits=bits))
        teacher, settings = self.state.teacher, self.settings

        def network(apply: Any, formats: Mapping[str, Any]) -> Network:
            return Network(
                apply,
                teacher.sampler,
                teacher.guidance_channels,
                tuple(formats.items()),
                settings.ranges,
            )

        def make() -> dict[str, Array]:
            group = np.arange(self.calls, dtype=np.int32)
            buffer = roll_out(
                network(self.inner.apply, formats),
                self.inner.params,
                self.items,
                self.rows,
                group=group,
                guidance_scale=self.scale,
                batch=settings.batch,
                driver=(network(teacher.apply, {}), teacher.params),
                on_step=lambda i: self.say(f"ranges of {bits} bits", i),
            )
            made = to_rows(to_fitted(buffer.ranges, formats), formats, jnp.asarray(group))
            return traverse_util.flatten_dict(made, sep="/")

        part = self.work.part(f"ranges-{bits}", make)
        return traverse_util.unflatten_dict(part, sep="/")

    def say(self, part: str, step: int) -> None:
        """Progress: a step of a part, all parts being alike long."""
        self.parts.setdefault(part, len(self.parts))
        share = min((self.parts[part] + step / self.calls) / self.measured, 1.0)
        self.work.log("step", part=part, step=step, steps=self.calls, share=round(share, 4))

    def table_with(self, entry: Any) -> StepTable:
        """The student's step table with these ranges."""
        return self.table.with_entry("quant", entry, key=self.timesteps)

    def rollout(self, entry: Any) -> NoiseRollout:
        """Both networks side by side, the quantized one with these ranges."""
        return NoiseRollout.of(
            self.state.teacher,
            self.state.student,
            self.table_with(entry),
            self.rows,
            self.items,
            guidance_scale=self.settings.guidance_scale,
            batch=self.settings.batch,
        )

    # What fewer bits bring about.

    def last(self, schedule: Sequence[int]) -> Array:
        """The last samples of the quantized network with a schedule."""
        n, batch, student = len(self.items.x_T), self.settings.batch, self.state.student
        table = self.table_with(scheduled(self.widths, schedule))
        parts = []
        for a in range(0, n, batch):
            here = slice(a, a + batch)
            x_T, told, null, keys = jax.tree.map(operator.itemgetter(here), self.items)
            drawn, _ = sample_jit(
                student.apply,
                student.params,
                self.state.teacher.sampler,
                self.rows,
                x_T,
                told,
                null,
                keys=keys,
                entries=dict(table.entries),
                guidance_scale=self.scale,
                guidance_channels=student.guidance_channels,
            )
            parts.append(drawn)
        return jnp.concatenate(parts)

    def error(self, schedule: Sequence[int]) -> float:
        """Squared relative L2 error of the last samples, to those of the most bits throughout."""
        if self.reference is None:
            self.reference = self.last([self.settings.choices[-1]] * self.calls)
        return float(relative_l2(self.last(schedule), self.reference)) ** 2

    def last_costs(self) -> Float[np.ndarray, "s k"]:
        """`error` of every width at every step alone, a part of the work for each step."""
        widest, found = self.settings.choices[-1], []
        for i in range(self.calls):

            def make(i: int = i) -> dict[str, Array]:
                alone = lambda bits: [bits if j == i else widest for j in range(self.calls)]
                costs = [self.error(alone(bits)) for bits in self.settings.choices[:-1]]
                return {"costs": jnp.asarray([*costs, 0.0], jnp.float32)}

            found.append(np.asarray(self.work.part(f"step-{i}", make)["costs"], np.float64))
            self.say("errors of single steps", i + 1)
        return np.stack(found)

    def noise(self) -> Float[np.ndarray, "s k"]:
        """Mean square of the answer's noise, of every width at every step, on the float samples."""

        def make() -> dict[str, Array]:
            rollouts = [self.rollout(rows) for rows in self.widths.values()]
            carry, found = rollouts[0].begin(), []
            for i in range(self.calls):
                steps = [one.step(i, carry, driver="float") for one in rollouts]
                found.append([noise.moments.error() for _, noise in steps])
                carry = steps[0][0]
                self.say("noise of single steps", i + 1)
            return {"noise": jnp.asarray(found, jnp.float32)}

        return np.asarray(self.work.part("noise", make)["noise"], np.float64)

    def schedule(self) -> list[int]:
        """The bits of every step, as the settings have them chosen; logs what they go by."""
        settings = self.settings
        if settings.bits is not None:
            more = self.calls - len(settings.bits)
            return [*settings.bits, *(settings.bits[-1],) * more]
        gains = np.asarray(self.rows["prediction_gain"], np.float64)
        if settings.margin is not None:
            costs = self.noise()
            left = noise_after(self.state.teacher, self.rows)
            chosen = ratio_schedule(costs, gains, left, settings.choices, margin=settings.margin)
        else:
            last = settings.cost == "last"
            costs = self.last_costs() if last else gains[:, None] ** 2 * self.noise()
            if settings.mean_bits is not None:
                chosen = budget_schedule(costs, settings.choices, mean_bits=settings.mean_bits)
            else:
                assert settings.max_error is not None
                chosen = bounded_schedule(costs, settings.choices, max_error=settings.max_error)
        for i, row in enumerate(costs):
            words = {
                f"cost_{bits}": float(c) for bits, c in zip(settings.choices, row, strict=True)
            }
            self.work.log("cost", step=i, bits=chosen[i], **words)
        return chosen

    def report(self, schedule: Sequence[int]) -> None:
        """Log what was chosen, what it saves, and the error that is measured."""
        told = jax.tree.map(lambda leaf: leaf[:1], self.items.told)
        layers = list(operations_of(self.state.student, told).values())
        self.work.log(
            "schedule",
            bits=" ".join(map(str, schedule)),
            mean_bits=float(np.mean(schedule)),
            gain=gain(layers, schedule),
            gain_most=gain(layers, [self.settings.choices[-1]]),
            error=float(np.sqrt(self.error(schedule))),
        )


def noise_after(pipe: Pipeline, rows: Mapping[str, np.ndarray]) -> Float[np.ndarray, " s"]:
    """`1 - alpha_bar` where each step ends: at the next timestep, and 0 after the last.

    Where a sampler ends above alpha_bar 1 that is less than there is, and the last step gets more
    bits than it needs.

    Raises:
      ValueError: If the sampler has no schedule.
    """
    schedule = getattr(pipe.sampler, "schedule", None)
    if schedule is None:
        raise ValueError(
            f"margin compares with the noise of a schedule, and {type(pipe.sampler).__name__} has "
            "none. Use mean_bits or max_error."
        )
    return np.append(1 - schedule.at(np.asarray(rows["t"])[1:]), 0.0)
