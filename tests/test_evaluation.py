"""An evaluation measures what it says, goes on where it was killed, and names what it lacks.

Models are one multiplication, and networks that look at pictures are small random maps; the real
ones have tests of their own.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import qjax
from qjax import evaluation_measuring, evaluation_nets
from qjax.core import metrics, resampling
from qjax.core.safetensors_io import write_tensors
from qjax.core.set_metrics import inception_score, precision_recall
from qjax.evaluation import METRICS, evaluate
from qjax.evaluation_choice import Given, choose
from qjax.evaluation_data import as_dict, score_table
from qjax.evaluation_nets import lpips_params, weight_file
from qjax.evaluation_parts import Parts
from qjax.evaluation_pictures import fingerprint
from qjax.models import inception
from qjax.models import lpips as perceptual
from qjax.models.inception import InceptionFeatures
from qjax.models.pipeline import Pipeline
from qjax.models.samplers import DDIM

SHAPE = (12, 12, 3)


def _apply(variables, x_t, t, labels):
    shade = 0.0 if labels is None else 0.1 * labels[:, None, None, None].astype(jnp.float32)
    return variables["params"]["gain"] * x_t + shade


def model(gain=1.0, **fields):
    """A denoiser whose answer is a share of its input, plus a shade of its class."""
    gain = jnp.asarray(gain, jnp.float32)
    return Pipeline.from_apply(_apply, {"gain": gain}, DDIM(), SHAPE, num_labels=3, **fields)


def scored(pipe=None, **settings):
    settings = {"num_images": 10, "steps": 2, "batch_size": 4, "part_size": 5} | settings
    return evaluate(model() if pipe is None else pipe, **settings)


def drawn(pipe, n=10, **settings):
    """The pictures of an evaluation, all at once and in 8 bits."""
    settings = {"steps": 2, "key": jax.random.key(0)} | settings
    images = np.asarray(pipe(labels=np.arange(n) % 3, num_images=n, **settings))
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


MIX = np.random.default_rng(0).standard_normal((int(np.prod(SHAPE)), 23)).astype(np.float32)


def looked(images):
    """What the network of these tests sees, in place of Inception."""
    seen = np.tanh(images.reshape(len(images), -1).astype(np.float32) / 255 @ MIX / 8)
    return InceptionFeatures(seen[:, :8], seen[:, 8:15] ** 2, 4 * seen[:, 15:])


@pytest.fixture
def small_inception(monkeypatch, tmp_path):
    """A file of weights, and a network of eight features that stands in for Inception."""
    monkeypatch.setattr(inception, "convert_inception", lambda tensors: dict(tensors))
    monkeypatch.setattr(inception, "inception_features", lambda params, images: looked(images))
    monkeypatch.setattr(inception, "POOL_FEATURES", 8)
    monkeypatch.setattr(inception, "SPATIAL_FEATURES", 7)
    file = tmp_path / "inception.safetensors"
    write_tensors(file, {"w": np.zeros(1, np.float32)})
    return file


def scores_of(found):
    return {(s.metric, s.of, s.against): s.value for s in found.scores}


# --- What is measured --------------------------------------------------------------------


def test_likeness_is_that_of_the_pictures_drawn_at_once_and_rounded_to_8_bits():
    a, b = model(0.9), model()
    found = scored(a, reference=b, names=("a", "b"))
    x, y = drawn(a), drawn(b)
    psnr, ssim = (f(x, y, data_range=255) for f in (metrics.psnr, metrics.ssim))
    assert found.score("PSNR").value == pytest.approx(psnr.mean())
    assert found.score("SSIM").value == pytest.approx(ssim.mean())
    assert found.score("PSNR").low < psnr.mean() < found.score("PSNR").high
    assert (found.score("PSNR").n, found.score("PSNR").against) == (10, "b")


def test_every_metric_of_features_is_that_of_all_pictures_at_once(small_inception, tmp_path):
    a, b = model(0.9), model()
    folder = tmp_path / "real"
    folder.mkdir()
    real = np.random.default_rng(1).integers(0, 256, (11, *SHAPE), np.uint8)
    for i, picture in enumerate(real):
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    found = scored(
        a, reference=b, images=folder, inception=small_inception, names=("a", "b"), resamples=4
    )
    x, y, z = looked(drawn(a)), looked(drawn(b)), looked(real)
    fid = lambda p, q: metrics.frechet_distance(p, q).value
    mark = " (unverified weights)"
    expected = {
        (f"FID{mark}", "a", "b"): fid(x.pool, y.pool),
        (f"FID{mark}", "a", "real"): fid(x.pool, z.pool),
        (f"FID{mark}", "b", "real"): fid(y.pool, z.pool),
        (f"FID{mark}", "a - b", "real"): fid(x.pool, z.pool) - fid(y.pool, z.pool),
        (f"sFID{mark}", "a", "b"): fid(x.spatial, y.spatial),
        (f"sFID{mark}", "a", "real"): fid(x.spatial, z.spatial),
        (f"IS{mark}", "a", None): inception_score(x.logits).mean,
        (f"IS{mark}", "b", None): inception_score(y.logits).mean,
        ("KID", "a", "real"): metrics.kernel_distance(x.pool, z.pool).mean,
        ("precision", "a", "b"): precision_recall(x.pool, y.pool).precision,
        ("recall", "b", "real"): precision_recall(y.pool, z.pool).recall,
    }
    values = scores_of(found)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    assert {s.net for s in found.scores if "ID" in s.metric} == {evaluation_nets.UNVERIFIED}
    (net,) = found.nets
    assert net.verified is False and len(net.sha256[0]) == 64


def test_the_published_weights_alone_make_an_fid(small_inception, monkeypatch):
    digest = evaluation_nets.read_weights(small_inception).sha256
    monkeypatch.setattr(inception, "SHA256", digest)
    found = scored(model(0.9), reference=model(), inception=small_inception, metrics=["fid"])
    assert [score.metric for score in found.scores] == ["FID"]
    assert found.nets[0].verified


def test_statistics_of_a_file_stand_in_for_pictures(small_inception, tmp_path):
    stats = metrics.feature_statistics(np.random.default_rng(0).random((50, 8)))
    np.savez(tmp_path / "stats.npz", mu=stats.mean, sigma=stats.cov)
    found = scored(images=tmp_path / "stats.npz", inception=small_inception, resamples=0)
    value = metrics.frechet_distance(looked(drawn(model())).pool, stats).value
    assert found.scores[0].value == pytest.approx(value)
    assert found.scores[0].low is None
    reasons = {one.metric: one.reason for one in found.left_out}
    assert "mu_s" in reasons["sfid"] and "statistics alone" in reasons["kid"]


def test_lpips_is_that_of_the_pairs(tmp_path):
    files, params = lpips_files(tmp_path, "alex")
    pipes = [dataclasses.replace(model(gain), shape=(32, 32, 3)) for gain in (0.8, 1.0)]
    found = scored(pipes[0], reference=pipes[1], lpips=files, num_images=3, metrics=["lpips-alex"])
    x, y = (drawn(pipe, 3).astype(np.float32) / 255 for pipe in pipes)
    expected = float(np.mean(np.asarray(perceptual.lpips("alex", params, x, y))))
    assert found.score("LPIPS").value == pytest.approx(expected, rel=1e-4)
    assert found.score("LPIPS").net == "LPIPS alex"


def test_the_clip_score_of_each_model_reads_the_prompts_in_turn(monkeypatch, tmp_path):
    """The scorer of this test counts letters; its weights are those of nobody."""
    seen = []

    def scores(scorer, images, prompts):
        seen.extend(prompts)
        return np.array([len(prompt) for prompt in prompts]) + images.mean((1, 2, 3)) / 255

    stub = type("Scorer", (), {"sha256": "0" * 64})()
    monkeypatch.setattr(evaluation_nets, "load_clip", lambda folder: stub)
    monkeypatch.setattr(evaluation_measuring, "clip_scores", scores)
    a, b = prompted(model(0.5)), prompted(model())
    found = scored(a, reference=b, prompts=["x", "xxx"], clip=tmp_path, names=("a", "b"))
    values = {s.of: s for s in found.scores if s.metric == "CLIP score"}
    light = [drawn_of(pipe).astype(np.float64).mean() / 255 for pipe in (a, b)]
    assert values["a"].value == pytest.approx(2 + light[0])
    assert values["a - b"].value == pytest.approx(light[0] - light[1])
    width = lambda s: s.high - s.low
    assert width(values["a - b"]) < 0.2 * width(values["a"])
    assert {"x", "xxx"} == set(seen) and found.told == "2 prompts in turn"


class Letters:
    """A conditioner that tells the network nothing of prompts."""

    def encode(self, prompts, negative_prompts, *, size):
        told = jnp.zeros(len(prompts), jnp.int32)
        return told, told


def prompted(pipe):
    return dataclasses.replace(pipe, conditioner=Letters(), num_labels=None)


def drawn_of(pipe):
    images = pipe(prompts=["x"] * 10, num_images=10, steps=2, key=jax.random.key(0))
    return np.round(np.clip(np.asarray(images), 0, 1) * 255).astype(np.uint8)


def test_equal_models_are_equal_and_nothing_is_nan(small_inception):
    found = scored(reference=model(), inception=small_inception, resamples=3)
    assert found.score("PSNR").value == np.inf
    assert found.score("PSNR").note == "all 10 pairs are equal to the last bit"
    assert found.score("SSIM").value == 1
    assert found.score("KID").value == pytest.approx(0, abs=1e-9)
    assert found.score("precision").value == found.score("recall").value == 1
    assert json.loads(json.dumps(as_dict(found)))["num_images"] == 10
    assert score_table(found).row_count == len(found.scores)


@pytest.mark.parametrize("resamples", [None, 5, 0])
def test_resamples_are_told_of_the_metrics_that_have_them_and_as_many_as_there_were(
    small_inception, monkeypatch, resamples
):
    asked = []
    counts = resampling.resample_counts
    monkeypatch.setattr(
        resampling, "resample_counts", lambda n, **s: asked.append(s["resamples"]) or counts(n, **s)
    )
    found = scored(
        model(0.9),
        reference=model(),
        inception=small_inception,
        metrics=["psnr", "fid", "is", "pr", "kid"],
        resamples=resamples,
    )
    told = {"fid": 20, "is": 200, "kid": 200}
    assert found.resamples == (told if resamples is None else dict.fromkeys(told, resamples))
    assert set(asked) == set(found.resamples.values()) - {0}


def test_few_pictures_in_many_features_are_remarked_upon(small_inception):
    settings = {"reference": model(), "inception": small_inception, "metrics": ["fid"]}
    few = scored(model(0.9), **settings, num_images=8, resamples=0)
    assert "8 pictures are no more than the 8 features" in few.scores[0].note
    assert not scored(model(0.9), **settings, num_images=9, resamples=0).scores[0].note


def test_one_picture_has_no_interval():
    found = scored(model(0.9), reference=model(), num_images=1)
    assert {score.low for score in found.scores} == {None}


def test_a_share_of_all_pictures_has_an_interval_of_some_width(small_inception):
    found = scored(reference=model(), inception=small_inception, metrics=["pr"])
    assert found.score("precision").value == found.score("precision").high == 1
    assert found.score("precision").low == pytest.approx(10 / (10 + 1.959964**2))


def test_two_models_of_one_name_are_told_apart():
    found = scored(model(0.9), reference=model(), names=("final", "final"), metrics=["psnr"])
    assert (found.model, found.reference) == ("final", "final, the reference")


def test_models_that_are_told_different_things_are_not_compared():
    with pytest.raises(ValueError, match="the reference reads prompts, the model labels"):
        scored(reference=prompted(model()))


# --- Batches, parts, resuming ------------------------------------------------------------


def test_batch_and_parts_change_no_score():
    whole = scored(model(0.9), reference=model(), batch_size=10, part_size=10)
    for batch, part in ((3, 7), (64, 4)):
        cut = scored(model(0.9), reference=model(), batch_size=batch, part_size=part)
        assert scores_of(cut) == pytest.approx(scores_of(whole), rel=1e-6)


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(small_inception, tmp_path):
    settings = {"reference": model(), "inception": small_inception, "resamples": 4}
    whole = scored(model(0.9), **settings, out=tmp_path / "whole")

    def stop(done, total, words):
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(model(0.9), **settings, out=tmp_path / "cut", on_progress=stop)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "pictures-00000000.safetensors",
        "run.json",
    ]
    told = []
    resumed = scored(
        model(0.9), **settings, out=tmp_path / "cut", on_progress=lambda *args: told.append(args)
    )
    assert [done for done, *_ in told] == [5, 9, 10]
    assert resumed == whole
    text = (tmp_path / "cut" / "evaluation.json").read_text()
    assert text == (tmp_path / "whole" / "evaluation.json").read_text()


def test_another_batch_goes_on_in_the_same_folder(tmp_path):
    first = scored(model(0.9), reference=model(), out=tmp_path)
    again = scored(model(0.9), reference=model(), out=tmp_path, batch_size=1)
    assert again == first


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"steps": 3}, "steps 2, now 3"),
        ({"num_images": 11}, "num_images 10, now 11"),
        ({"labels": [1]}, r"labels \[0, 1, 2\], now \[1\]"),
        ({"reference": model(1.1)}, "reference '"),
        ({"metrics": ["psnr"]}, "metrics "),
    ],
)
def test_the_folder_of_another_run_is_refused_by_name(tmp_path, changes, named):
    scored(model(0.9), reference=model(), out=tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"belongs to another run: {named}"):
        scored(model(0.9), **{"reference": model(), "out": tmp_path} | changes)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "wrong",
    [{"labels": [77]}, {"steps": 5000}, {"guidance_scale": 2.0}, {"prompts": ["a text"]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_cannot_be_drawn_with_leave_nothing_in_the_folder(tmp_path, wrong):
    with pytest.raises(ValueError):
        scored(reference=model(0.9), out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()
    scored(reference=model(0.9), out=tmp_path / "run")


def test_a_folder_that_another_run_has_taken_in_the_meantime_is_left_to_it(tmp_path):
    mine, theirs = (Parts(tmp_path / "run", {"seed": seed}) for seed in (0, 1))
    theirs.part("part-0", 1, lambda: {"x": np.ones(1)})
    with pytest.raises(ValueError, match="belongs to another run: seed 1, now 0"):
        mine.part("part-0b", 1, lambda: {"x": np.zeros(1)})
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "part-0.safetensors"}


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="no empty folder"):
        scored(reference=model(), out=tmp_path)


def test_a_damaged_part_is_an_error_and_not_a_number(tmp_path):
    scored(reference=model(0.9), out=tmp_path)
    part = tmp_path / "pictures-00000005.safetensors"
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(ValueError, match="pictures-00000005"):
        scored(reference=model(0.9), out=tmp_path)


def test_rows_stream_part_by_part_from_memory_and_from_the_disk(tmp_path):
    for folder in (None, tmp_path / "run"):
        parts = Parts(folder, {"a": 1})
        for i in range(3):
            assert parts.part(f"part-{i}", 2, lambda i=i: {"x": np.full((2, 1), i)})
        assert [rows[0, 0] for rows in parts.stream("x")] == [0, 1, 2]
        assert parts.whole("x").tolist() == [[0], [0], [1], [1], [2], [2]]
        with pytest.raises(KeyError, match="'y'"):
            parts.whole("y")


def test_a_fingerprint_is_that_of_all_that_draws():
    same, others = model(), [model(1.1), model(null_label=2)]
    others.append(dataclasses.replace(model(), sampler=DDIM(prediction_type="v_prediction")))
    others.append(dataclasses.replace(model(), apply=_darker))
    assert fingerprint(same) == fingerprint(model())
    assert len({fingerprint(pipe) for pipe in (same, *others)}) == 5


def _darker(variables, x_t, t, labels):
    return 0.5 * _apply(variables, x_t, t, labels)


_darker.__qualname__ = _apply.__qualname__  # as of a function that was edited between two runs


def test_a_fingerprint_is_also_of_what_stands_beside_the_denoiser():
    pipe = qjax.load("fashion-ldm")
    component = pipe.decoder.component
    scaled = {**component.config, "scaling_factor": 0.5}
    other = dataclasses.replace(component, config=scaled)
    changed = pipe.replace(decoder=dataclasses.replace(pipe.decoder, component=other))
    assert fingerprint(changed) != fingerprint(pipe) == fingerprint(qjax.load("fashion-ldm"))


# --- What is chosen ----------------------------------------------------------------------


GIVEN = Given(
    image_shape=(64, 64, 3),
    num_images=100,
    zoo=True,
    reference=True,
    folder=50,
    prompts=True,
    inception="Inception",
    lpips=("alex", "vgg"),
    clip="CLIP",
)


def chosen(asked=None, **changes):
    return choose(asked, dataclasses.replace(GIVEN, **changes), verified=True, zoo_net="classifier")


def test_with_everything_given_nothing_is_left_out():
    found = chosen()
    assert found.metrics == METRICS and found.left_out == ()
    assert found.titles["fid"] == "FID" and found.nets["kid"] == "Inception"


@pytest.mark.parametrize(
    ("changes", "metrics", "word"),
    [
        ({"inception": None}, {"fid", "sfid", "is"}, "pt_inception-2015-12-05-6726825d.pth"),
        ({"inception": None, "zoo": False}, {"fid", "sfid", "is", "pr", "kid", "fd"}, "Inception|shipped|ship"),
        ({"reference": False}, {"psnr", "ssim", "lpips-alex", "lpips-vgg"}, "--reference"),
        ({"lpips": ("alex",)}, {"lpips-vgg"}, "VGG16"),
        ({"prompts": False}, {"clip"}, "prompts"),
        ({"clip": None}, {"clip"}, "--clip"),
        ({"image_shape": (8, 64, 3)}, {"ssim", "lpips-alex", "lpips-vgg"}, "at least"),
        ({"num_images": 1}, {"fid", "sfid", "is", "pr", "kid", "fd"}, "two pictures"),
        ({"num_images": 3}, {"pr"}, "more than 3"),
        ({"folder": 3}, {"pr"}, "more than 3 pictures of each set; there are 100 and 3"),
        (
            {"reference": False, "folder": 0, "statistics": ("pool",)},
            {"psnr", "ssim", "lpips-alex", "lpips-vgg", "sfid", "pr", "kid"},
            "--reference|--images|mu_s",
        ),
    ],
)  # fmt: skip
def test_what_is_lacking_leaves_metrics_out_with_a_reason_or_is_an_error(changes, metrics, word):
    found = chosen(**changes)
    assert {one.metric for one in found.left_out} == metrics
    assert set(found.metrics) == set(METRICS) - metrics
    for metric in metrics:
        with pytest.raises(ValueError, match=f"{metric} .*({word})"):
            chosen([metric], **changes)


def test_without_inception_the_shipped_classifier_looks_and_is_named():
    found = chosen(inception=None)
    assert {found.nets[name] for name in ("pr", "kid", "fd")} == {"classifier"}
    assert {found.keys[name] for name in ("pr", "kid", "fd")} == {"zoo"}


def test_unknown_metrics_are_named_with_those_there_are():
    with pytest.raises(ValueError, match="clip; got fad"):
        chosen(["fad"])


def test_a_model_alone_has_nothing_to_be_scored_by():
    with pytest.raises(ValueError, match="nothing can be computed.*psnr needs.*clip needs"):
        scored()


# --- Files -------------------------------------------------------------------------------


def lpips_files(folder, net):
    """The two files of a backbone, of random weights, and the params they make."""
    rng = np.random.default_rng(0)
    state = {
        key: (rng.standard_normal(target.shape) / np.sqrt(np.prod(target.shape[1:]))).astype("f4")
        for key, target in perceptual.checkpoint_keys(net).items()
    }
    halves = {"backbone": "features", "heads": "lin"}
    for name, start in halves.items():
        part = {key: value for key, value in state.items() if key.startswith(start)}
        write_tensors(folder / f"{net}-{name}.safetensors", part)
    return [folder / f"{net}-{name}.safetensors" for name in halves], perceptual.convert_lpips(
        net, state
    )


def test_files_of_lpips_are_told_apart_by_their_shapes(tmp_path):
    (backbone, heads), params = lpips_files(tmp_path, "alex")
    found, used = lpips_params([heads, backbone])
    assert found.keys() == {"alex"}
    equal = jax.tree.map(np.array_equal, found["alex"], params)
    assert all(jax.tree.leaves(equal))
    assert used[0].name == "LPIPS alex" and len(used[0].sha256) == 2
    with pytest.raises(ValueError, match="needs a file of its heads, too; got backbone alone"):
        lpips_params([backbone])
    with pytest.raises(ValueError, match="both the backbone of alex"):
        lpips_params([backbone, heads, backbone])
    write_tensors(tmp_path / "other.safetensors", {"w": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"other\.safetensors must hold"):
        lpips_params([tmp_path / "other.safetensors"])


def test_weights_are_fetched_from_the_hub_by_id_and_file(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / "there.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert weight_file("owner/name:folder/w.pth") == tmp_path / "there.pth"
    assert asked == [("owner/name", "folder/w.pth")]
    assert weight_file("no/such.pth").name == "such.pth" and len(asked) == 1

    def offline(repository, name):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="hub did not give it: no route"):
        weight_file("owner/name:w.pth")


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere.pth", "There is no file"), ("w.txt", "are read from")]
)
def test_a_file_of_weights_that_is_none_is_named(tmp_path, name, message):
    (tmp_path / "w.txt").write_text("x")
    error = FileNotFoundError if name == "nowhere.pth" else ValueError
    with pytest.raises(error, match=message):
        scored(reference=model(), inception=tmp_path / name)


def test_files_that_are_no_pictures_are_named(small_inception, tmp_path):
    for i in range(4):
        Image.new("RGB", (12, 12), (i, 0, 0)).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "2.png").read_bytes()
    for bytes in (b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "2.png").write_bytes(bytes)
        with pytest.raises(ValueError, match=r"2\.png cannot be read as a picture.*Remove it"):
            scored(images=tmp_path, inception=small_inception, resamples=0)


def test_another_picture_under_the_same_name_is_another_run(small_inception, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (12, 12), (i, 0, 0)).save(folder / f"{i}.bmp")
    settings = {"images": folder, "inception": small_inception, "metrics": ["fid"], "resamples": 0}
    scored(**settings, out=tmp_path / "run")
    length = (folder / "2.bmp").stat().st_size
    Image.new("RGB", (12, 12), (200, 0, 0)).save(folder / "2.bmp")
    assert (folder / "2.bmp").stat().st_size == length
    with pytest.raises(ValueError, match="belongs to another run: images"):
        scored(**settings, out=tmp_path / "run")


def test_pictures_of_another_size_than_the_models_say_so(small_inception, tmp_path):
    for i in range(4):
        Image.new("RGB", (9, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    found = scored(images=tmp_path, inception=small_inception, metrics=["fid"], resamples=0)
    assert found.scores[0].against == f"{tmp_path.name}, 9 x 16"


def _npz(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 no zip"), "it is no .npz"),
        (lambda path: path.write_bytes(b"\x93NUMPY of one array"), "it is no .npz"),
        (lambda path: _npz(path, mu=np.zeros(8)), "it lacks sigma"),
        (lambda path: _npz(path, mu=np.array([None] * 8), sigma=np.eye(8)), "allow_pickle"),
        (lambda path: _npz(path, mu=np.zeros(8), sigma=np.full((8, 8), np.nan)), "must be finite"),
        (lambda path: _npz(path, mu=np.zeros(9), sigma=np.eye(9)), "Inception's 8 features; .* 9 num"),
    ],
    ids=["no zip", "an array", "half", "a pickle", "nan", "other features"],
)  # fmt: skip
def test_statistics_that_are_none_are_refused_by_name_before_anything_is_drawn(
    small_inception, tmp_path, monkeypatch, write, message
):
    write(tmp_path / "stats.npz")
    monkeypatch.setattr(evaluation_measuring, "draw", None)
    with pytest.raises(ValueError, match=rf"stats\.npz must hold .*{message}"):
        scored(images=tmp_path / "stats.npz", inception=small_inception)


def test_pictures_of_two_sizes_and_empty_folders_are_refused(small_inception, tmp_path):
    folder = tmp_path / "pictures"
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        scored(images=folder, inception=small_inception)
    folder.mkdir()
    with pytest.raises(ValueError, match="two pictures at least; it holds 0"):
        scored(images=folder, inception=small_inception)
    for i, side in enumerate((8, 9)):
        Image.new("RGB", (side, 8)).save(folder / f"{i}.png")
    with pytest.raises(ValueError, match=r"0\.png is 8 x 8, 1\.png 9 x 8"):
        scored(images=folder, inception=small_inception)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"part_size": 0}, "part_size=0"),
        ({"resamples": 1}, "resamples=1"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"labels": []}, "labels must hold one"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scored(reference=model(), **settings)


def test_models_of_two_sizes_and_pictures_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="samples have one shape"):
        scored(reference=dataclasses.replace(model(), shape=(16, 16, 3)))
    with pytest.raises(ValueError, match="no numbers"):
        scored(model(np.nan), reference=model())


# --- The command line --------------------------------------------------------------------


def test_the_command_scores_a_quantized_shipped_model_and_says_what_it_left_out(run, tmp_path):
    folder = tmp_path / "w4a8"
    qjax.quantize(qjax.load("fashion-dit"), qjax.recipes.w4a8()).save(folder)
    words = ("eval", folder, "--reference", "fashion-dit", "--num-images", 12, "--steps", 1)
    done = run(*words, "--out", tmp_path / "run", "--resamples", 5)
    assert (done.status, done.err) == (0, "")
    for title in ("PSNR", "SSIM", "precision", "recall", "KID", "FD", "the real test set"):
        assert title in done.out
    assert "left out: fid needs the weights of Inception" in done.out
    document = json.loads(run(*words, "--out", tmp_path / "run", "--resamples", 5, "--json").out)
    named = {(s["metric"], s["of"], s["against"]) for s in document["scores"]}
    assert {
        ("PSNR", "w4a8", "fashion-dit"),
        ("FD", "w4a8", "fashion-dit"),
        ("FD", "w4a8 - fashion-dit", "the real test set"),
    } <= named
    assert {net["name"] for net in document["nets"]} == {"fashion-features"}
    assert document["device"] and document["versions"]["qjax"] == qjax.__version__
    wrong = run(*words, "--metrics", "fid,psnr")
    assert wrong.status == 2 and "fid needs the weights of Inception" in wrong.err


def test_lpips_files_may_be_a_list_or_one():
    from qjax.cli_evaluate import several

    assert several("a.pth") == ["a.pth"] and several(["a", "b"]) == ["a", "b"]
