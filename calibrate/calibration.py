"""A run of serial-to-parallel calibration: its phases in order.

What the phases are is told in `serial_parallel.py`. Every one is a part of `Work`, and so is
every `keep_every` iterations of a fit: a run that is killed goes on from the last of them and
ends with the same bits. A fit online is one part, as its samples move with it.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate import optimize
from qjax.calibrate.blocks import Block, alike
from qjax.calibrate.collect import Data, Groups, Pairs, Samples, collect, collect_whole, samples_at
from qjax.calibrate.fitted import hardened_weights, nearest_weights, with_kernels
from qjax.calibrate.parts import (
    pack_buffer,
    pack_fitted,
    pack_tree,
    unpack_buffer,
    unpack_fitted,
    unpack_tree,
)
from qjax.calibrate.ranges import to_fitted, to_rows
from qjax.calibrate.reconstruction import (
    FitSettings,
    Fitted,
    Problem,
    Runner,
    mean_error,
    nearest,
)
from qjax.calibrate.register import Register, fit_online, lanes
from qjax.calibrate.rollout import Buffer, Items, Network, roll_out, shared_steps, staleness
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.student import Student, Tables, merged, names, stratified_pairs
from qjax.calibrate.trajectory import Unrolled, unrolled_data
from qjax.calibrate.work import Work
from qjax.core.steps import StepTable, TableKey
from qjax.core.typing import Array, Params, PRNGKeyArray
from qjax.models.pipeline import Pipeline
from qjax.models.sampling import draw_noise, image_keys

WITH_GRADIENT = 3.0
"""Work of an evaluation with its gradient, in evaluations."""

NOTHING = "(?!)"
"""A regular expression that nothing holds."""


class Calibration:
    """One run: what stays the same through its phases, and a method for each of them.

    Attributes:
      student: The quantized network as it is now.
      tables: Ranges of its layers' inputs.
      fitted: What was fitted of the weights so far, by layer.
      forwards: Evaluations of networks on one item so far, those with gradients included; a
        fit of blocks counts as one of the network.
    """

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
        steps = settings.check(teacher)
        scale = settings.guidance_scale
        self.items = settings.data.draw(teacher, jax.random.fold_in(key, 0), guidance_scale=scale)
        self.scale = self.items.scale(scale)
        self.rows = teacher.sampler.rows(steps, eta=settings.eta)
        self.calls = len(self.rows["t"])
        self.student = Student.of(student, teacher.params if floats is None else floats)
        _require_match(settings.fit.only, self.student.formats)
        reads_rows = [fmt for fmt in self.student.formats.values() if fmt.reads_rows]
        static = any(fmt.act is not None and fmt.act.mode == "static" for fmt in reads_rows)
        self.group = shared_steps(self.calls, 1 if static else settings.groups)
        self.tables: Tables = {}
        self.fitted: dict[str, Mapping[str, Array]] = {}
        self.forwards = 0
        self._done = 0.0
        rolls = (settings.refreshes if settings.schedule == "refresh" else 1) + (
            settings.finds_last_ranges
        )
        fits = 0 if settings.fits == "ranges" else settings.fit.iterations
        self._total = rolls * self._roll_out_work + fits * settings.fit.batch * WITH_GRADIENT

    @property
    def halves(self) -> int:
        """Evaluations of the network for one prediction."""
        return 1 if self.scale is None else 2

    @property
    def _roll_out_work(self) -> float:
        """Work of a roll-out in evaluations of the network: each batch is seen twice."""
        return 2.0 * self.calls * len(self.items.x_T) * self.halves

    def _share(self, work: float) -> float:
        """The share of all work that is done, with this much of the part at hand."""
        return round(min((self._done + work) / self._total, 1.0), 4)

    def run(self) -> Pipeline:
        """All phases in order, and the pipeline that comes of them."""
        settings = self.settings
        old: Buffer | None = None
        refreshes = settings.refreshes if settings.schedule == "refresh" else 1
        for refresh in range(refreshes):
            buffer = self.roll_out(f"roll-out-{refresh}", old)
            old = buffer
            learned = self.tables
            self.tables = to_fitted(buffer.ranges, self.student.formats)
            if learned and settings.fit.act_rate > 0 and not settings.finds_last_ranges:
                self.tables = learned
            if settings.fits == "ranges":
                continue
            if settings.schedule != "refresh":
                self.fit_online(settings.fit)
                continue
            pairs = self.pairs(refresh)
            fit = settings.fit
            if settings.fits == "both":
                fit = dataclasses.replace(fit, iterations=max(fit.iterations // 2, 1))
            if settings.fits in ("blocks", "both"):
                blocks = dataclasses.replace(fit, distillation=0.0)
                self.fit_blocks(self.samples(buffer, pairs), refresh, blocks)
            if settings.fits in ("network", "both"):
                self.fit_network(buffer, pairs, refresh, fit)
        if settings.finds_last_ranges:
            buffer = self.roll_out("roll-out-last", old)
            self.tables = to_fitted(buffer.ranges, self.student.formats)
        self.work.log("done", forwards=self.forwards)
        return self.result()

    def roll_out(self, name: str, old: Buffer | None = None) -> Buffer:
        """The serial phase; ranges of all steps come of it."""
        settings = self.settings
        network = self.student.network(self.teacher, settings.ranges)
        driver = None
        if settings.samples == "float" or (settings.samples == "float_first" and old is None):
            free = Network(
                self.teacher.apply,
                self.teacher.sampler,
                self.teacher.guidance_channels,
                (),
                settings.ranges,
            )
            driver = (free, self.teacher.params)

        def make() -> dict[str, Array]:
            return pack_buffer(self._roll_out(name, network, driver))

        if settings.fresh and old is not None:
            self.items = self._with_noise(name)
        buffer = unpack_buffer(self.work.part(name, make))
        self.forwards += buffer.forwards * self.halves
        self._done += self._roll_out_work
        if old is not None and not settings.fresh:
            moved = [round(float(s), 4) for s in staleness(buffer, old)]
            self.work.log("staleness", part=name, by_step=moved)
        return buffer

    def _roll_out(
        self, name: str, network: Network, driver: tuple[Network, Params] | None
    ) -> Buffer:
        """The samples and ranges of a roll-out, on one device."""
        return roll_out(
            network,
            self.student.params,
            self.items,
            self.rows,
            group=self.group,
            guidance_scale=self.scale,
            batch=self.settings.batch,
            driver=driver,
            on_step=functools.partial(self._log_step, name),
        )

    def _log_step(self, name: str, done: int) -> None:
        share = self._share(self._roll_out_work * done / self.calls)
        self.work.log("step", part=name, step=done, steps=self.calls, share=share)

    def _with_noise(self, name: str) -> Items:
        """The items with noise that no other roll-out has."""
        number = zlib.crc32(name.encode())
        key = jax.random.fold_in(jax.random.fold_in(self.key, 0), number)
        keys = image_keys(key, jnp.arange(len(self.items.x_T), dtype=jnp.uint32))
        x_T = draw_noise(keys, self.items.x_T.shape[1:])
        return self.items._replace(x_T=x_T, keys=keys)

    def pairs(self, refresh: int) -> Pairs:
        """Which samples of a roll-out the fit is made on."""
        count = len(self.items.x_T)
        return Pairs(*stratified_pairs(self.calls, count, self.settings.pairs, seed=refresh))

    def samples(self, buffer: Buffer, pairs: Pairs) -> list[Samples]:
        """The samples of pairs in batches of one size."""
        batch = min(self.settings.batch, len(pairs.step))
        t = np.asarray(self.rows["t"])
        return [
            samples_at(
                buffer,
                self.items,
                t,
                self.group,
                Pairs(pairs.step[a : a + batch], pairs.item[a : a + batch]),
            )
            for a in range(0, len(pairs.step) - batch + 1, batch)
        ]

    def fit_blocks(self, samples: list[Samples], refresh: int, fit: FitSettings) -> None:
        """The parallel phase, block after block in the order of execution."""
        blocks = self._blocks(samples)
        for number, (block, runner, data) in enumerate(blocks):
            if within_block(fit, block).only == NOTHING and fit.act_rate == 0:
                continue  # nothing of it is fitted
            name = f"refresh-{refresh}-block-{number}"
            self._fit(name, block, runner, data, refresh, number, fit, of=len(blocks))
        self.forwards += len(samples) * len(samples[0].t) + self._evaluations(refresh, fit)

    def _blocks(self, samples: list[Samples]) -> list[tuple[Block, Runner, Callable[[], Data]]]:
        """The blocks in the order of execution, each with its program and a function that
        collects its data from the student as it then is."""
        first = samples[0]
        blocks = self.student.blocks(first.x_t, first.t, first.told)
        groups: Groups = alike(blocks)
        place = {block: (g, i) for g, group in enumerate(groups) for i, block in enumerate(group)}
        teacher = (self.teacher.apply, self.teacher.params)

        def data_of(g: int, i: int) -> Data:
            return collect(
                self.student,
                teacher,
                groups,
                {g: i},
                samples,
                self.tables,
                memory_gib=self.settings.memory_gib,
            )[g]

        found: list[tuple[Block, Runner, Callable[[], Data]]] = []
        for block in blocks:
            g, i = place[block]
            # One program for alike blocks: the first one's module stands for all.
            runner = self.student.runner(groups[g][0])
            found.append((block, runner, functools.partial(data_of, g, i)))
        return found

    def fit_network(self, buffer: Buffer, pairs: Pairs, refresh: int, fit: FitSettings) -> None:
        """The parallel phase on the answer of the whole network, or on later samples."""
        settings, block = self.settings, self.student.whole()
        samples = self.samples(buffer, pairs)
        if settings.horizon:
            runner: Runner = Unrolled(
                None,
                self.student.apply,
                tuple(self.student.formats.items()),
                sampler=self.teacher.sampler,
                guidance_channels=self.teacher.guidance_channels,
            )

            def data() -> Data:
                assert isinstance(runner, Unrolled)
                return unrolled_data(
                    runner,
                    self.teacher.params,
                    buffer,
                    self.items,
                    self.rows,
                    self.group,
                    pairs,
                    horizon=settings.horizon,
                    guidance_scale=self.scale,
                    batch=settings.batch,
                )
        else:
            runner = self._network_runner(block, samples[0], fit)

            def data() -> Data:
                return collect_whole((self.teacher.apply, self.teacher.params), samples)

        self._fit(f"refresh-{refresh}-network", block, runner, data, refresh, 0, fit)
        each = settings.horizon * self.halves if settings.horizon else 1
        self.forwards += each * self._evaluations(refresh, fit) * (1 + (fit.distillation > 0))
        self.forwards += len(pairs.step) * self.halves * max(settings.horizon, 1)

    def fit_online(self, fit: FitSettings) -> None:
        """The whole network while its samples move on."""
        settings, block = self.settings, self.student.whole()
        slots = self.calls if settings.schedule == "register" else 1
        each = -(-fit.batch // (slots * self.halves))
        moving = lanes(jax.random.fold_in(self.key, 1), self.items, slots * each)
        network = self.student.network(self.teacher, settings.ranges)
        register = Register(
            network,
            self.student.runner(block),
            self.rows,
            self.group,
            self.scale,
            moving,
            slots,
        )
        teacher = (self.teacher.apply, self.teacher.params)

        def make() -> dict[str, Array]:
            problem, begin, key = self._begin(block, register.runner, 0, 0, fit)
            slots_now = register.fill(problem, begin)
            data = register.data(slots_now, teacher)
            problem = self._with_data(register.runner, problem, begin, data, fit)
            groups = int(self.group[-1]) + 1
            state = optimize.start_optimizer(
                jax.tree.map(jnp.copy, begin), groups, fit, register.runner, problem
            )

            def train(carry: Any, here: Problem, first: int, length: int) -> Any:
                return optimize.go_on(
                    register.runner, here, carry, fit, key, (first, first + length)
                )

            def on_shift(done: int, fitted: Fitted, slots: list) -> None:
                del fitted
                if done % fit.chunk < settings.shift_every:
                    work = self._evaluations(0, fit) * WITH_GRADIENT * done / fit.iterations
                    self.work.log(
                        "fit",
                        block=names((block,)),
                        refresh=0,
                        iteration=done,
                        share=self._share(work),
                    )

            carry = fit_online(
                register,
                problem,
                begin,
                train,
                state,
                teacher,
                iterations=fit.iterations,
                every=settings.shift_every,
                on_shift=on_shift,
            )
            return pack_fitted(carry.fitted)

        self._accept(block, self.work.part("online-network", make))
        self._done += self._evaluations(0, fit) * WITH_GRADIENT
        shifts = -(-fit.iterations // settings.shift_every)
        self.forwards += self._evaluations(0, fit) + 2 * shifts * slots * each * self.halves

    def _network_runner(self, block: Block, first: Samples, fit: FitSettings) -> Runner:
        runner = self.student.runner(block)
        if not fit.distillation:
            return runner
        blocks = self.student.blocks(first.x_t, first.t, first.told)
        return dataclasses.replace(runner, watched=tuple(one.path for one in blocks))

    def _span(self, refresh: int, fit: FitSettings) -> tuple[int, int]:
        """The iterations of a refresh, of all that there are."""
        total, parts = fit.iterations, self.settings.refreshes
        return total * refresh // parts, total * (refresh + 1) // parts

    def _ends(self, refresh: int, fit: FitSettings) -> list[int]:
        """Iterations of a refresh after which its state is kept, and the last."""
        first, last = self._span(refresh, fit)
        return [*range(first + self.settings.keep_every, last, self.settings.keep_every), last]

    def _evaluations(self, refresh: int, fit: FitSettings) -> int:
        if self.settings.schedule != "refresh":
            return fit.iterations * fit.batch
        first, last = self._span(refresh, fit)
        return (last - first) * fit.batch

    def _begin(
        self, block: Block, runner: Runner, refresh: int, number: int, fit: FitSettings
    ) -> tuple[Problem, Fitted, PRNGKeyArray]:
        """A problem without its data, and where its fit begins."""
        fixed = self.student.fixed(block)
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1 + refresh), number)
        begin = self.student.begin(block, fixed, self.tables, fit, key)
        before = {layer: self.fitted.get(block.absolute(layer)) for layer in block.layers}
        weights = {
            layer: begin.weights[layer] if one is None else dict(one)
            for layer, one in before.items()
        }
        for layer in block.layers:
            # What is not fitted is what its integers are, and nothing softer.
            if not re.search(fit.only, layer):
                weights[layer] = nearest_weights(fixed[layer], weights[layer])
        problem = Problem(
            params=self.student.block_params(block, fixed),
            fixed=fixed,
            args=None,
            target=jnp.zeros(()),
            group=jnp.zeros((1,), jnp.int32),
            baseline=jnp.float32(1),
        )
        return problem, Fitted(weights, begin.acts), key

    def _with_data(
        self,
        runner: Runner,
        problem: Problem,
        begin: Fitted,
        data: Data,
        fit: FitSettings,
    ) -> Problem:
        """The problem with its data, and `E_0`, the error of rounding to nearest."""
        problem = problem._replace(args=data.inputs, target=data.target, group=data.group)
        baseline = mean_error(runner, problem, nearest(problem, begin), batch=fit.batch)
        return problem._replace(baseline=jnp.maximum(baseline, 1e-12))

    def _fit(
        self,
        name: str,
        block: Block,
        runner: Runner,
        data: Callable[[], Data],
        refresh: int,
        number: int,
        fit: FitSettings,
        *,
        of: int = 1,
    ) -> None:
        """Fit a block, one `of` some, or read what an earlier run has fitted; take it over."""
        fit = within_block(fit, block)
        cost = self._evaluations(refresh, fit) * WITH_GRADIENT / of

        def make() -> dict[str, Array]:
            problem, begin, key = self._begin(block, runner, refresh, number, fit)
            problem = self._with_data(runner, problem, begin, data(), fit)
            fitted, errors = self._iterate(
                name, block, runner, problem, begin, key, refresh, fit, cost
            )
            hardened = Fitted(
                {layer: hardened_weights(one) for layer, one in fitted.weights.items()}, fitted.acts
            )
            after = mean_error(runner, problem, hardened, batch=fit.batch)
            self.work.log(
                "block",
                block=names((block,)),
                refresh=refresh,
                nearest=float(problem.baseline),
                soft=errors[-1] if errors else None,
                ratio=float(after / problem.baseline),
            )
            return pack_fitted(fitted)

        self._accept(block, self.work.part(name, make))
        for end in self._ends(refresh, fit)[:-1]:
            self.work.drop(f"{name}-at-{end}")
        self._done += cost

    def _iterate(
        self,
        name: str,
        block: Block,
        runner: Runner,
        problem: Problem,
        begin: Fitted,
        key: PRNGKeyArray,
        refresh: int,
        fit: FitSettings,
        cost: float,
    ) -> tuple[Fitted, list[float]]:
        """All iterations of a refresh; the state is kept every `keep_every` of them."""
        first, last = self._span(refresh, fit)
        groups = optimize.groups_of(problem, begin)
        begin = jax.tree.map(jnp.copy, begin)
        carry = optimize.start_optimizer(begin, groups, fit, runner, problem)
        errors: list[float] = []

        def on_chunk(done: int, found: np.ndarray) -> None:
            errors.append(float(np.mean(found)))
            self.work.log(
                "fit",
                block=names((block,)),
                refresh=refresh,
                iteration=done,
                error=errors[-1],
                share=self._share(cost * (done - first) / max(last - first, 1)),
            )

        ends = self._ends(refresh, fit)
        kept = [i for i, end in enumerate(ends) if self.work.has(f"{name}-at-{end}")]
        for i in range(kept[-1] if kept else 0, len(ends)):
            span = (ends[i - 1] if i else first, ends[i])

            def make(carry: Any = carry, span: tuple[int, int] = span) -> dict[str, Array]:
                return pack_tree(optimize.go_on(runner, problem, carry, fit, key, span, on_chunk))

            if ends[i] == last:
                carry = unpack_tree(make(), carry)
                break  # what was kept last goes when the whole is written
            carry = unpack_tree(self.work.part(f"{name}-at-{ends[i]}", make), carry)
            self.work.drop(f"{name}-at-{span[0]}")
        return carry.fitted, errors

    def _accept(self, block: Block, part: Mapping[str, Array]) -> None:
        fitted = unpack_fitted(part, block.layers)
        for layer, weights in fitted.weights.items():
            self.fitted[block.absolute(layer)] = weights
        self.tables = merged(self.tables, block, fitted)
        self.student = self.student.harden(block, self.student.fixed(block), fitted)

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


def _require_match(only: str, layers: Collection[str]) -> None:
    """That a layer is fitted.

    Raises:
      ValueError: If no path holds the expression.
    """
    if not any(re.search(only, layer) for layer in layers):
        shown = ", ".join(sorted(layers)[:3])
        raise ValueError(
            f"only must be held by the path of a quantized layer; got {only!r}, and layers such as "
            f"{shown}. Leave it empty to fit all."
        )


def within_block(fit: FitSettings, block: Block) -> FitSettings:
    """The settings with `only` in terms of a block's own paths, which begin at the block."""
    if not fit.only or not block.path:
        return fit
    kept = [
        re.escape(layer) for layer in block.layers if re.search(fit.only, block.absolute(layer))
    ]
    only = f"^({'|'.join(kept)})$" if kept else NOTHING
    return dataclasses.replace(fit, only=only)
