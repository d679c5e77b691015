"""Checkpoints become params with a full account, tensor by tensor, and go back."""

import json
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.safetensors_io import metadata, open_tensors, write_tensors
from qjax.models.convert import (
    Target,
    Transform,
    conv,
    conv1x1,
    convert,
    linear,
    load_checkpoint,
    same,
    save_component,
    to_checkpoint,
)

CONFIG = {"_class_name": "Tiny", "sizes": [4, 6]}
TARGETS = {
    "conv.weight": Target(("conv_in", "kernel"), (4, 3, 3, 2), conv),
    "conv.bias": Target(("conv_in", "bias"), (4,)),
    "proj.weight": Target(("proj", "kernel"), (6, 4), linear),
    "short.weight": Target(("short", "kernel"), (5, 4, 1, 1), conv1x1),
    "norm.weight": Target(("norm", "scale"), (4,), same),
    "blocks.0.emb.weight": Target(("emb", "kernel"), (3, 2), linear),
    "blocks.1.emb.weight": Target(("emb", "kernel"), (3, 2), linear),
}


def random_checkpoint(targets=TARGETS, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    """Normal tensors of the shapes in the table; keys that share a path are equal."""
    rng = np.random.default_rng(seed)
    by_path = {t.path: rng.standard_normal(t.shape).astype(dtype) for t in targets.values()}
    return {key: by_path[t.path].copy() for key, t in targets.items()}


def write_folder(folder, files, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(tensors))
        else:
            write_tensors(folder / name, tensors)
    return folder


def sharded(tensors, variant="") -> dict:
    """The same tensors in two shards with an index."""
    keys = sorted(tensors)
    names = [f"diffusion_pytorch_model{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = [keys[:3], keys[3:]]
    files = {name: {k: tensors[k] for k in part} for name, part in zip(names, parts, strict=True)}
    weight_map = {k: name for name, part in zip(names, parts, strict=True) for k in part}
    index = f"diffusion_pytorch_model.safetensors.index{variant}.json"
    return files | {index: {"metadata": {"total_size": 1}, "weight_map": weight_map}}


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# Transforms.


@pytest.mark.parametrize(
    ("transform", "stored", "leaf"),
    [
        (same, (2, 3, 4), (2, 3, 4)),
        (linear, (6, 4), (4, 6)),
        (conv, (5, 4, 3, 2), (3, 2, 4, 5)),
        (conv1x1, (5, 4, 1, 1), (4, 5)),
    ],
)
def test_transforms_reorder_axes_and_are_undone_by_their_inverses(transform, stored, leaf):
    w = np.random.default_rng(0).standard_normal(stored)
    assert transform(w).shape == leaf
    np.testing.assert_array_equal(transform.inverse(transform(w)), w)


def test_conv_takes_oihw_to_hwio():
    w = np.arange(5 * 4 * 3 * 2).reshape(5, 4, 3, 2)
    assert conv(w)[1, 0, 2, 3] == w[3, 2, 1, 0]
    assert conv1x1(w[:, :, :1, :1])[2, 3] == w[3, 2, 0, 0]


# Folders.


def test_a_single_file_is_read_lazily_with_its_config(tmp_path):
    tensors = random_checkpoint()
    write_folder(tmp_path / "unet", {"diffusion_pytorch_model.safetensors": tensors})
    found = load_checkpoint(tmp_path, "unet")
    assert found.config == CONFIG
    assert (found.variant, found.notes) == (None, ())
    assert [path.name for path in found.files] == ["diffusion_pytorch_model.safetensors"]
    assert found.keys() == tensors.keys()
    np.testing.assert_array_equal(found["conv.weight"].read(), tensors["conv.weight"])
    assert_same_trees(convert(found, TARGETS), convert(tensors, TARGETS))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_give_the_same_params_as_a_single_file(tmp_path, variant):
    tensors = random_checkpoint()
    write_folder(tmp_path, sharded(tensors, f".{variant}" if variant else ""))
    found = load_checkpoint(tmp_path, variant=variant)
    assert len(found.files) == 2
    assert found.variant == variant
    assert_same_trees(convert(found, TARGETS), convert(tensors, TARGETS))


def test_the_asked_variant_is_read(tmp_path):
    files = {
        "diffusion_pytorch_model.safetensors": random_checkpoint(),
        "diffusion_pytorch_model.fp16.safetensors": random_checkpoint(dtype=np.float16),
    }
    write_folder(tmp_path, files)
    plain, half = load_checkpoint(tmp_path), load_checkpoint(tmp_path, variant="fp16")
    assert plain["conv.bias"].dtype == np.float32
    assert half["conv.bias"].dtype == np.float16
    assert (plain.notes, half.notes) == ((), ())


def test_fp16_weights_that_stand_alone_are_read_with_a_note(tmp_path):
    write_folder(tmp_path, {"diffusion_pytorch_model.fp16.safetensors": random_checkpoint()})
    found = load_checkpoint(tmp_path)
    assert found.variant == "fp16"
    assert "fp16 variant only" in found.notes[0]


def test_another_variant_is_never_chosen_unasked(tmp_path):
    write_folder(tmp_path, {"diffusion_pytorch_model.non_ema.safetensors": random_checkpoint()})
    with pytest.raises(ValueError, match="no weights in variant None; it has 'non_ema'"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no weights in variant 'fp16'"):
        load_checkpoint(tmp_path, variant="fp16")


def test_text_encoders_are_read_by_their_own_stem(tmp_path):
    write_folder(tmp_path, {"model.safetensors": random_checkpoint()})
    assert load_checkpoint(tmp_path, stem="model").keys() == TARGETS.keys()


def test_weights_in_two_forms_are_refused(tmp_path):
    tensors = random_checkpoint()
    write_folder(tmp_path, sharded(tensors) | {"diffusion_pytorch_model.safetensors": tensors})
    with pytest.raises(ValueError, match="must hold weights in one form"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "dit.pt"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    write_folder(tmp_path, {})
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=f"{name}. Re-save as safetensors"):
        load_checkpoint(tmp_path)


def test_missing_config_and_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold config.json"):
        load_checkpoint(tmp_path)
    write_folder(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="must hold diffusion_pytorch_model.safetensors"):
        load_checkpoint(tmp_path)


def test_missing_shards_are_named_all_at_once(tmp_path):
    files = sharded(random_checkpoint())
    (index,) = (name for name in files if name.endswith(".json"))
    write_folder(tmp_path, {index: files[index]})
    with pytest.raises(FileNotFoundError, match="2 are missing: .*-00001-of.*-00002-of"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "..",
        ".hidden.safetensors",
        "",
        "secret.bin",
    ],
)
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, name):
    write_tensors(tmp_path / "secret.safetensors", random_checkpoint())
    index = {"weight_map": dict.fromkeys(TARGETS, name)}
    folder = write_folder(
        tmp_path / "model", {"diffusion_pytorch_model.safetensors.index.json": index}
    )
    with pytest.raises(ValueError, match="in its own folder, without any path"):
        load_checkpoint(folder)


def test_a_subfolder_cannot_leave_its_folder(tmp_path):
    with pytest.raises(ValueError, match="one plain name"):
        load_checkpoint(tmp_path, "../other")


def test_an_index_that_disagrees_with_its_shards_is_refused_with_all_keys(tmp_path):
    files = sharded(random_checkpoint())
    first, second, index = files
    files[first]["stray"] = np.ones(2)
    files[second]["conv.bias"] = files[first]["conv.bias"]
    del files[second]["proj.weight"]
    write_folder(tmp_path, files)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path)
    message = str(caught.value)
    assert f"stray in {first}" in message
    assert f"conv.bias in {second}" in message
    assert f"proj.weight in {second}" in message
    assert index in message


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json (must hold|is not valid)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_proper_weight_map_is_refused(tmp_path, index):
    write_folder(tmp_path, {"diffusion_pytorch_model.safetensors.index.json": index})
    with pytest.raises(ValueError, match="must have a weight_map"):
        load_checkpoint(tmp_path)


# Conversion.


def test_every_key_is_used_and_every_path_filled():
    tensors = random_checkpoint()
    params = convert(tensors, TARGETS)
    assert {k: set(v) for k, v in params.items()} == {
        "conv_in": {"kernel", "bias"},
        "proj": {"kernel"},
        "short": {"kernel"},
        "norm": {"scale"},
        "emb": {"kernel"},
    }
    np.testing.assert_array_equal(
        params["conv_in"]["kernel"], tensors["conv.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["proj"]["kernel"], tensors["proj.weight"].T)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"])
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))


def test_all_problems_are_named_at_once():
    tensors = random_checkpoint()
    del tensors["conv.bias"], tensors["norm.weight"]
    tensors["extra.a"] = tensors["extra.b"] = np.ones(1)
    tensors["proj.weight"] = np.ones((4, 6), np.float32)
    tensors["blocks.1.emb.weight"][0, 0] += 1
    tensors["short.weight"][0] = np.inf
    with pytest.raises(ValueError) as caught:
        convert(tensors, TARGETS, require_finite=True)
    message = str(caught.value)
    assert "2 missing: conv.bias, norm.weight" in message
    assert "2 unexpected: extra.a, extra.b" in message
    assert "1 of another shape: proj.weight [4, 6] instead of [6, 4]" in message
    assert "not: blocks.1.emb.weight and blocks.0.emb.weight" in message
    assert "1 not finite: short.weight" in message


def test_long_lists_are_cut_and_counted():
    tensors = random_checkpoint() | {f"extra.{n}": np.ones(1) for n in range(100)}
    with pytest.raises(ValueError, match=r"100 unexpected: .*extra.39, and 60 more") as caught:
        convert(tensors, TARGETS)
    assert "extra.40" not in str(caught.value)


def test_nothing_is_finished_when_keys_or_shared_tensors_are_wrong():
    finished = []
    tensors = random_checkpoint()
    tensors["blocks.0.emb.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="1 that should be equal"):
        convert(tensors, TARGETS, finish=lambda path, w: finished.append(path))
    tensors = random_checkpoint()
    del tensors["conv.bias"]
    with pytest.raises(ValueError, match="1 missing: conv.bias"):
        convert(tensors, TARGETS, finish=lambda path, w: finished.append(path))
    assert finished == []


def test_known_leftovers_are_allowed_by_whole_key_only():
    tensors = random_checkpoint() | {"pos.ids": np.arange(3)}
    assert_same_trees(
        convert(tensors, TARGETS, allow_unexpected=[r"pos\.ids"]),
        convert(random_checkpoint(), TARGETS),
    )
    with pytest.raises(ValueError, match=r"1 unexpected: pos\.ids"):
        convert(tensors, TARGETS, allow_unexpected=[r"pos"])
    with pytest.raises(TypeError, match="sequence of patterns"):
        convert(tensors, TARGETS, allow_unexpected=r"pos\.ids")


def test_shared_tensors_of_different_dtypes_are_not_equal():
    tensors = random_checkpoint()
    tensors["blocks.1.emb.weight"] = tensors["blocks.1.emb.weight"].astype(np.float64)
    with pytest.raises(ValueError, match="blocks.1.emb.weight and blocks.0.emb.weight"):
        convert(tensors, TARGETS)


def test_only_some_keys_of_a_shared_path_are_not_enough():
    tensors = random_checkpoint()
    del tensors["blocks.0.emb.weight"]
    with pytest.raises(ValueError, match="1 missing: blocks.0.emb.weight"):
        convert(tensors, TARGETS)


def test_a_key_table_that_contradicts_itself_is_refused():
    other = Transform("other", lambda w: w, lambda w: w)
    targets = {
        "a": Target(("x", "kernel"), (2,)),
        "b": Target(("x", "kernel"), (2,), other),
        "c": Target(("x", "kernel", "deeper"), (2,)),
        "d": Target((), (2,)),
    }
    with pytest.raises(ValueError, match="key table") as caught:
        convert({}, targets)
    assert "keys without a path: d" in str(caught.value)
    assert "different shape or transform: x/kernel" in str(caught.value)
    assert "x/kernel/deeper" in str(caught.value)


def test_bfloat16_tensors_keep_their_bits(tmp_path):
    tensors = random_checkpoint(dtype=ml_dtypes.bfloat16)
    write_folder(tmp_path, {"diffusion_pytorch_model.safetensors": tensors})
    params = convert(load_checkpoint(tmp_path), TARGETS)
    assert params["proj"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params["proj"]["kernel"], tensors["proj.weight"].T)
    wide = convert(load_checkpoint(tmp_path), TARGETS, dtype=jnp.float32)
    np.testing.assert_array_equal(
        wide["proj"]["kernel"], tensors["proj.weight"].T.astype(np.float32)
    )


def test_dtype_casts_floats_and_leaves_integers():
    targets = {"w": Target(("w",), (2, 3), linear), "ids": Target(("ids",), (3,))}
    tensors = {"w": np.ones((2, 3), np.float32), "ids": np.arange(3)}
    params = convert(tensors, targets, dtype=np.float16)
    assert params["w"].dtype == np.float16
    assert params["ids"].dtype == np.int64
    with pytest.raises(ValueError, match="float dtype; got int8"):
        convert(tensors, targets, dtype=np.int8)


def test_values_that_overflow_the_dtype_are_all_named():
    tensors = random_checkpoint()
    tensors["conv.bias"][0] = 1e6
    tensors["norm.weight"][0] = -1e6
    with pytest.raises(ValueError, match="2 too large for the dtype: conv.bias, norm.weight"):
        convert(tensors, TARGETS, dtype=np.float16)
    convert(tensors, TARGETS, dtype=jnp.bfloat16)


def test_infinities_pass_unless_finite_values_are_required():
    tensors = random_checkpoint()
    tensors["conv.bias"][0] = np.inf
    assert np.isinf(convert(tensors, TARGETS, dtype=np.float16)["conv_in"]["bias"][0])
    with pytest.raises(ValueError, match="1 not finite: conv.bias"):
        convert(tensors, TARGETS, require_finite=True)


def test_the_result_shares_no_memory_with_the_checkpoint():
    tensors = random_checkpoint()
    params = convert(tensors, TARGETS)
    for leaf in jax.tree.leaves(params):
        assert not any(np.shares_memory(leaf, w) for w in tensors.values())


def test_finish_makes_the_leaves_and_every_array_dies_before_the_next():
    given = []

    def finish(path, w):
        assert w.flags.c_contiguous and w.flags.writeable
        assert not any(ref() is not None for ref in given)
        given.append(weakref.ref(w))
        return "/".join(path)

    params = convert(random_checkpoint(), TARGETS, finish=finish)
    assert params["proj"]["kernel"] == "proj/kernel"
    assert len(given) == len({target.path for target in TARGETS.values()})


def test_progress_counts_every_byte_once():
    calls = []
    tensors = random_checkpoint()
    convert(tensors, TARGETS, on_tensor=lambda *call: calls.append(call))
    total = sum(w.nbytes for w in tensors.values())
    assert {key for key, _, _ in calls} == TARGETS.keys()
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
    assert calls[-1][1:] == (total, total)


def test_converting_holds_one_tensor_beyond_the_result(tmp_path):
    # 12 tensors of 1 MiB, made int8: 3 MiB of result, and at most the tensor in the file's
    # order and in ours beside it.
    targets = {f"{n}.weight": Target((str(n), "kernel"), (512, 512), linear) for n in range(12)}
    write_folder(tmp_path, {"diffusion_pytorch_model.safetensors": random_checkpoint(targets)})
    checkpoint = load_checkpoint(tmp_path)
    result, tensor = 12 * 512 * 512, 4 * 512 * 512
    tracemalloc.start()
    try:
        convert(checkpoint, targets, finish=lambda path, w: w.astype(np.int8))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result < peak < result + 2.2 * tensor


# And back.


def test_to_checkpoint_undoes_convert():
    tensors = random_checkpoint()
    back = to_checkpoint(convert(tensors, TARGETS), TARGETS)
    assert back.keys() == tensors.keys()
    for key, w in tensors.items():
        np.testing.assert_array_equal(back[key], w)
    assert not np.shares_memory(back["blocks.0.emb.weight"], back["blocks.1.emb.weight"])


def test_params_that_do_not_fit_the_table_are_refused_with_all_paths():
    params = convert(random_checkpoint(), TARGETS)
    params["proj"]["kernel"] = params["proj"]["kernel"].T
    params["norm"]["extra"] = params["norm"].pop("scale")
    with pytest.raises(ValueError) as caught:
        to_checkpoint(params, TARGETS)
    message = str(caught.value)
    assert "1 missing: norm/scale" in message
    assert "1 unexpected: norm/extra" in message
    assert "proj/kernel [6, 4] instead of [4, 6]" in message


def test_leaves_that_are_not_arrays_are_refused():
    params = convert(random_checkpoint(), TARGETS)
    params["proj"]["kernel"] = object()
    with pytest.raises(TypeError, match=r"proj/kernel \(object\). Dequantize"):
        to_checkpoint(params, TARGETS)


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32, jnp.bfloat16])
def test_a_saved_component_loads_as_it_was(tmp_path, dtype):
    params = jax.tree.map(jnp.asarray, convert(random_checkpoint(), TARGETS))
    save_component(tmp_path / "new" / "unet", CONFIG, params, TARGETS, dtype=dtype)
    found = load_checkpoint(tmp_path / "new", "unet")
    assert found.config == CONFIG
    assert metadata(found.files[0]) == {"format": "pt"}
    wanted = params if dtype is None else jax.tree.map(lambda w: w.astype(dtype), params)
    assert_same_trees(convert(found, TARGETS), wanted)


def test_a_failed_save_leaves_the_old_component_and_nothing_else(tmp_path):
    params = convert(random_checkpoint(), TARGETS)
    save_component(tmp_path, CONFIG, params, TARGETS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    params["conv_in"]["bias"][0] = 1e6
    with pytest.raises(ValueError, match="conv_in/bias must fit float16; .* 1000000"):
        save_component(tmp_path, {"new": 1}, params, TARGETS, dtype=np.float16)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_component(tmp_path, {"new": object()}, params, TARGETS)
    with pytest.raises(ValueError, match="float dtype"):
        save_component(tmp_path, {"new": 1}, params, TARGETS, dtype=np.int8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_component_is_not_saved_beside_a_sharded_one(tmp_path):
    write_folder(tmp_path, sharded(random_checkpoint()))
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        save_component(tmp_path, CONFIG, convert(random_checkpoint(), TARGETS), TARGETS)


@pytest.mark.torch_oracle
@pytest.mark.filterwarnings("ignore")  # diffusers and what it imports
def test_diffusers_loads_a_saved_component(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    state = {key: w.numpy() for key, w in model.state_dict().items()}
    transforms = {1: same, 2: linear, 4: conv}
    targets = {
        key: Target(tuple(key.split(".")), w.shape, transforms[w.ndim]) for key, w in state.items()
    }
    save_component(tmp_path, dict(model.config), convert(state, targets), targets)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path)
    for key, w in again.state_dict().items():
        np.testing.assert_array_equal(w.numpy(), state[key])
    model.save_pretrained(tmp_path / "theirs")
    assert_same_trees(
        convert(load_checkpoint(tmp_path / "theirs"), targets),
        convert(open_tensors(tmp_path / "diffusion_pytorch_model.safetensors"), targets),
    )
