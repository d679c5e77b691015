"""LoRA: every spelling finds its layer, and a side branch is the fused kernel."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import qjax
from qjax.core.config import QuantConfig, WeightSpec
from qjax.core.layers import Conv, Dense
from qjax.core.qtensor import is_qtensor
from qjax.core.safetensors_io import write_tensors
from qjax.models.convert import Target, linear
from qjax.models.lora import attach, detach, fuse, load_lora, rescale
from qjax.models.unet2d_keys import keys_of_params

X = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))


class Attention(nn.Module):
    """A dense layer of each kind that the spellings know."""

    @nn.compact
    def __call__(self, x):
        return Dense(8, name="to_out_0")(nn.silu(Dense(16, name="to_q")(x)))


class Net(nn.Module):
    """A layer of every kind, named as diffusers names them."""

    @nn.compact
    def __call__(self, x):
        x = Attention(name="attentions_0")(x)
        x = Conv(16, (3, 3), 2, ((1, 1), (1, 1)), name="conv1")(x)
        return Conv(4, (1, 1), name="conv_shortcut")(x)


MODEL = Net()
SHAPES = jax.eval_shape(MODEL.init, jax.random.key(0), X)["params"]
TABLES = {"unet": keys_of_params(SHAPES)}
DENSE, OUT, CONV, ONE = "attentions.0.to_q", "attentions.0.to_out.0", "conv1", "conv_shortcut"
run = jax.jit(lambda params: MODEL.apply({"params": params}, X))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype)
    return jax.tree.map(draw, SHAPES)


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


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


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
    beside, fused = run(attach(params, lora, scale=0.7)), run(fuse(params, lora, scale=0.7))
    assert relative(beside, fused) <= 1e-4
    assert relative(run(params), fused) > 1e-2


@pytest.mark.quick_cases("w4a16")
@pytest.mark.parametrize(
    "recipe, error", [(qjax.recipes.w8a8, 0.05), (qjax.recipes.w4a16, 1e-4)], ids=("w8a8", "w4a16")
)
def test_another_scale_runs_the_same_program_on_quantized_weights(params, tmp_path, recipe, error):
    """What is left of the difference is the rounding of the activations."""
    lora = load_lora(lora_file(tmp_path / "a.safetensors", kohya), TABLES)["unet"]
    qparams = qjax.quantize(params, recipe())
    ranks = {"/".join(path): factors.rank for path, factors in lora.layers.items()}
    traces = []

    @jax.jit
    def counted(params):
        traces.append(1)
        return MODEL.apply({"params": params}, X)

    beside = attach(qparams, lora, scale=1.0)
    off, one, two = (counted(rescale(beside, [ranks], [s])) for s in (0.0, 1.0, 2.0))
    np.testing.assert_array_equal(counted(attach(qparams, lora, scale=2.0)), two)
    assert len(traces) == 1
    assert relative(off, run(qparams)) <= 1e-5
    for scale, found in ((1.0, one), (2.0, two)):
        fused = run(fuse(qjax.dequantize(qparams), lora, scale=scale))
        assert relative(found, fused) <= error
        assert relative(off, fused) > 0.2


def test_another_scale_keeps_the_dtypes_of_what_was_quantized_with_its_branches(params, tmp_path):
    """The recipes store in float16 what they leave in float; float32 would be another program."""
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    ranks = {"/".join(path): factors.rank for path, factors in lora.layers.items()}
    quantized = qjax.quantize(attach(params, lora), qjax.recipes.w8a8())
    changed = rescale(quantized, [ranks], [0.5])
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(changed) == shapes(quantized)
    assert jnp.dtype("float16") in {leaf.dtype for leaf in jax.tree.leaves(changed)}


def test_a_scale_that_is_no_number_is_refused(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    with pytest.raises(ValueError, match="scale must be a finite number; got nan"):
        attach(params, lora, scale=float("nan"))


def test_several_add_up_each_with_its_scale(params, tmp_path):
    first = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    wide = lora_file(tmp_path / "b.safetensors", peft, rank=2, layers=(DENSE, CONV))
    second = load_lora(wide, TABLES)["unet"]
    both = attach(params, [first, second], scale=[0.3, -1.5])
    fused = run(fuse(fuse(params, first, scale=0.3), second, scale=-1.5))
    assert relative(run(both), fused) <= 1e-4
    in_turn = attach(attach(params, first, scale=0.3), second, scale=-1.5)
    jax.tree.map(np.testing.assert_array_equal, in_turn, both)
    jax.tree.map(np.testing.assert_array_equal, detach(both), params)


def test_ranks_that_are_not_those_of_the_branches_are_refused(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft, layers=(DENSE,)), TABLES)["unet"]
    with pytest.raises(ValueError, match="got 4 in all for attentions_0/to_q, which has 3"):
        rescale(attach(params, lora), [{"attentions_0/to_q": 4}], [1.0])


def test_a_branch_that_was_there_before_stays_as_it_was(params, tmp_path):
    first = lora_file(tmp_path / "a.safetensors", peft, rank=2, layers=(DENSE,))
    own = attach(params, load_lora(first, TABLES)["unet"], scale=0.5)
    lora = load_lora(lora_file(tmp_path / "b.safetensors", peft), TABLES)["unet"]
    ranks = [{"/".join(path): factors.rank for path, factors in lora.layers.items()}]
    both = attach(own, lora, scale=1.0)
    flat = traverse_util.flatten_dict(rescale(both, ranks, [0.25]), sep="/")
    scales = {path: leaf.tolist() for path, leaf in flat.items() if path.endswith("lora_scale")}
    dense = "attentions_0/to_q/lora_scale"
    assert scales.pop(dense) == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert scales and all(scale == [0.25] * 3 for scale in scales.values())
    jax.tree.map(np.testing.assert_array_equal, detach(both, ranks), own)
    with pytest.raises(ValueError, match="ranks of the LoRAs must be those"):
        detach(own, ranks)


def test_quantizing_leaves_a_side_branch_in_float(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    config = QuantConfig(weight=WeightSpec(bits=8))
    quantized = qjax.quantize(attach(params, lora), config)
    flat = traverse_util.flatten_dict(quantized, is_leaf=lambda _, leaf: is_qtensor(leaf))
    branches = [leaf for path, leaf in flat.items() if path[-1].startswith("lora_")]
    assert branches and not any(map(is_qtensor, branches))


def test_layers_that_are_stored_fused_are_changed_each_in_its_part(tmp_path):
    """As the three projections of DiT are."""
    part = lambda i: Target(("qkv", "kernel"), (4, 8), linear, part=(i, 2))
    tables = {"unet": {"to_q.weight": part(0), "to_k.weight": part(1)}}
    q, k = ((down[:, :, 0, 0], up[:, :, 0, 0]) for down, up in (factors(ONE, 3), factors(ONE, 2)))
    q, k = ((down[:, :8], up) for down, up in (q, k))
    tensors = {f"unet.to_{n}.lora_A.weight": w[0] for n, w in zip("qk", (q, k), strict=True)}
    tensors |= {f"unet.to_{n}.lora_B.weight": w[1] for n, w in zip("qk", (q, k), strict=True)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    lora = load_lora(tmp_path / "a.safetensors", tables)["unet"]
    kernel = np.ones((8, 8), np.float32)
    fused = fuse({"qkv": {"kernel": jnp.asarray(kernel)}}, lora)["qkv"]["kernel"]
    np.testing.assert_allclose(fused[:, :4], kernel[:, :4] + (q[1] @ q[0]).T, rtol=1e-5)
    np.testing.assert_allclose(fused[:, 4:], kernel[:, 4:] + (k[1] @ k[0]).T, rtol=1e-5)


def test_a_layer_in_two_spellings_counts_once_if_they_agree(tmp_path):
    down, up = factors(DENSE, 3)
    both = {spell(DENSE, "down"): down for spell in (peft, kohya)}
    both |= {spell(DENSE, "up"): up for spell in (peft, kohya)}
    write_tensors(tmp_path / "a.safetensors", both)
    [found] = load_lora(tmp_path / "a.safetensors", TABLES)["unet"].layers.values()
    np.testing.assert_array_equal(found.up, up.T)
    write_tensors(tmp_path / "b.safetensors", both | {kohya(DENSE, "up"): 2 * up})
    with pytest.raises(ValueError, match="1 of one layer, saying different things"):
        load_lora(tmp_path / "b.safetensors", TABLES)


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
            "unet.attentions.9.to_q.lora_A.weight": np.zeros((3, 16), np.float32),
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


def test_params_that_a_lora_does_not_suit_are_refused(params, tmp_path):
    lora = load_lora(lora_file(tmp_path / "a.safetensors", peft), TABLES)["unet"]
    with pytest.raises(ValueError, match="before quantize, or put it beside them"):
        fuse(qjax.quantize(params, qjax.recipes.w8a8()), lora)
    with pytest.raises(ValueError, match="layers that these params do not have"):
        attach({"conv1": params["conv1"]}, lora)
    with pytest.raises(ValueError, match="one number for each LoRA"):
        attach(params, lora, scale=[1.0, 2.0])


def test_an_empty_file_is_refused(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="it holds none"):
        load_lora(tmp_path / "a.safetensors", TABLES)


def test_pickles_and_missing_files_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        load_lora(tmp_path / "a.pt", TABLES)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_lora(tmp_path / "b.safetensors", TABLES)
    with pytest.raises(FileNotFoundError, match="must hold"):
        load_lora(tmp_path, TABLES)
