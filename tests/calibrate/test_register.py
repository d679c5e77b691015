"""Online: what is in the register, that its samples are the sampler's, and that fitting there helps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.calibration import Calibration
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import to_fitted
from qjax.calibrate.recipe import Recipe, run
from qjax.calibrate.reconstruction import FitSettings, Problem
from qjax.calibrate.register import Register, lanes
from qjax.calibrate.rollout import roll_out
from qjax.calibrate.serial_parallel import SerialParallel, SerialParallelSettings
from qjax.calibrate.work import Work
from qjax.core.metrics import relative_l2

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 3
SETTINGS = {
    "steps": STEPS,
    "guidance_scale": 2.0,
    "eta": 1.0,
    "data": CalibrationSet(items=4),
    "ranges": "minmax",
}
FIT = FitSettings(weights="latent", weight_rate=1e-2, iterations=60, batch=12, chunk=20)


class Online:
    """A quantized network after a roll-out, and registers that it moves samples in."""

    def __init__(self, pipe, student):
        settings = SerialParallelSettings(**SETTINGS)
        self.run = Calibration(pipe, student, settings, jax.random.key(0), Work())
        self.buffer = self.run.roll_out("first")
        tables = to_fitted(self.buffer.ranges, self.run.student.formats)
        block = self.run.student.whole()
        fixed = self.run.student.fixed(block)
        fit = FitSettings(weights="nearest")
        self.fitted = self.run.student.begin(block, fixed, tables, fit, jax.random.key(0))
        params = self.run.student.block_params(block, fixed)
        zero = jnp.zeros((1,), jnp.int32)
        self.problem = Problem(params, fixed, None, zero, zero, jnp.float32(1))

    def register(self, slots, items=None):
        run = self.run
        return Register(
            run.student.network(run.teacher, "minmax"),
            run.student.runner(run.student.whole()),
            run.rows,
            run.group,
            run.scale,
            lanes(jax.random.key(7), run.items, 2 * slots if items is None else items),
            slots,
        )

    def walk(self, register, shifts):
        """The slots when filled and after every shift."""
        slots = register.fill(self.problem, self.fitted)
        yield slots
        for count in range(shifts):
            slots = register.shift(slots, self.problem, self.fitted, count)
            yield slots


@pytest.fixture(scope="module")
def student(dit, quantize):
    return quantize(dit, bits=3)


@pytest.fixture(scope="module")
def online(dit, student):
    return Online(dit, student)


def test_a_register_holds_every_step_once_filled_and_after_every_shift(online):
    entered = []
    for slots in online.walk(online.register(STEPS), 5):
        assert [slot.step for slot in slots] == [0, 1, 2]
        assert {slot.x_t.shape for slot in slots} == {(2, 4, 4, 2)}
        entered.append(np.asarray(slots[0].x_t))
    # New noise each time, of no item before it, nor of the calibration set.
    noise = np.concatenate([*entered, np.asarray(online.run.items.x_T)]).reshape(16, -1)
    assert len(np.unique(noise, axis=0)) == 16
    assert np.abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1.0, abs=0.1)


def test_its_samples_are_those_of_a_plain_roll_out_of_the_same_network(online):
    *_, slots = online.walk(online.register(STEPS), 4)
    run = online.run
    for slot in slots[1:]:
        plain = roll_out(
            run.student.network(run.teacher, "minmax"),
            run.student.params,
            slot.items,
            run.rows,
            group=run.group,
            guidance_scale=run.scale,
            ranges=online.buffer.ranges,
        )
        np.testing.assert_allclose(slot.x_t, plain.x_t[slot.step], rtol=1e-5, atol=1e-5)


def test_the_float_answers_to_its_samples_are_what_is_fitted_to(online, dit):
    register = online.register(STEPS)
    (slots,) = online.walk(register, 0)
    data = register.data(slots, (dit.apply, dit.params))
    (x_t, t, labels), _ = data.inputs
    assert data.group.tolist() == 2 * [0, 0, 1, 1, 2, 2]
    assert t.tolist() == 2 * [66, 66, 33, 33, 0, 0] and set(labels[6:].tolist()) == {3}
    np.testing.assert_array_equal(x_t[:6], x_t[6:])  # both halves of guidance
    expected = dit.apply({"params": dit.params}, x_t, t, labels)
    np.testing.assert_allclose(data.target, expected, rtol=1e-4, atol=1e-5)


def test_with_one_slot_the_steps_follow_each_other(online):
    register = online.register(1)
    seen = [[slot.step for slot in slots] for slots in online.walk(register, 7)]
    assert seen == [[0], [1], [2], [0], [1], [2], [0], [1]]
    starts = [np.asarray(s[0].x_t) for s in online.walk(register, 6) if s[0].step == 0]
    assert len(np.unique(np.stack(starts).reshape(3, -1), axis=0)) == 3


def test_registers_that_cannot_be_filled_are_refused(online):
    with pytest.raises(ValueError, match="one slot, or one for each of the 3 steps; got 2"):
        online.register(2)
    with pytest.raises(ValueError, match="a multiple of the register's 3 slots; got 7"):
        online.register(3, items=7)
    with pytest.raises(ValueError, match="schedule='serial' fits the network online.*'blocks'"):
        SerialParallelSettings(schedule="serial")


@pytest.mark.slow
def test_fitting_online_lowers_the_error_of_new_samples(dit, student):
    def made(**changes):
        stage = SerialParallel(**SETTINGS | changes)
        events = []
        pipe = run(dit, Recipe(quant=student.quant, stages=(stage,)), on_event=events.append)
        shares = [event["share"] for event in events if "share" in event]
        assert shares == sorted(shares) and shares[-1] == 1.0
        return pipe

    def latents(pipe):
        labels = np.arange(32) % 3
        settings = {"steps": STEPS, "eta": 1.0, "guidance_scale": 2.0, "output": "latent"}
        return np.asarray(pipe(labels=labels, key=jax.random.key(99), **settings))

    error = lambda pipe: relative_l2(latents(pipe), latents(dit))
    ranges = error(made(fits="ranges"))
    online = {"fits": "network", "fit": FIT, "shift_every": 2}
    found = {name: error(made(schedule=name, **online)) for name in ("register", "serial")}
    assert found["register"] < 0.9 * ranges and found["serial"] < 0.97 * ranges, (found, ranges)


@pytest.mark.slow
def test_one_seed_is_one_result_online(dit, student):
    fit = dataclasses.replace(FIT, iterations=6)
    online = SETTINGS | {"schedule": "register", "fits": "network", "fit": fit, "shift_every": 2}
    settings = SerialParallelSettings(**online)
    pipes = [Calibration(dit, student, settings, jax.random.key(3), Work()).run() for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, pipes[0].params, pipes[1].params)
