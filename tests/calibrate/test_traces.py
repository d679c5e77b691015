"""What a step is taught in its turn it unlearns while the others have theirs; shuffled it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.calibration import Calibration
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.ranges import to_fitted
from qjax.calibrate.reconstruction import FitSettings, mean_error
from qjax.calibrate.serial_parallel_settings import SerialParallelSettings
from qjax.calibrate.traces import errors_by_step, network_problem, pairs_of, rises, trace
from qjax.calibrate.work import Work

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS, ITEMS = 6, 8
SETTINGS = SerialParallelSettings(
    steps=STEPS, data=CalibrationSet(items=2 * ITEMS), batch=ITEMS, ranges="minmax"
)
# At rates of 0.003 or 0.005 these random weights show nothing of it; trained ones do
# (benchmarks/saw_tooth.py).
FIT = {"weights": "latent", "weight_rate": 1e-2, "iterations": 2 * STEPS, "batch": ITEMS}


class AfterRollOut:
    """A network at 3 bits with samples of all steps to fit, and of the first to judge by."""

    def __init__(self, pipe, student):
        run = Calibration(pipe, student, SETTINGS, jax.random.key(0), Work())
        buffer = run.roll_out("roll-out")
        run.tables = to_fitted(buffer.ranges, run.student.formats)
        self.run, self.runner = run, run.student.runner(run.student.whole())
        self.problem = network_problem(run, buffer, pairs_of(range(STEPS), range(ITEMS)))
        self.held_out = network_problem(run, buffer, pairs_of([0], range(ITEMS, 2 * ITEMS)))

    def begin(self, fit):
        student, key = self.run.student, jax.random.key(0)
        return student.begin(student.whole(), self.problem.fixed, self.run.tables, fit, key)

    def errors(self, order, seed):
        """Of step 0, before the first iteration and after each."""
        fit = FitSettings(order=order, **FIT)
        key, begin = jax.random.key(seed), self.begin(fit)
        found = trace(self.runner, self.problem, begin, fit, key, held_out=self.held_out)
        assert found.shape == (2 * STEPS + 1, STEPS)
        assert np.isnan(found[:, 1:]).all()  # of the other steps nothing is held out
        return found[:, 0]


@pytest.fixture(scope="module")
def fixed(dit, quantize):
    return AfterRollOut(dit, quantize(dit, bits=3))


@pytest.mark.slow
def test_the_error_of_step_0_rises_after_its_turn_and_does_not_with_shuffled_steps(fixed):
    teeth, last = {}, {}
    for order in ("serial", "shuffled"):
        errors = np.stack([fixed.errors(order, seed) for seed in range(8)])
        assert (errors[:, 0] == 1.0).all()
        teeth[order] = np.mean([rises(one, steps=STEPS) for one in errors], axis=0)
        last[order] = errors[:, -1].mean()
    # Later epochs add less: errors fall, and Adam averages over about ten iterations.
    assert teeth["serial"][0] > 0.3 and teeth["serial"].mean() > 0.1
    assert teeth["shuffled"][0] < 0.15 and last["shuffled"] < last["serial"]


@pytest.mark.slow
def test_errors_by_step_are_those_of_each_steps_items_though_no_batch_is_of_one_step(fixed):
    begin = fixed.begin(FitSettings(**FIT))
    found = errors_by_step(fixed.runner, fixed.problem, begin, groups=STEPS, batch=7)
    index = jnp.flatnonzero(fixed.problem.group == 3)
    inputs = jax.tree.map(lambda leaf: leaf[index], fixed.problem.args)
    alone = fixed.problem._replace(
        args=inputs, target=fixed.problem.target[index], group=fixed.problem.group[index]
    )
    expected = mean_error(fixed.runner, alone, begin, batch=len(index))
    np.testing.assert_allclose(found[3], expected, rtol=1e-3)


def test_a_rise_is_from_after_a_turn_to_before_the_next():
    # Turns at iterations 0, 3, 6 and 1, 4, 7.
    errors = np.array([9.0, 1.0, 1.5, 2.0, 1.0, 1.0, 4.0, 1.0])
    np.testing.assert_allclose(rises(errors, steps=3), [1.0, 3.0])
    np.testing.assert_allclose(rises(errors, steps=3, step=1), [1.0 / 1.5 - 1, 0.0])
    with pytest.raises(ValueError, match="an epoch of 9 iterations at least; got 7"):
        rises(errors, steps=9)
