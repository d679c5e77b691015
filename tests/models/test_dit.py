"""The DiT port against diffusers' PyTorch module, from block to full size."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax
import jax.numpy as jnp

from qjax.models.convert import convert, to_checkpoint
from qjax.models.dit import DiT, DiTBlock, DiTConfig, position_embedding
from qjax.models.dit_keys import (
    ORIGINAL_CONSTANTS,
    diffusers_keys,
    is_original,
    original_config,
    original_keys,
)

pytestmark = [
    pytest.mark.torch_oracle,
    # torch and diffusers warn of their own deprecations at import.
    pytest.mark.filterwarnings("ignore:::torch"),
    pytest.mark.filterwarnings("ignore:::diffusers"),
]

SMALL = DiTConfig(
    sample_size=16,
    patch_size=4,
    in_channels=3,
    out_channels=6,
    num_layers=2,
    num_heads=2,
    head_dim=12,
    num_classes=5,
)


def oracle(config: DiTConfig, *, seed: int = 0):
    """diffusers' module with random weights and one embedder, as published checkpoints are."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    kwargs = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    model = DiTTransformer2DModel(**kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 / max(parameter.shape[-1] ** 0.5, 1) if parameter.ndim > 1 else 0.1
            parameter.normal_(0, 3 * std)
        first = model.transformer_blocks[0].norm1.emb
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first.state_dict())
    return model


def tensors(model) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items()}


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def run_both(config: DiTConfig, model, batch: int, size: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, size, size, config.in_channels)).astype(np.float32)
    t = rng.integers(0, 1000, batch)
    labels = rng.integers(0, config.num_classes + 1, batch)
    params = convert(tensors(model), diffusers_keys(config))
    ours = jax.jit(DiT(config).apply)({"params": params}, x, jnp.asarray(t), jnp.asarray(labels))
    with torch.no_grad():
        theirs = model(
            torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(labels)
        ).sample.numpy()
    return relative_error(ours, theirs.transpose(0, 2, 3, 1))


@pytest.mark.quick_cases("2")
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_model_equals_diffusers(batch):
    assert run_both(SMALL, oracle(SMALL), batch, 16, batch) <= 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"patch_size": 2, "sample_size": 8},
        {"in_channels": 1, "out_channels": 1, "num_heads": 4, "head_dim": 8},
        {"norm_eps": 1e-3, "num_layers": 3},
    ],
)
def test_other_sizes_equal_diffusers(change):
    import dataclasses

    config = dataclasses.replace(SMALL, **change)
    assert run_both(config, oracle(config), 2, config.sample_size, 0) <= 1e-4


@pytest.mark.quick_cases("4")
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_block_equals_diffusers(tokens):
    model = oracle(SMALL)
    block = model.transformer_blocks[1]
    rng = np.random.default_rng(tokens)
    h = rng.standard_normal((2, tokens, SMALL.width)).astype(np.float32)
    t, labels = torch.tensor([3, 800]), torch.tensor([1, 5])
    with torch.no_grad():
        conditioning = block.norm1.emb(t, labels, hidden_dtype=torch.float32).numpy()
        theirs = block(torch.tensor(h), timestep=t, class_labels=labels).numpy()
    params = convert(tensors(model), diffusers_keys(SMALL))["blocks_1"]
    ours = DiTBlock(SMALL).apply({"params": params}, h, jnp.asarray(conditioning))
    assert relative_error(ours, theirs) <= 1e-4


def test_position_embedding_equals_diffusers():
    expected = oracle(SMALL).pos_embed.pos_embed[0].numpy()
    assert relative_error(position_embedding(SMALL.width, 4), expected) <= 1e-6


def test_unequal_embedder_copies_are_named():
    state = tensors(oracle(SMALL))
    key = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[key] = state[key] + 1
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        convert(state, diffusers_keys(SMALL))


def test_checkpoint_round_trips_with_one_copy_per_block():
    state = tensors(oracle(SMALL))
    targets = diffusers_keys(SMALL)
    again = to_checkpoint(convert(state, targets), targets)
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) for key in state)


def test_config_round_trips():
    assert DiTConfig.from_diffusers(SMALL.to_diffusers()) == SMALL


def test_unsupported_config_values_are_all_named():
    config = SMALL.to_diffusers() | {"norm_type": "ada_norm", "activation_fn": "geglu", "new": 3}
    with pytest.raises(ValueError, match="norm_type.*activation_fn.*new"):
        DiTConfig.from_diffusers(config)


def original_state(config: DiTConfig) -> dict[str, np.ndarray]:
    """A checkpoint in the authors' layout with random weights."""
    rng = np.random.default_rng(0)
    state = {
        key: (0.2 * rng.standard_normal(target.shape)).astype(np.float32)
        for key, target in original_keys(config).items()
    }
    side = config.sample_size // config.patch_size
    state["pos_embed"] = position_embedding(config.width, side)[None]
    return state


def test_original_layout_is_read_with_its_sizes():
    state = original_state(SMALL)
    assert is_original(state)
    config = original_config({k: v.shape for k, v in state.items()}, num_heads=SMALL.num_heads)
    assert (config.width, config.num_layers) == (SMALL.width, SMALL.num_layers)
    assert (config.out_channels, config.sample_size) == (6, 16)
    params = convert(state, original_keys(config), allow_unexpected=ORIGINAL_CONSTANTS)
    x = jnp.ones((1, 16, 16, 3))
    out = DiT(config).apply({"params": params}, x, jnp.array([7]), jnp.array([2]))
    assert out.shape == (1, 16, 16, 6) and bool(jnp.isfinite(out).all())


def test_both_layouts_give_the_same_params():
    """Fused and separate projections of the same numbers end in the same leaf."""
    state = original_state(SMALL)
    params = convert(state, original_keys(SMALL), allow_unexpected=ORIGINAL_CONSTANTS)
    via_diffusers = convert(to_checkpoint(params, diffusers_keys(SMALL)), diffusers_keys(SMALL))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), params, via_diffusers)
    assert all(jax.tree.leaves(same))


def test_frequencies_of_the_two_layouts_differ():
    """diffusers divides the exponent by 127, the authors by 128 (models/embeddings.py)."""
    import dataclasses

    authors = dataclasses.replace(SMALL, freq_shift=0)
    params = convert(tensors(oracle(SMALL)), diffusers_keys(SMALL))
    x, t, labels = jnp.ones((1, 16, 16, 3)), jnp.array([500]), jnp.array([0])
    outs = [DiT(c).apply({"params": params}, x, t, labels) for c in (SMALL, authors)]
    assert float(jnp.abs(outs[0] - outs[1]).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_full_size_dit_xl_2_equals_diffusers(batch):
    config = DiTConfig.dit_xl_2()
    assert run_both(config, oracle(config), batch, 32, batch) <= 1e-4
