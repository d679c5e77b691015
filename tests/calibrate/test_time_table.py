"""Time information precalculation: a pipeline that draws, saves, loads and retargets its table."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.recipe import Recipe, State, quantize_pipeline, run
from qjax.calibrate.time_table import TimePrecalculation
from qjax.calibrate.work import Work
from qjax.core import manifest, serialize
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.safetensors_io import open_tensors
from qjax.core.steps import StepTable, TableKey
from qjax.models.class_embedder import ClassEmbedder, ClassEmbedderConfig
from qjax.models.components import Component
from qjax.models.conditioners import ClassConditioner
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.loading import load_pipeline
from qjax.models.pipeline import Pipeline, Source
from qjax.models.retargeting import precalculate_time, resample_rows
from qjax.models.samplers import DDIM, PNDM
from qjax.models.saving_time import SIDE_FILE
from qjax.models.schedules import Schedule
from qjax.models.time_table import drop_time_layers, replaced_layers, time_table
from qjax.models.unet2d_condition_config import UNet2DConditionConfig

STEPS = 4
LDM = UNet2DConditionConfig(
    sample_size=4,
    block_out_channels=(4,),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=2,
    cross_attention_dim=6,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
).to_diffusers()
DIT = DiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    num_classes=3,
).to_diffusers()
CLASSES = ClassEmbedderConfig(num_classes=3, embed_dim=6)
SAMPLER = DDIM(schedule=Schedule.linear(100, 1e-3, 0.1), clip_sample=False)
W8 = QuantConfig(weight=WeightSpec(bits=8))


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), tree)


@functools.cache
def float_pipeline(name):
    """Latent diffusion told a class, or a DiT, with random weights."""
    config = {"ldm": LDM, "dit": DIT}[name]
    denoiser = build_denoiser(config["_class_name"], config)
    fields = {**denoiser.fields, "null_label": 3, "num_labels": 3}
    if name == "ldm":
        embedder = ClassEmbedder(CLASSES)
        fields["conditioner"] = ClassConditioner(
            component=Component(
                class_name="ClassEmbedder",
                config=CLASSES.to_diffusers(),
                model=embedder,
                params=random_like({"embedding": {"embedding": jnp.zeros((4, 6))}}),
            )
        )
    return Pipeline.from_apply(
        denoiser.model.apply,
        random_like(abstract_params(denoiser)),
        SAMPLER,
        source=Source(model=config["_class_name"], config=config, name=name),
        **fields,
    )


def network(pipe):
    return pipe.apply.__self__


def tabulated(pipe, **settings):
    """The float pipeline with a table in place of its time layers."""
    return precalculate_time(pipe, pipe.params, **{"steps": STEPS, "keep": "float32"} | settings)


def draw(pipe, *, steps=STEPS, **settings):
    key = jax.random.key(1)
    return pipe(
        labels=[0, 2], guidance_scale=2.0, steps=steps, key=key, output="latent", **settings
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("name", [pytest.param("ldm", marks=pytest.mark.slow), "dit"])
def test_a_trajectory_with_a_table_is_that_of_the_float_time_path(name):
    pipe = float_pipeline(name)
    if name == "ldm":  # a sampler that visits one timestep twice
        pipe = pipe.replace(sampler=PNDM(schedule=SAMPLER.schedule, skip_prk_steps=True))
    timesteps = pipe.sampler.timesteps(STEPS)
    student = tabulated(pipe)
    assert student.step_table.steps == len(timesteps) == STEPS + (name == "ldm")
    assert student.step_table.key("time") == TableKey(timesteps=tuple(timesteps.tolist()))
    plain, found = (draw(p, return_trajectory=True)[1] for p in (pipe, student))
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_stage_makes_the_table_of_the_teachers_floats_and_drops_the_students_layers():
    teacher = float_pipeline("ldm")
    student = quantize_pipeline(teacher, W8)
    assert any(
        is_qtensor(leaf) for leaf in leaves(drop_time_layers(network(teacher), student.params)[1])
    )
    state = TimePrecalculation(steps=STEPS).run(State(teacher, student), jax.random.key(0), Work())
    made = state.student
    assert state.teacher is teacher
    assert_same(made.params, drop_time_layers(network(teacher), student.params)[0])
    expected = time_table(network(teacher), teacher.params, SAMPLER.timesteps(STEPS))
    assert_same(made.step_table.entries["time"], expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(made.time_layers)} == {np.dtype(np.float16)}
    assert made.source.sha256 == serialize.params_digest(teacher.params)
    step = made.predict(jnp.ones((1, *made.shape)), 75, 0, row=made.step_table.row(0))
    assert np.isfinite(step).all()


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=is_qtensor)


def test_the_table_stands_beside_activation_ranges_of_the_same_steps():
    act = ActSpec(mode="per_step", granularity="per_tensor")
    rule = Rule(pattern="final_linear/kernel", weight=WeightSpec(bits=8), act=act)
    teacher = float_pipeline("dit")
    student = quantize_pipeline(teacher, QuantConfig(rules=(rule,)))
    ranges = {"final_linear": {"act_scale": jnp.full((STEPS,), 0.05)}}
    key = TableKey(timesteps=tuple(SAMPLER.timesteps(STEPS).tolist()))
    table = StepTable().with_entry("quant", ranges, key=key)
    student = student.replace(step_table=table)
    stage = TimePrecalculation(steps=STEPS)
    made = stage.run(State(teacher, student), jax.random.key(0), Work()).student
    assert sorted(made.step_table.entries) == ["quant", "time"]
    np.testing.assert_allclose(draw(made), draw(student), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"steps=5.*'quant': timesteps"):
        TimePrecalculation(steps=5).run(State(teacher, student), jax.random.key(0), Work())


def test_a_recipe_with_the_stage_runs_saves_and_resumes(tmp_path):
    pipe = float_pipeline("dit")
    recipe = Recipe(quant=W8, stages=(TimePrecalculation(steps=STEPS),))
    made = run(pipe, recipe, out=tmp_path / "run")
    again = run(pipe, recipe, out=tmp_path / "run")
    assert_same(again.params, made.params)
    assert_same(again.time_layers, made.time_layers)
    assert np.array_equal(draw(again), draw(made))


@dataclasses.dataclass(frozen=True)
class Never:
    """A stage that must not run."""

    def run(self, state, key, work):
        raise AssertionError("a stage ran")


def test_a_network_without_a_port_is_refused_before_a_stage_runs(tmp_path):
    apply = lambda variables, x_t, t, labels: x_t @ variables["params"]["kernel"]
    pipe = Pipeline.from_apply(apply, {"kernel": jnp.ones((4, 4))}, SAMPLER, (8, 8, 4))
    recipe = Recipe(quant=W8, stages=(Never(), TimePrecalculation(steps=STEPS)))
    with pytest.raises(ValueError, match="has no source.*add a port of the network"):
        run(pipe, recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_with_nothing_that_depends_on_t_alone_is_refused_before_a_stage_runs():
    model = build_denoiser("UNet2DConditionModel", LDM | {"time_cond_proj_dim": 4}).model
    pipe = Pipeline.from_apply(model.apply, {}, SAMPLER, (4, 4, 4))
    recipe = Recipe(quant=QuantConfig(), stages=(Never(), TimePrecalculation(steps=STEPS)))
    with pytest.raises(ValueError, match="UNet2DConditionModel has none: its guidance"):
        run(pipe, recipe)


DRAW = """
import sys, jax, numpy as np
from qjax.models.loading import load_pipeline
pipe = load_pipeline(sys.argv[1])
images = pipe(labels=[0, 2], guidance_scale=2.0, steps=4, key=jax.random.key(1), output="latent")
np.save(sys.argv[2], np.asarray(images))
"""


@pytest.mark.slow
def test_a_save_draws_the_same_bits_in_a_new_process_without_float_time_weights(tmp_path):
    made = tabulated(float_pipeline("ldm"), keep=None)
    made.save(tmp_path / "saved")
    names = open_tensors(tmp_path / "saved" / serialize.WEIGHTS)
    assert not any("time_emb_proj/kernel" in name or "linear_1" in name for name in names)
    assert not (tmp_path / "saved" / SIDE_FILE).exists()
    record = manifest.read_manifest(tmp_path / "saved")["record"]
    assert record["time"]["dropped"] == list(replaced_layers(network(made)))
    command = [sys.executable, "-c", DRAW, str(tmp_path / "saved"), str(tmp_path / "drawn.npy")]
    subprocess.run(command, check=True)
    assert np.array_equal(np.load(tmp_path / "drawn.npy"), draw(made))


def test_a_file_is_smaller_by_the_bytes_of_the_layers(tmp_path):
    pipe = float_pipeline("ldm")
    made = tabulated(pipe)
    pipe.save(tmp_path / "whole")
    made.save(tmp_path / "dropped")
    made.replace(time_layers=None).save(tmp_path / "bare")
    size = lambda name, file: sum(t.nbytes for t in open_tensors(tmp_path / name / file).values())
    weights = lambda name: size(name, serialize.WEIGHTS)
    table = sum(leaf.nbytes for leaf in jax.tree.leaves(made.step_table.entries))
    layers = drop_time_layers(network(pipe), pipe.params)[1]
    dropped = sum(leaf.nbytes for leaf in jax.tree.leaves(layers))
    assert weights("whole") - (weights("dropped") - table) == dropped > 0
    assert weights("bare") == weights("dropped") and size("dropped", SIDE_FILE) == dropped
    assert load_pipeline(tmp_path / "bare").time_layers is None
    assert_same(load_pipeline(tmp_path / "dropped").time_layers, jax.tree.map(np.asarray, layers))


def test_retargeting_gives_the_table_of_a_fresh_pipeline(tmp_path):
    pipe = float_pipeline("dit")
    tabulated(pipe).save(tmp_path / "saved")
    loaded = load_pipeline(tmp_path / "saved")
    with pytest.raises(ValueError, match="'time': timesteps"):
        draw(loaded, steps=6)
    retargeted, fresh = loaded.retarget(steps=6), tabulated(pipe, steps=6)
    assert_same(retargeted.step_table.entries["time"], fresh.step_table.entries["time"])
    assert retargeted.step_table.keys == fresh.step_table.keys
    np.testing.assert_allclose(draw(retargeted, steps=6), draw(pipe, steps=6), rtol=1e-5, atol=1e-5)
    lost = loaded.replace(step_table=None).retarget(steps=6)
    assert_same(lost.step_table.entries, retargeted.step_table.entries)


def test_layers_kept_in_half_precision_give_nearly_the_same_table(tmp_path):
    pipe = float_pipeline("dit")
    half = tabulated(pipe, keep="float16").retarget(steps=6).step_table.entries["time"]
    full = tabulated(pipe, steps=6).step_table.entries["time"]
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * np.abs(b).max())


def test_without_the_side_file_a_pipeline_draws_and_retargeting_names_the_file(tmp_path):
    made = tabulated(float_pipeline("dit"))
    made.save(tmp_path / "saved")
    (tmp_path / "saved" / SIDE_FILE).unlink()
    loaded = load_pipeline(tmp_path / "saved")
    assert np.array_equal(draw(loaded), draw(made))
    assert loaded.retarget(steps=STEPS).step_table.keys == made.step_table.keys
    with pytest.raises(
        ValueError, match=r"conditioning/time_out were dropped and time.safetensors"
    ):
        loaded.retarget(steps=6)


def test_a_side_file_of_another_model_is_refused(tmp_path):
    pipe = float_pipeline("dit")
    other = pipe.replace(params=jax.tree.map(lambda leaf: 2 * leaf, pipe.params))
    tabulated(pipe).save(tmp_path / "one")
    tabulated(other).save(tmp_path / "other")
    theirs = (tmp_path / "other" / SIDE_FILE).read_bytes()
    (tmp_path / "one" / SIDE_FILE).write_bytes(theirs)
    with pytest.raises(ValueError, match=r"time.safetensors is not what was saved"):
        load_pipeline(tmp_path / "one")


def test_a_save_that_lacks_other_layers_is_refused(tmp_path):
    made = tabulated(float_pipeline("dit"))
    made.replace(params={k: v for k, v in made.params.items() if k != "final_linear"}).save(
        tmp_path / "saved"
    )
    with pytest.raises(ValueError, match="missing final_linear/bias"):
        load_pipeline(tmp_path / "saved")


def test_retargeting_resamples_ranges_and_says_what_it_leaves_out():
    pipe = tabulated(float_pipeline("dit"))
    key = pipe.step_table.key("time")
    ranges = {"final_linear": {"act_scale": jnp.arange(1.0, 5.0)}}
    table = pipe.step_table.with_entry("quant", ranges, key=key)
    table = table.with_entry("noise_correction", {"k": jnp.zeros(STEPS)}, key=key)
    pipe = pipe.replace(step_table=table)
    assert pipe.retarget(steps=STEPS).step_table.keys == table.keys
    with pytest.warns(UserWarning, match="left out what was fitted for another run: 'noise_corr"):
        made = pipe.retarget(steps=2)
    assert sorted(made.step_table.entries) == ["quant", "time"]
    (scale,) = jax.tree.leaves(made.step_table.entries["quant"])
    # Steps (50, 0) of (75, 50, 25, 0).
    assert scale.tolist() == [2.0, 4.0]
    other = table.with_entry("quant", ranges, key=dataclasses.replace(key, method="w4"))
    with pytest.raises(ValueError, match="only the timesteps differ; got method was 'w4'"):
        pipe.replace(step_table=other, method="w8").retarget(steps=2)


def test_resampling_takes_the_row_of_the_nearest_noise():
    alpha_bar = Schedule.linear(1000, 1e-4, 0.02).alpha_bar
    old, new = np.arange(999, -1, -50), np.arange(999, -1, -25)
    rows = resample_rows({"t": jnp.asarray(old)}, alpha_bar[old], alpha_bar[new])["t"]
    assert np.abs(np.asarray(rows) - new).max() <= 30
    assert np.array_equal(rows[::2], old)
    same = resample_rows(np.arange(20), alpha_bar[old], alpha_bar[old])
    assert np.array_equal(same, np.arange(20))
    assert resample_rows(np.arange(3), [0.0, 0.5, 1.0], [0.0, 1.0, 0.4]).tolist() == [0, 2, 1]


def test_pipelines_that_cannot_have_a_table_are_refused_by_name():
    gain = lambda variables, x_t, t, labels: variables["params"]["gain"] * x_t
    stranger = Pipeline.from_apply(gain, {"gain": jnp.ones(())}, SAMPLER, (4, 4, 1))
    with pytest.raises(ValueError, match="from_apply with .*lambda.* and has no source"):
        tabulated(stranger)
    pipe = float_pipeline("dit")
    with pytest.raises(ValueError, match="keep must be"):
        tabulated(pipe, keep="int8")
    large = jax.tree.map(lambda leaf: 1e6 * leaf, pipe.params)
    with pytest.raises(ValueError, match="must fit float16; conditioning/time_in/bias"):
        tabulated(pipe.replace(params=large), keep="float16")
    time_in = {**pipe.params["conditioning"]["time_in"], "lora_down": jnp.ones((256, 1))}
    beside = {**pipe.params, "conditioning": {**pipe.params["conditioning"], "time_in": time_in}}
    with pytest.raises(ValueError, match="got conditioning/time_in/lora_down. Fuse it"):
        tabulated(pipe.replace(params=beside))


def test_a_run_without_its_table_says_how_to_get_one():
    made = tabulated(float_pipeline("dit")).replace(step_table=None)
    with pytest.raises(ValueError, match=r"conditioning/time_out is in neither.*pipe\.retarget"):
        draw(made)
