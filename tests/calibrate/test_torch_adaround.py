"""The PyTorch loop that speed is compared with computes what our fit computes."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate import optimize
from qjax.calibrate.reconstruction import FitSettings
from qjax.models.dit import DiTBlock, DiTConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

pytestmark = [
    pytest.mark.torch_oracle,
    pytest.mark.usefixtures("standard_promotion"),
]

CONFIG = DiTConfig(
    sample_size=8, in_channels=1, out_channels=1, num_layers=1, num_heads=2, head_dim=16
)
SETTINGS = FitSettings(iterations=5, batch=4, chunk=5, warmup=0.2)


@pytest.fixture(scope="module")
def block():
    import _fit_problem

    rng = np.random.default_rng(1)
    args = (_fit_problem.normal(rng, 12, 16, 32), _fit_problem.normal(rng, 12, 32))
    return _fit_problem.make(DiTBlock(CONFIG), args, SETTINGS, floats="modulation/kernel", batch=4)


@pytest.mark.quick_cases("relative-*")
@pytest.mark.parametrize(("scaling", "strength"), [("relative", 1.0), ("absolute", 0.01)])
def test_five_iterations_of_both_have_the_same_losses_and_roundings(block, scaling, strength):
    pytest.importorskip("torch")
    from _torch_adaround import TorchFit

    runner, problem, begin = block
    settings = dataclasses.replace(SETTINGS, scaling=scaling, strength=strength, weight_rate=0.05)
    key, ours, batches = jax.random.key(3), [], []
    for number in range(5):
        index_key, _ = jax.random.split(jax.random.fold_in(key, number))
        batches.append(optimize.pick(settings, problem.group, 1, jnp.int32(number), index_key))
    theirs = TorchFit.of(runner, problem, begin, settings)
    expected = list(theirs.run(batches))
    (fitted,) = optimize.fit(
        runner,
        [problem],
        [begin],
        settings,
        [key],
        on_chunk=lambda done, errors: ours.extend(errors),
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    for path, v in theirs.v.items():
        # Adam divides by gradients that may be as small as rounding errors: few may differ.
        difference = np.abs(v.detach().numpy() - np.asarray(fitted.weights[path]["v"]))
        assert np.mean(difference > 1e-3) < 1e-3
