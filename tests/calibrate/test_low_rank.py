"""Low-rank branches: the split of a matrix, the stage, its bytes, and what comes after it."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate import low_rank
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.low_rank import LowRank, low_rank_split, truncated_svd
from qjax.calibrate.recipe import Recipe, State, quantize_pipeline, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.requantize import LAYER, requantized, spec_of, with_leaves
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.time_table import TimePrecalculation
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.layers import LOW_RANK, Conv
from qjax.core.metrics import relative_l2
from qjax.core.plan import to_qtensor
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import plan, tree_bytes
from qjax.core.serialize import flatten, params_digest
from qjax.models.loading import load_pipeline
from qjax.models.lora import Factors, LoRA, attach
from qjax.models.pipeline import Pipeline
from qjax.models.retargeting import network_of
from qjax.models.time_table import time_table

pytestmark = pytest.mark.usefixtures("standard_promotion")

STAGE = LowRank(rank=2, iterations=3)
W4A8 = QuantConfig(weight=WeightSpec(bits=4), act=ActSpec())


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rounding(bits=4, **settings):
    """What integers per output channel make of a kernel."""
    spec = WeightSpec(bits=bits, **settings)
    make = functools.partial(
        to_qtensor, spec=spec, act=None, group_size=None, axes=LAYER, scale_dtype="float32"
    )
    return lambda w: make(w).dequantize()


# The split of one kernel.


def test_a_truncated_svd_is_the_best_approximation(monkeypatch):
    w = normal(60, 3) @ normal(3, 40, seed=1) + 0.01 * normal(60, 40, seed=2)
    values = np.linalg.svd(w, compute_uv=False)
    for exact_below in (512, 8):  # decomposed whole, or sketched
        monkeypatch.setattr(low_rank, "EXACT_BELOW", exact_below)
        down, up = truncated_svd(w, 3)
        error = float(jnp.linalg.norm(w - down @ up))
        assert error <= 1.001 * np.linalg.norm(values[3:])
        np.testing.assert_allclose(jnp.sum(down**2, 0), jnp.sum(up**2, 1), rtol=1e-3)


def test_outliers_of_low_rank_go_into_the_branch():
    """Two directions twenty times as large as the rest cost nearly all of the levels."""
    w = normal(64, 48) + 20 * normal(64, 2, seed=1) @ normal(2, 48, seed=2)
    found = low_rank_split(w, rounding(), 2, 4)
    assert float(found.error) < 0.1 * float(found.plain)
    assert found.down.shape == (64, 2) and found.up.dtype == jnp.float16


def test_no_branch_is_worse_than_none_and_rounds_only_help():
    w = normal(12, 10)
    errors = [float(low_rank_split(w, rounding(3), 4, n).error) for n in (1, 4)]
    assert errors == sorted(errors, reverse=True)
    on_the_grid = rounding()(w)
    split = low_rank_split(on_the_grid, rounding(), 1, 3)
    assert float(split.error) <= float(split.plain) < 1e-6


def test_more_rank_leaves_less_error_until_nothing_is_left():
    w = normal(24, 16)
    errors = [float(low_rank_split(w, rounding(), rank, 2).error) for rank in (2, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]


# The format of a QTensor, and trees.


@pytest.mark.parametrize(
    "spec, group_size",
    [
        (WeightSpec(bits=4), None),
        (WeightSpec(bits=8, granularity="per_tensor"), None),
        (WeightSpec(bits=3, symmetric=False, granularity="per_group", group_size=4), 4),
        (WeightSpec(bits=4, granularity="per_group", group_size=8, method="mse"), 8),
    ],
    ids=str,
)
def test_a_kernel_quantized_in_the_format_of_itself_is_itself(spec, group_size):
    w = normal(3, 3, 8, 6)
    q = to_qtensor(
        w, spec, act=ActSpec(), group_size=group_size, axes=LAYER, scale_dtype="bfloat16"
    )
    again = requantized(w, q, spec.method)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, again, q)
    assert spec_of(q, spec.method)[0].bits == spec.bits


def test_other_leaves_stay_the_same_objects():
    inner = {"x": jnp.zeros(2)}
    tree = {"a": {"b": inner, "c": {"kernel": 1}}, "d": inner}
    made = with_leaves(tree, {"a/c/kernel": 2, "a/c/more": 3})
    assert made["a"]["c"] == {"kernel": 2, "more": 3} and tree["a"]["c"] == {"kernel": 1}
    assert made["a"]["b"] is inner and made["d"] is inner


# The stage.


@pytest.fixture(scope="module")
def split(dit, quantize):
    """The state before and after the stage, and the log."""
    before = State(dit, quantize(dit, act=ActSpec()))
    events: list = []
    after = STAGE.run(before, jax.random.key(0), Work(None, events.append))
    return before, after, events


def draw(pipe, **settings):
    settings = {"steps": 3, "labels": np.arange(8) % 3, "key": jax.random.key(5)} | settings
    return np.asarray(pipe(**settings, output="latent"))


def effective(params, layer):
    """The float kernel that a layer with a branch stands for."""
    node = functools.reduce(lambda tree, name: tree[name], layer.split("/"), params)
    down, up, scale = (jnp.asarray(node[name], jnp.float32) for name in LOW_RANK)
    kernel = node["kernel"].dequantize() if is_qtensor(node["kernel"]) else node["kernel"]
    return kernel + jnp.tensordot(down * scale, up, 1)


@pytest.mark.slow
def test_kernels_and_branches_add_up_better_than_kernels_alone(dit, split):
    before, after, events = split
    found = [event for event in events if event["event"] == "low_rank"]
    assert len(found) == 11 and all(e["error"] < 0.95 * e["without"] for e in found)
    for event in found:
        w = dict(flatten(dit.params))[f"{event['layer']}/kernel"]
        made = effective(after.student.params, event["layer"])
        np.testing.assert_allclose(event["error"], relative_l2(made, w), rtol=1e-2)
    layer = "blocks_1/mlp/fc1"
    w = dit.params["blocks_1"]["mlp"]["fc1"]["kernel"]
    alone = before.student.params["blocks_1"]["mlp"]["fc1"]["kernel"].dequantize()
    assert relative_l2(effective(after.student.params, layer), w) < relative_l2(alone, w)
    reference = draw(dit)
    errors = [relative_l2(draw(s.student), reference) for s in split[:2]]
    assert errors[1] < 0.95 * errors[0]


def test_the_floats_lack_the_branches_and_nothing_else(dit, split):
    _, after, _ = split
    floats, whole = dict(flatten(after.floats)), dict(flatten(dit.params))
    assert floats.keys() == whole.keys()
    branched = dict(flatten(after.student.params))
    for path, leaf in floats.items():
        layer = path.rpartition("/")[0]
        if f"{layer}/{LOW_RANK[0]}" not in branched or not path.endswith("kernel"):
            assert leaf is whole[path]
            continue
        down, up = (np.asarray(branched[f"{layer}/{name}"], np.float32) for name in LOW_RANK[:2])
        np.testing.assert_allclose(leaf + down @ up, whole[path], atol=1e-5)


def test_formats_stay_and_a_branch_has_the_dtype_of_what_stays_in_float(dit, split):
    before, after, _ = split
    for path, leaf in flatten(before.student.params):
        if is_qtensor(leaf):
            other = dict(flatten(after.student.params))[path]
            assert jax.tree.structure(other) == jax.tree.structure(leaf)
    bf16 = quantize_pipeline(dit, dataclasses.replace(W4A8, float_dtype="bfloat16"))
    one = LowRank(rank=1, iterations=1, pattern="blocks_0/attn/qkv/kernel")
    made = one.run(State(dit, bf16), jax.random.key(0), Work())
    branch = made.student.params["blocks_0"]["attn"]["qkv"]
    assert {branch[name].dtype for name in LOW_RANK} == {jnp.dtype(jnp.bfloat16)}
    assert sum(LOW_RANK[0] in path for path, _ in flatten(made.student.params)) == 1


def test_convolutions_have_branches_too(unet, quantize):
    stage = dataclasses.replace(STAGE, pattern="up_blocks_0/resnets_0/conv1/kernel")
    state = State(unet, quantize(unet, act=None))
    made = stage.run(state, jax.random.key(0), Work()).student
    layer = made.params["up_blocks_0"]["resnets_0"]["conv1"]
    assert layer["lora_down"].shape == (3, 3, 32, 2)
    x, w = normal(1, 5, 5, 32), unet.params["up_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    conv = lambda node: Conv(w.shape[-1], use_bias=False).apply({"params": node}, x)
    summed = effective(made.params, "up_blocks_0/resnets_0/conv1")
    assert relative_l2(conv(layer), conv({"kernel": summed})) < 1e-5
    alone = state.student.params["up_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    assert relative_l2(summed, w) < relative_l2(alone.dequantize(), w)


def test_bytes_are_told_before_and_after(dit, split):
    before, after, _ = split
    added = tree_bytes(after.student.params) - tree_bytes(before.student.params)
    assert added == STAGE.bytes_of(plan(dit.params, before.student.quant)) > 0
    leaves = [leaf for path, leaf in flatten(after.student.params) if "lora_" in path]
    assert added == sum(leaf.nbytes for leaf in leaves)


def test_a_branch_that_saves_nothing_is_left_out_and_named(dit, quantize):
    events: list = []
    state = State(dit, quantize(dit))
    made = LowRank(rank=12, iterations=1).run(state, jax.random.key(0), Work(None, events.append))
    skipped = {event["layer"] for event in events if event["event"] == "low_rank_skipped"}
    assert "blocks_0/attn/proj" in skipped
    assert "lora_down" not in made.student.params["blocks_0"]["attn"]["proj"]
    assert made.floats["blocks_0"]["attn"]["proj"] is dit.params["blocks_0"]["attn"]["proj"]


DRAW = """
import sys, jax, numpy as np
from qjax.models.loading import load_pipeline
pipe = load_pipeline(sys.argv[1])
settings = {"steps": 3, "labels": np.arange(8) % 3, "key": jax.random.key(5)}
jax.config.update("jax_disable_most_optimizations", True)
np.save(sys.argv[2], np.asarray(pipe(**settings, output="latent")))
"""


@pytest.mark.slow
def test_a_save_draws_the_same_bits_in_a_new_process(split, tmp_path):
    made = split[1].student
    made.save(tmp_path / "saved")
    command = [sys.executable, "-c", DRAW, str(tmp_path / "saved"), str(tmp_path / "drawn.npy")]
    subprocess.run(command, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "drawn.npy"), draw(made))


@pytest.mark.slow
def test_fitting_goes_on_from_there_and_a_killed_run_ends_with_the_same_bits(
    dit, quantize, tmp_path, monkeypatch
):
    fit = SerialParallel(
        steps=2,
        data=CalibrationSet(items=8),
        pairs=16,
        batch=8,
        ranges="minmax",
        last_ranges=False,
        fit=FitSettings(iterations=60, batch=16, chunk=60, weight_rate=3e-2),
    )
    quant = quantize(dit, bits=3).quant
    rest = Rule(pattern="(blocks_1|final_modulation)/.*", reason="one block is enough")
    quant = dataclasses.replace(quant, rules=(rest, *quant.rules))
    recipe = Recipe(quant=quant, stages=(STAGE, fit))
    events: list = []
    fitted = run(dit, recipe, seed=1, on_event=events.append)
    ratios = [event["ratio"] for event in events if event["event"] == "block"]
    # Of the block's error when it is rounded to nearest.
    assert len(ratios) == 1 and ratios[0] < 0.98

    part = Work.part

    def killed(self, name, make):
        if name == stop:
            raise KeyboardInterrupt
        return part(self, name, make)

    monkeypatch.setattr(Work, "part", killed)
    stop = "branch-4"
    with pytest.raises(KeyboardInterrupt):
        run(dit, recipe, seed=1, out=tmp_path)
    stop = "roll-out-0"
    with pytest.raises(KeyboardInterrupt):
        run(dit, recipe, seed=1, out=tmp_path)
    stop = ""
    resumed = run(dit, recipe, seed=1, out=tmp_path)
    assert params_digest(resumed.params) == params_digest(fitted.params)
    begun = dict(flatten(load_pipeline(tmp_path / "stage-0-lowrank").params))
    for path, leaf in flatten(fitted.params):
        if not is_qtensor(leaf):  # branches too are what they were
            np.testing.assert_array_equal(leaf, begun[path])


def test_a_time_table_is_made_of_whole_kernels(dit):
    student = quantize_pipeline(dit, W4A8)
    stage = LowRank(rank=1, iterations=1, pattern="conditioning/time_out/kernel")
    state = stage.run(State(dit, student), jax.random.key(0), Work())
    assert "lora_down" in state.student.params["conditioning"]["time_out"]
    made = TimePrecalculation(steps=2).run(state, jax.random.key(0), Work()).student
    assert made.params["conditioning"].keys() == {"label"}
    wanted = time_table(network_of(dit), dit.params, dit.sampler.timesteps(2))
    rows = (made.step_table.entries["time"], wanted)
    np.testing.assert_allclose(*(jax.tree.leaves(row)[0] for row in rows), rtol=1e-4, atol=1e-5)


def test_what_cannot_have_a_branch_is_refused(dit, quantize):
    student = quantize(dit)
    run_stage = lambda stage, pipe: stage.run(State(dit, pipe), jax.random.key(0), Work())
    with pytest.raises(ValueError, match=r"pattern='nowhere', which takes none of blocks_0"):
        run_stage(LowRank(pattern="nowhere"), student)
    factors = Factors(np.zeros((16, 1), np.float32), np.zeros((48, 1), np.float32).T)
    lora = LoRA(layers={("blocks_0", "attn", "qkv"): factors}, source="a.safetensors")
    beside = student.replace(params=attach(student.params, lora))
    with pytest.raises(ValueError, match="nothing beside them; got blocks_0/attn/qkv/lora_down"):
        run_stage(STAGE, beside)
    stranger = Pipeline.from_apply(dit.apply, student.params, dit.sampler, dit.shape)
    with pytest.raises(ValueError, match="needs a network of this library"):
        run_stage(STAGE, stranger)
    with pytest.raises(ValueError, match="at least 1; got 0 and 10"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="regular expression; got '\\['"):
        LowRank(pattern="[")


def test_a_lora_can_be_added_to_the_result(split):
    made = split[1].student
    factors = Factors(np.ones((16, 1), np.float32), np.ones((1, 48), np.float32) / 100)
    lora = LoRA(layers={("blocks_0", "attn", "qkv"): factors}, source="a.safetensors")
    both = attach(made.params, lora)
    branch = both["blocks_0"]["attn"]["qkv"]
    assert branch["lora_down"].shape == (16, 3)
    change = effective(both, "blocks_0/attn/qkv") - effective(made.params, "blocks_0/attn/qkv")
    np.testing.assert_allclose(change, 0.01, atol=1e-4)
