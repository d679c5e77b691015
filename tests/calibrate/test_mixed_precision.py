"""Mixed precision as a stage: less noise in the same size, recorded, resumable, and combined."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.fitted import quantized_kernels, with_kernels
from qjax.calibrate.layer_widths import quantized_layers, with_rules, with_widths
from qjax.calibrate.mixed_precision import MixedPrecision, costs_with_pictures
from qjax.calibrate.recipe import Recipe, State, quantize_pipeline, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.work import Work
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.plan import PlanEntry
from qjax.core.quantize import plan
from qjax.core.safetensors_io import write_tensors
from qjax.core.serialize import flatten, params_digest
from qjax.core.steps import StepTable, TableKey
from qjax.models.features import FeatureNet, FeatureNetConfig
from qjax.models.loading import load_pipeline

pytestmark = pytest.mark.usefixtures("standard_promotion")

STAGE = MixedPrecision(
    mean_bits=4.0,
    steps=3,
    guidance_scale=2.0,
    data=CalibrationSet(items=6),
    pairs=12,
    rescore=0.0,
    pictures="mse",
    batch=6,
)
RANGES = SerialParallel(
    steps=3, guidance_scale=2.0, data=CalibrationSet(items=4), fits="ranges", ranges="minmax"
)
PARTS = "stage-0-mixedprecision-parts"


def recipe_of(student, *after, **changes) -> Recipe:
    return Recipe(quant=student.quant, stages=(dataclasses.replace(STAGE, **changes), *after))


def widths(pipe) -> dict[str, int]:
    return {path: q.bits for path, q in quantized_kernels(pipe.params).items()}


def mean_bits(pipe) -> float:
    kernels = quantized_kernels(pipe.params).values()
    return sum(q.size * q.bits for q in kernels) / sum(q.size for q in kernels)


@pytest.fixture(scope="module")
def uniform(dit, quantize):
    return quantize(dit, bits=4, act=None)


@pytest.fixture(scope="module")
def log():
    return []


@pytest.fixture(scope="module")
def mixed(dit, uniform, log):
    return run(dit, recipe_of(uniform), seed=1, on_event=log.append)


@pytest.mark.slow
def test_at_equal_mean_bits_there_is_less_noise(dit, uniform, mixed, log, error):
    at_4 = [10 ** (-e["sqnr"] / 10) for e in log if e["event"] == "sensitivity" and e["bits"] == 4]
    (said,) = [e for e in log if e["event"] == "allocation"]
    assert len(at_4) == len(widths(uniform))
    assert said["optimal"] and said["noise_to_signal"] <= sum(at_4) * (1 + 1e-3)
    assert said["measured"] == pytest.approx(said["noise_to_signal"], rel=0.6)
    assert mean_bits(mixed) == pytest.approx(said["mean_bits"]) and mean_bits(mixed) <= 4.0
    assert len(set(widths(mixed).values())) > 1
    assert error(dit, mixed) < error(dit, uniform)


def test_the_log_has_a_line_for_every_layer_at_every_width(uniform, mixed, log):
    lines = [(e["layer"], e["bits"]) for e in log if e["event"] == "sensitivity"]
    assert lines == [(path, bits) for path in widths(uniform) for bits in STAGE.choices]
    (said,) = [e for e in log if e["event"] == "allocation"]
    found = list(widths(mixed).values())
    assert said["layers"] == ", ".join(f"{found.count(b)} at {b} bits" for b in STAGE.choices)
    kernels = quantized_kernels(mixed.params).values()
    assert said["bytes"] == sum(q.nbytes_packed for q in kernels)


def test_the_rules_say_how_the_student_was_made(dit, mixed, uniform):
    assert params_digest(quantize_pipeline(dit, mixed.quant).params) == params_digest(mixed.params)
    changed = {path for path, bits in widths(mixed).items() if bits != 4}
    new = mixed.quant.rules[: len(changed)]
    assert {rule.pattern for rule in new} == {re.escape(f"{path}/kernel") for path in changed}
    assert all(rule.reason == "mixed precision: 4 before" for rule in new)
    assert mixed.method != uniform.method


def test_what_is_in_float_stays_so_and_formats_stay_but_for_their_width(dit, quantize):
    student = quantize(dit, bits=4)
    found = run(dit, recipe_of(student, choices=(3, 8), mean_bits=5), seed=1)
    before, after = (quantized_kernels(p.params) for p in (student, found))
    assert before.keys() == after.keys()
    for path, q in after.items():
        assert q.act == before[path].act and q.scale.shape == before[path].scale.shape
        assert type(q) is type(before[path]) and q.scale.dtype == before[path].scale.dtype
        assert q.bits in (3, 8)


def test_choices_above_the_bits_of_all_only_protect(dit, uniform, error):
    stage = dataclasses.replace(STAGE, choices=(4, 8), mean_bits=4.5)
    state = stage.run(State(teacher=dit, student=uniform), jax.random.key(1), Work())
    found = state.student
    bits = list(widths(found).values())
    assert set(bits) == {4, 8} and mean_bits(found) <= 4.5
    before, after = (quantized_kernels(p.params) for p in (uniform, found))
    assert all(after[path] is before[path] for path in before if after[path].bits == 4)
    assert error(dit, found) < error(dit, uniform)


def test_a_budget_in_bytes_counts_what_is_stored(dit, uniform):
    stored = sum(q.nbytes_packed for q in quantized_kernels(uniform.params).values())
    found = run(dit, recipe_of(uniform, mean_bits=None, max_bytes=stored), seed=1)
    assert sum(q.nbytes_packed for q in quantized_kernels(found.params).values()) <= stored


def test_a_budget_that_nothing_fits_is_said_before_anything_is_computed(dit, uniform):
    events, recipe = [], recipe_of(uniform, mean_bits=None, max_bytes=100)
    with pytest.raises(ValueError, match="the budget must be at least .*got 100"):
        run(dit, recipe, on_event=events.append)
    assert not events


def test_it_is_saved_and_loaded_with_its_rules(mixed, tmp_path):
    mixed.save(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    assert again.quant == mixed.quant and widths(again) == widths(mixed)
    settings = {"steps": 3, "labels": [0, 1], "key": jax.random.key(0), "output": "latent"}
    np.testing.assert_array_equal(mixed(**settings), again(**settings))


def test_a_run_that_is_killed_in_any_part_ends_with_the_same_bits(
    dit, uniform, tmp_path, monkeypatch
):
    recipe = recipe_of(uniform, rescore=0.3)
    whole, parts = Work.part, []

    def count(self, name, make):
        if len(parts) == limit:
            raise KeyboardInterrupt
        parts.append(name)
        return whole(self, name, make)

    monkeypatch.setattr(Work, "part", count)
    for limit in (1, 4, 2 + len(widths(uniform))):
        parts.clear()
        with pytest.raises(KeyboardInterrupt):
            run(dit, recipe, seed=1, out=tmp_path)
        assert len(list((tmp_path / PARTS).glob("*.safetensors"))) == limit
    assert parts[-1].startswith("pictures-")
    monkeypatch.setattr(Work, "part", whole)
    resumed = run(dit, recipe, seed=1, out=tmp_path)
    assert params_digest(resumed.params) == params_digest(run(dit, recipe, seed=1).params)
    assert not list((tmp_path / PARTS).glob("*.safetensors"))
    log = [json.loads(line) for line in (tmp_path / PARTS / "log.jsonl").read_text().splitlines()]
    measured = [(e["layer"], e["bits"]) for e in log if e["event"] == "sensitivity"]
    assert len(measured) == len(set(measured))  # nothing was measured twice


def test_pictures_decide_on_the_share_that_is_asked_for(dit, uniform):
    events = []
    run(dit, recipe_of(uniform, rescore=0.3), seed=1, on_event=events.append)
    again = {e["layer"] for e in events if e["event"] == "rescore"}
    worst = sorted(
        (e["sqnr"], e["layer"]) for e in events if e["event"] == "sensitivity" and e["bits"] == 3
    )
    assert again == {layer for _, layer in worst[: len(again)]}
    assert len(again) == int(np.ceil(0.3 * len(worst)))


def test_pictures_redistribute_the_noise_of_their_layers():
    noise = np.array([[4.0, 1.0], [2.0, 1.0], [9.0, 8.0]])
    distances = np.array([[[0.1, 0.0], [0.3, 0.0]], [[0.2, 0.2], [0.2, 0.2]]])
    costs = costs_with_pictures(noise, [0, 1], distances)
    assert costs[:2].sum() == pytest.approx(noise[:2].sum())
    np.testing.assert_allclose(costs, [[2, 1], [4, 1], [9, 8]])
    blind = costs_with_pictures(noise, [1], np.zeros((1, 1, 2)))
    np.testing.assert_array_equal(blind, noise)


def test_samples_of_the_quantized_network_are_another_choice(dit, quantize):
    student = quantize(dit, bits=3)
    events = []
    found = run(dit, recipe_of(student, samples="quantized"), seed=1, on_event=events.append)
    parts = {e["part"] for e in events if e["event"] == "step"}
    assert parts == {"roll-out-float", "roll-out-quantized"} and mean_bits(found) <= 4


def test_integers_are_those_of_the_floats_that_a_stage_before_has_left(dit, uniform):
    path = "blocks_0/mlp/fc1"
    w = dit.params["blocks_0"]["mlp"]["fc1"]["kernel"]
    floats = with_kernels(dit.params, {path: 2 * w})
    student = quantize_pipeline(dit.replace(params=floats), uniform.quant)
    stage = dataclasses.replace(STAGE, choices=(3, 8), mean_bits=8.0)
    state = State(teacher=dit, student=student, floats=floats)
    after = stage.run(state, jax.random.key(0), Work())
    q = quantized_kernels(after.student.params)[path]
    assert q.bits == 8 and after.floats is floats
    np.testing.assert_allclose(q.dequantize(), 2 * w, atol=0.02)


# With other stages.


@pytest.mark.slow
def test_rounding_is_fitted_at_the_widths_that_were_chosen(dit, uniform, mixed, tmp_path):
    fit = FitSettings(iterations=20, batch=8, chunk=20, weight_rate=3e-2)
    fitting = dataclasses.replace(RANGES, fits="network", pairs=8, fit=fit)
    found = run(dit, recipe_of(uniform, fitting), seed=1, out=tmp_path)
    chosen = load_pipeline(tmp_path / "stage-0-mixedprecision")
    assert params_digest(chosen.params) == params_digest(mixed.params)
    assert widths(found) == widths(mixed) and found.quant == mixed.quant
    assert params_digest(found.params) != params_digest(mixed.params)


@pytest.mark.slow
def test_a_unet_is_scored_by_structure_and_features_and_goes_on(unet, tmp_path):
    config = FeatureNetConfig(channels=(4, 6), num_features=3, num_classes=2)
    net = FeatureNet(config).init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(net)}
    write_tensors(tmp_path / "net" / "features.safetensors", arrays, {})

    large = unet.replace(shape=(16, 16, 1))
    act = ActSpec(mode="per_step", granularity="per_tensor", symmetric=False)
    middle = Rule(pattern=r"mid_block/.*/kernel", weight=WeightSpec(bits=4), act=act)
    student = quantize_pipeline(large, QuantConfig(rules=(middle,)))
    small = {"items": 3, "labels": (0, 1, 2)}
    ranges = dataclasses.replace(RANGES, data=CalibrationSet(**small))
    recipe = recipe_of(
        student,
        ranges,
        choices=(4, 8),
        mean_bits=4.6,
        data=CalibrationSet(**small),
        pairs=3,
        batch=3,
        rescore=0.05,
        pictures="ssim",
        features=str(tmp_path / "net"),
    )
    events = []
    found = run(large, recipe, seed=1, out=tmp_path / "run", on_event=events.append)
    assert mean_bits(found) <= 4.6 and set(widths(found).values()) == {4, 8}
    assert any(e["event"] == "rescore" and e["distance"] > 0 for e in events)
    told = []
    again = run(large, recipe, seed=1, out=tmp_path / "run", on_stage=lambda *at: told.append(at))
    assert told == [(2, 2, "done")] and params_digest(again.params) == params_digest(found.params)


def test_a_second_stage_leaves_no_rule_that_decides_nothing(dit, mixed):
    layers = quantized_layers(mixed)
    bits = {path: 6 if path.endswith("fc1") else width for path, width in widths(mixed).items()}
    again = with_widths(mixed, dit.params, layers, bits)
    entries = plan(dit.params, again.quant).entries
    assert {e.path: e.weight.bits for e in entries if e.weight} == {
        f"{path}/kernel": width for path, width in bits.items()
    }
    patterns = [rule.pattern for rule in again.quant.rules]
    assert len(patterns) == len(set(patterns))
    assert with_widths(mixed, dit.params, layers, widths(mixed)) is mixed


def test_rules_stay_where_they_still_decide_something():
    def entry(path):
        return PlanEntry(path, "dense", (2, 2), None, None, None, 0, 0, "")

    spec = WeightSpec(bits=4)
    one, both, never = (Rule(pattern=p, weight=spec) for p in ("a/kernel", "[ab]/kernel", "c"))
    convs = Rule(pattern=".*", weight=spec, kind="conv")
    config = QuantConfig(rules=(convs, one, both, never))
    new = Rule(pattern="a/kernel", weight=WeightSpec(bits=8))
    found = with_rules(config, {"a/kernel": new}, [entry("a/kernel"), entry("b/kernel")])
    assert found.rules == (new, convs, both, never)


def test_ranges_stay_and_statistics_of_the_former_noise_do_not(dit, mixed):
    rows = {"x": jnp.zeros((3,))}
    table = StepTable().with_entry("quant", rows, key=TableKey(timesteps=(66, 33, 0)))
    table = table.with_entry("noise_correction", rows, key=TableKey(method=mixed.method))
    pipe = mixed.replace(step_table=table)
    bits = {path: 5 for path in widths(mixed)}
    found = with_widths(pipe, dit.params, quantized_layers(pipe), bits)
    assert list(found.step_table.entries) == ["quant"]
    alone = mixed.replace(step_table=table.drop("quant"))
    assert with_widths(alone, dit.params, quantized_layers(pipe), bits).step_table is None


# What is refused.


def test_settings_that_make_no_sense_are_refused():
    for changes, said in [
        ({"max_bytes": 9}, "one of them; got mean_bits=4.0, max_bytes=9"),
        ({"mean_bits": None}, "one of them; got mean_bits=None"),
        ({"mean_bits": 2.5}, "at least 3, the fewest bits"),
        ({"choices": (4, 7)}, r"got \[7\]"),
        ({"choices": (4, 4)}, "two widths or more"),
        ({"pairs": 0}, "got 0, 6 and 0.0"),
        ({"rescore": 1.5}, "rescore between 0 and 1"),
        ({"samples": "none"}, "samples must be float or quantized"),
        ({"pictures": "lpips"}, "pictures must be ssim or mse"),
    ]:
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(STAGE, **changes)


def test_pictures_too_small_for_the_score_are_said_at_once(dit, uniform):
    with pytest.raises(ValueError, match="cannot be scored so: .*11 x 11.*Set pictures='mse'"):
        run(dit, recipe_of(uniform, rescore=0.1, pictures="ssim"))


def test_nothing_to_give_bits_to_is_said(dit):
    with pytest.raises(ValueError, match="got 0 quantized layers"):
        run(dit, Recipe(quant=QuantConfig(), stages=(STAGE,)))


def test_a_recipe_with_it_has_a_lasting_hash(uniform):
    assert recipe_of(uniform).digest() == recipe_of(uniform).digest()
    assert recipe_of(uniform).digest() != recipe_of(uniform, mean_bits=4.1).digest()
    shuffled = dataclasses.replace(STAGE, choices=(8, 3, 6, 4))
    assert shuffled == STAGE
