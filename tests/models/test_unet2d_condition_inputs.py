"""What a UNet2DConditionModel is told: the shapes it takes, and what it refuses."""

import math

import jax
import numpy as np
import pytest

from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import (
    OF_TEXT,
    OF_TIME,
    Conditioning,
    abstract_inputs,
    check_conditioning,
)

TEXT_WIDTH = 6
PRESETS = {
    "sd_v1_4": 859_520_964,
    "sd_v2_1": 865_910_724,
    "sdxl": 2_567_463_684,
    "ldm4_imagenet": 400_920_579,
}
SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 7 + 6 * 4,
}
ALL = SIZES | {"num_class_embeds": 5, "time_cond_proj_dim": 4}
WITHOUT_TEXT = {
    "down_block_types": ("DownBlock2D",) * 4,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 4,
}


def config_of(**settings):
    return UNet2DConditionConfig(cross_attention_dim=TEXT_WIDTH, **settings)


def check(config, conditioning, batch=2):
    check_conditioning(config, conditioning, OF_TIME + OF_TEXT, batch=batch)


@pytest.mark.quick_cases("sd_v1_4", "ldm4_imagenet")
@pytest.mark.parametrize("name", PRESETS)
def test_published_models_can_be_evaluated_abstractly(name):
    config = getattr(UNet2DConditionConfig, name)()
    inputs = abstract_inputs(config, batch=2, size=(config.sample_size,) * 2)
    model = UNet2DConditionModel(config)
    prediction, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)
    assert prediction.shape == (2, config.sample_size, config.sample_size, config.out_channels)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == PRESETS[name]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        ALL,
        WITHOUT_TEXT,
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 9},
    ],
)
def test_abstract_inputs_are_what_the_model_needs(settings):
    config = config_of(**settings)
    conditioning = abstract_inputs(config, batch=2)[2]
    given = tuple(name for name, field in conditioning._asdict().items() if field is not None)
    assert sorted(given) == sorted(config.conditioning)
    check(config, conditioning)


def test_refiner_with_five_sizes_takes_a_wider_pooled_text():
    config = config_of(**SIZES)
    text = np.zeros((2, 3, TEXT_WIDTH))
    check(config, Conditioning(text=text, pooled=np.zeros((2, 7)), time_ids=np.zeros((2, 6))))
    check(config, Conditioning(text=text, pooled=np.zeros((2, 11)), time_ids=np.zeros((2, 5))))


def test_fields_are_checked_where_they_are_read():
    of_time = abstract_inputs(config_of(**ALL), batch=2)[2]._replace(text=None)
    check_conditioning(config_of(**ALL), of_time, OF_TIME, batch=2)
    with pytest.raises(ValueError, match=r"; text is missing\.$"):
        check(config_of(**ALL), of_time)


def test_missing_fields_are_named_at_once():
    needs = r"needs Conditioning\(text, pooled, time_ids, labels, guidance\)"
    missing = "pooled is missing; time_ids is missing; labels is missing; guidance is missing; text"
    with pytest.raises(ValueError, match=f"{needs}; {missing} is missing"):
        check(config_of(**ALL), None)


def test_unexpected_fields_are_named_at_once():
    given = abstract_inputs(config_of(**ALL), batch=2, tokens=3)[2]
    given = given._replace(mask=np.ones((2, 3), bool))
    with pytest.raises(ValueError) as error:
        check(config_of(**WITHOUT_TEXT), given)
    for name, field in given._asdict().items():
        assert field is not None
        assert f"{name} is not expected" in str(error.value)
    with pytest.raises(ValueError, match=r"Conditioning\(text\); .*labels is not expected"):
        check(config_of(), given)


def test_fields_of_another_shape_are_named_at_once():
    given = Conditioning(
        text=np.zeros((2, 3, TEXT_WIDTH + 1)),
        mask=np.zeros((2, 4)),
        pooled=np.zeros((2, 8)),
        time_ids=np.zeros((2, 6)),
        labels=np.zeros((2, 3)),
        guidance=np.zeros((3, 4)),
    )
    with pytest.raises(ValueError) as error:
        check(config_of(**ALL), given)
    for part in (
        f"text must be [2, any, {TEXT_WIDTH}], not [2, 3, {TEXT_WIDTH + 1}]",
        "mask must be [2, 3], not [2, 4]",
        "pooled must be [2, 7], not [2, 8]",
        "labels must be [2], not [2, 3]",
        "guidance must be [2, 4], not [3, 4]",
    ):
        assert part in str(error.value)


def test_text_that_is_no_conditioning_raises():
    with pytest.raises(TypeError, match=r"must be a Conditioning or None; got ndarray. Pass"):
        check(config_of(), np.zeros((2, 3, TEXT_WIDTH)))


def test_model_checks_before_it_computes():
    model, (x_t, t, _) = UNet2DConditionModel(config_of()), abstract_inputs(config_of())
    with pytest.raises(ValueError, match="text is missing"):
        jax.eval_shape(model.init, jax.random.key(0), x_t, t)
