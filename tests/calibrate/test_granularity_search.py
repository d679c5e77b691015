"""Granularity search as a stage: better than uniform groups, recorded, resumable, reproducible."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.evolution import EvolutionSettings
from qjax.calibrate.fitted import quantized_kernels
from qjax.calibrate.granularity_search import RECIPE_FILE, GranularitySearch
from qjax.calibrate.recipe import Recipe, State, quantize_pipeline, run
from qjax.calibrate.recipe_file import load_search
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.safetensors_io import write_tensors
from qjax.core.serialize import flatten, params_digest
from qjax.core.steps import StepTable, TableKey
from qjax.models.features import FeatureNet, FeatureNetConfig
from qjax.models.loading import load_pipeline

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = EvolutionSettings(population=6, keep=3, crossovers=2, mutations=2, generations=2)
STAGE = GranularitySearch(
    uniform=8,
    choices=(2, 8, 16),
    layers=r"blocks_\d/(attn|mlp)/.*",
    objective="latent",
    steps=2,
    guidance_scale=2.0,
    data=CalibrationSet(items=6),
    finalists=2,
    evolution=SMALL,
    batch=6,
    pairs=8,
)
PARTS = "stage-0-granularitysearch-parts"
ACT = ActSpec(bits=6, symmetric=False)
QUANT = QuantConfig(
    rules=(
        Rule(pattern=r"blocks_\d/modulation/kernel", weight=WeightSpec(bits=8), act=ACT),
        Rule(pattern=r"blocks_\d/.*kernel", weight=WeightSpec(bits=3), act=ACT),
    )
)


def recipe_of(**changes) -> Recipe:
    return Recipe(quant=QUANT, stages=(dataclasses.replace(STAGE, **changes),))


def groups_of(pipe) -> dict[str, int]:
    return {p: q.group_size or q.shape[-2] for p, q in quantized_kernels(pipe.params).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def log():
    return []


@pytest.fixture(scope="module")
def searched(dit, folder, log):
    return run(dit, recipe_of(), seed=1, out=folder, on_event=log.append)


def test_the_winner_is_within_the_budget_and_no_worse_than_uniform_groups(searched, log):
    (space,) = [e for e in log if e["event"] == "space"]
    (won,) = [e for e in log if e["event"] == "winner"]
    assert space["layers"] == 8 and won["bitops"] <= space["bitops_budget"] * (1 + 1e-9)
    assert won["fresh_fitness"] <= won["uniform_fresh_fitness"]
    best = min(e["fitness"] for e in log if e["event"] == "candidate" and e["search"] == "search")
    assert best <= won["uniform_fitness"] and best <= won["fitness"]
    assert won["evaluated"] == SMALL.evaluations == 14


def test_weights_and_inputs_of_a_layer_share_the_groups_that_were_chosen(dit, searched):
    plain = quantized_kernels(quantize_pipeline(dit, QUANT).params)
    for path, q in quantized_kernels(searched.params).items():
        assert q.bits == plain[path].bits and q.act.bits == 6 and not q.act.symmetric
        if "modulation" in path:
            assert q.act == ACT and q.group_size is None
            continue
        group_size = q.group_size or q.shape[-2]
        assert group_size in (2, 8, 16)
        assert (q.act.granularity, q.act.group_size) == ("per_group", group_size)
    assert len(set(groups_of(searched).values())) > 1


def test_the_rules_say_how_the_student_was_made(dit, searched, folder):
    again = quantize_pipeline(dit, searched.quant)
    assert params_digest(again.params) == params_digest(searched.params)
    assert again.method == searched.method
    loaded = load_pipeline(folder / "final")
    assert loaded.quant == searched.quant and groups_of(loaded) == groups_of(searched)


def test_the_recipe_file_makes_the_same_of_the_floats(dit, unet, searched, folder):
    found = load_search(folder / PARTS / RECIPE_FILE)
    assert found.config_for(dit.params) == searched.quant
    assert found.result["evaluated"] == 14 and found.settings["steps"] == 2
    with pytest.raises(ValueError, match="another architecture"):
        found.config_for(unet.params)


def test_a_search_killed_after_any_generation_ends_with_the_same_winner(
    dit, searched, tmp_path, monkeypatch
):
    whole, parts = Work.part, []

    def count(self, name, make):
        if len(parts) == limit:
            raise KeyboardInterrupt
        parts.append(name)
        return whole(self, name, make)

    monkeypatch.setattr(Work, "part", count)
    recipe = recipe_of()
    for limit in range(1, 6):
        parts.clear()
        with pytest.raises(KeyboardInterrupt):
            run(dit, recipe, seed=1, out=tmp_path)
        assert len(list((tmp_path / PARTS).glob("*.safetensors"))) == limit
    assert parts == ["float-0", "search-0", "search-1", "search-2", "float-1"]
    monkeypatch.setattr(Work, "part", whole)
    resumed = run(dit, recipe, seed=1, out=tmp_path)
    assert resumed.quant == searched.quant
    assert params_digest(resumed.params) == params_digest(searched.params)
    lines = (tmp_path / PARTS / "log.jsonl").read_text().splitlines()
    seen = [
        e["groups"]
        for e in map(json.loads, lines)
        if e.get("search") == "search" and e["event"] == "candidate"
    ]
    assert len(seen) == len(set(seen)) == 14  # nothing was evaluated twice


@pytest.mark.slow
def test_pictures_are_compared_by_a_feature_net(dit, tmp_path):
    config = FeatureNetConfig(channels=(2, 2, 2), num_features=2, num_classes=2)
    net = FeatureNet(config).init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))["params"]
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(net)}
    write_tensors(tmp_path / "features.safetensors", arrays, {})
    large = dit.replace(shape=(8, 8, 2))
    settings = {"objective": "fd", "features": str(tmp_path), "layers": r"blocks_0/mlp/.*"}
    with pytest.raises(ValueError, match="reference='float'"):
        run(large, recipe_of(**settings))
    real = {"test/mean": np.zeros(2), "test/cov": np.eye(2), "test/n": np.array([9])}
    write_tensors(tmp_path / "reference.safetensors", real, {})
    found = []
    for reference in ("float", "real"):
        events = []
        recipe = recipe_of(
            **settings,
            reference=reference,
            evolution=EvolutionSettings(population=3, generations=0),
        )
        run(large, recipe, seed=1, on_event=events.append)
        found.append([e["fitness"] for e in events if e["event"] == "candidate"])
        assert {e["event"] for e in events} >= {"space", "step", "generation", "winner"}
    assert found[0] != found[1] and np.isfinite(found).all()


def test_errors_of_layers_are_summed_or_allocated_exactly(dit):
    sums, groups = {}, {}
    for solver in ("evolution", "ilp"):
        events = []
        recipe = recipe_of(objective="layers", solver=solver)
        made = run(dit, recipe, seed=1, on_event=events.append)
        (won,) = [e for e in events if e["event"] == "winner"]
        (space,) = [e for e in events if e["event"] == "space"]
        assert won["bitops"] <= space["bitops_budget"] * (1 + 1e-9)
        sums[solver], groups[solver] = won["fitness"], groups_of(made)
    assert 0 < sums["ilp"] <= sums["evolution"] * (1 + 1e-6)


def test_settings_that_make_no_sense_are_refused():
    for changes, said in [
        ({"bitops": 5.0}, "bitops or uniform, one of them"),
        ({"uniform": None}, "needs a budget"),
        ({"choices": (0, 2)}, r"at least 1; got \[0\]"),
        ({"objective": "fid"}, "objective must be fd or latent or layers"),
        ({"objective": "fd"}, "needs features"),
        ({"solver": "ilp"}, "needs errors that add up"),
        ({"solver": "ilp", "objective": "layers", "stored_bytes": 9}, "one budget"),
        ({"finalists": 0}, "finalists must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(STAGE, **changes)


def test_what_cannot_be_searched_is_said_before_anything_is_computed(dit):
    for changes, said in [
        ({"steps": None}, "number of steps is not chosen"),
        ({"stored_bytes": 100}, "no group sizes fit the budget of 100 bytes: .* from"),
        ({"choices": (3,)}, r"none divides"),
        ({"layers": "nothing"}, "matches none of them"),
    ]:
        events = []
        with pytest.raises(ValueError, match=said):
            run(dit, recipe_of(**changes), on_event=events.append)
        assert not events
    static = QuantConfig(rules=(dataclasses.replace(QUANT.rules[1], act=ActSpec(mode="static")),))
    with pytest.raises(ValueError, match="dynamic ranges"):
        run(dit, Recipe(quant=static, stages=(STAGE,)))
    with pytest.raises(ValueError, match="no layer of this pipeline is quantized"):
        run(dit, Recipe(quant=QuantConfig(), stages=(STAGE,)))
    table = StepTable().with_entry("quant", {"x": jnp.zeros((2,))}, key=TableKey(timesteps=(5, 0)))
    student = quantize_pipeline(dit, QUANT).replace(step_table=table)
    with pytest.raises(ValueError, match="Put GranularitySearch first"):
        STAGE.run(State(teacher=dit, student=student), jax.random.key(0), Work())
