"""Recipes: order, hashing, resuming, and what is refused before any work is done."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate import programs
from qjax.calibrate import recipe as recipes
from qjax.calibrate.recipe import (
    Recipe,
    State,
    quant_config,
    quantize_pipeline,
    recipe_of_run,
    run,
)
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import params_digest
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.loading import load_pipeline
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule

SIZES = {"sample_size": 4, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 1}
CONFIG = DiTConfig(**SIZES, num_heads=2, head_dim=4, num_classes=3).to_diffusers()
QUANT = QuantConfig(weight=WeightSpec(bits=4), act=ActSpec())


@dataclasses.dataclass(frozen=True)
class Jitter:
    """A stage that multiplies every scale by a random number, the same for equal keys."""

    amount: float = 0.1
    log: tuple[str, ...] = ()

    def run(self, state: State, key: jax.Array, work: Work) -> State:
        names = [path for path, _ in jax.tree.leaves_with_path(state.student.params)]
        keys = jax.random.split(key, len(names))

        def jitter(q, key):
            if not is_qtensor(q):
                return q
            factor = 1 + self.amount * jax.random.uniform(key, q.scale.shape, q.scale.dtype)
            return q.replace(scale=q.scale * factor)

        leaves, treedef = jax.tree.flatten(state.student.params, is_leaf=is_qtensor)
        params = jax.tree.unflatten(treedef, map(jitter, leaves, keys[: len(leaves)]))
        return dataclasses.replace(state, student=state.student.replace(params=params))


@dataclasses.dataclass(frozen=True)
class Power:
    """A stage that can be cut off from outside."""

    is_on = True

    def run(self, state: State, key: jax.Array, work: Work) -> State:
        if not type(self).is_on:
            raise KeyboardInterrupt
        return Jitter(amount=0.05).run(state, key, work)


STAGES = Recipe(quant=QUANT, stages=(Jitter(), Power(), Jitter(amount=0.2)), name="jittered")


def pipeline() -> Pipeline:
    denoiser = build_denoiser("DiTTransformer2DModel", CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
        abstract_params(denoiser),
    )
    return Pipeline.from_apply(
        denoiser.model.apply,
        params,
        DDIM(schedule=Schedule.linear(100, 1e-3, 0.1)),
        source=Source(model="DiTTransformer2DModel", config=CONFIG, name="tiny"),
        **denoiser.fields,
    )


def same(a: Pipeline, b: Pipeline) -> bool:
    return params_digest(a.params) == params_digest(b.params)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def whole(pipe):
    """What an uninterrupted run gives."""
    return run(pipe, STAGES, seed=3)


def test_quantizing_keeps_the_float_pipeline_and_remembers_rules_and_source(pipe):
    before = params_digest(pipe.params)
    student = quantize_pipeline(pipe, STAGES)
    assert student.quant == QUANT and student.method != pipe.method
    assert student.source.sha256 == before == params_digest(pipe.params)
    assert not any(map(is_qtensor, jax.tree.leaves(pipe.params, is_leaf=is_qtensor)))


def test_without_stages_a_run_quantizes(pipe, tmp_path):
    plain = Recipe(quant=QUANT)
    student = run(pipe, plain, out=tmp_path / "run")
    assert same(student, quantize_pipeline(pipe, QUANT))
    assert same(load_pipeline(tmp_path / "run" / "final"), student)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(pipe, whole):
    assert same(run(pipe, STAGES, seed=3), whole)
    assert not same(run(pipe, STAGES, seed=4), whole)


def test_every_stage_has_a_key_of_its_own(pipe):
    twice = run(pipe, Recipe(quant=QUANT, stages=(Jitter(), Jitter())))
    scale = lambda p: p.params["patch_embed"]["kernel"].scale.astype(jnp.float32)
    first = scale(run(pipe, Recipe(quant=QUANT, stages=(Jitter(),)))) / scale(
        quantize_pipeline(pipe, QUANT)
    )
    total = scale(twice) / scale(quantize_pipeline(pipe, QUANT))
    assert float(jnp.max(jnp.abs(total / first - first))) > 1e-3


def test_an_interrupted_run_goes_on_where_it_stopped(pipe, whole, tmp_path, monkeypatch):
    out, ran = tmp_path / "run", []
    monkeypatch.setattr(Power, "is_on", False)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, STAGES, out=out, seed=3)
    assert (out / "stage-0-jitter").is_dir() and not (out / "stage-1-power").exists()
    monkeypatch.setattr(Power, "is_on", True)
    tell = lambda done, total, name: ran.append((done, total, name))
    resumed = run(pipe, STAGES, out=out, seed=3, on_stage=tell)
    assert ran == [(1, 3, "Power"), (2, 3, "Jitter"), (3, 3, "done")]
    assert same(resumed, whole) and same(load_pipeline(out / "final"), whole)
    ran.clear()
    assert same(run(pipe, STAGES, out=out, seed=3, on_stage=tell), whole)
    assert ran == [(3, 3, "done")]


def test_without_resume_every_stage_runs_again(pipe, whole, tmp_path):
    ran = []
    run(pipe, STAGES, out=tmp_path, seed=3)
    tell = lambda done, total, name: ran.append(name)
    assert same(run(pipe, STAGES, out=tmp_path, seed=3, resume=False, on_stage=tell), whole)
    assert ran == ["Jitter", "Power", "Jitter", "done"]


def test_a_folder_of_another_run_is_refused_with_both_values(pipe, tmp_path):
    run(pipe, Recipe(quant=QUANT), out=tmp_path, seed=3)
    before = listing(tmp_path)
    shifted = pipe.replace(params=jax.tree.map(lambda w: w + 1, pipe.params))
    for one, recipe, seed, error in [
        (pipe, Recipe(quant=QUANT), 4, "seed 3, now 4"),
        (pipe, STAGES, 3, "name 'custom', now 'jittered'"),
        (pipe, Recipe(quant=QuantConfig(weight=WeightSpec(bits=8))), 3, "recipe '"),
        (shifted, Recipe(quant=QUANT), 3, "params '"),
    ]:
        with pytest.raises(ValueError, match=f"belongs to another run: .*{error}"):
            run(one, recipe, out=tmp_path, seed=seed)
    assert listing(tmp_path) == before


def test_a_spoilt_run_file_is_refused(pipe, tmp_path):
    (tmp_path / recipes.RUN).write_text("{")
    with pytest.raises(ValueError, match="is not what a run has written"):
        run(pipe, Recipe(quant=QUANT), out=tmp_path)


def test_what_could_not_be_saved_is_refused_before_any_stage_runs(pipe, tmp_path):
    stranger = pipe.replace(source=Source(model="MyNet", config={}))
    with pytest.raises(ValueError, match="port"):
        run(stranger, STAGES, out=tmp_path / "run", on_stage=pytest.fail)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Parts:
    """A stage of two parts, the second of which can be cut off."""

    stop: ClassVar[bool] = False

    def run(self, state: State, key: jax.Array, work: Work) -> State:
        first = work.part("first", lambda: {"x": jax.random.uniform(key)})["x"]

        def second():
            if type(self).stop:
                raise KeyboardInterrupt
            return {"amount": 0.1 * first}

        amount = float(work.part("second", second)["amount"])
        return Jitter(amount=amount).run(state, key, work)


OWN = Recipe(quant=QUANT, stages=(Parts(), Jitter(), Parts()), name="in parts")


def test_a_pipeline_without_a_source_goes_on_from_its_parts(pipe, tmp_path, monkeypatch):
    own, events = pipe.replace(source=None), []
    whole = run(own, OWN, seed=3)
    tell = lambda event: events.append((event["event"], event["part"]))
    monkeypatch.setattr(Parts, "stop", True)
    with pytest.raises(KeyboardInterrupt):
        run(own, OWN, out=tmp_path, seed=3)
    monkeypatch.setattr(Parts, "stop", False)
    assert same(run(own, OWN, out=tmp_path, seed=3, on_event=tell), whole)
    assert events == [("read", "first"), *[("wrote", p) for p in ("second", "first", "second")]]
    events.clear()
    again = pipeline().replace(source=None, apply=lambda *args: pipe.apply(*args))
    assert same(run(again, OWN, out=tmp_path, seed=3, on_event=tell), whole)
    assert events == [("read", "first"), ("read", "second")] * 2
    assert not (tmp_path / "final").exists()


def test_another_function_or_other_params_do_not_go_on_from_those_parts(pipe, tmp_path):
    own = pipe.replace(source=None)
    run(own, OWN, out=tmp_path, seed=3)
    changed = own.replace(apply=lambda *args: 2 * pipe.apply(*args))
    shifted = own.replace(params=jax.tree.map(lambda w: w + 1, pipe.params))
    for one, word in ((changed, "network '"), (shifted, "params '"), (pipe, "model None")):
        with pytest.raises(ValueError, match=f"belongs to another run: {word}"):
            run(one, OWN, out=tmp_path, seed=3)
    with pytest.raises(ValueError, match="belongs to another run: model 'tiny', now None"):
        run(pipe, OWN, out=tmp_path / "saved", seed=3)
        run(own, OWN, out=tmp_path / "saved", seed=3)


def test_a_recipe_that_does_not_suit_the_model_writes_nothing(pipe, tmp_path):
    wrong = QuantConfig(weight=WeightSpec(bits=4, granularity="per_group", group_size=5))
    with pytest.raises(ValueError, match="group_size must divide"):
        run(pipe, Recipe(quant=wrong), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_run_file_says_what_the_folder_is_for(pipe, tmp_path):
    run(pipe, Recipe(quant=QUANT, name="w4a8"), out=tmp_path, seed=7)
    said = json.loads((tmp_path / recipes.RUN).read_text())
    assert said["name"] == "w4a8" and said["seed"] == 7 and said["model"] == "tiny"
    assert said["params"] == params_digest(pipe.params)


@pytest.mark.parametrize("text", [b"[]", b"{}", b"{", b'{"name": 3}', b"\xff", b"[" * 100_000])
def test_a_result_tells_its_recipe_where_a_run_wrote_it(tmp_path, text):
    assert recipe_of_run(tmp_path / "final") is None
    (tmp_path / "run.json").write_text('{"name": "s2p_w4a8"}')
    assert recipe_of_run(tmp_path / "final") == "s2p_w4a8"
    (tmp_path / "run.json").write_bytes(text)
    assert recipe_of_run(tmp_path / "final") is None


def test_a_digest_is_of_the_settings_of_the_stages_so_far():
    shorter = dataclasses.replace(STAGES, stages=STAGES.stages[:2])
    assert STAGES.digest(2) == shorter.digest() != STAGES.digest()
    assert STAGES.digest() == dataclasses.replace(STAGES, name="another").digest()
    other = dataclasses.replace(STAGES, stages=(Jitter(amount=0.3), *STAGES.stages[1:]))
    assert other.digest(1) != STAGES.digest(1)
    quant = dataclasses.replace(STAGES, quant=QuantConfig(weight=WeightSpec(bits=8)))
    assert quant.digest(0) != STAGES.digest(0)


def test_settings_that_have_no_lasting_hash_are_refused():
    with pytest.raises(TypeError, match="Settings of stages must be numbers"):
        Recipe(quant=QUANT, stages=(Jitter(log=(object(),)),)).digest()


def test_stages_must_be_frozen_dataclasses_that_run():
    @dataclasses.dataclass
    class Thawed:
        def run(self, state, key, work):
            return state

    @dataclasses.dataclass(frozen=True)
    class Idle:
        pass

    class Plain:
        def run(self, state, key, work):
            return state

    for stage in (Thawed(), Idle(), Plain(), Jitter):
        with pytest.raises(TypeError, match="stages must be frozen dataclasses with run"):
            Recipe(quant=QUANT, stages=(stage,))


def test_a_recipe_or_a_config_is_asked_for():
    assert quant_config(STAGES) is quant_config(QUANT) is QUANT
    with pytest.raises(TypeError, match="A QuantConfig or a Recipe is needed; got str"):
        quant_config("w4a8")
    with pytest.raises(TypeError, match="got function. Call it"):
        quant_config(lambda: QUANT)


def test_programs_are_dropped_once_the_process_has_many_maps(tmp_path, monkeypatch):
    compiled = jax.jit(lambda x: x + 1)
    compiled(jnp.zeros(3))
    monkeypatch.setattr(programs, "MAPS", tmp_path / "maps")
    assert not programs.drop_programs()  # no such file
    programs.MAPS.write_text("a map\n" * programs.MOST)
    assert not programs.drop_programs() and compiled._cache_size() == 1
    programs.MAPS.write_text("a map\n" * (programs.MOST + 1))
    assert programs.drop_programs() and compiled._cache_size() == 0
