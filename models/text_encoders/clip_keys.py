"""Where the tensors of a transformers CLIP text checkpoint go in the params of our port.

The port carries transformers' names, so the table is read off the params tree itself:

    text_model/encoder/layers_3/mlp/fc1/kernel  <->  text_model.encoder.layers.3.mlp.fc1.weight

Not every release of transformers writes these keys. `rename_checkpoint_keys` gives the tensors
of all of them the names of the table, and comes before it is applied:

    tensors = rename_checkpoint_keys(load_checkpoint(folder, stem="model"))
    params = convert(tensors, checkpoint_keys(config))

| file by | keys |
|---|---|
| transformers 4, early | `text_model.*`, and the buffer `text_model.embeddings.position_ids` |
| transformers 4, late | `text_model.*` |
| transformers 5, `CLIPTextModel` that was read from one of these | `text_model.*` |
| transformers 5, `CLIPTextModel` that was built from a config | `*` |
| transformers 5, `CLIPTextModelWithProjection` | `text_model.*` |
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

from qjax.models.convert import Target
from qjax.models.text_encoders.clip import CLIPTextConfig, text_encoder
from qjax.models.unet2d_keys import keys_of_params

T = TypeVar("T")

PREFIX = "text_model."
POSITION_IDS = f"{PREFIX}embeddings.position_ids"
_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")


def checkpoint_keys(config: CLIPTextConfig) -> dict[str, Target]:
    """For every key of the checkpoint of this model: path, expected shape, transform.

    The keys have the prefix `text_model.`, as in published checkpoints.
    """
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(text_encoder(config).init, jax.random.key(0), ids)
    targets = keys_of_params(shapes["params"])
    return {re.sub(r"\.layers_(\d+)\.", r".layers.\1.", key): t for key, t in targets.items()}


def rename_checkpoint_keys(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors with the prefix `text_model.`, less the buffer `position_ids`.

    The buffer counts the positions from 0 and holds nothing else. Keys that are neither of the
    tower nor of its buffer stay as they are, so every checkpoint may go through here.

    Raises:
      ValueError: If a tensor is there with and without the prefix, naming all of them.

    Example:
      >>> rename_checkpoint_keys({"final_layer_norm.bias": 0, "embeddings.position_ids": 1})
      {'text_model.final_layer_norm.bias': 0}
    """
    names = {key: PREFIX + key if key.startswith(_PARTS) else key for key in tensors}
    twice = sorted(new for old, new in names.items() if new != old and new in tensors)
    if twice:
        raise ValueError(
            f"every tensor must be there with the prefix {PREFIX} or without; got both of "
            f"{', '.join(twice)}. Drop one of each pair."
        )
    return {name: tensors[key] for key, name in names.items() if name != POSITION_IDS}
