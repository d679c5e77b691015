"""LoRA: every spelling finds its layer, and a side branch is the fused kernel."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import qjax
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.qtensor import is_qtensor
from qjax.core.safetensors_io import write_tensors
from qjax.models.lora import attach, detach, fuse, load_lora
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_config import UNet2DConfig
from qjax.models.unet2d_keys import checkpoint_keys

CONFIG = UNet2DConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    attention_head_dim=8,
)
TABLES = {"unet": checkpoint_keys(CONFIG)}
MODEL = UNet2DModel(CONFIG)
DENSE, OUT = "mid_block.attentions.0.to_q", "mid_block.attentions.0.to_out.0"
CONV, ONE = "down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"
X_T = jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
T = jnp.asarray([3, 700])


@pytest.fixture(scope="module")
def params():
    params = jax.jit(MODEL.init)(jax.random.key(0), X_T, T)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return tree.unflatten([a + b for a, b in zip(leaves, noise, strict=True)])


def factors(layer, rank, seed=0):
    """A `down` and an `up` for a layer, as PyTorch has them."""
    rng = np.random.default_rng([seed, len(layer)])
    o, i, *taps = TABLES["unet"][f"{layer}.weight"].shape
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32) / 4
    return draw(rank, i, *taps), draw(o, rank, *[1 for _ in taps])


def lora_file(path, spell, *, rank=3, layers=(DENSE, OUT, CONV, ONE), alpha=None, **extra):
    """A file with one key for each half, as `spell(layer, role)` writes it."""
    tensors = dict(extra)
    for layer in layers:
        tensors[spell(layer, "down")], tensors[spell(layer, "up")] = factors(layer, rank)
        if alpha is not None:
            tensors[spell(layer, "alpha")] = np.float32(alpha)
    write_tensors(path, tensors)
    return path


def peft(layer, role):
    return f"unet.{layer}." + {"down": "lora_A.weight", "up": "lora_B.weight"}.get(role, role)


def bare(layer, role):
    return f"base_model.model.{layer}." + {"down": "lora_A.weight", "up": "lora_B.weight"}[role]


def older(layer, role):
    return f"unet.{layer}.lora.{role}.weight"


def processor(layer, role):
    module, _, projection = layer.removesuffix(".0").rpartition(".")
    return f"unet.{module}.processor.{projection}_lora.{role}.weight"


def kohya(layer, role):
    name = "lora_unet_" + layer.replace(".", "_")
    return f"{name}.alpha" if role == "alpha" else f"{name}.lora_{role}.weight"


def kernel_change(layer, rank):
    """`up down` in PyTorch's own terms, then in the order of the params."""
    down, up = factors(layer, rank)
    change = np.einsum("or,r...->o...", up.reshape(len(up), rank), down)
    target = TABLES["unet"][f"{layer}.weight"]
    return target.path, target.transform(change)


@pytest.mark.parametrize(
    "spell, layers",
    [
        (peft, (DENSE, OUT, CONV, ONE)),
        (bare, (DENSE, OUT, CONV, ONE)),
        (older, (DENSE, OUT)),
        (processor, (DENSE, OUT)),
        (kohya, (DENSE, OUT, CONV, ONE)),
    ],
)
def test_every_spelling_changes_the_same_kernels(params, tmp_path, spell, layers):
    file = lora_file(tmp_path / "lora.safetensors", spell, layers=layers)
    fused = fuse(params, load_lora(file, TABLES)["unet"], scale=0.5)
    before, after = traverse_util.flatten_dict(params), traverse_util.flatten_dict(fused)
    changes = dict(kernel_change(layer, 3) for layer in layers)
    for path in before:
        wanted = before[path] + 0.5 * changes.get(path, np.zeros((), np.float32))
        np.testing.assert_allclose(after[path], wanted, rtol=1e-5, atol=1e-6)


def test_a_side_branch_is_the_fused_kernel(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    beside = MODEL.apply({"params": attach(params, lora, scale=0.7)}, X_T, T)
    fused = MODEL.apply({"params": fuse(params, lora, scale=0.7)}, X_T, T)
    plain = MODEL.apply({"params": params}, X_T, T)
    scale = float(jnp.abs(fused).max())
    assert float(jnp.abs(beside - fused).max()) <= 1e-4 * scale
    assert float(jnp.abs(plain - fused).max()) > 1e-2 * scale


@pytest.mark.parametrize(
    "recipe, error", [(qjax.recipes.w8a8, 0.05), (qjax.recipes.w4a16, 1e-4)], ids=("w8a8", "w4a16")
)
def test_another_scale_runs_the_same_program_on_quantized_weights(params, tmp_path, recipe, error):
    """What is left of the difference is the rounding of the activations."""
    lora = load_lora(lora_file(tmp_path / "a.safetensors", kohya), TABLES)["unet"]
    qparams = qjax.quantize(params, recipe())
    traces = []

    @jax.jit
    def run(params):
        traces.append(1)
        return MODEL.apply({"params": params}, X_T, T)

    off, one, two = (run(attach(qparams, lora, scale=s)) for s in (0.0, 1.0, 2.0))
    assert len(traces) == 1
    np.testing.assert_allclose(off, run(qparams), rtol=1e-4, atol=1e-5)
    for scale, got in ((1.0, one), (2.0, two)):
        fused = run(fuse(qjax.dequantize(qparams), lora, scale=scale))
        assert float(jnp.abs(got - fused).max()) <= error * float(jnp.abs(fused).max())
        assert float(jnp.abs(off - fused).max()) > 0.2 * float(jnp.abs(fused).max())


def test_several_add_up_each_with_its_scale(params, tmp_path):
    first = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    wide = lora_file(tmp_path / "b.safetensors", peft, rank=2, layers=(DENSE, CONV))
    second = load_lora(wide, TABLES)["unet"]
    both = attach(params, [first, second], scale=[0.3, -1.5])
    wanted = fuse(fuse(params, first, scale=0.3), second, scale=-1.5)
    got, want = (MODEL.apply({"params": p}, X_T, T) for p in (both, wanted))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert jax.tree.structure(detach(both)) == jax.tree.structure(params)


def test_quantizing_leaves_a_side_branch_in_float(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    config = QuantConfig(weight=WeightSpec(bits=8))
    quantized = qjax.quantize(attach(params, lora), config)
    flat = traverse_util.flatten_dict(quantized, is_leaf=lambda _, leaf: is_qtensor(leaf))
    branches = [leaf for path, leaf in flat.items() if path[-1].startswith("lora_")]
    assert branches and not any(map(is_qtensor, branches))


def test_alpha_over_rank_scales_the_change(params, tmp_path):
    plain = load_lora(lora_file(tmp_path / "a.safetensors", kohya), TABLES)["unet"]
    scaled = load_lora(lora_file(tmp_path / "b.safetensors", kohya, alpha=6), TABLES)["unet"]
    for path, one in plain.layers.items():
        np.testing.assert_allclose(scaled.layers[path].up, one.up * 2, rtol=1e-6)


def test_settings_in_the_file_or_beside_it_scale_the_change(tmp_path):
    plain = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    path = tuple(TABLES["unet"][f"{DENSE}.weight"].path[:-1])
    tensors = {peft(DENSE, "down"): factors(DENSE, 3)[0], peft(DENSE, "up"): factors(DENSE, 3)[1]}
    text = json.dumps({"unet.lora_alpha": 12, "unet.r": 3, "unet.use_rslora": False})
    write_tensors(tmp_path / "b.safetensors", tensors, {"lora_adapter_metadata": text})
    inside = load_lora(tmp_path / "b.safetensors", TABLES)["unet"]
    np.testing.assert_allclose(inside.layers[path].up, plain.layers[path].up * 4, rtol=1e-6)

    folder = tmp_path / "adapter"
    folder.mkdir()
    lora_file(folder / "adapter_model.safetensors", bare)
    settings = {"lora_alpha": 3, "r": 3, "use_rslora": True, "alpha_pattern": {"to_q": 6}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    beside = load_lora(folder, TABLES)["unet"]
    np.testing.assert_allclose(
        beside.layers[path].up, plain.layers[path].up * 6 / 3**0.5, rtol=1e-6
    )


def test_keys_without_a_layer_are_all_named(tmp_path):
    file = lora_file(
        tmp_path / "a.safetensors",
        peft,
        layers=(DENSE,),
        **{
            "unet.mid_block.attentions.9.to_q.lora_A.weight": np.zeros((3, 16), np.float32),
            f"unet.{DENSE}.lora_magnitude_vector": np.zeros(16, np.float32),
            f"unet.{OUT}.hada_w1_a": np.zeros((3, 3), np.float32),
        },
    )
    with pytest.raises(ValueError, match="3 of no layer") as error:
        load_lora(file, TABLES)
    for name in ("attentions.9", "lora_magnitude_vector", "hada_w1_a"):
        assert name in str(error.value)


def test_half_a_lora_and_wrong_shapes_are_named_at_once(tmp_path):
    down, up = factors(CONV, 3)
    write_tensors(
        tmp_path / "a.safetensors",
        {
            peft(DENSE, "down"): factors(DENSE, 3)[0],
            peft(CONV, "down"): down[:, :-1],
            peft(CONV, "up"): up,
        },
    )
    with pytest.raises(ValueError, match=r"1 without the other half.*1 of another shape"):
        load_lora(tmp_path / "a.safetensors", TABLES)


def test_a_quantized_kernel_cannot_be_fused(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    with pytest.raises(ValueError, match="before quantize, or use attach"):
        fuse(qjax.quantize(params, qjax.recipes.w8a8()), lora)
    with pytest.raises(ValueError, match="layers that these params do not have"):
        attach({"conv_in": params["conv_in"]}, lora)
    with pytest.raises(ValueError, match="one number for each LoRA"):
        attach(params, lora, scale=[1.0, 2.0])


def test_pickles_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_lora(tmp_path / "a.pt", TABLES)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_lora(tmp_path / "b.safetensors", TABLES)
    with pytest.raises(FileNotFoundError, match="must hold"):
        load_lora(tmp_path, TABLES)
