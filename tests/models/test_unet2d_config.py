"""Settings of UNet2DModel: what is read, what is refused, and that nothing is lost."""

import json

import pytest

from qjax.models.unet2d_config import UNet2DConfig

# As published with google/ddpm-cifar10-32: an early version, so some keys are missing.
DDPM_CIFAR10 = """{
  "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
  "attention_head_dim": null, "block_out_channels": [128, 256, 256, 256],
  "center_input_sample": false,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
  "downsample_padding": 0, "flip_sin_to_cos": false, "freq_shift": 1, "in_channels": 3,
  "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06,
  "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
  "time_embedding_type": "positional",
  "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
}"""
PRESETS = [UNet2DConfig.ddpm_cifar10, UNet2DConfig.ddpm_256, UNet2DConfig.ldm_4]


def test_published_config_is_read():
    assert UNet2DConfig.from_diffusers(json.loads(DDPM_CIFAR10)) == UNet2DConfig.ddpm_cifar10()


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset):
    config = preset()
    text = json.dumps(config.to_diffusers())
    assert UNet2DConfig.from_diffusers(json.loads(text)) == config
    assert hash(UNet2DConfig.from_diffusers(json.loads(text))) == hash(config)


def test_tuple_sample_size_is_read():
    config = UNet2DConfig.from_diffusers({"sample_size": [16, 24]})
    assert config.sample_size == (16, 24)
    assert config.to_diffusers()["sample_size"] == [16, 24]


def test_defaults_are_those_of_diffusers():
    pytest.importorskip("torch")
    import inspect

    import diffusers

    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    assert UNet2DConfig.from_diffusers(theirs) == UNet2DConfig()
    assert UNet2DConfig().to_diffusers().keys() - {"_class_name"} == theirs.keys()


def test_old_spellings_are_read():
    config = UNet2DConfig.from_diffusers(
        {
            "act_fn": "SiLU",
            "block_out_channels": [32, 64],
            "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
            "up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
        }
    )
    assert config.act_fn == "silu"
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D")


def test_every_setting_that_is_not_available_is_named_at_once():
    wrong = {
        "act_fn": "tanh",
        "addition_embed_type": "text",
        "block_out_channels": [32, 48, 64],
        "class_embed_type": "projection",
        "down_block_types": ["SkipDownBlock2D", "KDownBlock2D"],
        "downsample_padding": 2,
        "downsample_type": "fir",
        "encoder_hid_dim": 4,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": 32,
        "resnet_time_scale_shift": "ada_group",
        "time_embedding_type": "sinusoid",
        "up_block_types": ["AttnSkipUpBlock2D", "UpBlock2D"],
        "upsample_type": "fir",
    }
    with pytest.raises(ValueError) as error:
        UNet2DConfig.from_diffusers(wrong)
    message = str(error.value)
    assert [key for key in wrong if key not in message] == []
    for part in ("SkipDownBlock2D", "KDownBlock2D", "AttnSkipUpBlock2D", "'scale_shift'", "48"):
        assert part in message


def test_learned_embedding_without_a_length_raises():
    with pytest.raises(ValueError, match="num_train_timesteps=None"):
        UNet2DConfig(time_embedding_type="learned")


def test_unknown_key_that_is_null_is_no_error():
    assert UNet2DConfig.from_diffusers({"encoder_hid_dim": None}) == UNet2DConfig()
