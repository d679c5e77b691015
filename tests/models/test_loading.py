"""Folders become pipelines, pipelines folders, and what does not fit is refused by name."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import manifest, serialize
from qjax.core.config import ActSpec, QuantConfig, Rule, WeightSpec
from qjax.core.manifest import MANIFEST
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import plan, quantize
from qjax.core.steps import StepTable, TableKey
from qjax.models.convert import save_component
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiTConfig
from qjax.models.loading import load_pipeline
from qjax.models.pipeline import Pipeline, Source
from qjax.models.samplers import DDIM, DDPM
from qjax.models.saving import load_saved, method_name, save_pipeline
from qjax.models.schedules import Schedule
from qjax.models.unet2d_config import UNet2DConfig

SIZES = DiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    num_classes=3,
)
CONFIG = SIZES.to_diffusers()
UNET = UNet2DConfig(
    sample_size=(4, 8),
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 4),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=2,
    attention_head_dim=2,
).to_diffusers()
SAMPLER = DDIM(schedule=Schedule.linear(100, 1e-3, 0.1), clip_sample=False)
W4A8 = QuantConfig(
    rules=(Rule(pattern="conditioning/.*|final_linear/.*"),),
    weight=WeightSpec(bits=4, granularity="per_group", group_size=(8, None)),
    act=ActSpec(),
    float_dtype="float16",
)


def random_params(class_name="DiTTransformer2DModel", config=CONFIG):
    """Normal params of a denoiser, without running its initialisation."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32)
    return jax.tree.map(draw, abstract_params(build_denoiser(class_name, config)))


def write(path: Path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_folder(folder: Path, component="transformer", config=CONFIG, sampler=SAMPLER) -> Path:
    """A pipeline of random weights in the layout of diffusers."""
    name = config["_class_name"]
    targets = build_denoiser(name, config).targets
    save_component(folder / component, config, random_params(name, config), targets)
    index = {component: ["diffusers", name], "scheduler": ["diffusers", "DDIMScheduler"]}
    write(folder / "model_index.json", {"_class_name": "Pipeline", **index})
    write(folder / "scheduler" / "scheduler_config.json", sampler.to_diffusers())
    return folder


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of diffusers, to be read only."""
    return write_folder(tmp_path_factory.mktemp("diffusers") / "tiny-dit")


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def quantized(folder):
    return load_pipeline(folder, quantize=W4A8)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder, to be broken."""
    return Path(shutil.copytree(folder, tmp_path / "tiny-dit"))


@pytest.fixture
def saved(quantized, tmp_path):
    """A saved pipeline, to be broken."""
    quantized.save(tmp_path / "saved")
    return tmp_path / "saved"


# Folders of diffusers.


def test_a_folder_becomes_a_pipeline(pipe):
    assert_same(pipe.params, random_params())
    assert pipe.shape == (4, 4, 1) and pipe.null_label == pipe.num_labels == 3
    assert pipe.sampler == SAMPLER and pipe.quant is pipe.method is pipe.step_table is None
    assert pipe.source.model == "DiTTransformer2DModel" and pipe.source.name == "tiny-dit"
    assert pipe.source.config == CONFIG


def test_four_channels_are_guided_on_three():
    config = DiTConfig.dit_xl_2().to_diffusers()
    assert build_denoiser("DiTTransformer2DModel", config).fields["guidance_channels"] == 3
    assert build_denoiser("DiTTransformer2DModel", CONFIG).fields["guidance_channels"] is None


def test_a_unet_without_classes_becomes_a_pipeline_and_is_saved_and_loaded(tmp_path):
    pipe = load_pipeline(write_folder(tmp_path / "unet", "unet", UNET), name="mine")
    assert pipe.shape == (4, 8, 1) and pipe.num_labels is None and pipe.source.name == "mine"
    assert_same(pipe.params, random_params("UNet2DModel", UNET))
    pipe.save(tmp_path / "saved")
    assert_same(load_pipeline(tmp_path / "saved").params, pipe.params)


@pytest.mark.parametrize(
    ("name", "config", "labels"),
    [
        ("DiTTransformer2DModel", CONFIG, jnp.zeros(1, jnp.int32)),
        ("UNet2DModel", UNET, None),
        ("UNet2DModel", UNET | {"num_class_embeds": 3}, jnp.zeros(1, jnp.int32)),
    ],
    ids=["dit", "unet", "unet with classes"],
)
def test_abstract_params_are_those_that_initialisation_makes(name, config, labels):
    denoiser = build_denoiser(name, config)
    x, t = jnp.zeros((1, *denoiser.fields["shape"])), jnp.zeros(1, jnp.int32)
    made = jax.eval_shape(denoiser.model.init, jax.random.key(0), x, t, labels)["params"]
    assert abstract_params(denoiser) == made


def test_a_unet_needs_a_sample_size():
    with pytest.raises(ValueError, match="must have a sample_size"):
        build_denoiser("UNet2DModel", UNET | {"sample_size": None})


def test_the_dtype_is_the_asked_one(folder):
    assert load_pipeline(folder, dtype=np.float16).params["patch_embed"]["bias"].dtype == np.float16


def test_all_files_in_one_folder_load_as_well(folder, pipe, copied):
    for name in ("transformer", "scheduler"):
        for path in (copied / name).iterdir():
            path.rename(copied / path.name)
        (copied / name).rmdir()
    assert_same(load_pipeline(copied).params, pipe.params)


def test_components_that_are_not_loaded_are_named(copied):
    index = json.loads((copied / "model_index.json").read_text())
    write(copied / "model_index.json", {**index, "prior": ["diffusers", "PriorTransformer"]})
    with pytest.warns(UserWarning, match="prior not loaded; there is no port"):
        load_pipeline(copied)


def test_an_autoencoder_that_is_named_must_be_there(copied):
    index = json.loads((copied / "model_index.json").read_text())
    write(copied / "model_index.json", {**index, "vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(FileNotFoundError, match=r"vae must hold config\.json"):
        load_pipeline(copied)


def test_zoo_json_names_the_null_class(copied):
    write(copied / "zoo.json", {"null_label": 2, "labels": ["a", "b"]})
    pipe = load_pipeline(copied)
    assert (pipe.null_label, pipe.num_labels) == (2, 2)
    write(copied / "zoo.json", {"labels": 2})
    with pytest.raises(ValueError, match=r"zoo.json must have a null_label and labels"):
        load_pipeline(copied)


def test_quantizing_while_reading_gives_what_quantizing_afterwards_gives(pipe, quantized):
    assert_same(quantized.params, quantize(pipe.params, W4A8))
    assert quantized.quant == W4A8 and quantized.method == method_name(W4A8)
    assert quantized.source.sha256 == serialize.params_digest(pipe.params)


def test_rules_are_checked_before_anything_is_read(folder):
    read = []
    for config, error in [
        (QuantConfig(rules=(Rule(pattern="blocks_9/.*"),)), "'blocks_9/.*' matches no leaf"),
        (
            QuantConfig(weight=WeightSpec(bits=4, granularity="per_group", group_size=5)),
            "group_size must divide the 8 input channels",
        ),
    ]:
        with pytest.raises(ValueError, match=error):
            load_pipeline(folder, quantize=config, on_tensor=lambda *args: read.append(args))
    assert not read


def test_weights_that_are_not_finite_are_not_quantized(copied):
    params = random_params()
    kernel = params["blocks_0"]["mlp"]["fc1"]["kernel"].at[0, 0].set(jnp.nan)
    params["blocks_0"]["mlp"]["fc1"]["kernel"] = kernel
    targets = build_denoiser(CONFIG["_class_name"], CONFIG).targets
    save_component(copied / "transformer", CONFIG, params, targets)
    with pytest.raises(ValueError, match="must be finite; blocks_0/mlp/fc1/kernel"):
        load_pipeline(copied, quantize=W4A8)


def test_a_truncated_checkpoint_is_refused(copied):
    (path,) = (copied / "transformer").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    before = listing(copied)
    for config in (None, W4A8):
        with pytest.raises(ValueError, match="safetensors"):
            load_pipeline(copied, quantize=config)
    assert listing(copied) == before


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({}, "must name one denoiser .* it names nothing"),
        ({"unet": ["diffusers", "UNet2DModel"]}, r"config.json|denoiser"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "The denoisers with a port are"),
    ],
)
def test_an_index_without_a_denoiser_of_ours_is_refused(copied, index, error):
    write(copied / "model_index.json", index)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        load_pipeline(copied)


def test_missing_parts_of_a_folder_are_named(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_pipeline(tmp_path / "nowhere")
    shutil.rmtree(copied / "scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config.json is missing"):
        load_pipeline(copied)
    (copied / "model_index.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_pipeline(copied)
    (copied / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_index.json is missing"):
        load_pipeline(copied)


# The library's own folders.


def test_a_saved_pipeline_loads_as_it_was_without_the_float_weights(copied, tmp_path):
    before = load_pipeline(copied, quantize=W4A8)
    before.save(tmp_path / "saved")
    shutil.rmtree(copied)
    after = load_pipeline(tmp_path / "saved")
    assert_same(after.params, before.params)
    for name in ("shape", "sampler", "null_label", "num_labels", "guidance_channels", "method"):
        assert getattr(after, name) == getattr(before, name)
    assert after.source == before.source and after.quant == before.quant == W4A8


def test_a_saved_pipeline_draws_the_same_images(quantized, saved, key):
    settings = {"labels": [0, 2], "steps": 2, "guidance_scale": 2.0, "key": key}
    np.testing.assert_array_equal(load_pipeline(saved)(**settings), quantized(**settings))


def test_a_float_pipeline_is_saved_with_the_hash_of_its_params(pipe, quantized, tmp_path):
    pipe.save(tmp_path / "saved")
    after = load_pipeline(tmp_path / "saved")
    assert_same(after.params, pipe.params)
    assert after.quant is None and after.source.sha256 == quantized.source.sha256


def test_the_manifest_says_how_it_was_quantized_and_of_what(saved, pipe):
    record = json.loads((saved / MANIFEST).read_text())["record"]
    assert QuantConfig.from_dict(record["quant"]) == W4A8
    assert record["source"]["sha256"] == serialize.params_digest(pipe.params)
    assert record["source"]["config"] == CONFIG


def test_a_step_table_is_saved_with_its_keys(quantized, tmp_path):
    key = quantized.table_key(steps=4)
    entry = {"blocks_0": {"attn": {"qkv": {"act_scale": jnp.linspace(0.1, 0.4, 4)}}}}
    table = StepTable().with_entry("quant", entry, key=key)
    table = table.with_entry("time", jnp.ones((4, 2)), key=TableKey(timesteps=key.timesteps))
    quantized.replace(step_table=table).save(tmp_path / "saved")
    after = load_pipeline(tmp_path / "saved").step_table
    assert dict(after.keys) == dict(table.keys)
    assert_same(dict(after.entries), dict(table.entries))


def test_a_step_table_of_another_sampler_is_refused_by_the_run(quantized, key):
    entry = {"patch_embed": {"act_scale": jnp.ones(4)}}
    table = StepTable().with_entry("quant", entry, key=quantized.table_key(steps=4))
    pipe = quantized.replace(step_table=table, sampler=DDPM(schedule=SAMPLER.schedule))
    with pytest.raises(ValueError, match="sampler was 'ddim', the run has 'ddpm'") as error:
        pipe(labels=[0], steps=4, key=key)
    assert "drop('quant')" in str(error.value)
    requantized = quantized.replace(step_table=table, method="another")
    with pytest.raises(ValueError, match=f"method was '{quantized.method}', the run has 'another'"):
        requantized(labels=[0], steps=4, key=key)


def test_pipelines_that_could_not_be_built_again_are_not_saved(pipe, tmp_path):
    stranger = Pipeline.from_apply(pipe.apply, pipe.params, SAMPLER, pipe.shape)
    with pytest.raises(ValueError, match="from from_apply without one"):
        stranger.save(tmp_path / "saved")
    other = pipe.replace(source=Source(model="MyNet", config={}))
    with pytest.raises(ValueError, match="The denoisers with a port are .* got 'MyNet'"):
        save_pipeline(other, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_saved_pipeline_is_not_quantized_again(saved):
    with pytest.raises(ValueError, match="load it, then quantize its params"):
        load_pipeline(saved, quantize=W4A8)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("source",), None),
        (("source", "model"), "MyNet"),
        (("source", "config"), [1]),
        (("source", "config", "num_layers"), 2),
        (("source", "config", "sample_size"), "32"),
        (("source", "colour"), "red"),
        (("sampler",), None),
        (("sampler", "_class_name"), "Euler"),
        (("fields", "shape"), 3),
        (("fields", "shape"), [4, 4]),
        (("fields", "colour"), "red"),
        (("quant",), {"weight": {"bits": 7}}),
        (("quant",), [1]),
        (("step_table",), {"quant": {"timesteps": [1, 0]}}),
        (("step_table",), None),
    ],
)
def test_a_record_that_describes_no_pipeline_is_refused(saved, path, value):
    data = json.loads((saved / MANIFEST).read_text())
    node = data["record"]
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    data["sha256"] = manifest._manifest_digest(data)
    write(saved / MANIFEST, data)
    with pytest.raises(ValueError, match=r"\w{3,} .*\."):
        load_pipeline(saved)


def test_a_tree_that_is_no_pipeline_is_refused(tmp_path):
    serialize.save(tmp_path / "tree", {"w": jnp.ones(2)}, {"note": "params only"})
    with pytest.raises(ValueError, match="does not describe a pipeline: KeyError"):
        load_saved(tmp_path / "tree")


def test_a_plan_of_abstract_params_is_the_plan_of_loaded_ones(pipe):
    abstract = abstract_params(build_denoiser(CONFIG["_class_name"], CONFIG))
    assert plan(abstract, W4A8) == plan(pipe.params, W4A8)
    left = {e.path for e in plan(abstract, W4A8).entries if e.kind != "other" and not e.weight}
    assert left == {f"conditioning/{n}/kernel" for n in ("time_in", "time_out")} | {
        "final_linear/kernel"
    }
    assert any(map(is_qtensor, jax.tree.leaves(quantize(pipe.params, W4A8), is_leaf=is_qtensor)))
