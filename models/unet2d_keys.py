"""Where the tensors of a diffusers `UNet2DModel` checkpoint go in the params of our port.

The port carries diffusers' names, so the table is read off the params tree itself:

    down_blocks_0/resnets_1/conv1/kernel  <->  down_blocks.0.resnets.1.conv1.weight

Checkpoints from before diffusers 0.16 name the attention projections `query`, `key`,
`value` and `proj_attn`; `rename_old_attention_keys` gives their tensors today's names, and
comes before the table is applied:

    tensors = rename_old_attention_keys(safetensors.numpy.load_file(path))
    table = checkpoint_keys(config)
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import traverse_util

from qjax.core.typing import Params
from qjax.models.convert import Target, conv, linear, same
from qjax.models.unet2d import UNet2DConfig, UNet2DModel

T = TypeVar("T")

_NUMBERED = re.compile(
    r"(down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers|to_out)_(\d+)"
)
_OLD_ATTENTION = re.compile(r"(?<=attentions\.)(\d+)\.(query|key|value|proj_attn)(?=\.)")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_old_attention_keys(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors, `query`, `key`, `value`, `proj_attn` renamed to today's names.

    Keys in today's spelling stay as they are, so every checkpoint may go through here.

    Raises:
      ValueError: If a tensor is there under its old and its new name, naming all of them.

    Example:
      >>> rename_old_attention_keys({"mid_block.attentions.0.proj_attn.bias": 0})
      {'mid_block.attentions.0.to_out.0.bias': 0}
    """
    names = {
        key: _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_NAMES[m[2]]}", key) for key in tensors
    }
    twice = sorted(new for old, new in names.items() if new != old and new in tensors)
    if twice:
        raise ValueError(
            "every attention projection must be there under one name; got the old and the new "
            f"one of {', '.join(twice)}. Drop one of each pair."
        )
    return {names[key]: tensor for key, tensor in tensors.items()}


def checkpoint_keys(config: UNet2DConfig) -> dict[str, Target]:
    """For every key of the checkpoint of this model: path, expected shape, transform.

    The old spelling of the attention keys is not in the table; `rename_old_attention_keys`
    takes care of it.
    """
    size = config.size_multiple
    labels = None
    if config.class_embed_type == "identity":
        labels = jnp.zeros((1, config.time_dim))
    elif config.has_labels:
        labels = jnp.zeros((1,), jnp.int32)
    x_t = jnp.zeros((1, size, size, config.in_channels))
    t = jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(UNet2DModel(config).init, jax.random.key(0), x_t, t, labels)
    return keys_of_params(shapes["params"])


def keys_of_params(params: Params) -> dict[str, Target]:
    """The table of any tree (of arrays or of shapes) that is named as diffusers names it."""
    flat = traverse_util.flatten_dict(params)
    return {_checkpoint_key(path): _target(path, leaf.shape) for path, leaf in flat.items()}


def _checkpoint_key(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    parts = [_NUMBERED.sub(r"\1.\2", name) for name in modules]
    return ".".join([*parts, "bias" if leaf == "bias" else "weight"])


def _target(path: tuple[str, ...], shape: tuple[int, ...]) -> Target:
    if path[-1] != "kernel":
        return Target(path, shape, same)
    if len(shape) == 2:
        return Target(path, shape[::-1], linear)
    h, w, i, o = shape
    return Target(path, (o, i, h, w), conv)
