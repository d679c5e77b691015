"""The front with places in a bucket: what takes them, and that all else refuses them by name."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate.prompt_files import read_prompts
from qjax.conversion import convert_checkpoint
from qjax.core.manifest import WEIGHTS
from qjax.models import loading
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import DDIM

URL = "gs://bucket/models/one"


@pytest.fixture(scope="module")
def pipe():
    return qjax.load("fashion-dit", quantize=qjax.recipes.w8a8())


@pytest.fixture(autouse=True)
def nothing_is_left_here(tmp_path, monkeypatch):
    """Every test runs in an empty folder and leaves it empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert os.listdir(tmp_path / "here") == []


def scaling(gain):
    """A denoiser whose answer is a share of its input: nothing to compile."""
    apply = lambda variables, x_t, t, labels: variables["params"]["gain"] * x_t
    return Pipeline.from_apply(apply, {"gain": jnp.float32(gain)}, DDIM(), (4, 4, 1))


def same(a, b):
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_pipeline_saved_in_a_bucket_is_loaded_bit_for_bit(pipe, buckets):
    pipe.save(URL)
    loaded = qjax.load(URL)
    same(pipe, loaded)
    assert loaded.recipe == pipe.recipe and loaded.source == pipe.source
    loaded.save("gs://bucket/models/two")
    one, two = (buckets.root / "bucket/models" / name / WEIGHTS for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_diffusers_folder_in_a_bucket_is_read_weights_only_when_they_are_wanted(buckets):
    import shutil

    from qjax import zoo

    folder = buckets.root / "bucket/models/fashion-dit"
    shutil.copytree(zoo.FOLDER / "fashion-dit", folder)
    (folder / "notes.bin").write_bytes(b"a pickle, for example")
    shapes, _ = qjax.api.locate("gs://bucket/models/fashion-dit", weights=False)
    assert not list(shapes.rglob("*.safetensors"))
    loaded = qjax.load("gs://bucket/models/fashion-dit/")
    assert list(shapes.rglob("*.safetensors")) and not list(shapes.rglob("*.bin"))
    same(qjax.load("fashion-dit"), loaded)
    assert loaded.source.name == "fashion-dit"


def test_a_model_that_is_not_there_is_named_with_its_place(buckets):
    with pytest.raises(FileNotFoundError, match=f"nothing at {URL}"):
        qjax.load(URL)
    (buckets.root / "bucket/models/one").mkdir(parents=True)
    (buckets.root / "bucket/models/one/config.json").write_text("{}")
    for load in (qjax.load, loading.load_pipeline, qjax.api.shapes):
        with pytest.raises(FileNotFoundError, match=f"{URL} holds neither qjax.json"):
            load(URL)
    with pytest.raises(ValueError, match="revision is for repositories of the hub"):
        qjax.load(URL, revision="main")


@pytest.mark.parametrize(
    "take",
    [
        lambda pipe, place: qjax.compare(pipe, pipe, out=place),
        lambda pipe, place: qjax.evaluate(pipe, images=place),
        lambda pipe, place: qjax.evaluate(pipe, inception=place),
        lambda pipe, place: pipe.with_lora(place),
        lambda pipe, place: read_prompts(place),
        lambda pipe, place: qjax.recipes.w8a8().quant.to_yaml(place),
        lambda pipe, place: qjax.QuantConfig.from_yaml(place),
        lambda pipe, place: convert_checkpoint("fashion-dit", place),
        lambda pipe, place: convert_checkpoint(place, Path("out")),
    ],
)
@pytest.mark.parametrize(
    "place", ["gs://bucket/a.html", "http://host/a.html", Path("gs://b/a.html")]
)
def test_what_takes_a_path_of_this_machine_alone_says_so(pipe, buckets, take, place):
    with pytest.raises(ValueError, match="must be a (path of this machine|local path)|two slashes"):
        take(pipe, place)
    assert buckets.changes == []


@pytest.mark.parametrize("place", ["http://host/one", Path(URL)])
def test_what_takes_a_bucket_takes_no_other_place(pipe, place):
    takes = (pipe.save, qjax.load, loading.load_pipeline, lambda out: qjax.evaluate(pipe, out=out))
    for take in takes:
        with pytest.raises(ValueError, match="must be a local path|two slashes"):
            take(place)


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "fashion-dit", "--out", "gs://bucket/a.png"),
        ("compare", "fashion-dit", "fashion-dit", "--out", "gs://bucket/a.html"),
        ("demo", "--out", "gs://bucket/demo"),
        ("convert", "fashion-dit", "--out", "gs://bucket/a"),
        ("calibrate", "fashion-dit", "--out", URL, "--prompts", "gs://bucket/a.txt"),
        ("plan", "fashion-dit", "--config", "gs://bucket/a.yaml"),
        ("quantize", "fashion-dit", "--recipe", "w8a8", "--out", "http://host/a"),
        ("quantize", "fashion-dit", "--recipe", "w8a8", "--out", "gs:/bucket/a"),
    ],
)
def test_on_the_command_line_the_same_holds(run, buckets, words):
    result = run(*words)
    assert result.status == 2
    assert "must be a path of this machine" in result.err or "gs://" in result.err
    assert buckets.changes == []


def test_quantize_writes_into_a_bucket_and_inspect_reads_it(run, buckets):
    words = ("quantize", "fashion-dit", "--recipe", "w8a8", "--out", URL, "--json")
    result = run(*words)
    assert result.status == 0, result.err
    said = json.loads(result.out)
    folder = buckets.root / "bucket/models/one"
    assert said["out"] == URL
    assert said["bytes_on_disk"] == sum(p.stat().st_size for p in folder.rglob("*"))
    result = run(*words)
    assert (
        result.status == 2 and f"{URL} is not empty" in result.err and "--overwrite" in result.err
    )
    assert run(*words, "--overwrite").status == 0
    assert json.loads(run("inspect", URL, "--json").out)["manifest"]["made_from"] == "fashion-dit"


def test_an_evaluation_that_is_broken_off_goes_on_from_the_bucket(buckets, tmp_path):
    settings = {"num_images": 6, "part_size": 2, "steps": 2, "metrics": ["psnr"], "resamples": 0}
    settings |= {"reference": scaling(0.9), "batch_size": 2}
    tiny = scaling(1.0)
    whole = qjax.evaluate(tiny, out=tmp_path / "local", **settings)
    drawn = []

    def stop(done, total, words):
        drawn.append(done)
        if len(drawn) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qjax.evaluate(tiny, out="gs://bucket/eval", on_progress=stop, **settings)
    assert drawn == [0, 2, 4]
    drawn.clear()
    tell = lambda done, total, words: drawn.append(done)
    found = qjax.evaluate(tiny, out="gs://bucket/eval", on_progress=tell, **settings)
    assert drawn == [4, 6]
    assert found == whole
    kept = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
    assert kept(buckets.root / "bucket/eval") == kept(tmp_path / "local")
    with pytest.raises(ValueError, match="gs://bucket/eval belongs to another run: seed 0, now 1"):
        qjax.evaluate(tiny, out="gs://bucket/eval", seed=1, **settings)
