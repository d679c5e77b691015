"""The networks beside the denoiser: autoencoders, text towers, class embedders.

Adding one: its file, its key table, and a case in `build_component`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flax import linen as nn

from qjax.core.typing import Params
from qjax.models import autoencoder_kl, class_embedder, vq_model
from qjax.models.autoencoder_config import AutoencoderKLConfig, VQModelConfig
from qjax.models.autoencoder_kl import AutoencoderKL
from qjax.models.checkpoints import STEM
from qjax.models.class_embedder import ClassEmbedder, ClassEmbedderConfig
from qjax.models.convert import Target
from qjax.models.text_encoders import clip_keys
from qjax.models.text_encoders.clip import text_encoder
from qjax.models.text_encoders.clip_config import CLIPTextConfig
from qjax.models.unet2d_keys import rename_old_attention_keys
from qjax.models.vq_model import VQModel

Rename = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """A network with its parameters, and what it takes to build it again.

    Attributes:
      class_name: Name of the class in diffusers or transformers.
      config: Its config in the form of `config.json`.
      model: The module; one object for equal configs, so that programs are kept.
      params: Its parameters.
    """

    class_name: str
    config: Mapping[str, Any]
    model: nn.Module
    params: Params = field(repr=False)


class Kind(NamedTuple):
    """How the files of a component are read."""

    model: nn.Module
    targets: Mapping[str, Target]
    rename: Rename = dict


TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
AUTOENCODERS = ("AutoencoderKL", "VQModel")


def weights_stem(class_name: str) -> str:
    """Name of the weight files without variant and ending."""
    return "model" if class_name in TEXT_ENCODERS else STEM


def build_component(class_name: str, config: Mapping[str, Any]) -> Kind:
    """The port of a component's class, and its key table.

    Raises:
      ValueError: If there is no port of the class, or its config asks for what the port lacks.
    """
    if class_name == "AutoencoderKL":
        kl = AutoencoderKLConfig.from_diffusers(config)
        targets = autoencoder_kl.checkpoint_keys(kl)
        return Kind(_module(AutoencoderKL, kl), targets, rename_old_attention_keys)
    if class_name == "VQModel":
        vq = VQModelConfig.from_diffusers(config)
        return Kind(_module(VQModel, vq), vq_model.checkpoint_keys(vq), rename_old_attention_keys)
    if class_name == class_embedder.CLASS_NAME:
        classes = ClassEmbedderConfig.from_diffusers(config)
        return Kind(_module(ClassEmbedder, classes), class_embedder.checkpoint_keys(classes))
    if class_name in TEXT_ENCODERS:
        text = CLIPTextConfig.from_transformers({**config, "architectures": [class_name]})
        rename = clip_keys.rename_checkpoint_keys
        return Kind(_module(text_encoder, text), clip_keys.checkpoint_keys(text), rename)
    known = (*AUTOENCODERS, *TEXT_ENCODERS, class_embedder.CLASS_NAME)
    raise ValueError(f"The components with a port are {', '.join(known)}; got {class_name!r}.")


@functools.cache
def _module(network: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    return network(config)
