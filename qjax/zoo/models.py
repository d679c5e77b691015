"""The architectures of the zoo and the noise schedule they were trained with."""

from flax import linen as nn

from qjax.core.typing import Array
from qjax.models.autoencoder_config import AutoencoderKLConfig
from qjax.models.autoencoder_kl import AutoencoderKL
from qjax.models.class_embedder import ClassEmbedder, ClassEmbedderConfig
from qjax.models.dit import DiT, DiTConfig
from qjax.models.features import FeatureNet, FeatureNetConfig
from qjax.models.samplers import DDIM
from qjax.models.schedules import Schedule
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import Conditioning
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

FASHION_VAE = AutoencoderKLConfig(
    in_channels=1,
    out_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64),
    latent_channels=4,
    norm_num_groups=8,
    sample_size=32,
)
"""f4: 32x32x1 to 8x8x4. The scaling factor that ships is 1 / std of the trained latents."""

FASHION_LDM = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=(64, 96),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=64,
    attention_head_dim=4,
    norm_num_groups=16,
)

FASHION_CLASSES = ClassEmbedderConfig(
    num_classes=NUM_CLASSES, embed_dim=FASHION_LDM.cross_attention_dim
)

PREDICTION_TYPES = {"fashion-ldm": "epsilon", "fashion-ldm-v": "v_prediction"}
"""What the two latent models answer."""


class LatentDenoiser(nn.Module):
    """The UNet and its class embedder as one network of labels, to be trained together."""

    @nn.compact
    def __call__(self, x_t: Array, t: Array, labels: Array) -> Array:
        token = ClassEmbedder(FASHION_CLASSES, name="class_embedder")(labels)
        unet = UNet2DConditionModel(FASHION_LDM, name="unet")
        return unet(x_t, t, Conditioning(text=token))


MODELS: dict[str, nn.Module] = {
    "fashion-dit": DiT(FASHION_DIT),
    "fashion-unet": UNet2DModel(FASHION_UNET),
    "fashion-vae": AutoencoderKL(FASHION_VAE),
    "fashion-ldm": LatentDenoiser(),
    "fashion-ldm-v": LatentDenoiser(),
    "fashion-features": FeatureNet(FeatureNetConfig()),
}


def build(name: str) -> nn.Module:
    """The untrained module of the zoo that is named so.

    Raises:
      ValueError: If there is none.
    """
    if name not in MODELS:
        raise ValueError(f"The zoo's models are {', '.join(MODELS)}; got {name!r}.")
    return MODELS[name]
