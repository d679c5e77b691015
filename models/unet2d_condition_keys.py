"""Where the tensors of a diffusers `UNet2DConditionModel` checkpoint go in our params.

As for `UNet2DModel` the table is read off the params tree; transformers add numbered names:

    down_blocks_0/attentions_1/transformer_blocks_0/ff/net_2/kernel
    down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight
"""

import re

import jax

from qjax.core.typing import Params
from qjax.models.convert import Target
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import abstract_inputs
from qjax.models.unet2d_keys import keys_of_params

_NUMBERED = re.compile(r"(?<![^.])(transformer_blocks|net)_(\d+)(?=\.)")


def checkpoint_keys(config: UNet2DConditionConfig) -> dict[str, Target]:
    """For every key of the checkpoint of this model: path, expected shape, transform."""
    model = UNet2DConditionModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *abstract_inputs(config, tokens=1))
    return transformer_keys_of_params(shapes["params"])


def transformer_keys_of_params(params: Params) -> dict[str, Target]:
    """`keys_of_params` for trees that have `transformer_blocks_0` and `net_0` in them."""
    return {_NUMBERED.sub(r"\1.\2", key): target for key, target in keys_of_params(params).items()}
