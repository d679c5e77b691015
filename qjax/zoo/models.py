"""The architectures of the zoo and the noise schedule they were trained with."""

from flax import linen as nn

from qjax.models.dit import DiT, DiTConfig
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_config import UNet2DConfig

NUM_CLASSES = 10
NULL_LABEL = NUM_CLASSES

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)

SAMPLER = DDIM(schedule=SCHEDULE, clip_sample=False)

FASHION_DIT = DiTConfig(
    sample_size=32,
    patch_size=4,
    in_channels=1,
    out_channels=1,
    num_layers=6,
    num_heads=4,
    head_dim=32,
    num_classes=NUM_CLASSES,
)

FASHION_UNET = UNet2DConfig(
    sample_size=32,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 48, 96),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=32,
    num_class_embeds=NUM_CLASSES + 1,
)


def build(name: str) -> nn.Module:
    """The untrained module of the zoo's diffusion model `name`."""
    if name == "fashion-dit":
        return DiT(FASHION_DIT)
    if name == "fashion-unet":
        return UNet2DModel(FASHION_UNET)
    raise ValueError(f"The zoo's diffusion models are fashion-dit, fashion-unet; got {name!r}.")
