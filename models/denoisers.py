"""The denoisers there is a port of, by the name of their diffusers class.

Adding a model: its file, its key table, and a case in `build_denoiser`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from qjax.models import unet2d_condition_keys, unet2d_keys
from qjax.models.convert import Target
from qjax.models.dit import DiT, DiTConfig
from qjax.models.dit_keys import diffusers_keys
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_config import UNet2DConfig

DENOISERS = ("DiTTransformer2DModel", "UNet2DModel", "UNet2DConditionModel")


class HasTargets(Protocol):
    """A network with its key table: a `Denoiser`, or the `Kind` of a component."""

    @property
    def targets(self) -> Mapping[str, Target]:
        """The key table."""
        ...


class Denoiser(NamedTuple):
    """A network and what a pipeline must know of it."""

    model: nn.Module
    targets: Mapping[str, Target]
    fields: dict[str, Any]


def build_denoiser(class_name: str, config: Mapping[str, Any]) -> Denoiser:
    """The port of a diffusers class, its key table and its pipeline fields.

    Raises:
      ValueError: If there is no port of the class, or its config asks for what the port lacks.
    """
    if class_name == "DiTTransformer2DModel":
        dit = DiTConfig.from_diffusers(config)
        fields = {
            "shape": (dit.sample_size, dit.sample_size, dit.in_channels),
            "null_label": dit.num_classes,
            "num_labels": dit.num_classes,
            # The authors' code guides the first three of four channels.
            "guidance_channels": 3 if dit.in_channels == 4 else None,
        }
        return Denoiser(_module(DiT, dit), diffusers_keys(dit), fields)
    if class_name == "UNet2DModel":
        unet = UNet2DConfig.from_diffusers(config)
        fields = {
            "shape": (*_sample_size(class_name, unet), unet.in_channels),
            "num_labels": unet.num_class_embeds,
        }
        return Denoiser(_module(UNet2DModel, unet), unet2d_keys.checkpoint_keys(unet), fields)
    if class_name == "UNet2DConditionModel":
        condition = UNet2DConditionConfig.from_diffusers(config)
        fields = {"shape": (*_sample_size(class_name, condition), condition.in_channels)}
        targets = unet2d_condition_keys.checkpoint_keys(condition)
        return Denoiser(_module(UNet2DConditionModel, condition), targets, fields)
    raise ValueError(
        f"The denoisers with a port are {', '.join(DENOISERS)}; got "
        f"{class_name!r}. Wrap your own Flax model with Pipeline.from_apply."
    )


def _sample_size(class_name: str, config: Any) -> tuple[int, int]:
    """Height and width of the samples of training, which a config need not tell."""
    size = config.sample_size
    if size is None:
        raise ValueError(
            f"The config of a {class_name} must have a sample_size, the height and width of "
            "what it was trained on; got None. Add it to config.json."
        )
    return size if isinstance(size, tuple) else (size, size)


@functools.cache
def _module(network: type[nn.Module], config: Any) -> nn.Module:
    """One module for equal configs: programs are kept per module, so loading again reuses them."""
    return network(config)


def abstract_params(network: HasTargets) -> dict[str, Any]:
    """Shapes of a network's params in float32: from its key table, without any weights."""
    leaves = {}
    for target in network.targets.values():
        # A broadcast zero has any shape and takes no memory.
        shape = target.transform(np.broadcast_to(np.zeros(()), target.shape)).shape
        if target.part[1] > 1:
            shape = (*shape[:-1], shape[-1] * target.part[1])
        leaves[target.path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return traverse_util.unflatten_dict(leaves)
