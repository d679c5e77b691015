import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.steps import StepTable, TableKey

KEY = TableKey(
    timesteps=(751, 501, 251, 1), sampler="ddim", eta=0.0, guidance_scale=1.5, method="w4a8"
)


def table(steps=4):
    quant = {"dense": {"act_scale": jnp.arange(steps, dtype=jnp.float32)}}
    return StepTable().with_entry("quant", quant, key=TableKey(timesteps=KEY.timesteps))


def test_row_takes_one_step_of_every_leaf():
    full = table().with_entry("noise_correction", {"mu": jnp.ones((4, 3))}, key=KEY)
    row = full.row(2)
    assert row["quant"]["dense"]["act_scale"] == 2.0
    assert row["noise_correction"]["mu"].shape == (3,)


def test_scan_over_entries_equals_row_by_row():
    entries = table().entries
    _, scanned = jax.lax.scan(
        lambda carry, row: (carry, row["quant"]["dense"]["act_scale"] * 2), 0, entries
    )
    by_row = [2 * table().row(i)["quant"]["dense"]["act_scale"] for i in range(4)]
    np.testing.assert_array_equal(scanned, np.stack(by_row))


def test_row_takes_a_traced_step():
    pick = jax.jit(lambda t, i: t.row(i)["quant"]["dense"]["act_scale"])
    assert pick(table(), 3) == 3.0


def test_a_pytree_whose_keys_are_static():
    leaves, treedef = jax.tree.flatten(table())
    assert len(leaves) == 1
    assert jax.tree.unflatten(treedef, leaves).keys == table().keys


def test_steps_is_the_first_axis_of_every_leaf():
    assert table().steps == 4
    assert StepTable().steps == 0


def test_a_run_at_the_fitted_settings_passes():
    full = table().with_entry("noise_correction", {"k": jnp.zeros(4)}, key=KEY)
    full.check(KEY)


def test_an_entry_ignores_settings_it_does_not_depend_on():
    other = TableKey(timesteps=KEY.timesteps, sampler="ddpm", eta=1.0, guidance_scale=4.0)
    table().check(other)


def test_check_names_every_entry_setting_both_values_and_the_way_out():
    full = table().with_entry("noise_correction", {"k": jnp.zeros(4)}, key=KEY)
    run = TableKey(timesteps=(999, 666, 333, 0), sampler="ddim", eta=1.0, guidance_scale=7.5)
    with pytest.raises(ValueError) as error:
        full.check(run)
    message = str(error.value)
    for part in (
        "'quant'",
        "'noise_correction'",
        "(751, 501, 251, 1)",
        "(999, 666, 333, 0)",
        "step 0: 751 and 999",
        "eta was 0.0, the run has 1.0",
        "guidance_scale was 1.5, the run has 7.5",
        "drop('quant', 'noise_correction')",
    ):
        assert part in message
    assert "sampler was" not in message


def test_check_counts_rows_even_without_fitted_timesteps():
    anywhere = StepTable().with_entry("quant", {"scale": jnp.ones(4)}, key=TableKey())
    anywhere.check(TableKey(timesteps=(3, 2, 1, 0)))
    with pytest.raises(ValueError, match="4 rows, the run 2 steps"):
        anywhere.check(TableKey(timesteps=(1, 0)))


def test_long_timesteps_that_differ_in_the_middle_say_where():
    fitted = tuple(range(50, 0, -1))
    run = (*fitted[:20], 7.5, *fitted[21:])
    (problem,) = TableKey(timesteps=fitted).mismatch(TableKey(timesteps=run))
    assert "50 steps" in problem and "step 20: 30 and 7.5" in problem


def test_timesteps_compare_by_value_not_by_type():
    assert not TableKey(timesteps=(5.0, 1.0)).mismatch(TableKey(timesteps=np.array([5, 1])))


def test_with_entry_replaces_the_entry_and_its_key():
    again = table().with_entry("quant", {"scale": jnp.ones(4)}, key=KEY)
    assert list(again.entries) == ["quant"]
    assert again.key("quant") == KEY
    assert table().key("quant") != KEY


def test_drop_leaves_the_rest():
    full = table().with_entry("noise_correction", {"k": jnp.zeros(4)}, key=KEY)
    rest = full.drop("noise_correction")
    assert list(rest.entries) == ["quant"] and len(rest.keys) == 1
    with pytest.raises(KeyError, match="time"):
        full.drop("time")


@pytest.mark.parametrize(
    "value",
    [{"k": np.zeros(3)}, {"k": np.zeros(())}, {}, {"k": np.zeros(4), "mu": np.zeros((2, 4))}],
)
def test_an_entry_without_one_row_a_step_raises(value):
    with pytest.raises(ValueError, match="first axis"):
        table().with_entry("noise_correction", value, key=TableKey())


def test_rows_must_be_as_many_as_the_keys_timesteps():
    with pytest.raises(ValueError, match="key.timesteps"):
        table().with_entry("time", np.zeros((4, 2)), key=TableKey(timesteps=(1, 0)))


def test_an_entry_cannot_hide_the_parameters():
    with pytest.raises(ValueError, match="name='params'"):
        table().with_entry("params", np.zeros((4, 2)), key=TableKey())
