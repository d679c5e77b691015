"""A hash of a network that has no name: of the program it is."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from qjax.models.pipeline import Pipeline

__all__ = ["network_digest"]


def network_digest(pipe: Pipeline) -> str:
    """Hash of the program (StableHLO) that a pipeline's network is, for one sample.

    It is that of the computation alone: names, comments and the values of the parameters change
    nothing, shapes and dtypes do. Another version of jax may write the same computation otherwise.

    Args:
      pipe: The pipeline; of a step table the first row.
    """
    table = {} if pipe.step_table is None else pipe.step_table.entries
    row = jax.tree.map(lambda rows: rows[0], dict(table))
    told_labels = bool(pipe.num_labels) or pipe.conditioner is not None
    words: dict[str, Any] = {"prompts": ""} if pipe.reads_prompts else {}
    told, _ = pipe.condition(1, **words or {"labels": 0 if told_labels else None})

    def network(variables: Any, x_t: Any, t: Any, told: Any) -> Any:
        return pipe.apply(variables, x_t, t, told)

    x_t, t = jnp.zeros((1, *pipe.shape), jnp.float32), jnp.zeros((1,), jnp.int32)
    text = jax.jit(network).lower({**row, "params": pipe.params}, x_t, t, told).as_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]
