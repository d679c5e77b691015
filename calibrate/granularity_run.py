"""One run of the granularity search: its space, its objective, and what is made of the winner."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.blocks import subtree
from qjax.calibrate.collect import Pairs, Samples, samples_at
from qjax.calibrate.evolution import Evaluated, Objective, evolve, select
from qjax.calibrate.fitted import KERNEL, quantized_kernels, with_kernels
from qjax.calibrate.genome import Budget, Genome, Space
from qjax.calibrate.genome_forward import Candidates, GenomeNetwork, network_layers
from qjax.calibrate.genome_objectives import (
    LatentError,
    LayerErrors,
    PictureDistance,
    Run,
    least_sum,
    load_features,
    load_reference,
    measure_layers,
    statistics_of,
)
from qjax.calibrate.genome_space import (
    build_space,
    entries_of,
    grouped_config,
    layers_of,
    macs_of_layers,
)
from qjax.calibrate.granularity_settings import GranularitySettings
from qjax.calibrate.layer_widths import float_params
from qjax.calibrate.recipe import State
from qjax.calibrate.recipe_file import SearchRecipe, kernel_shapes, save_search
from qjax.calibrate.rollout import Items, Network, roll_out, shared_steps
from qjax.calibrate.student import Student, stratified_pairs
from qjax.calibrate.work import Work
from qjax.core.config import QuantConfig
from qjax.core.linen import BoxedQTensor
from qjax.core.plan import name_some
from qjax.core.quantize import quantize_leaf
from qjax.core.typing import Array, Float, Params, PRNGKeyArray
from qjax.models.pipeline import Pipeline
from qjax.models.saving import method_name

__all__ = ["RECIPE_FILE", "Search", "with_group_sizes"]

RECIPE_FILE = "granularity.yaml"

_SEARCH, _FRESH = 0.9, 1.0  # shares of the stage that are done after the search, after the rest


def with_group_sizes(pipe: Pipeline, floats: Params, config: QuantConfig) -> Pipeline:
    """The pipeline with the kernels whose rules are others now quantized anew, to nearest.

    Args:
      pipe: A quantized pipeline.
      floats: The params that its integers stand for.
      config: Rules that quantize the same layers (`genome_space.grouped_config`).
    """
    assert pipe.quant is not None
    before = {entry.path: entry for entry in entries_of(floats, pipe.quant)}
    kernels = {}
    old = quantized_kernels(pipe.params)
    for entry in entries_of(floats, config):
        path = entry.path.removesuffix(KERNEL).rstrip("/")
        was = before[entry.path]
        if path not in old or (entry.weight, entry.act) == (was.weight, was.act):
            continue
        box = isinstance(old[path], BoxedQTensor)
        new = quantize_leaf(entry.path, subtree(floats, path)[KERNEL], config, box=box)
        kernels[path] = new.replace(dtype_name=old[path].dtype_name)
    return pipe.replace(
        params=with_kernels(pipe.params, kernels), quant=config, method=method_name(config)
    )


class Search:
    """One run: what stays the same through its parts, and a method for each of them.

    Args:
      state: Before the stage.
      settings: Of the search.
      key: Of the noise and of all draws.
      work: Keeps the parts, and takes the log.

    Raises:
      ValueError: If nothing is quantized, no choice divides a layer's channels, no group sizes
        fit the budget, or the student has a step table.
    """

    def __init__(self, state: State, settings: GranularitySettings, key: PRNGKeyArray, work: Work):
        self.settings, self.work, self.key = settings, work, key
        self.teacher, self.pipe = state.teacher, state.student
        steps = settings.check(self.teacher)
        if self.pipe.quant is None or not quantized_kernels(self.pipe.params):
            raise ValueError(
                "there is nothing to search: no layer of this pipeline is quantized, or it does "
                "not remember its rules. Use a recipe whose rules quantize some."
            )
        if self.pipe.step_table is not None and self.pipe.step_table.entries:
            raise ValueError(
                "the search comes before stages that fill the step table; this pipeline's has "
                f"{', '.join(self.pipe.step_table.entries)}. Put GranularitySearch first."
            )
        self.quant: QuantConfig = self.pipe.quant
        self.floats = self.teacher.params if state.floats is None else state.floats
        self.entries = entries_of(self.floats, self.quant)
        self.layers = layers_of(self.entries, settings.layers)
        self.rows = self.teacher.sampler.rows(steps, eta=settings.eta)
        self.items = self.drawn_items(0)
        self.scale = self.items.scale(settings.guidance_scale)
        self.space = self.build_space()
        self.budget = self.build_budget()
        self.budget.check(self.space)
        student = Student.of(self.pipe, self.floats)
        self.float_params = float_params(self.floats, self.pipe.params)
        self.network = GenomeNetwork(
            self.pipe.apply,
            self.pipe.sampler,
            self.pipe.guidance_channels,
            network_layers(self.space, self.layers, self.quant.scale_dtype),
            self.other_acts(),
        )
        self.candidates = Candidates.of(self.network, student.params, self.floats)

    def run(self) -> Pipeline:
        """Search, choose on fresh noise, quantize anew."""
        self.tell_space()
        objective = self.objective(0)
        if self.settings.solver == "ilp":
            genome, result = self.programme(objective)
        else:
            genome, result = self.evolution(objective)
        return self.made(genome, result)

    # What is searched.

    def drawn_items(self, number: int) -> Items:
        """Items of a noise of their own: 0 for the search, 1 for the finalists."""
        key = jax.random.fold_in(self.key, number)
        return self.settings.data.draw(
            self.teacher, key, guidance_scale=self.settings.guidance_scale
        )

    def build_space(self) -> Space:
        """Layers, choices and costs; the network is run abstractly on one item."""
        one = jax.tree.map(lambda a: a[:1], self.items.told)
        t = jnp.asarray(self.rows["t"])[:1]
        forward = lambda: self.pipe.apply({"params": self.floats}, self.items.x_T[:1], t, one)
        macs = macs_of_layers(forward, self.layers, items=1)
        return build_space(
            self.layers, macs, choices=self.settings.choices, scale_dtype=self.quant.scale_dtype
        )

    def build_budget(self) -> Budget:
        """The limits in numbers."""
        bitops = self.settings.bitops
        if self.settings.uniform is not None:
            bitops = self.space.bitops(self.space.uniform(self.settings.uniform))
        return Budget(bitops=bitops, stored=self.settings.stored_bytes)

    def other_acts(self) -> tuple[Any, ...]:
        """The quantized layers that keep their groups, with how their inputs are quantized."""
        acts = {
            path: q.act
            for path, q in quantized_kernels(self.pipe.params).items()
            if path not in self.layers and q.act is not None
        }
        if fixed := [path for path, act in acts.items() if act.mode != "dynamic"]:
            raise ValueError(
                "pictures can be drawn only with dynamic ranges of the layers' inputs; those of "
                f"{name_some(fixed)} come from the step's row. Use ActSpec(mode='dynamic')."
            )
        return tuple(acts.items())

    def tell_space(self) -> None:
        """Log what there is to choose from, and what it may cost."""
        space = self.space
        self.work.log(
            "space",
            layers=len(space.genes),
            genomes=float(np.prod(space.counts.astype(np.float64))),
            bitops_from=space.bitops(space.coarsest),
            bitops_to=space.bitops(space.finest),
            bitops_budget=self.budget.bitops or 0.0,
            bytes_from=space.stored(space.coarsest),
            bytes_to=space.stored(space.finest),
            bytes_budget=self.budget.stored or 0,
            at_once=self.candidates.at_once,
        )

    # What is minimised.

    def objective(self, number: int) -> Objective:
        """The objective on the items of that number."""
        if self.settings.objective == "layers":
            return self.layer_errors(number)
        items = self.items if number == 0 else self.drawn_items(number)
        run = Run(
            items=items,
            rows=self.rows,
            guidance_scale=self.scale,
            batch=self.settings.batch,
        )
        if self.settings.objective == "latent":
            latents = self.float_latents(run, number)
            return LatentError(candidates=self.candidates, run=run, reference=latents)
        assert self.settings.features is not None
        features = load_features(self.settings.features)
        if self.settings.reference == "real":
            reference = load_reference(self.settings.features)
        else:
            latents = self.float_latents(run, number)
            reference = statistics_of(self.teacher, features, latents, batch=self.settings.batch)
        return PictureDistance(
            candidates=self.candidates,
            run=run,
            pipe=self.teacher,
            features=features,
            reference=reference,
        )

    def float_latents(self, run: Run, number: int) -> Float[np.ndarray, "b h w c"]:
        """The float network's last samples; a part of the work."""
        network = self.network._replace(layers=(), others=())
        plain = Candidates.of(network, self.float_params, {}, devices=jax.local_devices()[:1])

        def make() -> dict[str, Array]:
            self.work.log("float", part=number, items=len(run.items.x_T))
            return {"x_0": jnp.asarray(run.plain(plain))}

        return np.asarray(self.work.part(f"float-{number}", make)["x_0"])

    def layer_errors(self, number: int) -> LayerErrors:
        """The table of layers' errors; a part of the work."""

        def make() -> dict[str, Array]:
            samples = self.samples(number)
            errors = lambda genome: self.candidates.layer_errors(genome, samples, self.float_params)
            return {"errors": jnp.asarray(measure_layers(self.space, errors), jnp.float32)}

        table = self.work.part(f"layers-{number}", make)["errors"]
        return LayerErrors(table=np.asarray(table, np.float64))

    def samples(self, number: int) -> list[Samples]:
        """Pairs of the float network's roll-out, all steps alike, in batches of one size."""
        items = self.items if number == 0 else self.drawn_items(number)
        steps, n = len(self.rows["t"]), len(items.x_T)
        group = shared_steps(steps, None)
        network = Network(self.pipe.apply, self.teacher.sampler, self.teacher.guidance_channels, ())
        buffer = roll_out(
            network,
            self.float_params,
            items,
            self.rows,
            group=group,
            guidance_scale=self.scale,
            batch=self.settings.batch,
        )
        count = min(self.settings.pairs, steps * n)
        batch = min(self.settings.batch, count)
        step, item = stratified_pairs(steps, n, count // batch * batch, seed=number)
        t = np.asarray(self.rows["t"])
        return [
            samples_at(buffer, items, t, group, Pairs(step[a : a + batch], item[a : a + batch]))
            for a in range(0, len(step), batch)
        ]

    # What is chosen.

    def evolution(self, objective: Objective) -> tuple[Genome, dict[str, Any]]:
        """The best of the finalists on fresh noise, and what is known of it."""
        entropy = [int(part) for part in np.ravel(jax.random.key_data(self.key))]
        found = evolve(
            self.space,
            self.budget,
            objective,
            self.settings.evolution,
            entropy=entropy,
            work=self.work,
            share=(0.0, _SEARCH),
        )
        finalists = list(found.genomes[: self.settings.finalists])
        uniform = [u for u in self.space.uniforms().values() if self.budget.fits(self.space, u)]
        fresh = select(
            self.space,
            self.objective(1),
            [*finalists, *uniform],
            work=self.work,
            share=(_SEARCH, _FRESH),
        )
        genome = fresh.genomes[0]
        result: dict[str, Any] = {
            "fitness": _of(found, genome),
            "fresh_fitness": float(fresh.fitness[0]),
            "evaluated": len(found.genomes),
        }
        if uniform:
            best = min(uniform, key=lambda one: _of(fresh, one))
            result |= {
                "uniform": max(self.space.groups(best).values()),
                "uniform_fitness": _of(found, best),
                "uniform_fresh_fitness": _of(fresh, best),
            }
        return genome, result

    def programme(self, objective: Objective) -> tuple[Genome, dict[str, Any]]:
        """The choices whose errors sum to least, by an integer programme."""
        assert isinstance(objective, LayerErrors)
        genome, cost, optimal = least_sum(self.space, self.budget, objective.table)
        return genome, {"fitness": cost, "optimal": optimal}

    def made(self, genome: Genome, result: dict[str, Any]) -> Pipeline:
        """The student in the winner's groups; its recipe file beside the log."""
        groups = self.space.groups(genome)
        result = result | {
            "bitops": self.space.bitops(genome),
            "bytes": self.space.stored(genome),
        }
        sizes = sorted({g for gene in self.space.genes for g in gene.choices})
        chosen = list(groups.values())
        self.work.log(
            "winner",
            **result,
            layers=", ".join(f"{chosen.count(g)} at {g}" for g in sizes if g in chosen),
        )
        config = grouped_config(self.quant, self.entries, groups)
        student = with_group_sizes(self.pipe, self.floats, config)
        if self.work.folder is not None:
            self.write(self.work.folder / RECIPE_FILE, groups, result)
        return student

    def write(self, path: Path, groups: dict[str, int], result: dict[str, Any]) -> None:
        """The recipe file; the folder of features, which is this machine's, is left out of it."""
        settings = dataclasses.asdict(self.settings)
        if self.settings.features is not None:
            settings["features"] = Path(self.settings.features).name
        recipe = SearchRecipe(
            architecture=kernel_shapes(self.floats),
            quant=self.quant,
            groups=groups,
            settings=settings,
            result=result,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_search(path, recipe)


def _of(found: Evaluated, genome: Genome) -> float:
    """What was found of a genome; infinite where nothing was."""
    same = np.flatnonzero((found.genomes == genome).all(axis=1))
    return float(found.fitness[same[0]]) if same.size else float("inf")
