"""The zoo: its data reader, training, published folders, judge, and shipped weights."""

import dataclasses
import gc
import gzip
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import recipes, zoo
from qjax.core.metrics import class_agreement
from qjax.core.qtensor import is_qtensor
from qjax.core.quantize import plan, tree_bytes
from qjax.models.denoisers import abstract_params, build_denoiser
from qjax.models.dit import DiT
from qjax.models.features import FeatureNet, FeatureNetConfig
from qjax.models.loading import load_pipeline
from qjax.models.saving_sides import sides_of
from qjax.zoo import judge, train
from qjax.zoo import models as zoo_models
from qjax.zoo.data import CLASSES, DEFAULT_FOLDER, fashion_mnist, read_idx, to_float
from qjax.zoo.latents import load_autoencoder
from qjax.zoo.publish import publish

TINY = dataclasses.replace(zoo_models.FASHION_DIT, num_layers=1, num_heads=1, head_dim=8)


def idx(array: np.ndarray) -> bytes:
    """The idx file of an array of bytes."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0)


def write_data(folder: Path, *, count: int = 24) -> Path:
    """A Fashion-MNIST of random pictures."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return folder


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


# The data reader.


def test_an_idx_file_is_read_as_written(tmp_path):
    array = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    (tmp_path / "x.gz").write_bytes(idx(array))
    found = read_idx(tmp_path / "x.gz")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, array)


# Of networks of equal shapes, which differ in what they predict, the first.
OTHERS = [name for name in zoo.names() if name.endswith("-v")]
ONE_OF_EACH = [name for name in zoo.names() if name not in OTHERS]
ONE_LATENT = [name for name in ONE_OF_EACH if "ldm" in name]


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "idx file of unsigned bytes|whole gzip"),
        (b"P5 28 28", "is not a whole gzip file"),
        (idx(np.ones((4, 4)))[:-9], "is not a whole gzip file"),
        (
            gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", mtime=0),
            "is not an idx file of unsigned bytes",
        ),
        (gzip.compress(b"\0\0\x08\x03\0\0", mtime=0), "is not an idx file of unsigned bytes"),
        (
            gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc", mtime=0),
            r"says shape \(5,\) but holds 3 values",
        ),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, error):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match=error):
        read_idx(tmp_path / "x.gz")


def test_images_are_padded_with_background_to_32_pixels(data):
    images, labels = fashion_mnist("train", folder=data)
    assert images.shape == (24, 32, 32, 1) and images.dtype == np.uint8
    assert labels.dtype == np.int32 and labels.tolist() == [i % 10 for i in range(24)]
    raw = read_idx(data / "train-images-idx3-ubyte.gz")
    np.testing.assert_array_equal(images[:, 2:-2, 2:-2, 0], raw)
    assert images.sum() == raw.sum()


def test_bytes_become_floats_between_minus_one_and_one():
    values = to_float(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[-1] == 1
    assert np.all(np.diff(values) > 0)


def test_missing_and_odd_files_are_named_with_the_way_out(tmp_path, data):
    with pytest.raises(FileNotFoundError, match=r"t10k-images.*install the Debian package"):
        fashion_mnist("test", folder=tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'test'; got 'val'"):
        fashion_mnist("val", folder=data)
    odd = write_data(tmp_path / "odd")
    (odd / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(7)))
    with pytest.raises(ValueError, match="a label for each"):
        fashion_mnist("train", folder=odd)


# Training.


class Steps:
    """Stands for `make_step`: compiles once, and interrupts when told to."""

    def __init__(self):
        self.make_step, self.step, self.left = train.make_step, None, None

    def __call__(self, *args):
        self.step = self.step or self.make_step(*args)
        return self.run

    def run(self, *args):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        return self.step(*args)


def train_in_two_parts(name, data, out, monkeypatch) -> None:
    """Three steps, and the same with an interruption after two: every bit must agree."""
    steps = Steps()
    monkeypatch.setattr(train, "build", lambda name: DiT(TINY))
    monkeypatch.setattr(train, "make_step", steps)
    config = train.TrainConfig(steps=3, batch=4, checkpoint_every=1)
    _, whole = train.train(name, out=out / "whole", config=config, folder=data)
    steps.left = 2
    with pytest.raises(KeyboardInterrupt):
        train.train(name, out=out / "parts", config=config, folder=data)
    steps.left = 1  # which is all that is left to do
    _, resumed = train.train(name, out=out / "parts", config=config, folder=data)
    assert_same(resumed, whole)
    _, again = train.train(name, out=out / "parts", config=config, folder=data)
    assert_same(again, whole)


@pytest.fixture
def folders(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    with jax.numpy_dtype_promotion("standard"):  # optax adds floats and int32 counts
        yield tmp_path


# orbax leaves event loops to the garbage collector, which warns of it.
LOOPS_LEFT_OPEN = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.slow
@LOOPS_LEFT_OPEN
def test_an_interrupted_training_goes_on_to_the_same_bits(data, folders, monkeypatch):
    train_in_two_parts("fashion-features", data, folders, monkeypatch)


@pytest.mark.slow
@LOOPS_LEFT_OPEN
def test_so_does_that_of_a_diffusion_model(data, folders, monkeypatch):
    train_in_two_parts("fashion-dit", data, folders, monkeypatch)


@pytest.mark.slow
@LOOPS_LEFT_OPEN
@pytest.mark.parametrize("name", train.RUNS)
def test_the_command_line_trains_and_publishes(name, data, tmp_path, monkeypatch):
    options = ["--steps", "3", "--batch", "4", "--data", str(data)]
    places = ["--out", str(tmp_path / "run"), "--publish", str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", ["train", name, *options, *places])
    with jax.numpy_dtype_promotion("standard"):  # optax adds floats and int32 counts
        train.main()
    if name == "fashion-features":
        monkeypatch.setattr(judge, "FOLDER", tmp_path / name)
        assert judge.record()["name"] == name and judge.real_statistics(9).n == 2
    elif name == "fashion-vae":
        autoencoder, _ = load_autoencoder(tmp_path / name)
        assert autoencoder.config.scaling_factor != 1
    else:
        pipe = load_pipeline(tmp_path / name)
        assert pipe.num_labels == 10 and pipe.null_label == 10


def test_settings_of_every_model_are_there():
    assert train.RUNS.keys() == zoo_models.MODELS.keys()
    with pytest.raises(ValueError, match="fashion-dit, .*; got 'mnist'"):
        zoo_models.build("mnist")


# Publishing.


def random_params(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.2, s.shape), jnp.float32), shapes)


def test_a_published_model_loads_with_its_classes_and_sampler(tmp_path):
    one = jnp.zeros(1, jnp.int32)
    params = random_params(DiT(TINY), jnp.zeros((1, 32, 32, 1)), one, one)
    publish("tiny", DiT(TINY), params, tmp_path / "tiny")
    pipe = load_pipeline(tmp_path / "tiny")
    stored = jax.tree.map(lambda w: w.astype(jnp.float16).astype(jnp.float32), params)
    assert_same(pipe.params, stored)
    assert pipe.sampler == zoo_models.SAMPLER
    assert (pipe.null_label, pipe.num_labels) == (zoo_models.NULL_LABEL, len(CLASSES))


def test_a_published_classifier_comes_with_the_statistics_of_real_features(
    data, tmp_path, monkeypatch
):
    model = FeatureNet(FeatureNetConfig(channels=(2, 2, 2), num_features=3))
    params = random_params(model, jnp.zeros((1, 32, 32, 1)))
    publish("fashion-features", model, params, tmp_path / "features", data=data)
    monkeypatch.setattr(judge, "FOLDER", tmp_path / "features")
    assert judge.real_statistics().n == 24 and judge.real_statistics(9).n == 2
    assert judge.real_statistics().mean.shape == (3,)
    record = judge.record()
    assert 0 <= record["test_accuracy"] <= 1 and record["fd_between_real_halves_n"] == 12


def test_only_models_of_the_zoo_are_published(tmp_path):
    with pytest.raises(TypeError, match="The zoo holds fashion-dit"):
        publish("mine", zoo_models.SCHEDULE, {}, tmp_path / "mine")


# The judge.


def test_the_judge_sees_each_picture_by_itself(key):
    images = np.asarray(jax.random.uniform(key, (judge.BATCH + 3, 32, 32, 1)))
    together, alone = judge.judge(images), judge.judge(images[-2:])
    np.testing.assert_array_equal(together.classes[-2:], alone.classes)
    np.testing.assert_allclose(together.features[-2:], alone.features, rtol=1e-5, atol=1e-5)
    assert together.features.shape == (len(images), 64) and together.features.dtype == np.float64
    assert set(together.classes) <= set(range(10))


def test_statistics_of_the_classes_make_those_of_the_whole():
    whole = judge.real_statistics()
    parts = [judge.real_statistics(label) for label in range(len(CLASSES))]
    assert whole.n == 10_000 and all(part.n == 1_000 for part in parts)
    mean = np.mean([part.mean for part in parts], axis=0)
    np.testing.assert_allclose(mean, whole.mean, rtol=1e-4, atol=1e-5)
    for part in (whole, *parts):
        np.testing.assert_array_equal(part.cov, part.cov.T)
        assert np.linalg.eigvalsh(part.cov)[0] > -1e-3


def test_the_classifier_is_as_good_as_asked():
    assert judge.record()["test_accuracy"] >= 0.91


@pytest.mark.slow
@pytest.mark.skipif(not DEFAULT_FOLDER.exists(), reason="Fashion-MNIST is not installed")
def test_the_record_of_the_classifier_is_true():
    images, labels = fashion_mnist("test")
    judged = judge.judge(to_float(images) / 2 + 0.5)
    accuracy = float(np.mean(judged.classes == labels))
    assert accuracy == pytest.approx(judge.record()["test_accuracy"], abs=1e-3)
    mean = judge.real_statistics().mean
    np.testing.assert_allclose(judged.features.mean(axis=0), mean, rtol=1e-3, atol=1e-4)


# The weights that ship.


CONFIGS = {
    "fashion-dit": zoo_models.FASHION_DIT,
    "fashion-ldm": zoo_models.FASHION_LDM,
    "fashion-ldm-v": zoo_models.FASHION_LDM,
    "fashion-unet": zoo_models.FASHION_UNET,
}
SHAPES = {name: (8, 8, 4) if "ldm" in name else (32, 32, 1) for name in CONFIGS}


def fp16_bytes(name: str) -> int:
    """Bytes of a shipped denoiser's parameters in float16, each counted once."""
    return plan(shapes_of(name), recipes.w8a8().quant).bytes_before


def shapes_of(name: str):
    data = CONFIGS[name].to_diffusers()
    return abstract_params(build_denoiser(data["_class_name"], data))


def test_all_weights_together_are_small_enough_to_ship():
    weights = list(zoo.FOLDER.rglob("*.safetensors"))
    # The classifier has two files, a latent model an autoencoder and a class embedder.
    assert len(weights) == len(zoo.names()) + 2 + 2 * sum("ldm" in name for name in zoo.names())
    assert sum(path.stat().st_size for path in weights) <= 25e6


@pytest.mark.parametrize("name", zoo.names())
def test_every_shipped_model_loads(name):
    pipe = load_pipeline(zoo.FOLDER / name)
    assert pipe.shape == SHAPES[name] and pipe.image_shape == (32, 32, 1)
    assert pipe.num_labels == 10 and pipe.null_label == 10
    assert pipe.sampler.prediction_type == zoo_models.PREDICTION_TYPES.get(name, "epsilon")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pipe.params))
    record = json.loads((zoo.FOLDER / name / "zoo.json").read_text())
    assert record["name"] == name and record["labels"] == list(CLASSES)


@pytest.mark.quick_cases("w4a8-0.33-fashion-dit")
@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("recipe", "most"), [("w4a8", 0.33), pytest.param("w8a8", 0.56, marks=pytest.mark.slow)]
)
def test_a_quantized_shipped_model_is_as_small_as_promised(name, recipe, most, tmp_path):
    """On disk, manifest included, and on the device, where no array is narrower than it says.

    The networks beside a denoiser stay in float and are left out. Live bytes are those of
    all JAX arrays that the load has added. Codes below 8 bits are packed into bytes, so
    `nbytes` counts them by their bits.
    """
    quant = recipes.by_name(recipe).quant
    # The search of the ranges changes no size, and takes a minute to compile.
    quant = dataclasses.replace(quant, weight=dataclasses.replace(quant.weight, method="minmax"))
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    pipe = load_pipeline(zoo.FOLDER / name, quantize=quant)
    gc.collect()
    live = sum(array.nbytes for array in jax.live_arrays()) - before
    assert all(leaf.dtype != jnp.int4 for leaf in jax.tree.leaves(pipe.params))
    beside = [one.params for one in sides_of(pipe).components.values()]
    live -= sum(leaf.nbytes for leaf in jax.tree.leaves(beside))
    pipe.replace(conditioner=None, decoder=None).save(tmp_path / "saved")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert live == tree_bytes(pipe.params)
    assert live <= most * fp16_bytes(name)
    assert on_disk <= most * fp16_bytes(name)
    assert any(map(is_qtensor, jax.tree.leaves(pipe.params, is_leaf=is_qtensor)))


@pytest.mark.parametrize("name", ONE_LATENT)
def test_a_forward_of_a_latent_model_takes_at_most_a_fifth_of_a_gigaflop(name):
    pipe = load_pipeline(zoo.FOLDER / name)
    told, _ = pipe.condition(1, labels=[3])
    inputs = (jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,), jnp.int32), told)
    cost = jax.jit(pipe.apply).lower({"params": pipe.params}, *inputs).compile().cost_analysis()
    assert cost["flops"] <= 2e8


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_LATENT, *OTHERS])
def test_a_latent_model_draws_the_class_that_it_is_asked_for(name):
    """85 % of 100 pictures at least; `benchmarks/zoo_quality.py` counts 1,000."""
    pipe = load_pipeline(zoo.FOLDER / name)
    labels = np.arange(100) % 10
    settings = {"steps": 10, "guidance_scale": 3.0, "batch_size": 50}
    images = pipe(labels=labels, key=jax.random.key(0), **settings)
    assert class_agreement(judge.judge(np.asarray(images)).classes, labels) >= 0.85


@pytest.mark.quick_cases("fashion-dit", "fashion-ldm")
@pytest.mark.torch_oracle
@pytest.mark.filterwarnings("ignore:::torch", "ignore:::diffusers")  # of their own deprecations
@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH, *(slow(n) for n in zoo.names() if n not in ONE_OF_EACH)]
)
def test_diffusers_loads_a_shipped_folder_and_predicts_the_same(name):
    torch = pytest.importorskip("torch")
    import diffusers

    pipe = load_pipeline(zoo.FOLDER / name)
    component = "transformer" if name == "fashion-dit" else "unet"
    theirs = getattr(diffusers, pipe.source.model).from_pretrained(zoo.FOLDER / name / component)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *SHAPES[name])).astype(np.float32)
    t, labels = np.array([3, 801]), np.array([4, 10])
    ours = np.asarray(pipe.predict(x, t, labels))
    told = np.asarray(pipe.condition(2, labels=labels)[0].text) if "ldm" in name else labels
    with torch.no_grad():
        inputs = (torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(told))
        expected = theirs.float().eval()(*inputs).sample.numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    scheduler = diffusers.DDIMScheduler.from_pretrained(zoo.FOLDER / name / "scheduler")
    np.testing.assert_allclose(
        scheduler.alphas_cumprod.numpy(), pipe.sampler.schedule.alpha_bar, rtol=1e-5
    )


@pytest.mark.slow
def test_networks_beside_the_denoiser_are_saved_in_the_float16_they_came_in(tmp_path):
    pipe = load_pipeline(zoo.FOLDER / "fashion-ldm")
    pipe.save(tmp_path / "saved")
    alone = tmp_path / "alone"
    pipe.replace(conditioner=None, decoder=None).save(alone)
    bytes_of = lambda folder: (folder / "model.safetensors").stat().st_size
    beside = [one.params for one in sides_of(pipe).components.values()]
    values = sum(leaf.size for leaf in jax.tree.leaves(beside))
    added = bytes_of(tmp_path / "saved") - bytes_of(alone)
    assert 2 * values <= added <= 2.1 * values
    again = load_pipeline(tmp_path / "saved")
    assert_same([one.params for one in sides_of(again).components.values()], beside)
