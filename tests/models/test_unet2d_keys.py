"""The key table of UNet2DModel covers every tensor of a checkpoint, old or new."""

import math

import numpy as np
import pytest

from qjax.models.convert import convert, to_checkpoint
from qjax.models.unet2d_config import UNet2DConfig
from qjax.models.unet2d_keys import checkpoint_keys, rename_old_attention_keys

TINY = UNet2DConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    time_embedding_type="fourier",
    num_class_embeds=3,
)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tensors_for(table):
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=target.shape) for key, target in table.items()}


def old_spelling(tensors):
    for new, old in OLD_NAMES.items():
        tensors = {key.replace(f".{new}.", f".{old}."): w for key, w in tensors.items()}
    return tensors


# Parameters in millions: DDPM, appendix B; LDM, table 12 (CelebA-HQ).
@pytest.mark.torch_oracle
@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (UNet2DConfig.ddpm_cifar10(), 35.7),
        (UNet2DConfig.ddpm_256(), 114),
        (UNet2DConfig.ldm_4(), 274),
    ],
    ids=["ddpm_cifar10", "ddpm_256", "ldm_4"],
)
def test_published_models_have_these_keys_shapes_and_sizes(config, millions):
    torch = pytest.importorskip("torch")
    import diffusers

    table = checkpoint_keys(config)
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel.from_config(config.to_diffusers()).state_dict()
    assert {k: target.shape for k, target in table.items()} == {
        k: tuple(tensor.shape) for k, tensor in theirs.items()
    }
    total = sum(math.prod(target.shape) for target in table.values())
    assert total / 1e6 == pytest.approx(millions, rel=5e-3)


def test_checkpoint_survives_the_way_there_and_back():
    table = checkpoint_keys(TINY)
    tensors = tensors_for(table)
    back = to_checkpoint(convert(tensors, table), table)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def test_old_attention_names_give_the_same_params():
    table = checkpoint_keys(TINY)
    tensors = tensors_for(table)
    old = old_spelling(tensors)
    assert sum(key not in tensors for key in old) == 2 * 4 * 4  # weight and bias, 4 attentions
    renamed = rename_old_attention_keys(old)
    assert renamed.keys() == table.keys()
    assert all(renamed[key] is tensors[key] for key in tensors)


def test_new_attention_names_stay():
    tensors = tensors_for(checkpoint_keys(TINY))
    assert rename_old_attention_keys(tensors) == tensors


def test_tensor_under_both_names_raises():
    new = "mid_block.attentions.0.to_q.bias"
    with pytest.raises(ValueError, match=f"under one name.*{new}"):
        rename_old_attention_keys({new: 0, "mid_block.attentions.0.query.bias": 0})
