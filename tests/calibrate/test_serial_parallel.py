"""Serial to parallel as a whole: it helps, it can be killed, and it says what is wrong."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qjax.calibrate import recipe as recipes
from qjax.calibrate.data import CalibrationSet, timesteps_of
from qjax.calibrate.recipe import Recipe, quantize_pipeline, run
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel import SerialParallel
from qjax.calibrate.work import Work
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.serialize import params_digest
from qjax.models.loading import load_pipeline

pytestmark = pytest.mark.usefixtures("standard_promotion")

STAGE = SerialParallel(
    steps=3,
    guidance_scale=2.0,
    data=CalibrationSet(items=8),
    pairs=24,
    batch=8,
    ranges="minmax",
    fit=FitSettings(iterations=60, batch=16, chunk=20, weight_rate=3e-2),
)


def recipe_of(pipe, **changes) -> Recipe:
    return Recipe(quant=pipe.quant, stages=(dataclasses.replace(STAGE, **changes),), name="s2p")


@pytest.fixture(scope="module")
def student(dit, quantize):
    return quantize(dit, bits=3)


@pytest.fixture(scope="module")
def fitted(dit, student):
    return run(dit, recipe_of(student), seed=1)


@pytest.fixture(scope="module")
def ranges_only(dit, student):
    return run(dit, recipe_of(student, fits="ranges"), seed=1)


def test_fitting_blocks_lowers_the_error_of_new_samples(dit, fitted, ranges_only, error):
    assert error(dit, fitted) < 0.9 * error(dit, ranges_only)


@pytest.mark.slow
def test_fitting_the_network_lowers_it_too(dit, student, ranges_only, error):
    fit = dataclasses.replace(STAGE.fit, iterations=200)
    whole = run(dit, recipe_of(student, fits="network", refreshes=2, fit=fit), seed=1)
    assert error(dit, whole) < 0.99 * error(dit, ranges_only)


@pytest.mark.slow
def test_at_8_bits_nothing_gets_worse(dit, quantize, error):
    student = quantize(dit, bits=8)
    before = run(dit, recipe_of(student, fits="ranges"), seed=1)
    after = run(dit, recipe_of(student), seed=1)
    assert error(dit, after) < 1.1 * error(dit, before) + 1e-3


def test_the_table_has_a_row_for_every_step_and_its_key(fitted, student):
    table = fitted.step_table
    assert table.steps == 3 and table.key("quant").timesteps == (66, 33, 0)
    row = table.row(0)["quant"]["blocks_0"]["attn"]["qkv"]
    assert {"act_scale", "act_zero_point", "act_qmin", "act_qmax"} == row.keys()
    with pytest.raises(ValueError, match="timesteps were"):
        fitted(labels=[0], steps=4, key=jax.random.key(0))
    assert params_digest(fitted.params) != params_digest(student.params)


def test_it_is_saved_and_loaded_with_its_rows(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    settings = {"steps": 3, "labels": [0, 1], "key": jax.random.key(0), "output": "latent"}
    np.testing.assert_array_equal(fitted(**settings), again(**settings))


def test_a_run_that_is_killed_in_any_part_ends_with_the_same_bits(
    dit, student, fitted, tmp_path, monkeypatch
):
    whole, parts = Work.part, []

    def count(self, name, make):
        if len(parts) == limit:
            raise KeyboardInterrupt
        parts.append(name)
        return whole(self, name, make)

    monkeypatch.setattr(Work, "part", count)
    for limit in (1, 2, 3):
        parts.clear()
        with pytest.raises(KeyboardInterrupt):
            run(dit, recipe_of(student), seed=1, out=tmp_path)
        kept = list((tmp_path / "stage-0-serialparallel-parts").glob("*.safetensors"))
        assert len(kept) == limit
    monkeypatch.setattr(Work, "part", whole)
    resumed = run(dit, recipe_of(student), seed=1, out=tmp_path)
    assert params_digest(resumed.params) == params_digest(fitted.params)
    for a, b in zip(
        jax.tree.leaves(dict(resumed.step_table.entries)),
        jax.tree.leaves(dict(fitted.step_table.entries)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert not list((tmp_path / "stage-0-serialparallel-parts").glob("*.safetensors"))
    log = (tmp_path / "stage-0-serialparallel-parts" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in log]
    assert {"step", "fit", "block", "read", "wrote"} <= set(events)


def test_a_full_disk_is_said_and_earlier_parts_stay(dit, student, tmp_path, monkeypatch):
    from qjax.calibrate import work

    written = []

    def fill(path, tensors, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        return real(path, tensors, metadata)

    real = work.write_tensors
    monkeypatch.setattr(work, "write_tensors", fill)
    with pytest.raises(OSError, match="No space left"):
        run(dit, recipe_of(student), seed=1, out=tmp_path)
    assert [path.exists() for path in written] == [True, True]
    assert not (tmp_path / "final").exists()


def test_events_tell_of_progress(dit, student):
    events = []
    run(dit, recipe_of(student, fits="ranges"), seed=1, on_event=events.append)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3]


def test_nothing_to_calibrate_is_said(dit):
    plain = Recipe(quant=QuantConfig(), stages=(STAGE,))
    with pytest.raises(ValueError, match="no layer of this pipeline is quantized"):
        run(dit, plain)


def test_steps_that_share_a_range_share_a_row(dit, student):
    shared = run(dit, recipe_of(student, fits="ranges", groups=1), seed=1)
    for leaf in jax.tree.leaves(shared.step_table.entries["quant"]):
        assert len(set(np.asarray(leaf).tolist())) == 1


@pytest.mark.slow
def test_the_same_recipe_in_another_profile_runs(dit, student, ranges_only, error):
    latent = FitSettings(iterations=60, batch=16, chunk=20, weights="latent", weight_rate=3e-3)
    assert error(dit, run(dit, recipe_of(student, fit=latent), seed=1)) < error(dit, ranges_only)


def test_a_recipe_has_a_lasting_hash(student):
    assert recipe_of(student).digest() == recipe_of(student).digest()
    assert recipe_of(student).digest() != recipe_of(student, refreshes=2).digest()


# Calibration sets.


def test_items_do_not_depend_on_how_many_there_are(dit, key):
    few = CalibrationSet(items=3).draw(dit, key, guidance_scale=2.0)
    many = CalibrationSet(items=7).draw(dit, key, guidance_scale=2.0)
    np.testing.assert_array_equal(few.x_T, many.x_T[:3])
    assert few.told.tolist() == [0, 1, 2] and few.null.tolist() == [3, 3, 3]


def test_sets_that_do_not_suit_the_model_are_refused(dit, key):
    with pytest.raises(ValueError, match="reads labels, not prompts"):
        CalibrationSet(prompts=("a cat",)).draw(dit, key)
    with pytest.raises(ValueError, match="items must be at least 1"):
        CalibrationSet(items=0)


def test_timesteps_are_spread_evenly_with_both_ends():
    assert timesteps_of(10, 4).tolist() == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="between 1 and steps=3; got 4"):
        timesteps_of(3, 4)


def test_quantizing_alone_is_what_the_stage_begins_with(dit, student):
    assert params_digest(quantize_pipeline(dit, recipe_of(student)).params) == params_digest(
        student.params
    )
    assert recipes.RUN == "run.json" and WeightSpec(bits=3).bits == 3
