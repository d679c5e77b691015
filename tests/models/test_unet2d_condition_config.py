"""Settings of UNet2DConditionModel: what is read, what is refused, what the blocks become."""

import json

import pytest

from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_plan import down_plan, mid_plan, up_plan

# As published with CompVis/stable-diffusion-v1-4: an early version, so some keys are missing.
SD_V1_4 = """{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu",
  "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": false, "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
    "DownBlock2D"],
  "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
  "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
  "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D"]
}"""
# stabilityai/stable-diffusion-2-1.
SD_V2_1 = """{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.10.0.dev0", "act_fn": "silu",
  "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": false, "cross_attention_dim": 1024,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
    "DownBlock2D"],
  "downsample_padding": 1, "dual_cross_attention": false, "flip_sin_to_cos": true,
  "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
  "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": null,
  "only_cross_attention": false, "out_channels": 4, "sample_size": 96,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D"],
  "upcast_attention": true, "use_linear_projection": true
}"""
# stabilityai/stable-diffusion-xl-base-1.0: null stands for no.
SDXL = """{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
  "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280], "center_input_sample": false, "class_embed_type": null,
  "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3,
  "cross_attention_dim": 2048, "cross_attention_norm": null,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "downsample_padding": 1, "dual_cross_attention": false, "encoder_hid_dim": null,
  "encoder_hid_dim_type": null, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
  "layers_per_block": 2, "mid_block_only_cross_attention": null, "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
  "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false,
  "out_channels": 4, "projection_class_embeddings_input_dim": 2816,
  "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
  "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null,
  "time_embedding_act_fn": null, "time_embedding_dim": null, "time_embedding_type": "positional",
  "timestep_post_act": null, "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "upcast_attention": null, "use_linear_projection": true
}"""
PRESETS = ("sd_v1_4", "sd_v2_1", "sdxl", "ldm4_imagenet")
# An unsymmetric model, its lists in a list as in the distilled SDXL called SSD-1B.
LISTS = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, [2, 3]],
    "reverse_transformer_layers_per_block": [[4, 0, 5], 1],
    "attention_head_dim": [2, 4],
    "layers_per_block": [1, 2],
    "only_cross_attention": [False, True],
}


@pytest.mark.parametrize(
    ("text", "preset"), [(SD_V1_4, "sd_v1_4"), (SD_V2_1, "sd_v2_1"), (SDXL, "sdxl")]
)
def test_published_config_is_read(text, preset):
    published = UNet2DConditionConfig.from_diffusers(json.loads(text))
    assert published == getattr(UNet2DConditionConfig, preset)()


@pytest.mark.parametrize("name", [*PRESETS, "lists"])
def test_config_survives_json(name):
    if name == "lists":
        config = UNet2DConditionConfig.from_diffusers(LISTS)
    else:
        config = getattr(UNet2DConditionConfig, name)()
    text = json.dumps(config.to_diffusers())
    assert UNet2DConditionConfig.from_diffusers(json.loads(text)) == config
    assert hash(UNet2DConditionConfig.from_diffusers(json.loads(text))) == hash(config)


def test_defaults_are_those_of_diffusers():
    pytest.importorskip("torch")
    import inspect

    import diffusers

    parameters = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    assert UNet2DConditionConfig.from_diffusers(theirs) == UNet2DConditionConfig()
    assert UNet2DConditionConfig().to_diffusers().keys() - {"_class_name"} == theirs.keys()


def test_old_spellings_and_equal_widths_are_read():
    config = UNet2DConditionConfig.from_diffusers(
        LISTS
        | {
            "act_fn": "SiLU",
            "down_block_types": ["UNetResDownBlock2D", "UNetResCrossAttnDownBlock2D"],
            "cross_attention_dim": [24, 24],
        }
    )
    assert config.act_fn == "silu"
    assert config.down_block_types == ("DownBlock2D", "CrossAttnDownBlock2D")
    assert config.cross_attention_dim == 24


def test_attention_head_dim_is_the_number_of_heads():
    config = UNet2DConditionConfig.sd_v2_1()
    assert [plan.heads for plan in down_plan(config)] == [5, 10, 20, 20]
    assert {plan.head_dim for plan in (*down_plan(config), *up_plan(config))} == {64}
    assert {plan.heads for plan in up_plan(UNet2DConditionConfig.sd_v1_4())} == {8}


def test_plain_self_attention_reads_it_as_the_width_of_a_head():
    config = UNet2DConditionConfig(
        block_out_channels=(32, 64),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=(8, 16),
    )
    assert (down_plan(config)[0].heads, down_plan(config)[0].head_dim) == (4, 8)
    # On the way up diffusers does not turn the list round for these blocks.
    assert (up_plan(config)[1].heads, up_plan(config)[1].head_dim) == (2, 16)


def test_lists_go_to_their_blocks():
    config = UNet2DConditionConfig.from_diffusers(LISTS)
    assert [plan.depths for plan in down_plan(config)] == [(0,), (2, 3)]
    assert [plan.depths for plan in up_plan(config)] == [(4, 0, 5), (0, 0)]
    mid = mid_plan(config)
    assert (mid.depths, mid.heads, mid.only_cross_attention) == ((2,), 4, False)
    assert [plan.only_cross_attention for plan in down_plan(config)] == [False, True]
    assert [plan.only_cross_attention for plan in up_plan(config)] == [True, False]
    assert [plan.resample for plan in (*down_plan(config), *up_plan(config))] == ["conv", None] * 2


def test_config_says_what_the_model_must_be_told():
    presets = {name: getattr(UNet2DConditionConfig, name)() for name in PRESETS}
    assert presets["sdxl"].conditioning == ("text", "pooled", "time_ids")
    assert not presets["sdxl"].time_vector_is_of_t_alone
    for name in set(PRESETS) - {"sdxl"}:
        assert presets[name].conditioning == ("text",)
        assert presets[name].time_vector_is_of_t_alone


def test_every_setting_that_is_not_available_is_named_at_once():
    wrong = {
        "act_fn": "tanh",
        "addition_embed_type": "image",
        "attention_type": "gated",
        "block_out_channels": [32, 48],
        "class_embed_type": "simple_projection",
        "class_embeddings_concat": True,
        "conv_in_kernel": 4,
        "cross_attention_dim": [8, 16],
        "cross_attention_norm": "layer_norm",
        "down_block_types": ["SimpleCrossAttnDownBlock2D", "KDownBlock2D"],
        "downsample_padding": 2,
        "dual_cross_attention": True,
        "encoder_hid_dim": 4,
        "encoder_hid_dim_type": "text_proj",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "norm_num_groups": 32,
        "num_attention_heads": 8,
        "projection_class_embeddings_input_dim": None,
        "resnet_skip_time_act": True,
        "resnet_time_scale_shift": "spatial",
        "time_embedding_act_fn": "silu",
        "time_embedding_type": "fourier",
        "timestep_post_act": "silu",
        "up_block_types": ["SkipUpBlock2D", "UpBlock2D"],
        "use_new_attention": 1,
    }
    with pytest.raises(ValueError) as error:
        UNet2DConditionConfig.from_diffusers(wrong)
    message = str(error.value)
    assert [key for key in wrong if key not in message] == []
    for part in (
        "SimpleCrossAttnDownBlock2D",
        "KDownBlock2D",
        "SkipUpBlock2D",
        "only 'positional'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_per_block": [2]}, "layers_per_block of 1 entries .*, 2"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types of 1 entries"),
        ({"attention_head_dim": None}, "attention_head_dim=None .*a whole number"),
        ({"attention_head_dim": [2, 0]}, r"attention_head_dim=\(2, 0\)"),
        ({"reverse_transformer_layers_per_block": None}, "reverse_transformer_layers_per_block="),
        ({"reverse_transformer_layers_per_block": 2}, r"per_block=2 \(a list"),
        ({"transformer_layers_per_block": [1, [2]]}, r"has \(2,\) .* each of 2 ResNet blocks"),
        (
            {"reverse_transformer_layers_per_block": [[1, 2], 1]},
            r"has \(1, 2\) .* each of 3 ResNet blocks",
        ),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
    ],
)
def test_lists_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionConfig.from_diffusers(LISTS | settings)


def test_settings_without_effect_are_not_read():
    idle = {
        "dropout": 0.1,
        "mid_block_only_cross_attention": True,
        "addition_embed_type_num_heads": 32,
        "some_new_key": None,
    }
    assert UNet2DConditionConfig.from_diffusers(idle) == UNet2DConditionConfig()
