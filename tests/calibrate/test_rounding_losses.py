"""What rounding is learned from: mixed inputs and the losses of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.rounding import block_loss, mix, relative_loss


def draw(seed=0, shape=(6, 4)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_mixing_keeps_each_element_with_the_probability(key):
    x, x_hat = jnp.zeros((64, 256)), jnp.ones((64, 256))
    for probability in (0.0, 0.25, 0.5, 1.0):
        kept = 1 - jax.jit(mix)(key, x, x_hat, probability=probability)
        assert np.mean(kept) == pytest.approx(probability, abs=4 * 0.5 / 128)
    a, b = (mix(key, x, x_hat) for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_mixing_passes_each_gradient_to_whom_it_took_the_value_from(key):
    call = lambda x, x_hat: jnp.sum(mix(key, x, x_hat))
    to_x, to_x_hat = jax.grad(call, argnums=(0, 1))(jnp.zeros((8, 8)), jnp.ones((8, 8)))
    np.testing.assert_array_equal(to_x + to_x_hat, 1)
    np.testing.assert_array_equal(to_x_hat, mix(key, jnp.zeros((8, 8)), jnp.ones((8, 8))))


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (2, 16, 6), (32, 6)])
@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_block_loss_sums_over_channels_and_averages_over_the_rest(shape, power):
    y, target = draw(0, shape), draw(1, shape)
    errors = np.abs(np.asarray(y, np.float64) - np.asarray(target, np.float64)) ** power
    wanted = errors.sum(axis=-1).mean()
    assert block_loss(y, target, power=power) == pytest.approx(wanted, rel=1e-5)
    twice = block_loss(jnp.repeat(y, 2, -1), jnp.repeat(target, 2, -1), power=power)
    assert twice == pytest.approx(2 * wanted, rel=1e-5)
    longer = block_loss(jnp.repeat(y, 2, 0), jnp.repeat(target, 2, 0), power=power)
    assert longer == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_losses_have_finite_gradients_where_nothing_differs(power):
    y = draw()
    for loss in (block_loss, relative_loss):
        gradient = jax.grad(loss)(y, y, power=power)
        np.testing.assert_array_equal(gradient, 0)
    assert relative_loss(jnp.zeros_like(y), jnp.zeros_like(y), power=power) == 0


@pytest.mark.parametrize("power", [2.0, 2.4])
def test_the_relative_loss_heeds_no_scale_and_is_1_for_an_output_of_zeros(power):
    y, target = draw(), draw(1)
    loss = float(relative_loss(y, target, power=power))
    assert relative_loss(8.0 * y, 8.0 * target, power=power) == pytest.approx(loss, rel=1e-5)
    assert relative_loss(jnp.zeros_like(y), target, power=power) == pytest.approx(1, rel=1e-6)


def test_losses_of_bfloat16_are_summed_in_float32():
    y = jnp.ones((512, 64), jnp.bfloat16)
    loss = block_loss(y, jnp.zeros_like(y))
    assert loss.dtype == jnp.float32 and loss == 64
