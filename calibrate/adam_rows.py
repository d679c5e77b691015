"""Adam for tables of which a step touches only some rows.

A range of a sampler step learns from the samples of that step alone. Adam's averages of other
rows must not decay while these are away, and its bias correction counts the updates of each
row by itself; with the common count the first update of a row that comes late would be far
too small or too large.

References:
  Kingma and Ba, Adam, 2015, https://arxiv.org/abs/1412.6980, algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax.core.typing import Array, Bool, Int


class RowState(NamedTuple):
    """Moments shaped as the tables, and how often each row was updated."""

    updates: Int[Array, " rows"]
    mean: Any
    square: Any


def init(tables: Any, rows: int) -> RowState:
    """The state before the first update of tables with `rows` rows, one array or many."""
    zeros = jax.tree.map(jnp.zeros_like, tables)
    return RowState(jnp.zeros((rows,), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, tables))


def update(
    gradients: Any,
    state: RowState,
    present: Bool[Array, " rows"],
    rate: float | Array,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Any, RowState]:
    """What to add to the tables, 0 in absent rows, and the state after it.

    Args:
      gradients: Tables of gradients, rows first.
      state: The state so far.
      present: Rows that the batch had.
      rate: Learning rate.
      b1: Decay of the mean.
      b2: Decay of the mean square.
      eps: Added to the root.
    """
    updates = state.updates + present.astype(jnp.int32)

    def over(row: Array, leaf: Array) -> Array:
        return row.reshape(-1, *(1,) * (leaf.ndim - 1))

    def moment(decay: float, power: int):
        def step(old: Array, gradient: Array) -> Array:
            new = decay * old + (1 - decay) * gradient**power
            return jnp.where(over(present, old), new, old)

        return step

    mean = jax.tree.map(moment(b1, 1), state.mean, gradients)
    square = jax.tree.map(moment(b2, 2), state.square, gradients)
    counted = jnp.maximum(updates, 1).astype(jnp.float32)

    def change(m: Array, v: Array) -> Array:
        m_hat = m / over(1 - b1**counted, m)
        v_hat = v / over(1 - b2**counted, v)
        return jnp.where(over(present, m), -rate * m_hat / (jnp.sqrt(v_hat) + eps), 0.0)

    return jax.tree.map(change, mean, square), RowState(updates, mean, square)


def apply(tables: Any, changes: Any) -> Any:
    """The tables with the changes added."""
    return optax.apply_updates(tables, changes)
