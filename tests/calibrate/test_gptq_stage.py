"""GPTQ on whole networks: every layer, the inputs that it will have, and a killed run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.collect import Data
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.gptq_stage import GPTQ, layer_hessians
from qjax.calibrate.recipe import Recipe, State, quantize_pipeline, run
from qjax.calibrate.student import Student
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.metrics import relative_l2
from qjax.core.serialize import params_digest

pytestmark = pytest.mark.usefixtures("standard_promotion")

STAGE = GPTQ(
    steps=3, guidance_scale=2.0, data=CalibrationSet(items=8), pairs=24, batch=8, act_order=True
)
GROUPS = ActSpec(bits=8, mode="dynamic", granularity="per_group", group_size=8)


def draw(pipe):
    labels = np.arange(16) % 3
    settings = {"steps": 3, "guidance_scale": 2.0, "output": "latent", "key": jax.random.key(9)}
    return np.asarray(pipe(labels=labels, **settings))


@pytest.fixture(scope="module")
def student(dit):
    """The tiny DiT in 3 bits, weights and inputs in groups of 8."""
    weight = WeightSpec(bits=3, granularity="per_group", group_size=8, symmetric=False)
    edges = Rule(pattern=r"(.*/)?(patch_embed|conditioning|final_linear)(/.*)?")
    return quantize_pipeline(dit, QuantConfig(rules=(edges,), weight=weight, act=GROUPS))


@pytest.fixture(scope="module")
def rounded(dit, student):
    events = []
    state = STAGE.run(State(dit, student), jax.random.key(0), Work(None, events.append))
    return state.student, events


def test_every_layer_is_rounded_with_no_more_error_than_to_nearest(student, rounded):
    layers = [event for event in rounded[1] if event["event"] == "layer"]
    assert len(layers) == len({event["layer"] for event in layers}) == 11
    assert all(event["gptq"] <= event["nearest"] or not event["taken"] for event in layers)
    assert sum(event["taken"] for event in layers) >= 9
    assert rounded[1][-2]["share"] == 1.0


@pytest.mark.slow
def test_pictures_come_nearer_to_those_of_the_float_model(dit, student, rounded):
    wanted = draw(dit)
    before, after = (relative_l2(draw(pipe), wanted) for pipe in (student, rounded[0]))
    assert after < 0.8 * before


def test_formats_stay_what_they_were(student, rounded):
    leaves = lambda pipe: jax.tree.map(lambda a: (a.shape, a.dtype), pipe.params)
    assert jax.tree.structure(leaves(student)) == jax.tree.structure(leaves(rounded[0]))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(dit, student, rounded, tmp_path, monkeypatch):
    recipe = Recipe(quant=student.quant, stages=(STAGE,), name="gptq")
    whole = run(dit, recipe, seed=0)
    part, done = Work.part, []

    def killed(self, name, make):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        return part(self, name, make)

    monkeypatch.setattr(Work, "part", killed)
    with pytest.raises(KeyboardInterrupt):
        run(dit, recipe, seed=0, out=tmp_path / "run")
    monkeypatch.undo()
    resumed = run(dit, recipe, seed=0, out=tmp_path / "run")
    assert params_digest(resumed.params) == params_digest(whole.params)


def test_the_hessian_of_a_convolution_is_that_of_its_patches(unet, quantize):
    student = Student.of(quantize(unet, bits=4, act=None), unet.params)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 1)), jnp.float32)
    block = student.blocks(x, jnp.zeros(4), jnp.zeros(4, jnp.int32))[0]
    fixed = student.fixed(block)
    params = student.block_params(block, fixed)
    hidden = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 8, 8)), jnp.float32)
    data = Data(((hidden, jnp.ones((4, 32))), {}), jnp.zeros(()), jnp.zeros(4, jnp.int32))
    (name,) = [layer for layer in block.layers if layer.endswith("conv1")]
    found = layer_hessians(student.runner(block), params, data, {}, only=(name,), batch=2)[name]
    seen = {}

    def watch(path, module, x):
        seen[path] = np.asarray(x, np.float64)
        return x

    from qjax.calibrate.simulate import simulated

    with simulated(watch):
        block.module.apply({"params": params}, hidden, jnp.ones((4, 32)))
    padded = np.pad(seen[name], ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, a : a + 8, b : b + 8] for a in range(3) for b in range(3)]
    rows = np.concatenate(patches, axis=-1).reshape(-1, 72)
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_layers_with_too_many_inputs_are_left_and_named(dit, student):

    events = []
    stage = dataclasses.replace(STAGE, most_inputs=20)
    made = stage.run(State(dit, student), jax.random.key(0), Work(None, events.append)).student
    kept = {event["layer"]: event["inputs"] for event in events if event["event"] == "kept"}
    assert kept and all(inputs > 20 for inputs in kept.values())
    for path in kept:
        node, old = made.params, student.params
        for name in path.split("/"):
            node, old = node[name], old[name]
        np.testing.assert_array_equal(node["kernel"].qvalue, old["kernel"].qvalue)


def test_steps_that_are_not_chosen_are_asked_for(dit, student):
    recipe = Recipe(quant=student.quant, stages=(GPTQ(),), name="gptq")
    with pytest.raises(ValueError, match="whose number is not chosen: give steps"):
        run(dit, recipe)
