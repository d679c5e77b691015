"""The text towers against transformers' on the same random weights, and their configs and keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import quantize
from qjax.models.convert import convert, load_checkpoint, to_checkpoint
from qjax.models.text_encoders.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    end_of_text,
    text_encoder,
)
from qjax.models.text_encoders.clip_keys import checkpoint_keys, rename_checkpoint_keys

pytestmark = pytest.mark.optimized  # some numbers must have equal bits

TOLERANCE = 1e-4  # largest error over largest output; float32 sums in another order
VOCAB, T = 40, 9

# Name -> published config, and how many parameters its authors' model has.
PRESETS = {
    "clip_l": (CLIPTextConfig.clip_l(), 123_060_480),
    "openclip_h": (CLIPTextConfig.openclip_h(), 340_387_840),
    "openclip_bigg": (CLIPTextConfig.openclip_bigg(), 694_659_840),
}
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 10,
    "max_position_embeddings": T + 2,
}


def compiled(function, **static):
    return jax.jit(functools.partial(function, **static))


def tiny_config(name="clip_l", **changes):
    return dataclasses.replace(PRESETS[name][0], **TINY | changes)


def some_ids(b=3, t=T):
    """Texts of different lengths; the end token pads, as in Stable Diffusion 1."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB - 4, (b, t)).astype(np.int32)
    for row, length in enumerate(rng.permutation(np.arange(2, t))[:b]):
        ids[row, length:] = VOCAB - 4
    return ids


def random_params(config, seed=0):
    """Every parameter drawn, norms and biases too, so that none can be mixed up."""
    shapes = jax.eval_shape(text_encoder(config).init, jax.random.key(0), some_ids())
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(len(leaf.shape) == 1, 0.3, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, shapes["params"])


def reference(config, **settings):
    """Transformers' model with parameters of its own, and ours with the same."""
    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.CLIPTextConfig(bos_token_id=None, **config.to_transformers() | settings)
    module = getattr(transformers, type(text_encoder(config)).__name__)(theirs).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 + (parameter.ndim == 1)
    tensors = {k: v.numpy() for k, v in module.state_dict().items()}
    return module, convert(rename_checkpoint_keys(tensors), checkpoint_keys(config))


def run_reference(module, ids, mask=None):
    torch = pytest.importorskip("torch")
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return module(torch.tensor(ids), attention_mask=mask, output_hidden_states=True)


def assert_close(ours, theirs):
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def assert_agrees(output, expected):
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs)
    assert_close(output.last_hidden_state, expected.last_hidden_state)
    if output.text_embeds is None:
        assert_close(output.pooled, expected.pooler_output)
    else:
        assert_close(output.text_embeds, expected.text_embeds)


# The model


@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", PRESETS)
def test_tower_agrees_with_transformers(name):
    """All hidden states, what is pooled, what is projected; with and without a mask."""
    config = tiny_config(name)
    module, params = reference(config)
    ids = some_ids()
    seen = (np.arange(T) < [[T], [5], [2]]).astype(np.int32)
    model = compiled(text_encoder(config).apply, hidden_layers=None)
    for mask in (None, seen):
        assert_agrees(model({"params": params}, ids, mask), run_reference(module, ids, mask))


@pytest.mark.torch_oracle
@pytest.mark.parametrize("eos", [2, 30])
def test_what_is_pooled_agrees_with_transformers(eos):
    config = tiny_config(eos_token_id=eos)
    module, params = reference(config)
    ids = np.array(
        [
            [1, 30, 5, 30, 3],  # the end token pads
            [1, 5, 35, 30, 0],  # a new token with an id above that of the end
            [39, 5, 6, 7, 8],  # no end
        ],
        np.int32,
    )
    output = jax.jit(CLIPTextModel(config).apply)({"params": params}, ids)
    assert_close(output.pooled, run_reference(module, ids).pooler_output)
    ends = {2: [1, 2, 0], 30: [1, 3, 0]}[eos]
    assert end_of_text(ids, eos).tolist() == ends
    assert np.array_equal(output.pooled, output.last_hidden_state[np.arange(3), ends])


@pytest.fixture(scope="module")
def tiny():
    """A model with a projection, its variables, and its output for `some_ids()`."""
    config = tiny_config("openclip_bigg")
    model, variables = text_encoder(config), {"params": random_params(config)}
    return model, variables, compiled(model.apply, hidden_layers=None)(variables, some_ids())


def test_only_tokens_before_matter(tiny):
    model, variables, _ = tiny
    apply, ids = jax.jit(model.apply), some_ids()
    states = apply(variables, ids).last_hidden_state
    others = np.where(np.arange(T) < 5, ids, (ids + 7) % VOCAB)
    changed = apply(variables, others).last_hidden_state
    assert np.array_equal(changed[:, :5], states[:, :5])
    assert not np.allclose(changed[:, 5:], states[:, 5:])


def test_masked_tokens_do_not_matter(tiny):
    model, variables, _ = tiny
    apply, ids = jax.jit(model.apply), some_ids()
    others = np.arange(T) != 4
    mask = np.tile(others.astype(np.int32), (3, 1))
    masked = apply(variables, ids, mask).last_hidden_state
    changed = np.where(others, ids, (ids + 1) % VOCAB)
    again = apply(variables, changed, mask).last_hidden_state
    assert np.array_equal(again[:, others], masked[:, others])


def test_a_text_that_is_masked_whole_gives_numbers(tiny):
    model, variables, _ = tiny
    mask = np.ones((3, T), np.bool_)
    mask[0] = False
    output = jax.jit(model.apply)(variables, some_ids(), mask)
    assert np.isfinite(output.last_hidden_state).all()


def test_hidden_layers_selects_and_orders(tiny):
    model, variables, output = tiny
    chosen = compiled(model.apply, hidden_layers=(-2, 0, 2))(variables, some_ids()).hidden_states
    for state, i in zip(chosen, (1, 0, 2), strict=True):
        np.testing.assert_allclose(state, output.hidden_states[i], rtol=1e-5, atol=1e-6)
    assert jax.jit(model.apply)(variables, some_ids()).hidden_states == ()
    with pytest.raises(ValueError, match="between -3 and 2; got 3, -4"):
        model.apply(variables, some_ids(), hidden_layers=(3, 0, -4))


def test_a_tower_that_ends_a_layer_early_ends_at_the_penultimate_states(tiny):
    """Stable Diffusion 2 cuts its tower so, where XL selects."""
    model, variables, output = tiny
    shorter = text_encoder(dataclasses.replace(model.config, num_hidden_layers=1))
    cut = compiled(shorter.apply, hidden_layers=(-1,))(variables, some_ids())
    np.testing.assert_allclose(cut.hidden_states[0], output.hidden_states[-2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_computes_in_bfloat16_and_stays_near_float32(tiny, params_dtype):
    model, variables, output = tiny
    stored = jax.tree.map(lambda w: jnp.asarray(w, params_dtype), variables)
    dtype = jnp.bfloat16 if params_dtype == jnp.float32 else None
    half = compiled(model.clone(dtype=dtype).apply, hidden_layers=(-2,))(stored, some_ids())
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    full = output.last_hidden_state
    error = np.abs(np.asarray(half.last_hidden_state, np.float32) - full)
    assert 0 < error.mean() < 0.03 * np.abs(full).max()


def test_every_linear_layer_can_be_quantized(tiny):
    model, variables, output = tiny
    config = QuantConfig(weight=WeightSpec(bits=8))
    params = quantize(variables["params"], config)
    quantized = sum(map(is_qtensor, jax.tree.leaves(params, is_leaf=is_qtensor)))
    assert quantized == 6 * model.config.num_hidden_layers + 1
    low = jax.jit(model.apply)({"params": params}, some_ids()).last_hidden_state
    error = np.abs(low - output.last_hidden_state)
    assert 0 < error.mean() < 0.03 * np.abs(output.last_hidden_state).max()


def test_ids_and_masks_that_do_not_fit_raise(tiny):
    model, variables, _ = tiny
    with pytest.raises(ValueError, match=r"max_position_embeddings=11; got \(3, 12\)"):
        model.apply(variables, some_ids(t=12))
    with pytest.raises(ValueError, match=r"got \(9,\)"):
        model.apply(variables, some_ids()[0])
    with pytest.raises(TypeError, match="must be integers; got float32"):
        model.apply(variables, some_ids().astype(np.float32))
    with pytest.raises(ValueError, match=r"attention_mask must .* got \(3, 8\) for \(3, 9\)"):
        model.apply(variables, some_ids(), np.ones((3, 8), np.int32))


def test_ids_outside_the_vocabulary_give_nan(tiny):
    model, variables, _ = tiny
    ids = some_ids()
    ids[0, 0] = VOCAB
    states = jax.jit(model.apply)(variables, ids).last_hidden_state
    assert np.isnan(states[0]).all() and np.isfinite(states[1:]).all()


@pytest.mark.parametrize(
    ("model", "name"), [(CLIPTextModel, "openclip_bigg"), (CLIPTextModelWithProjection, "clip_l")]
)
def test_the_other_class_raises(model, name):
    with pytest.raises(ValueError, match="this class needs a config with_projection="):
        model(tiny_config(name)).init(jax.random.key(0), some_ids())


@pytest.mark.slow
@pytest.mark.torch_oracle
def test_clip_l_agrees_with_transformers_at_full_size():
    torch = pytest.importorskip("torch")
    import transformers

    config = CLIPTextConfig.clip_l()
    torch.manual_seed(0)
    module = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**config.to_transformers())
    ).eval()
    tensors = {k: v.numpy() for k, v in module.state_dict().items()}
    params = convert(rename_checkpoint_keys(tensors), checkpoint_keys(config))
    ids = np.random.default_rng(0).integers(0, 49406, (2, 77)).astype(np.int32)
    ids[:, 40:] = 49407
    output = jax.jit(functools.partial(CLIPTextModel(config).apply, hidden_layers=None))(
        {"params": params}, ids
    )
    assert_agrees(output, run_reference(module, ids))


# Sizes, keys


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name):
    config, count = PRESETS[name]
    shapes = jax.eval_shape(text_encoder(config).init, jax.random.key(0), some_ids())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_keys_and_shapes_of_transformers(name):
    torch = pytest.importorskip("torch")
    import transformers

    config, count = PRESETS[name]
    theirs = transformers.CLIPTextConfig(**config.to_transformers())
    with torch.device("meta"):
        module = getattr(transformers, type(text_encoder(config)).__name__)(theirs)
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    shapes = {k: tuple(v.shape) for k, v in rename_checkpoint_keys(module.state_dict()).items()}
    assert shapes == {key: target.shape for key, target in checkpoint_keys(config).items()}


@pytest.mark.torch_oracle
@pytest.mark.parametrize("name", ["clip_l", "openclip_bigg"])
def test_saved_models_go_both_ways(tmp_path, name):
    """As transformers saves a model made by it, and one that it has read with the prefix."""
    torch = pytest.importorskip("torch")
    config = tiny_config(name)
    module, params = reference(config)
    module.save_pretrained(str(tmp_path / "made"))
    module.from_pretrained(str(tmp_path / "made")).save_pretrained(str(tmp_path / "read"))
    for folder in ("made", "read"):
        checkpoint = load_checkpoint(tmp_path, folder, stem="model")
        read = CLIPTextConfig.from_transformers(checkpoint.config)
        assert read == config
        again = convert(rename_checkpoint_keys(checkpoint), checkpoint_keys(read))
        assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    tensors = to_checkpoint(params, checkpoint_keys(config))
    assert all(key.startswith(("text_model.", "text_projection.")) for key in tensors)
    ours = rename_checkpoint_keys({k: v.numpy() for k, v in module.state_dict().items()})
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(torch.tensor(tensors[k]), torch.tensor(ours[k])) for k in ours)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_checkpoints_of_every_age_are_read(prefix):
    config = tiny_config("openclip_bigg")
    targets, params = checkpoint_keys(config), random_params(config)
    tensors = {
        prefix + key.removeprefix("text_model.") if key.startswith("text_model.") else key: tensor
        for key, tensor in to_checkpoint(params, targets).items()
    }
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(T + 2)[None]
    again = convert(rename_checkpoint_keys(tensors), targets)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_a_key_with_and_without_prefix_raises():
    tensors = dict.fromkeys(
        [
            "final_layer_norm.bias",
            "text_model.final_layer_norm.bias",
            "encoder.layers.0.mlp.fc1.bias",
            "text_model.encoder.layers.0.mlp.fc1.bias",
            "encoder.layers.1.mlp.fc1.bias",
        ]
    )
    wanted = r"both of text_model\.encoder\.layers\.0\.mlp\.fc1\.bias, text_model\.final_layer_norm"
    with pytest.raises(ValueError, match=wanted):
        rename_checkpoint_keys(tensors)


def test_tensors_of_a_vision_tower_are_not_dropped_in_silence():
    config = tiny_config()
    tensors = to_checkpoint(random_params(config), checkpoint_keys(config))
    tensors["vision_model.embeddings.position_ids"] = np.arange(3)
    with pytest.raises(ValueError, match="1 unexpected: vision_model"):
        convert(rename_checkpoint_keys(tensors), checkpoint_keys(config))


# Configs


@pytest.mark.parametrize("name", PRESETS)
def test_configs_go_both_ways(name):
    config = PRESETS[name][0]
    assert CLIPTextConfig.from_transformers(config.to_transformers()) == config


@pytest.mark.torch_oracle
def test_defaults_are_those_of_transformers():
    pytest.importorskip("torch")
    import transformers

    theirs = transformers.CLIPTextConfig().to_dict()
    assert CLIPTextConfig.from_transformers(theirs) == CLIPTextConfig()
    assert CLIPTextConfig.from_transformers({}) == CLIPTextConfig()


def test_every_setting_that_cannot_be_followed_is_named():
    config = CLIPTextConfig.clip_l().to_transformers()
    config |= {
        "hidden_act": "relu",
        "num_attention_heads": 7,
        "vocab_size": None,
        "eos_token_id": [2, 49407],
        "layer_norm_eps": "small",
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "quantization_config": {"bits": 4},
        "dropout": 0.1,
        "pruned_heads": {},
        "sep_token": None,
    }
    with pytest.raises(ValueError) as error:
        CLIPTextConfig.from_transformers(config)
    told = str(error.value)
    for part in (
        "quantization_config={'bits': 4} (unknown key)",
        "model_type='clip' (only 'clip_text_model')",
        "architectures=['CLIPModel'] (only",
        "vocab_size=None (a positive integer)",
        "eos_token_id=[2, 49407] (one token's id)",
        "layer_norm_eps='small' (a number)",
        "hidden_act='relu' (one of 'quick_gelu', 'gelu')",
        "num_attention_heads=7 with hidden_size=768 (must divide it)",
    ):
        assert part in told
    assert not any(key in told for key in ("dropout", "pruned_heads", "sep_token"))
    with pytest.raises(ValueError, match="projection_dim=None"):
        CLIPTextConfig(projection_dim=None, with_projection=True)
    assert CLIPTextConfig(projection_dim=None).to_transformers()["projection_dim"] is None
