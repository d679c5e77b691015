"""The key table of UNet2DConditionModel covers every tensor of a checkpoint."""

import numpy as np
import pytest

from qjax.models.convert import convert, to_checkpoint
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_keys import checkpoint_keys, transformer_keys_of_params

TINY = UNet2DConditionConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=6,
    down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    transformer_layers_per_block=2,
    num_class_embeds=3,
    time_cond_proj_dim=4,
    addition_embed_type="text_time",
    addition_time_embed_dim=2,
    projection_class_embeddings_input_dim=20,
)
CONFIGS = {
    name: getattr(UNet2DConditionConfig, name)()
    for name in ("sd_v1_4", "sd_v2_1", "sdxl", "ldm4_imagenet")
} | {"tiny": TINY}


@pytest.mark.quick_cases("sd_v1_4", "ldm4_imagenet", "tiny")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_table_has_the_keys_and_shapes_of_diffusers(name):
    torch = pytest.importorskip("torch")
    import diffusers

    table = checkpoint_keys(CONFIGS[name])
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(CONFIGS[name].to_diffusers())
    assert {key: target.shape for key, target in table.items()} == {
        key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()
    }


def test_checkpoint_survives_the_way_there_and_back():
    table = checkpoint_keys(TINY)
    rng = np.random.default_rng(0)
    tensors = {key: rng.normal(size=target.shape) for key, target in table.items()}
    back = to_checkpoint(convert(tensors, table), table)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def test_numbers_of_blocks_are_names_of_their_own_in_a_checkpoint():
    leaf = np.zeros((2, 3))
    params = {"attentions_1": {"transformer_blocks_12": {"ff": {"net_2": {"kernel": leaf}}}}}
    (key,) = transformer_keys_of_params(params)
    assert key == "attentions.1.transformer_blocks.12.ff.net.2.weight"
    (root,) = transformer_keys_of_params({"net_0": {"bias": leaf[0]}, "subnet_0": {}})
    assert root == "net.0.bias"
