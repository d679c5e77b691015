"""A run of serial-to-parallel calibration on a pod.

The phases are those of `calibration.py`. Items lie along the axis `data` of the mesh in logical
shards, whose number belongs to the recipe; up to `at_once` alike blocks are fitted at the same
time, along the axis `block`, on what the network gives them before the first of these is fitted.
Both change the numbers, and both are settings of the stage; the mesh changes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate import optimize, sharded_collect, sharded_fit
from qjax.calibrate.blocks import Block, alike
from qjax.calibrate.calibration import NOTHING, WITH_GRADIENT, Calibration, within_block
from qjax.calibrate.collect import Data, Groups, Pairs, Samples, samples_at
from qjax.calibrate.fitted import hardened_weights
from qjax.calibrate.parts import pack_fitted
from qjax.calibrate.pod import Pod
from qjax.calibrate.preemption import Preempted, asked
from qjax.calibrate.reconstruction import FitSettings, Fitted, Problem, Runner, nearest
from qjax.calibrate.rollout import Buffer, Network
from qjax.calibrate.sharded_rollout import roll_out
from qjax.calibrate.spread import on_host
from qjax.calibrate.states import States
from qjax.calibrate.student import names
from qjax.core.typing import Array, Params


class ShardedCalibration(Calibration):
    """As `Calibration`, on the devices of a pod.

    Attributes:
      pod: The devices.
      shards: Logical shards of the data.
    """

    def __init__(self, *args: Any, pod: Pod, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.settings.shards is not None
        self.pod, self.shards = pod, self.settings.shards
        self.ordered = self.settings.reduction == "ordered"
        self.states = States(self.work.shared, pod)
        pod.check(self.shards)
        # Programs get what they need; no device has more of the networks than others.
        self.teacher = self.teacher.replace(params=on_host(self.teacher.params))
        self.student = dataclasses.replace(
            self.student,
            params=on_host(self.student.params),
            floats=on_host(self.student.floats),
            kernels=on_host(self.student.kernels),
        )

    def _roll_out(
        self, name: str, network: Network, driver: tuple[Network, Params] | None
    ) -> Buffer:
        share = len(self.items.x_T) // self.shards
        return roll_out(
            self.pod,
            network,
            self.student.params,
            self.items,
            self.rows,
            group=self.group,
            guidance_scale=self.scale,
            # The largest part of a shard's items that a batch has room for.
            piece=next(n for n in range(self._piece, 0, -1) if share % n == 0),
            driver=driver,
            on_step=functools.partial(self._log_step, name),
        )

    @property
    def _piece(self) -> int:
        """Items of a batch that a shard has."""
        return max(self.settings.batch // self.shards, 1)

    def samples(self, buffer: Buffer, pairs: Pairs) -> list[Samples]:
        """The samples of pairs in pieces of one size, those of a shard together."""
        each = len(pairs.step) // self.shards
        size = min(self._piece, each)
        t = np.asarray(self.rows["t"])
        starts = [s * each + i for s in range(self.shards) for i in range(0, each - size + 1, size)]
        return [
            samples_at(
                buffer,
                self.items,
                t,
                self.group,
                Pairs(pairs.step[a : a + size], pairs.item[a : a + size]),
            )
            for a in starts
        ]

    def fit_blocks(self, samples: list[Samples], refresh: int, fit: FitSettings) -> None:
        """The parallel phase: alike blocks in rounds of `at_once`, by the order of execution."""
        first = samples[0]
        blocks = self.student.blocks(first.x_t, first.t, first.told)
        groups = alike(blocks)
        fits = lambda block: within_block(fit, block).only != NOTHING or fit.act_rate > 0
        rounds = rounds_of(blocks, groups, self.settings.at_once, fits)
        for number, (group, members) in enumerate(rounds):
            chosen = [groups[group][i] for i in members]
            collect = functools.partial(
                sharded_collect.collect_blocks,
                self.pod,
                self.student,
                (self.teacher.apply, self.teacher.params),
                groups,
                group,
                samples=samples,
                tables=self.tables,
                shards=self.shards,
                memory_gib=self.settings.memory_gib,
            )
            self._fit_round(
                f"refresh-{refresh}-round-{number}",
                chosen,
                # One program for alike blocks: the first one's module stands for all.
                self.student.runner(groups[group][0]),
                functools.partial(_padded, collect, members),
                refresh,
                [blocks.index(block) for block in chosen],
                fit,
                of=len(blocks),
            )
        self.forwards += len(samples) * len(first.t) + self._evaluations(refresh, fit)

    def fit_network(self, buffer: Buffer, pairs: Pairs, refresh: int, fit: FitSettings) -> None:
        """The parallel phase on the answer of the whole network."""
        block, samples = self.student.whole(), self.samples(buffer, pairs)
        runner = self._network_runner(block, samples[0], fit)
        teacher = (self.teacher.apply, self.teacher.params)
        collect = lambda _: sharded_collect.collect_whole(
            self.pod, teacher, samples, shards=self.shards
        )
        self._fit_round(f"refresh-{refresh}-network", [block], runner, collect, refresh, [0], fit)
        self.forwards += self._evaluations(refresh, fit) * (1 + (fit.distillation > 0))
        self.forwards += len(pairs.step) * self.halves

    def _fit_round(
        self,
        name: str,
        blocks: list[Block],
        runner: Runner,
        collect: Callable[[int], Data],
        refresh: int,
        numbers: list[int],
        fit: FitSettings,
        *,
        of: int = 1,
    ) -> None:
        """Fit blocks at once, of `of` all in all, or read what an earlier run has fitted."""
        cost = self._evaluations(refresh, fit) * WITH_GRADIENT * len(blocks) / of
        fit = within_block(fit, blocks[0])

        def make() -> dict[str, Array]:
            fitted = self._fit_at_once(name, blocks, runner, collect, refresh, numbers, fit, cost)
            return {
                f"{i}:{key}": leaf
                for i, one in enumerate(fitted)
                for key, leaf in pack_fitted(one).items()
            }

        part = self.work.part(name, make)
        self.states.drop(name)
        for i, block in enumerate(blocks):
            mine = f"{i}:"
            found = {k.removeprefix(mine): a for k, a in part.items() if k.startswith(mine)}
            self._accept(block, found)
        self._done += cost

    def _fit_at_once(
        self,
        name: str,
        blocks: list[Block],
        runner: Runner,
        collect: Callable[[int], Data],
        refresh: int,
        numbers: list[int],
        fit: FitSettings,
        cost: float,
    ) -> list[Fitted]:
        """What was fitted of every block, on the host."""
        pod, count = self.pod, len(blocks)
        places = sharded_fit.padded(pod, count)
        axis = sharded_fit.block_axis(pod, places)
        groups = int(self.group[-1]) + 1
        begun: list[tuple] = []
        for block, number in zip(blocks, numbers, strict=True):
            problem, begin, key = self._begin(block, runner, refresh, number, fit)
            state = optimize.start_optimizer(begin, groups, fit, runner, problem)
            bare = (problem.params, problem.fixed, problem.baseline)
            # One by one to the host: no device has room for all.
            begun.append(on_host((state, bare, nearest(problem, begin), jax.random.key_data(key))))
        begun += begun[-1:] * (places - count)
        states, problems, rounded, keys = zip(*begun, strict=True)
        to_pod = lambda trees: pod.put(sharded_fit.stack(trees), axis)
        data = collect(places - count)
        carry: optimize.Carry = to_pod(states)
        params, fixed, baseline = to_pod(problems)
        problem = Problem(params, fixed, data.inputs, data.target, data.group, baseline)
        key_data = to_pod(keys)
        counts = pod.put(sharded_fit.counts_of(pod, places, self.shards))

        def errors(problem: Problem, fitted: Fitted) -> Array:
            return sharded_fit.mean_errors(
                runner, fit.batch, pod, self.shards, self.ordered, axis, problem, fitted, counts
            )

        baseline = _at_least(errors(problem, to_pod(rounded)), 1e-12)
        problem = problem._replace(baseline=baseline)

        def chunk(carry: optimize.Carry, first: int, length: int) -> tuple[optimize.Carry, Array]:
            return sharded_fit.run_chunk(
                runner,
                fit,
                length,
                pod,
                self.shards,
                self.ordered,
                axis,
                carry,
                problem,
                pod.put(np.int32(first)),
                key_data,
                counts,
            )

        carry, last = self._iterate_at_once(name, blocks, chunk, carry, refresh, fit, cost)
        fitted: Fitted = pod.get(carry.fitted)
        alone = [jax.tree.map(lambda a, i=i: a[i], fitted) for i in range(places)]
        hardened = [
            Fitted({path: hardened_weights(w) for path, w in one.weights.items()}, one.acts)
            for one in alone
        ]
        before, after = pod.get(baseline), pod.get(errors(problem, to_pod(hardened)))
        for i, block in enumerate(blocks):
            self.work.log(
                "block",
                block=names((block,)),
                refresh=refresh,
                nearest=float(before[i]),
                soft=None if last is None else float(last[i]),
                ratio=float(after[i] / before[i]),
            )
        return alone[:count]

    def _iterate_at_once(
        self,
        name: str,
        blocks: list[Block],
        chunk: Callable[[optimize.Carry, int, int], tuple[optimize.Carry, Array]],
        carry: optimize.Carry,
        refresh: int,
        fit: FitSettings,
        cost: float,
    ) -> tuple[optimize.Carry, np.ndarray | None]:
        """All iterations of a refresh and the last errors; the state is kept on the way."""
        first, last = self._span(refresh, fit)
        kept = self.states.last(name)
        done = first if kept is None else kept
        if kept is not None:
            carry = self.states.read(name, kept, carry)
        means: np.ndarray | None = None
        since = done
        while done < last:
            length = min(fit.chunk, last - done)
            carry, errors = chunk(carry, done, length)
            done += length
            means = np.mean(self.pod.get(errors), axis=1)
            self.work.log(
                "fit",
                block=names(blocks),
                refresh=refresh,
                iteration=done,
                error=float(np.mean(means[: len(blocks)])),
                share=self._share(cost * (done - first) / max(last - first, 1)),
            )
            stop = self.pod.any(asked())
            if done < last and (stop or done - since >= self.settings.keep_every):
                self.states.keep(name, done, carry)
                since = done
            if stop:
                self.states.finish()
                raise Preempted
        return carry, means


def rounds_of(
    blocks: Sequence[Block], groups: Groups, at_once: int, fits: Callable[[Block], bool]
) -> list[tuple[int, list[int]]]:
    """Which blocks are fitted at once: the number of a group, and of blocks within.

    A round begins with the first block, in the order of execution, that no round has, and takes the
    next ones of its group.

    Args:
      blocks: In the order of execution.
      groups: The same, alike ones together.
      at_once: Most blocks of a round.
      fits: Whether something of a block is fitted.
    """
    place = {block: (g, i) for g, group in enumerate(groups) for i, block in enumerate(group)}
    open_rounds: dict[int, list[int]] = {}
    rounds: list[tuple[int, list[int]]] = []
    for block in filter(fits, blocks):
        g, i = place[block]
        members = open_rounds.get(g)
        if members is None or len(members) == at_once:
            members = open_rounds[g] = []
            rounds.append((g, members))
        members.append(i)
    return rounds


def _padded(collect: Callable[..., Data], members: list[int], padding: int) -> Data:
    """The data of blocks, the last of them once more for every place that is left."""
    return collect(members=[*members, *members[-1:] * padding])


@jax.jit
def _at_least(a: Array, least: float) -> Array:
    return jnp.maximum(a, least)
