"""Denoisers of published models by name, as shapes: what can be planned without any weights."""

import functools
from collections.abc import Callable, Mapping

from qjax.core.typing import Params
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.unet2d_condition_config import UNet2DConditionConfig

PUBLISHED: Mapping[str, Callable[[], DiTConfig | UNet2DConditionConfig]] = {
    "sd-v1-4": UNet2DConditionConfig.sd_v1_4,
    "sd-v2-1": UNet2DConditionConfig.sd_v2_1,
    "sdxl-1.0": UNet2DConditionConfig.sdxl,
    "ldm-4-imagenet": UNet2DConditionConfig.ldm4_imagenet,
    "dit-xl-2-256": functools.partial(DiTConfig.dit_xl_2, image_size=256),
    "dit-xl-2-512": functools.partial(DiTConfig.dit_xl_2, image_size=512),
}


def published_shapes(name: str) -> Params:
    """The params of a published denoiser as shapes.

    Raises:
      KeyError: If it is none of `PUBLISHED`.
    """
    config = PUBLISHED[name]().to_diffusers()
    return abstract_params(build_denoiser(config["_class_name"], config))
