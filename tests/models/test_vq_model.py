"""VQModel against diffusers' on the same random weights: codebook, model, keys."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import array, assert_close, from_torch, randomize, to_torch

from qjax.models.autoencoder_config import VQModelConfig
from qjax.models.convert import convert, to_checkpoint
from qjax.models.vq_model import VectorQuantizer, VQModel, checkpoint_keys, nearest_codes

SHAPES = [(1, 8, 8), (3, 8, 16), (2, 16, 12)]  # batch, height, width

TINY = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "num_vq_embeddings": 16,
}
ONE_SIZE = {
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [8],
    "mid_block_add_attention": False,
}
MODELS = {
    "f4_like": {},
    "f8_like": {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "latent_channels": 4,
        "vq_embed_dim": 6,
        "layers_per_block": 2,
    },
    "codes": {"lookup_from_codebook": True, **ONE_SIZE},
}
# As published with CompVis/ldm-celebahq-256: an early version, so some keys are missing.
LDM_4 = """{
  "_class_name": "VQModel", "_diffusers_version": "0.1.2", "act_fn": "silu",
  "block_out_channels": [128, 256, 512],
  "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
  "in_channels": 3, "latent_channels": 3, "layers_per_block": 2, "num_vq_embeddings": 8192,
  "out_channels": 3, "sample_size": 256,
  "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
}"""


def tiny_config(**settings):
    return VQModelConfig.from_diffusers(TINY | settings)


@functools.cache
def reference_model(name):
    """Diffusers' model with every parameter drawn anew, and ours with its parameters."""
    pytest.importorskip("torch")
    import diffusers

    config = tiny_config(**MODELS[name])
    theirs = randomize(diffusers.VQModel.from_config(config.to_diffusers()))
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return theirs, VQModel(config), convert(tensors, checkpoint_keys(config))


@functools.cache
def tiny_model(**settings):
    """A model with random weights everywhere, norms and biases too."""
    model = VQModel(tiny_config(**ONE_SIZE, **settings))
    targets = checkpoint_keys(model.config)
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(0, 0.5, shape).astype(np.float32)
    return model, convert({key: draw(target.shape) for key, target in targets.items()}, targets)


# Codebook


@pytest.mark.quick_cases("shape0-1-3", "shape1-16-4", "shape2-300-3")
@pytest.mark.parametrize(("rows", "dim"), [(1, 3), (16, 4), (300, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_code_is_that_of_the_nearest_row(shape, rows, dim):
    latents = array(*shape, dim)
    codebook = np.random.default_rng(1).normal(size=(rows, dim)).astype(np.float32)
    codes = nearest_codes(latents, codebook)
    apart = latents.astype(np.float64)[..., None, :] - codebook
    assert codes.dtype == jnp.int32
    assert np.array_equal(codes, np.square(apart).sum(-1).argmin(-1))


def test_latents_far_from_the_codebook_find_the_nearest_row_too():
    latents, codebook = array(1, 8, 8, 3) + 1000, array(1, 1, 64, 3, seed=1)[0, 0]
    apart = latents.astype(np.float64)[..., None, :] - codebook
    assert np.array_equal(nearest_codes(latents, codebook), np.square(apart).sum(-1).argmin(-1))


def test_the_first_of_equally_near_rows_is_taken():
    codebook = np.asarray([[1.0], [-1.0], [1.0]], np.float32)
    latents = np.asarray([0.0, 2.0, -3.0], np.float32).reshape(1, 1, 3, 1)
    assert np.asarray(nearest_codes(latents, codebook)).ravel().tolist() == [0, 0, 1]


def quantizer():
    module = VectorQuantizer(16, 3)
    return module, {"params": {"embedding": {"embedding": array(1, 1, 16, 3)[0, 0]}}}


def test_rows_of_the_codebook_stay_as_they_are():
    module, variables = quantizer()
    codes = np.arange(16, dtype=np.int32).reshape(1, 4, 4)
    rows = module.apply(variables, codes, method="lookup")
    assert np.array_equal(module.apply(variables, rows), rows)
    assert np.array_equal(module.apply(variables, rows, method="codes"), codes)


def test_quantizing_has_the_gradient_of_the_identity():
    module, variables = quantizer()
    z, weights = array(1, 4, 4, 3, seed=1), array(1, 4, 4, 3, seed=2)
    loss = lambda z, variables: jnp.vdot(weights, module.apply(variables, z))
    of_latents, of_codebook = jax.grad(loss, argnums=(0, 1))(z, variables)
    assert np.array_equal(of_latents, weights)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_codebook))


def test_codebook_hides_no_nan():
    module, variables = quantizer()
    z = array(1, 2, 2, 3).copy()
    z[0, 1, 1, 2] = np.nan
    quantized = module.apply(variables, z)
    assert np.isnan(quantized[0, 1, 1, 2])
    assert np.isfinite(quantized[0, 0]).all()


# Model


@pytest.mark.quick_cases("f4_like-shape1", "f8_like*")
@pytest.mark.torch_oracle
@pytest.mark.parametrize(
    ("name", "shape"), [("f4_like", shape) for shape in SHAPES] + [("f8_like", SHAPES[1])]
)
def test_encode_and_decode_agree_with_diffusers(name, shape):
    theirs, model, params = reference_model(name)
    x, z = array(*shape, 3), array(*shape, model.config.codebook_dim)
    latents = jax.jit(functools.partial(model.apply, method="encode"))({"params": params}, x)
    assert_close(latents, from_torch(theirs.encode(to_torch(x)).latents))
    decoded = jax.jit(functools.partial(model.apply, method="decode"))({"params": params}, z)
    assert_close(decoded, from_torch(theirs.decode(to_torch(z)).sample))


@pytest.mark.torch_oracle
def test_decoding_without_the_codebook_and_of_codes_agrees_with_diffusers():
    torch = pytest.importorskip("torch")
    theirs, model, params = reference_model("codes")
    codes = np.arange(16, dtype=np.int32).reshape(1, 2, 8)
    ours = functools.partial(
        model.apply, {"params": params}, method="decode", force_not_quantize=True
    )
    decoded = jax.jit(ours)(codes)
    reference = theirs.decode(
        torch.tensor(codes.reshape(-1)), force_not_quantize=True, shape=(1, 2, 8, 3)
    )
    assert_close(decoded, from_torch(reference.sample))

    # The same weights under a config without the lookup.
    z = array(2, 4, 6, 3)
    settings = model.config.to_diffusers() | {"lookup_from_codebook": False}
    plain = VQModel(VQModelConfig.from_diffusers(settings))
    ours = functools.partial(
        plain.apply, {"params": params}, method="decode", force_not_quantize=True
    )
    theirs.register_to_config(lookup_from_codebook=False)
    reference = theirs.decode(to_torch(z), force_not_quantize=True).sample
    theirs.register_to_config(lookup_from_codebook=True)
    assert_close(jax.jit(ours)(z), from_torch(reference))


@pytest.mark.torch_oracle
def test_whole_model_and_its_gradient_agree_with_diffusers():
    theirs, model, params = reference_model("f4_like")
    x, weights = array(2, 8, 12, 3), array(2, 8, 12, 3, seed=1)
    ours = lambda x: jnp.vdot(weights, model.apply({"params": params}, x))
    value, gradient = jax.jit(jax.value_and_grad(ours))(x)

    their_x = to_torch(x).requires_grad_()
    their_value = (theirs(their_x).sample * to_torch(weights)).sum()
    their_value.backward()
    assert float(value) == pytest.approx(their_value.item(), rel=1e-3)
    assert_close(gradient, from_torch(their_x.grad), tolerance=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decode_takes_the_codes_that_codes_names_in_every_dtype(dtype):
    model, params = tiny_model()
    apply = functools.partial(model.clone(dtype=dtype).apply, {"params": params})

    @jax.jit
    def images(z):
        codes = apply(z, method="codes")
        return apply(z, method="decode"), apply(codes, method="decode_codes")

    of_latents, of_codes = images(array(2, 4, 4, 3))
    assert of_latents.dtype == of_codes.dtype == dtype
    assert np.array_equal(of_latents, of_codes)


def test_vmap_over_batches_equals_one_large_batch():
    model, params = tiny_model()
    decode = lambda z: model.apply({"params": params}, z, method="decode")
    z = array(4, 4, 6, 3)
    together = jax.jit(decode)(z)
    stacked = jax.jit(jax.vmap(decode))(z.reshape(2, 2, 4, 6, 3))
    assert_close(stacked.reshape(together.shape), together)


@pytest.mark.parametrize(("force_upcast", "dtype"), [(False, jnp.float16), (True, jnp.float32)])
def test_force_upcast_is_followed(force_upcast, dtype):
    model, params = tiny_model(force_upcast=force_upcast)
    decode = functools.partial(model.apply, {"params": params}, method="decode")
    program = jax.make_jaxpr(decode)(jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float16))
    convolutions = [eqn for eqn in program.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert len(convolutions) > 5
    assert {eqn.outvars[0].aval.dtype for eqn in convolutions} == {jnp.dtype(dtype)}
    assert program.out_avals[0].dtype == jnp.float16


def test_codes_where_latents_are_wanted_raise():
    model, params = tiny_model()
    decode = functools.partial(model.apply, {"params": params}, method="decode")
    with pytest.raises(ValueError, match="float latents, .* got int32 .* decode_codes"):
        decode(np.zeros((1, 2, 2), np.int32))
    lookup = VQModel(tiny_config(**MODELS["codes"]))
    with pytest.raises(ValueError, match="got float32 with force_not_quantize=True"):
        lookup.apply(
            {"params": params}, array(1, 2, 2, 3), method="decode", force_not_quantize=True
        )


def test_size_that_cannot_be_halved_raises():
    model = VQModel(tiny_config())
    with pytest.raises(ValueError, match=r"multiples of 2, .* image.shape=\(1, 7, 8, 3\)"):
        jax.eval_shape(model.init, jax.random.key(0), array(1, 7, 8, 3))


# Keys and settings


@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_of_diffusers(name):
    theirs, model, params = reference_model(name)
    table = checkpoint_keys(model.config)
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {key: target.shape for key, target in table.items()} == expected
    back = to_checkpoint(params, table)
    assert all(np.array_equal(back[key], theirs.state_dict()[key]) for key in expected)


# Parameters of diffusers' class under the configs of latent diffusion's first stages.
@pytest.mark.torch_oracle
@pytest.mark.parametrize(
    ("config", "parameters"),
    [(VQModelConfig.vq_f4(), 55_322_782), (VQModelConfig.vq_f8(), 67_717_295)],
    ids=["vq_f4", "vq_f8"],
)
def test_first_stages_have_these_keys_shapes_and_sizes(config, parameters):
    torch = pytest.importorskip("torch")
    import diffusers

    with torch.device("meta"):
        theirs = diffusers.VQModel.from_config(config.to_diffusers()).state_dict()
    table = checkpoint_keys(config)
    assert {key: target.shape for key, target in table.items()} == {
        key: tuple(tensor.shape) for key, tensor in theirs.items()
    }
    assert sum(math.prod(target.shape) for target in table.values()) == parameters


def test_published_config_is_read_and_not_scaled():
    config = VQModelConfig.from_diffusers(json.loads(LDM_4))
    assert config == VQModelConfig.vq_f4()
    assert config.scaling_factor == 1


def test_scaling_latents_can_be_undone():
    config, z = tiny_config(scaling_factor=0.5), jnp.asarray(array(1, 2, 2, 3))
    assert np.array_equal(config.scale_latents(z), z / 2)
    assert np.array_equal(config.unscale_latents(config.scale_latents(z)), z)


def test_spatial_normalisation_is_refused_by_name():
    with pytest.raises(ValueError, match=r"VQModel .* norm_type='spatial' \(only 'group'\)"):
        tiny_config(norm_type="spatial")
