"""Serial to parallel: roll the quantized sampler out, then fit on what it went through.

The paper ("Efficiency Meets Fidelity", 2024) calls its pipeline so in its abstract; how it goes
about it is not public, and this is a reconstruction of ours, which the documentation says
(docs/methods.md). It alternates, `refreshes` times:

1. serial: the quantized sampler runs over its steps on the calibration items. Each layer's
   range at each step is fitted in the order of execution on what the quantized network itself
   has made, and the sampler goes on with the quantized prediction (`rollout.py`);
2. parallel: weights, and the ranges of all steps, are fitted on shuffled pairs of an item and
   a step of that roll-out, the float network on the same samples being the aim: block by
   block, or the whole network at once (`reconstruction.py`).

At the end weights are integers, and a last roll-out fits the ranges for them.

| `samples` | `fits` | what it is |
|---|---|---|
| `"quantized"` | `"blocks"`, `"network"` | serial to parallel |
| `"float"` | `"blocks"` | block reconstruction on float samples (Q-Diffusion, TFMQ-DM) |
| `"quantized"` | `"ranges"` | ranges alone, progressively (PCR) |

References:
  Li et al., Efficiency Meets Fidelity, 2024, https://arxiv.org/abs/2412.06661 (the abstract);
  Ross et al., DAgger, 2011, https://arxiv.org/abs/1011.0686 (own samples, teacher's answers).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qjax.calibrate import rounding
from qjax.calibrate.blocks import Block, alike
from qjax.calibrate.collect import (
    Data,
    Groups,
    Pairs,
    Samples,
    collect,
    collect_whole,
    samples_at,
)
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import with_kernels
from qjax.calibrate.ranges import Method, Range, to_fitted, to_rows
from qjax.calibrate.recipe import State
from qjax.calibrate.reconstruction import FitSettings, Fitted, Problem, fit, mean_error
from qjax.calibrate.rollout import Buffer, Network, roll_out, shared_steps
from qjax.calibrate.student import Student, Tables, merged, names, stratified_pairs
from qjax.calibrate.work import Work
from qjax.core.qtensor import spread
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Array, Params, PRNGKeyArray
from qjax.models.pipeline import Pipeline

Fits = Literal["blocks", "network", "ranges"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SerialParallelSettings:
    """How the two phases alternate.

    Attributes:
      steps: Steps of the sampler, those of its later use.
      eta: Its share of fresh noise.
      guidance_scale: Weight of the guidance, that of the later use; None for none.
      data: The calibration set.
      groups: Groups of neighbouring steps that share a range; None: every step has its own.
      samples: Whose samples the fit is made on.
      fits: What is fitted in the parallel phase.
      refreshes: Roll-outs, each followed by its share of the iterations.
      pairs: Pairs of an item and a step that the fit is made on.
      fit: How blocks, or the network, are fitted.
      ranges: How a range is found in the serial phase.
      last_ranges: Whether ranges are fitted anew on the final weights, or kept as fitted.
      batch: Items that run at once in roll-outs and captures.
      memory_gib: Most that the data of the blocks being fitted may take.
    """

    steps: int = 20
    eta: float = 0.0
    guidance_scale: float | None = None
    data: CalibrationSet = dataclasses.field(default_factory=CalibrationSet)
    groups: int | None = None
    samples: Literal["quantized", "float"] = "quantized"
    fits: Fits = "blocks"
    refreshes: int = 1
    pairs: int = 512
    fit: FitSettings = dataclasses.field(default_factory=FitSettings)
    ranges: Method = "mse"
    last_ranges: bool = True
    batch: int = 64
    memory_gib: float = 4.0

    def __post_init__(self):
        if self.refreshes < 1 or self.pairs < 1 or self.batch < 1:
            raise ValueError(
                f"refreshes, pairs and batch must be at least 1; got {self.refreshes}, "
                f"{self.pairs} and {self.batch}."
            )
        for name, allowed in (
            ("samples", ("quantized", "float")),
            ("fits", ("blocks", "network", "ranges")),
            ("ranges", ("minmax", "mse")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}; got {getattr(self, name)!r}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SerialParallel(SerialParallelSettings):
    """The stage of a recipe: its settings are those of `SerialParallelSettings`."""

    def run(self, state: State, key: PRNGKeyArray, work: Work) -> State:
        """The state with the student's integers and ranges fitted.

        Raises:
          ValueError: If nothing is quantized, or the calibration set does not suit the model.
        """
        student = Calibration(state.teacher, state.student, self, key, work).run()
        return dataclasses.replace(state, student=student)


class Calibration:
    """One run: what stays the same through its phases, and a method for each of them."""

    def __init__(
        self,
        teacher: Pipeline,
        student: Pipeline,
        settings: SerialParallelSettings,
        key: PRNGKeyArray,
        work: Work,
        *,
        floats: Params | None = None,
    ):
        self.settings, self.work, self.teacher = settings, work, teacher
        self.pipe = student
        self.key = key
        guided = settings.guidance_scale not in (None, 1.0)
        self.scale = jnp.float32(settings.guidance_scale) if guided else None
        self.items = settings.data.draw(teacher, jax.random.fold_in(key, 0), guided=guided)
        self.rows = teacher.sampler.rows(settings.steps, eta=settings.eta)
        self.calls = len(self.rows["t"])
        self.student = Student.of(student, teacher.params if floats is None else floats)
        reads_rows = [fmt for fmt in self.student.formats.values() if fmt.reads_rows]
        static = any(fmt.act is not None and fmt.act.mode == "static" for fmt in reads_rows)
        self.group = shared_steps(self.calls, 1 if static else settings.groups)
        self.tables: Tables = {}

    def roll_out(self, name: str) -> Buffer:
        """The serial phase; ranges of all steps come of it."""
        settings, student = self.settings, self.student
        network = student.network(self.teacher, settings.ranges)
        driver = None
        if settings.samples == "float":
            free = Network(
                self.teacher.apply,
                self.teacher.sampler,
                self.teacher.guidance_channels,
                (),
                settings.ranges,
            )
            driver = (free, self.teacher.params)

        def make() -> dict[str, Array]:
            buffer = roll_out(
                network,
                student.params,
                self.items,
                self.rows,
                group=self.group,
                guidance_scale=self.scale,
                batch=settings.batch,
                driver=driver,
                on_step=lambda i: self.work.log("step", part=name, step=i, steps=self.calls),
            )
            return _pack(buffer)

        return _unpack(self.work.part(name, make))

    def samples(self, buffer: Buffer, seed: int) -> list[Samples]:
        """Pairs of the roll-out in batches of one size."""
        settings = self.settings
        step, item = stratified_pairs(self.calls, len(self.items.x_T), settings.pairs, seed=seed)
        batch = min(settings.batch, len(step))
        t = np.asarray(self.rows["t"])
        return [
            samples_at(
                buffer,
                self.items,
                t,
                self.group,
                Pairs(step[a : a + batch], item[a : a + batch]),
            )
            for a in range(0, len(step) - batch + 1, batch)
        ]

    def span(self, refresh: int) -> tuple[int, int]:
        """The iterations of a refresh, of all that there are."""
        total, parts = self.settings.fit.iterations, self.settings.refreshes
        return total * refresh // parts, total * (refresh + 1) // parts

    def fit_blocks(self, samples: list[Samples], refresh: int) -> None:
        """The parallel phase, block after block in the order of execution."""
        first = samples[0]
        blocks = self.student.blocks(first.x_t, first.t, first.told)
        groups: Groups = alike(blocks)
        place = {block: (g, i) for g, group in enumerate(groups) for i, block in enumerate(group)}
        teacher = (self.teacher.apply, self.teacher.params)
        for number, block in enumerate(blocks):
            g, i = place[block]

            def make(block=block, g=g, i=i, number=number) -> dict[str, Array]:
                data = collect(
                    self.student,
                    teacher,
                    groups,
                    {g: i},
                    samples,
                    self.tables,
                    memory_gib=self.settings.memory_gib,
                )[g]
                return self._fit_one(block, groups[g], data, refresh, number)

            part = self.work.part(f"refresh-{refresh}-block-{number}", make)
            self._accept(block, part)

    def fit_network(self, samples: list[Samples], refresh: int) -> None:
        """The parallel phase on the answer of the whole network."""
        block = self.student.whole()

        def make() -> dict[str, Array]:
            data = collect_whole((self.teacher.apply, self.teacher.params), samples)
            return self._fit_one(block, (block,), data, refresh, 0)

        self._accept(block, self.work.part(f"refresh-{refresh}-network", make))

    def _fit_one(
        self, block: Block, group: tuple[Block, ...], data: Data, refresh: int, number: int
    ) -> dict[str, Array]:
        settings = self.settings.fit
        fixed = self.student.fixed(block)
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1 + refresh), number)
        begin = self.student.begin(block, fixed, self.tables, settings, key)
        before = self.fitted.get(block.path)
        if before is not None:
            begin = Fitted(before.weights, begin.acts)
        # One program for alike blocks: the first one's module stands for all.
        runner = self.student.runner(group[0])
        problem = Problem(
            params=self.student.block_params(block, fixed),
            fixed=fixed,
            args=data.inputs,
            target=data.target,
            group=data.group,
            baseline=jnp.float32(1),
        )
        nearest = Fitted(self._nearest(block, fixed, begin), begin.acts)
        baseline = mean_error(runner, problem, nearest, batch=settings.batch)
        problem = problem._replace(baseline=jnp.maximum(baseline, 1e-12))
        errors: list[float] = []

        def on_chunk(done: int, found: np.ndarray) -> None:
            errors.append(float(np.mean(found)))
            self.work.log(
                "fit", block=names((block,)), refresh=refresh, iteration=done, error=errors[-1]
            )

        (fitted,) = fit(
            runner, [problem], [begin], settings, [key], span=self.span(refresh), on_chunk=on_chunk
        )
        hardened = self.student.harden(block, fixed, fitted)
        after = mean_error(
            runner,
            problem,
            _as_hard(hardened, block, fitted),
            batch=settings.batch,
        )
        self.work.log(
            "block",
            block=names((block,)),
            refresh=refresh,
            nearest=float(baseline),
            soft=errors[-1] if errors else 1.0,
            ratio=float(after / jnp.maximum(baseline, 1e-12)),
        )
        return _pack_fitted(fitted)

    def _nearest(
        self, block: Block, fixed: Mapping[str, Mapping[str, Array]], begin: Fitted
    ) -> dict[str, dict[str, Array]]:
        """Arrays of the profile that stand for rounding to nearest: of one structure with those
        that are fitted, so that one program serves both."""
        weights: dict[str, dict[str, Array]] = {}
        for layer in block.layers:
            if "v" in begin.weights[layer]:
                v = rounding.rounding_start(
                    fixed[layer]["w"], spread(fixed[layer]["scale"], fixed[layer]["w"].shape)
                )
                weights[layer] = {"v": jnp.where(v >= 0, 10.0, -10.0)}
            else:
                weights[layer] = jax.tree.map(jnp.zeros_like, begin.weights[layer])
                if "w" in weights[layer]:
                    weights[layer] = {"w": fixed[layer]["w"]}
        return weights

    def _accept(self, block: Block, part: Mapping[str, Array]) -> None:
        fitted = _unpack_fitted(part, block.layers)
        self.fitted[block.path] = fitted
        self.tables = merged(self.tables, block, fitted)
        self.student = self.student.harden(block, self.student.fixed(block), fitted)

    def run(self) -> Pipeline:
        """All phases in order, and the pipeline that comes of them."""
        settings = self.settings
        self.fitted: dict[str, Fitted] = {}
        for refresh in range(settings.refreshes):
            buffer = self.roll_out(f"roll-out-{refresh}")
            learned = self.tables
            self.tables = to_fitted(buffer.ranges, self.student.formats)
            if learned and settings.fit.act_rate > 0 and not settings.last_ranges:
                self.tables = learned
            if settings.fits == "ranges":
                continue
            samples = self.samples(buffer, seed=refresh)
            if settings.fits == "network":
                self.fit_network(samples, refresh)
            else:
                self.fit_blocks(samples, refresh)
        if settings.last_ranges and settings.fits != "ranges":
            buffer = self.roll_out("roll-out-last")
            self.tables = to_fitted(buffer.ranges, self.student.formats)
        return self.result()

    def result(self) -> Pipeline:
        """The calibrated pipeline: integers as fitted, and a row of ranges for every step."""
        params = with_kernels(self.pipe.params, self.student.kernels)
        table = self.pipe.step_table or StepTable()
        if "quant" in table.entries:
            table = table.drop("quant")
        if self.tables:
            rows = to_rows(self.tables, self.student.formats, jnp.asarray(self.group))
            key = TableKey(timesteps=tuple(np.asarray(self.rows["t"]).tolist()))
            table = table.with_entry("quant", rows, key=key)
        return self.pipe.replace(params=params, step_table=table if table.entries else None)


def _as_hard(student: Student, block: Block, fitted: Fitted) -> Fitted:
    """The fitted arrays with rounding to 0 or 1, as the integers have it."""
    weights = {}
    for layer in block.layers:
        one = fitted.weights[layer]
        weights[layer] = {"v": jnp.where(one["v"] >= 0, 10.0, -10.0)} if "v" in one else one
    return Fitted(weights, fitted.acts)


def _pack(buffer: Buffer) -> dict[str, Array]:
    arrays: dict[str, Any] = {"x_t": buffer.x_t, "x_0": buffer.x_0}
    arrays["forwards"] = np.int64(buffer.forwards).reshape(1)
    for g, ranges in enumerate(buffer.ranges):
        for path, found in ranges.items():
            arrays[f"{g}:{path}:low"], arrays[f"{g}:{path}:high"] = found
    return arrays


def _unpack(arrays: Mapping[str, Array]) -> Buffer:
    ranges: list[dict[str, Range]] = []
    for key, value in arrays.items():
        if key.count(":") != 2:
            continue
        number, path, end = key.split(":")
        while len(ranges) <= int(number):
            ranges.append({})
        old = ranges[int(number)].get(path, Range(value, value))
        ranges[int(number)][path] = old._replace(**{end: value})
    return Buffer(
        np.asarray(arrays["x_t"]),
        np.asarray(arrays["x_0"]),
        ranges,
        int(np.asarray(arrays["forwards"])[0]),
    )


def _pack_fitted(fitted: Fitted) -> dict[str, Array]:
    flat = traverse_util.flatten_dict({"weights": fitted.weights, "acts": fitted.acts})
    return {":".join(path): leaf for path, leaf in flat.items()}


def _unpack_fitted(arrays: Mapping[str, Array], layers: tuple[str, ...]) -> Fitted:
    weights: dict[str, dict[str, Array]] = {layer: {} for layer in layers}
    acts: dict[str, dict[str, Array]] = {}
    for key, value in arrays.items():
        kind, layer, name = key.split(":")
        (weights if kind == "weights" else acts).setdefault(layer, {})[name] = value
    return Fitted(weights, acts)
