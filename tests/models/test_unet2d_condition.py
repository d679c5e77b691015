"""UNet2DConditionModel against diffusers' on the same random weights: layer, block, model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import array, assert_close, randomize, to_torch, with_weights_of

from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import quantize
from qjax.models.convert import convert
from qjax.models.unet2d_condition import TimeEmbedding, UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.models.unet2d_condition_inputs import Conditioning, abstract_inputs
from qjax.models.unet2d_condition_keys import checkpoint_keys

SHAPES = [(1, 8, 8), (3, 8, 4), (2, 7, 10)]  # batch, height, width; the last does not divide
TOKENS, TEXT_WIDTH, TIME_DIM = 5, 6, 12
GRADIENT_TOLERANCE = 1e-3

TINY = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_WIDTH,
    "time_embedding_dim": TIME_DIM,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD2 = {"attention_head_dim": (1, 4), "use_linear_projection": True, "upcast_attention": True}
DOWN_FIRST = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SDXL = DOWN_FIRST | {
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 7 + 6 * 4,
}
LDM4 = DOWN_FIRST | {"attention_head_dim": 1, "in_channels": 3, "out_channels": 3}
FAMILIES = {"sd1": {}, "sd2": SD2, "sdxl": SDXL, "ldm4": LDM4}
ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
}
OTHERS = {
    "class_table": ONE_LEVEL
    | {
        "num_class_embeds": 5,
        "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True,
        "in_channels": 5,
        "out_channels": 3,
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1.5,
    },
    "class_timestep": ONE_LEVEL
    | {
        "class_embed_type": "timestep",
        "act_fn": "gelu",
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "class_projection": ONE_LEVEL
    | {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 9,
        "act_fn": "mish",
        "norm_eps": 1e-3,
    },
    "class_vectors": ONE_LEVEL
    | {
        "class_embed_type": "identity",
        "only_cross_attention": True,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "time_embedding_dim": None,
    },
    "lcm": ONE_LEVEL | {"time_cond_proj_dim": 4},
    "without_text": {
        "block_out_channels": (8, 16, 8),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": (4, 4, 8),
        "downsample_padding": 0,
    },
}
CONFIGS = FAMILIES | OTHERS
WITH_GRADIENT = ("sd1", "sdxl")


def tiny_config(**settings):
    return UNet2DConditionConfig.from_diffusers(TINY | settings)


def conditioning_for(config, b, tokens=TOKENS):
    """Whatever the model needs, every image's its own."""

    def draw(name, leaf):
        if name == "labels" and leaf.ndim == 1:
            return np.arange(1, b + 1, dtype=np.int32)
        if name == "time_ids":
            return np.arange(6 * b, dtype=np.float32).reshape(b, 6) * 60
        return array(*leaf.shape, seed=len(name))

    fields = abstract_inputs(config, batch=b, tokens=tokens)[2]._asdict()
    return Conditioning(**{k: None if v is None else draw(k, v) for k, v in fields.items()})


# Layers


@pytest.mark.torch_oracle
@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("condition_dim", [None, 3])
def test_time_embedding_agrees_with_diffusers(act, condition_dim):
    pytest.importorskip("torch")
    from diffusers.models.embeddings import TimestepEmbedding

    theirs = randomize(TimestepEmbedding(8, 12, act_fn=act, cond_proj_dim=condition_dim))
    inputs = [array(3, 8)] if condition_dim is None else [array(3, 8), array(3, condition_dim)]
    ours = with_weights_of(theirs, TimeEmbedding(12, act), *inputs)
    assert_close(ours(*inputs), theirs(*map(to_torch, inputs)))


# Model


def timesteps(b):
    return np.arange(b, dtype=np.int32) * 300 + 7


def reference_answer(theirs, x_t, t, conditioning):
    """What diffusers' model says to the same inputs; `x_t` is a tensor."""
    fields = {k: None if v is None else to_torch(v) for k, v in conditioning._asdict().items()}
    sizes = None
    if fields["time_ids"] is not None:
        sizes = {"text_embeds": fields["pooled"], "time_ids": fields["time_ids"]}
    return theirs(
        x_t,
        to_torch(t),
        fields["text"],
        class_labels=fields["labels"],
        timestep_cond=fields["guidance"],
        added_cond_kwargs=sizes,
        encoder_attention_mask=fields["mask"],
    ).sample


@functools.cache
def reference_model(name):
    """Diffusers' model, and ours with its parameters: every key used, every leaf filled."""
    pytest.importorskip("torch")
    import diffusers

    config = tiny_config(**CONFIGS[name])
    theirs = randomize(diffusers.UNet2DConditionModel.from_config(config.to_diffusers()))
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return theirs, UNet2DConditionModel(config), convert(tensors, checkpoint_keys(config))


def told_for(name, config, b):
    """A conditioning: with a mask for SD 2, and a text of one token for LDM."""
    told = conditioning_for(config, b, tokens=1 if name == "ldm4" else TOKENS)
    if name == "sd2":
        return told._replace(mask=np.arange(TOKENS) <= 1 + np.arange(b)[:, None])
    return told


@pytest.mark.quick_cases("sd1-*", "sd2-shape1", "sdxl-*", "ldm4-shape3", "class_vectors-*", "lcm-*")
@pytest.mark.torch_oracle
@pytest.mark.parametrize(
    ("name", "shape"),
    [("sd1", SHAPES[0]), ("sd2", SHAPES[1]), ("sdxl", SHAPES[1]), ("ldm4", SHAPES[0])]
    + [(name, SHAPES[2]) for name in CONFIGS if name not in WITH_GRADIENT],
)
def test_model_agrees_with_diffusers(name, shape):
    theirs, model, params = reference_model(name)
    b, config = shape[0], model.config
    x_t, t, told = array(*shape, config.in_channels), timesteps(b), told_for(name, config, b)
    ours = jax.jit(model.apply)({"params": params}, x_t, t, told)
    assert_close(ours, reference_answer(theirs, to_torch(x_t), t, told))


@pytest.mark.quick_cases("sd1")
@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_model_and_its_gradient_agree_at_a_size_that_does_not_divide(name):
    theirs, model, params = reference_model(name)
    b, config = SHAPES[2][0], model.config
    x_t, t, told = array(*SHAPES[2], config.in_channels), timesteps(b), told_for(name, config, b)
    weights = array(*SHAPES[2], config.out_channels, seed=1)

    def ours(x_t):
        y, pullback = jax.vjp(lambda x: model.apply({"params": params}, x, t, told), x_t)
        return y, pullback(weights)[0]

    y, gradient = jax.jit(ours)(x_t)
    x_t = to_torch(x_t).requires_grad_()
    expected = reference_answer(theirs, x_t, t, told)
    assert_close(y, expected)
    (expected * to_torch(weights)).sum().backward()
    assert_close(gradient, x_t.grad, GRADIENT_TOLERANCE)


@functools.cache
def tiny_model(name):
    """A model with random weights everywhere, the zero-initialised last layer too."""
    model = UNet2DConditionModel(tiny_config(**TINY_MODELS[name]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *abstract_inputs(model.config))
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    return model, jax.tree.map(draw, shapes), jax.jit(model.apply)


TINY_MODELS = {
    "text": ONE_LEVEL,
    "all": ONE_LEVEL
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 7 + 6 * 4,
        "num_class_embeds": 5,
    },
}


def test_time_vectors_of_all_steps_can_be_computed_in_advance():
    model, variables, apply = tiny_model("text")
    assert model.config.time_vector_is_of_t_alone
    x_t, told = array(2, 3, 4, 4), conditioning_for(model.config, 2)
    steps = np.array([801, 401, 1], np.int32)
    rows = jax.jit(functools.partial(model.apply, method="time_vector"))(variables, steps)
    assert rows.shape == (3, TIME_DIM)
    denoise = jax.jit(functools.partial(model.apply, method="denoise"))
    for i, t in enumerate(steps):
        ahead = denoise(variables, x_t, rows[i : i + 1], told)
        np.testing.assert_allclose(ahead, apply(variables, x_t, np.array([t, t]), told), atol=1e-5)


def test_time_vector_reads_no_text_and_the_rest_no_time_fields():
    model, variables, _ = tiny_model("all")
    told = conditioning_for(model.config, 2)
    t, x_t = timesteps(2), array(2, 3, 4, 4)
    vector = jax.jit(functools.partial(model.apply, method="time_vector"))
    time = vector(variables, t, told)
    assert np.array_equal(time, vector(variables, t, told._replace(text=None)))
    denoise = functools.partial(model.apply, method="denoise")
    split = jax.eval_shape(denoise, variables, x_t, time, Conditioning(text=told.text))
    assert split.shape == x_t.shape


def test_one_timestep_for_all_equals_one_for_each():
    model, variables, apply = tiny_model("text")
    x_t, told = array(2, 3, 4, 4), conditioning_for(model.config, 2)
    one = apply(variables, x_t, 5, told)
    each = apply(variables, x_t, np.array([5, 5], np.int32), told)
    np.testing.assert_allclose(one, each, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other():
    model, variables, apply = tiny_model("text")
    inputs = array(2, 3, 4, 4), timesteps(2), conditioning_for(model.config, 2)
    turned = jax.tree.map(lambda leaf: leaf[::-1], inputs)
    turned_back = apply(variables, *turned)[::-1]
    np.testing.assert_allclose(turned_back, apply(variables, *inputs), atol=1e-5)


def test_untrained_model_predicts_zero():
    model = tiny_model("text")[0]
    inputs = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract_inputs(model.config))
    last_layer = jax.jit(lambda key: model.init(key, *inputs)["params"]["conv_out"])
    assert not any(leaf.any() for leaf in last_layer(jax.random.key(0)).values())


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    model, variables, apply = tiny_model("all")
    x_t, told = array(2, 3, 4, 4), conditioning_for(model.config, 2)
    told = told._replace(mask=np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool))
    full = apply(variables, x_t, 5, told)
    half_variables = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(half_variables, x_t, 5, told)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - full).max()
    assert 0 < error < 0.1 * np.abs(full).max()


def test_every_convolution_and_linear_map_can_be_quantized():
    model, variables, apply = tiny_model("text")
    x_t, told = array(2, 3, 4, 4), conditioning_for(model.config, 2)
    config = QuantConfig(weight=WeightSpec(bits=8))
    quantized = quantize(variables["params"], config, box=False)
    leaves = jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_qtensor)
    kernels = [(path, leaf) for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert [path for path, leaf in kernels if not is_qtensor(leaf)] == []
    full = apply(variables, x_t, 5, told)
    error = np.abs(apply({"params": quantized}, x_t, 5, told) - full).max()
    assert 0 < error < 0.05 * np.abs(full).max()


@pytest.mark.parametrize(
    "settings",
    [
        {"up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D")},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")},
    ],
)
def test_size_that_resnet_blocks_cannot_halve_and_double_raises(settings):
    config = tiny_config(**settings)
    told = conditioning_for(config, 2)
    with pytest.raises(ValueError, match="multiples of 2 where ResNet blocks halve or double"):
        UNet2DConditionModel(config).init(jax.random.key(0), array(2, 7, 8, 4), 1, told)


# The published models with random weights: minutes and gigabytes


class _ReadOnce:
    """An array-like that lets go of its torch parameter once it is read."""

    def __init__(self, parameter):
        self.parameter, self.shape, self.dtype = parameter, tuple(parameter.shape), np.float32

    def __array__(self, dtype=None, copy=None):
        w = self.parameter.detach().numpy().copy()
        self.parameter.data = self.parameter.data.new_empty(0)
        return w


@pytest.mark.slow
@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", ["sd_v1_4", "sdxl"])
def test_published_model_with_random_weights_agrees_with_diffusers(name):
    """At 64x64 latents; holds about the model in float32, once."""
    torch = pytest.importorskip("torch")
    import diffusers

    config = getattr(UNet2DConditionConfig, name)()
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel.from_config(config.to_diffusers()).eval()
    x_t, t, told = array(1, 64, 64, 4), timesteps(1), conditioning_for(config, 1, tokens=77)
    with torch.no_grad():
        expected = reference_answer(theirs, to_torch(x_t), t, told)
    tensors = {key: _ReadOnce(parameter) for key, parameter in theirs.named_parameters()}
    params = convert(tensors, checkpoint_keys(config), finish=lambda path, w: jnp.asarray(w))
    ours = jax.jit(UNet2DConditionModel(config).apply)({"params": params}, x_t, t, told)
    assert_close(ours, expected)
