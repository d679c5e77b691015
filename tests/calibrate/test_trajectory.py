"""A horizon: where the float network arrives, whose ranges learn, and that the sample gets nearer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.calibration import Calibration
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import to_fitted
from qjax.calibrate.reconstruction import FitSettings
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.traces import pairs_of
from qjax.calibrate.trajectory import Unrolled, unrolled_data
from qjax.calibrate.work import Work
from qjax.models.dpm_solver import DPMSolver
from qjax.models.euler import Euler
from qjax.models.pndm import PNDM
from qjax.models.sampling import draw_noise, guided_prediction

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS, ITEMS = 3, 8
FIT = FitSettings(weights="latent", weight_rate=1e-2, iterations=60, batch=8, chunk=20)
SETTINGS = SerialParallelSettings(
    steps=STEPS,
    eta=1.0,
    guidance_scale=2.0,
    data=CalibrationSet(items=ITEMS),
    ranges="minmax",
    batch=ITEMS,
    fits="network",
    horizon=2,
    fit=FIT,
)
NO_NOISE = dataclasses.replace(SETTINGS, eta=0.0)


class AfterRollOut:
    """A calibration after its first roll-out, and the aims of its samples."""

    def __init__(self, pipe, student):
        self.events = []
        work = Work(on_event=self.events.append)
        self.run = Calibration(pipe, student, SETTINGS, jax.random.key(0), work)
        self.buffer = self.run.roll_out("first")
        self.run.tables = to_fitted(self.buffer.ranges, self.run.student.formats)
        self.pairs = pairs_of(range(STEPS), range(ITEMS))

    def data(self, horizon):
        run = self.run
        runner = Unrolled(None, run.teacher.apply, (), sampler=run.teacher.sampler)
        return unrolled_data(
            runner,
            run.teacher.params,
            self.buffer,
            run.items,
            run.rows,
            run.group,
            self.pairs,
            horizon=horizon,
            guidance_scale=run.scale,
            batch=STEPS * ITEMS,
        )


@pytest.fixture(scope="module")
def fixed(dit, quantize):
    return AfterRollOut(dit, quantize(dit, bits=3))


@pytest.fixture(scope="module")
def arrived(fixed):
    """By horizon and step, `[s, n, h, w, c]`."""
    step = fixed.pairs.step
    targets = {horizon: np.asarray(fixed.data(horizon).target) for horizon in (1, 2)}
    return {h: np.stack([x[step == i] for i in range(STEPS)]) for h, x in targets.items()}


def test_one_step_ahead_is_one_guided_step_of_the_float_network(fixed, arrived, dit):
    items, rows = fixed.run.items, fixed.run.rows
    for i in range(STEPS):
        row = {name: jnp.asarray(column[i]) for name, column in rows.items()}
        x_t = jnp.asarray(fixed.buffer.x_t[i])
        prediction = guided_prediction(
            dit.apply,
            {"params": dit.params},
            x_t,
            row["t"],
            items.told,
            items.null,
            guidance_scale=jnp.float32(2),
        )
        noise = draw_noise(items.keys, dit.shape, draw=i + 1)
        expected, _ = dit.sampler.step(row, (), x_t, prediction, noise)
        np.testing.assert_allclose(arrived[1][i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_steps_ahead_are_two_steps_of_the_pipeline(fixed, arrived, dit):
    _, trajectory = dit(
        labels=np.asarray(fixed.run.items.told),
        steps=STEPS,
        eta=1.0,
        guidance_scale=2.0,
        key=jax.random.fold_in(jax.random.key(0), 0),  # that of the calibration set
        return_trajectory=True,
    )
    np.testing.assert_allclose(arrived[1][0], trajectory.x_t[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(arrived[2][0], trajectory.x_t[2], rtol=1e-5, atol=1e-5)


def test_a_sample_at_the_end_moves_no_further(arrived):
    np.testing.assert_allclose(arrived[2][-1], arrived[1][-1], rtol=1e-6, atol=1e-6)
    assert np.abs(arrived[2][0] - arrived[1][0]).max() > 1e-2


@pytest.mark.slow
def test_a_fit_brings_the_sample_two_steps_later_nearer_and_teaches_both_steps_ranges(fixed):
    run = fixed.run
    before = run.tables
    from_noise = pairs_of([0], range(ITEMS))
    run.fit_network(fixed.buffer, from_noise, 0, FIT)
    (done,) = [event for event in fixed.events if event["event"] == "block"]
    assert done["ratio"] < 0.8  # on the integers, relative to rounding to nearest
    moved = [
        np.abs(np.asarray(run.tables[path]["log_scale"] - table["log_scale"]))
        for path, table in before.items()
    ]
    largest = np.max(moved, axis=0)
    assert largest.shape == (STEPS,) and largest[:2].min() > 1e-3 and largest[2] == 0


@pytest.mark.parametrize("sampler", [PNDM, DPMSolver])
def test_samplers_with_a_history_are_refused_by_name(dit, sampler):
    pipe = dit.replace(sampler=sampler(schedule=dit.sampler.schedule))
    with pytest.raises(ValueError, match=f"{sampler.__name__} keeps one. Use DDIM, DDPM or Euler"):
        dataclasses.replace(NO_NOISE, steps=5).check(pipe)


def test_a_sampler_without_one_is_not(dit):
    assert NO_NOISE.check(dit.replace(sampler=Euler(schedule=dit.sampler.schedule))) == STEPS


def test_horizons_that_make_no_sense_are_refused(dit):
    whole = {"fits": "network"}
    for settings, error in [
        ({"horizon": -1} | whole, "horizon must be at least 0; got -1"),
        ({"horizon": 2, "fits": "blocks"}, "need fits='network' or 'both'; got 'blocks'"),
        ({"horizon": 2, "fit": FitSettings(distillation=1.0)} | whole, "use it with horizon=0"),
    ]:
        with pytest.raises(ValueError, match=error):
            SerialParallelSettings(**settings)
    with pytest.raises(ValueError, match="at most the 3 steps of the sampler; got 4"):
        SerialParallelSettings(steps=3, horizon=4, **whole).check(dit)
