"""load, quantize, plan and compare: one model through all of them, and a stranger's."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

import qjax
from qjax import api, recipes, report_judge, zoo
from qjax.core import metrics
from qjax.core.config import QuantConfig, Rule, WeightSpec
from qjax.core.layers import LOW_RANK
from qjax.core.qtensor import is_qtensor
from qjax.core.serialize import flatten
from qjax.layer_errors import weight_sqnr
from qjax.models.conditioners import TextConditioner
from qjax.models.loading import _why_not_drawn
from qjax.models.samplers import DDIM, DDPM
from qjax.models.unet2d_condition import UNet2DConditionModel
from qjax.models.unet2d_condition_config import UNet2DConditionConfig
from qjax.report_how import settings_of
from qjax.report_layers import how_quantized, layer_results
from qjax.timing import Phases, interleaved
from qjax.zoo.data import CLASSES

MODEL = "fashion-dit"
QUICK = {"num_images": 2, "steps": 1, "repeats": 0}


@pytest.fixture(scope="module")
def pipe():
    return qjax.load(MODEL)


@pytest.fixture(scope="module")
def qpipe(pipe):
    return qjax.quantize(pipe, recipes.w8a8())


def leaves(params):
    return jax.tree.leaves(params, is_leaf=is_qtensor)


def copy_of_the_model(folder):
    return shutil.copytree(zoo.FOLDER / MODEL, folder)


def test_shipped_models_are_listed_and_the_classifier_is_none_of_them():
    assert MODEL in qjax.zoo_names()
    assert "fashion-features" not in qjax.zoo_names()


def test_a_folder_is_loaded_as_what_it_is(pipe, tmp_path):
    from_folder = qjax.load(copy_of_the_model(tmp_path / "mine"))
    assert from_folder.source.name == "mine"
    assert dict(from_folder.source.config) == dict(pipe.source.config)
    jax.tree.map(np.testing.assert_array_equal, from_folder.params, pipe.params)


def test_loading_again_reuses_the_compiled_program(pipe):
    assert qjax.load(MODEL).apply == pipe.apply


def test_shown_a_pipeline_says_what_it_is_and_not_its_weights(qpipe):
    shown = repr(qpipe)
    assert "DDIM" in shown and "DiTTransformer2DModel" in shown
    assert "Array" not in shown and len(shown) < 5000


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_that_is_no_number_is_refused(pipe, scale):
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        pipe(labels=[1], steps=1, guidance_scale=scale, key=jax.random.key(0))


def test_a_height_of_0_is_not_taken_for_the_models_own(pipe):
    with pytest.raises(ValueError, match="height and width must be multiples"):
        pipe(labels=[1], steps=1, height=0, key=jax.random.key(0))


def test_a_name_that_is_nothing_names_what_there_is():
    with pytest.raises(FileNotFoundError, match=f"no model of the zoo.*{MODEL}.*no local folder"):
        qjax.load("fashion-dot")


def test_a_hub_id_is_downloaded_and_keeps_its_name(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repository, *, allow_patterns, revision, token):
        asked.append((repository, allow_patterns))
        return str(copy_of_the_model(tmp_path / f"snapshot-{len(asked)}"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert qjax.load("somebody/a-model").source.name == "somebody/a-model"
    assert asked[0][0] == "somebody/a-model"
    patterns = [pattern for _, patterns in asked for pattern in patterns]
    assert not any(pattern.endswith((".bin", ".ckpt", "*")) for pattern in patterns)


def test_shapes_of_a_hub_id_need_its_configs_alone(monkeypatch, tmp_path):
    def snapshot_download(repository, *, allow_patterns, revision, token):
        assert all(pattern.endswith(".json") for pattern in allow_patterns)
        folder = copy_of_the_model(tmp_path / "snapshot")
        for file in folder.rglob("*.safetensors"):
            file.unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    shapes = lambda params: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes(api.shapes("somebody/a-model")) == shapes(api.shapes(MODEL))


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("bad name")])
def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="no local folder, and the Hugging Face hub") as got:
        qjax.load("somebody/a-model")
    assert "\n" not in str(got.value)


def test_a_folder_named_like_a_shipped_model_is_not_taken_in_silence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    copy_of_the_model(tmp_path / MODEL)
    with pytest.warns(UserWarning, match="the folder of that name is ./fashion-dit"):
        assert api.locate(MODEL)[0] == zoo.FOLDER / MODEL
    assert api.locate(f"./{MODEL}")[0].resolve() == tmp_path / MODEL


def test_a_plan_needs_no_weights(pipe):
    recipe = recipes.w4a8()
    assert qjax.plan(api.shapes(MODEL), recipe) == qjax.plan(pipe, recipe)


def test_quantizing_while_loading_gives_the_same_bits(qpipe):
    streamed = qjax.load(MODEL, quantize=recipes.w8a8())
    jax.tree.map(np.testing.assert_array_equal, streamed.params, qpipe.params)
    assert (streamed.method, streamed.quant) == (qpipe.method, qpipe.quant)


def test_quantizing_changes_nothing_of_the_float_pipeline(pipe, qpipe):
    assert any(map(is_qtensor, leaves(qpipe.params)))
    assert not any(map(is_qtensor, leaves(pipe.params)))
    assert pipe.quant is None


def test_stages_that_are_left_out_are_named(pipe):
    @dataclasses.dataclass(frozen=True)
    class Polish:
        def run(self, state, key):
            return state

    recipe = dataclasses.replace(recipes.w8a8(), stages=(Polish(),))
    with pytest.warns(UserWarning, match="leaves out the stages Polish"):
        qjax.quantize(pipe, recipe)


def test_every_leaf_left_in_float_has_its_reason(qpipe):
    reasons = {layer.path: layer.reason for layer in layer_results(qpipe.params, qpipe.quant)}
    assert "next to the pixels" in reasons["patch_embed/kernel"]
    assert reasons["blocks_0/mlp/fc1/bias"] == "not a layer's kernel"
    assert reasons["blocks_0/mlp/fc1/kernel"] == ""


def quantize_leaf(spec, shape):
    config = QuantConfig(weight=spec)
    return qjax.quantize({"kernel": np.ones(shape, np.float32)}, config, box=False)["kernel"]


def test_formats_are_said_in_words(pipe, qpipe):
    assert how_quantized(pipe.params) == "not quantized"
    assert how_quantized(qpipe.params) == (
        "8-bit weights (one scale per channel), 8-bit activations"
    )


def test_several_widths_are_said_with_their_mean_over_weights():
    narrow = quantize_leaf(WeightSpec(bits=2), (4, 6))
    wide = quantize_leaf(WeightSpec(bits=6), (4, 2))
    words = how_quantized({"a": {"kernel": narrow}, "b": {"kernel": wide}})
    assert words.startswith("2 or 6-bit weights (3.00 on average; one scale per channel), ")


def test_a_model_compared_with_itself_differs_in_nothing(pipe):
    report = qjax.compare(pipe, pipe, **QUICK)
    (variant,) = report.variants
    assert np.isposinf(variant.psnr).all()
    assert not variant.error_per_step.any()
    assert variant.timing is None
    assert variant.agreement.value == variant.agreement.value_float
    assert variant.distances[0].value == variant.distances[0].value_float


def test_compare_measures_and_writes_a_page_and_a_grid(pipe, qpipe, tmp_path):
    told = []
    report = qjax.compare(
        pipe,
        {"w8a8": qpipe},
        labels=[1, 7, 9],
        steps=2,
        guidance_scale=2.0,
        repeats=1,
        out=tmp_path / "new" / "report.html",
        on_progress=lambda *said: told.append(said),
    )
    (variant,) = report.variants
    assert report.labels == ("trouser", "sneaker", "ankle boot")
    assert len(variant.psnr) == 3 and (variant.psnr > 20).all()
    assert variant.error_per_step.shape == (2,)
    assert variant.timing.batch == 3 and variant.timing.seconds_float > 0
    assert report.bytes_float / variant.bytes_quantized > 1.8
    assert "guidance 2" in report.sampler
    assert any("two halves of the real test set" in note for note in report.notes)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "report.html",
        "report.png",
    ]
    done, total = zip(*[said[:2] for said in told], strict=True)
    assert list(done) == sorted(done) and set(total) == {done[-1]}


def test_labels_are_all_classes_in_turn_and_may_be_the_null_class(pipe, qpipe):
    assert qjax.compare(pipe, qpipe, **QUICK).labels == ("T-shirt", "trouser")
    report = qjax.compare(pipe, qpipe, labels=[10, 3], steps=1, repeats=0)
    assert report.labels == ("no class", "dress")


def test_labels_must_be_one_an_image(pipe, qpipe):
    with pytest.raises(ValueError, match="one an image; got 2 labels for num_images=5"):
        qjax.compare(pipe, qpipe, labels=[1, 2], num_images=5)


def test_pipelines_that_cannot_be_compared_are_named_before_anything_is_drawn(pipe, qpipe):
    with pytest.raises(ValueError, match="ddpm has sampler DDPM.*instead of DDIM"):
        qjax.compare(pipe, {"ddpm": qpipe.replace(sampler=DDPM())})
    with pytest.raises(ValueError, match=r"small has shape \(16, 16, 1\) instead of"):
        qjax.compare(pipe, {"small": qpipe.replace(shape=(16, 16, 1))})
    with pytest.raises(ValueError, match="pictures of 1 or 3 channels; got samples of 4"):
        latent = pipe.replace(shape=(32, 32, 4))
        qjax.compare(latent, latent)
    with pytest.raises(ValueError, match="at least one quantized pipeline"):
        qjax.compare(pipe, {})


def test_a_page_that_is_no_page_is_refused_before_anything_is_drawn(pipe, qpipe, tmp_path):
    with pytest.raises(ValueError, match="ends in .html"):
        qjax.compare(pipe, qpipe, out=tmp_path / "report.png")
    assert not any(tmp_path.iterdir())


def test_every_quantized_layer_tells_how_far_its_weights_moved(pipe, qpipe):
    (variant,) = qjax.compare(pipe, {"w8a8": qpipe}, **QUICK).variants
    floats, stored = dict(flatten(pipe.params)), dict(flatten(qpipe.params))
    assert len(variant.quantized_layers) > 20
    for layer in variant.quantized_layers:
        w = np.asarray(floats[layer.path])
        expected = metrics.sqnr(np.asarray(stored[layer.path].dequantize(jnp.float32)), w)
        assert layer.weight_sqnr == pytest.approx(expected) and expected > 35
        assert layer.output_sqnr is None
    assert all(layer.weight_sqnr is None for layer in variant.float_layers)


def test_sensitivity_is_how_far_the_answer_moves_with_one_layer_quantized(pipe):
    coarse = "blocks_1/mlp/fc1/kernel"
    rule = Rule(pattern=coarse, weight=WeightSpec(bits=2))
    quantized = qjax.quantize(pipe, QuantConfig(rules=(rule,), weight=WeightSpec(bits=8)))
    asked = {"labels": [1, 7], "steps": 1, "guidance_scale": 2.0}
    (variant,) = qjax.compare(
        pipe, quantized, **asked, repeats=0, sensitivity=True, recipes={"quantized": "my own"}
    ).variants
    found = {layer.path: layer.output_sqnr for layer in variant.quantized_layers}
    assert all(np.isfinite(sqnr) for sqnr in found.values())
    assert min(found, key=found.get) == coarse
    assert dict(variant.settings)["Recipe"] == "my own"

    _, trajectory = pipe(**asked, key=jax.random.key(0), return_trajectory=True)
    leaves_ = dict(flatten(pipe.params))
    leaves_[coarse] = dict(flatten(quantized.params))[coarse].dequantize(jnp.float32)
    other = pipe.replace(params=traverse_util.unflatten_dict(leaves_, sep="/"))
    # Both halves of guidance, one after the other, without a scale.
    x_t, t = trajectory.x_t[0], jnp.int32(pipe.sampler.timesteps(1)[0])
    answers = [
        np.concatenate([one.predict(x_t, t, labels) for labels in ([1, 7], None)])
        for one in (other, pipe)
    ]
    assert found[coarse] == pytest.approx(float(metrics.sqnr(*answers)), abs=0.01)


def test_sensitivity_needs_a_float_model(pipe, qpipe):
    with pytest.raises(ValueError, match="float pipeline without a step table"):
        qjax.compare(qpipe, qpipe, **QUICK, sensitivity=True)


def test_weights_that_stand_for_other_numbers_are_not_compared(pipe, qpipe):
    assert weight_sqnr(pipe.params, qpipe.replace(smoothed=True)) == {}
    doubled = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), pipe.params)
    assert weight_sqnr(doubled, qpipe) == {}


def test_a_low_rank_branch_counts_as_part_of_its_kernel():
    rng = np.random.default_rng(0)
    w, down, up = (rng.normal(size=s).astype(np.float32) for s in ((32, 16), (32, 2), (2, 16)))
    strength = np.array([0.5, 2.0], np.float32)
    low = (down * strength) @ up
    config = QuantConfig(weight=WeightSpec(bits=4))
    q = qjax.quantize({"kernel": w - low}, config, box=False)["kernel"]
    branch = dict(zip(LOW_RANK, (down, up, strength), strict=True))
    pipe = qjax.Pipeline.from_apply(
        lambda variables, x_t, t, labels: x_t, {"a": {"kernel": q, **branch}}, DDIM(), (8, 8, 1)
    )
    found = weight_sqnr({"a": {"kernel": w}}, pipe)
    expected = metrics.sqnr(np.asarray(q.dequantize(jnp.float32)) + low, w)
    assert found == {"a/kernel": pytest.approx(float(expected))} and expected > 10


@pytest.mark.slow
def test_of_many_pictures_the_worst_are_shown_too(pipe, qpipe):
    report = qjax.compare(pipe, qpipe, num_images=12, steps=1, repeats=0)
    (variant,) = report.variants
    assert report.worst_shown == 2 and report.seeds[:6] == tuple(range(6))
    assert variant.psnr.shape == (12,) and variant.psnr[6] <= variant.psnr[7]
    assert variant.psnr[7] <= variant.psnr[8:].min()
    shown = metrics.psnr(variant.images, report.float_images, data_range=1.0)
    np.testing.assert_allclose(shown, variant.psnr[:8])
    worst = report.seeds[6]
    again = pipe(labels=[worst % 10], start_index=worst, steps=1, key=jax.random.key(0))
    np.testing.assert_allclose(again[0], report.float_images[6], atol=1e-4)
    assert report.labels[6] == CLASSES[worst % 10]


def test_how_a_model_was_quantized_is_read_from_what_it_remembers(pipe, qpipe):
    def said(pipe, recipe=None):
        return dict(settings_of(pipe, layer_results(pipe.params, pipe.quant), recipe))

    found = said(qpipe)
    assert found["Recipe"] == "the rules of w8a8"
    assert "8-bit integers, 255 levels each" in found["Weights"]
    assert found["Groups"].startswith("All weights of an output channel share one scale")
    assert "The range is mirrored at zero" in found["Rounding"]
    assert found["Inputs of layers"].startswith("8-bit integers, the range is taken")
    assert found["Calibration"] == "None that the model remembers"
    assert found["Left in float"].endswith("as float16")
    assert said(qpipe, recipes.w8a8())["Calibration"] == "None: no data was needed"
    calibrated = said(qpipe, recipes.ptqd_w8a8())
    assert calibrated["Recipe"] == "ptqd_w8a8" and "noise corrected" in calibrated["Calibration"]
    smoothed = said(qpipe.replace(smoothed=True))
    assert smoothed["Recipe"] == "rules of its own" and "moved from" in smoothed["Calibration"]
    assert said(pipe) == {}


def test_a_recipe_for_a_variant_that_is_not_there_is_named(pipe, qpipe):
    with pytest.raises(ValueError, match="names of variants, w8a8; got also w4"):
        qjax.compare(pipe, {"w8a8": qpipe}, recipes={"w4": "w4a8"}, **QUICK)


def test_a_model_made_from_other_weights_is_told(pipe, qpipe):
    other = pipe.replace(params=jax.tree.map(lambda leaf: leaf * 2.0, pipe.params))
    (variant,) = qjax.compare(pipe, {"w8a8": qpipe}, **QUICK).variants
    assert variant.notes == ()
    (variant,) = qjax.compare(other, {"w8a8": qpipe}, **QUICK).variants
    assert "made from other weights" in variant.notes[0]


def test_a_broken_model_is_reported_as_broken(pipe):
    broken = pipe.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, pipe.params))
    (variant,) = qjax.compare(pipe, broken, **QUICK).variants
    assert np.isnan(variant.psnr).all()
    assert variant.distances == ()


def test_one_picture_has_no_distance():
    one = np.zeros((1, 32, 32, 1), np.float32)
    assert report_judge.feature_distances(one, one) == ()
    (note,) = report_judge.notes(1)
    assert "draws" not in note


def test_few_pictures_are_far_from_the_real_ones_by_their_number_alone():
    few, many = (report_judge.distance_of_real_draws(n) for n in (16, 256))
    assert few > 2 * many > 0


class Stranger(nn.Module):
    """Somebody's denoiser: plain Flax layers, an embedding of the class, attention."""

    @nn.compact
    def __call__(self, x, t, labels):
        b, h, w, c = x.shape
        wave = jnp.sin(t.astype(jnp.float32)[:, None] / 1000.0 * jnp.arange(1.0, 17.0))
        e = nn.Dense(16)(wave) + nn.Embed(4, 16)(labels)
        y = nn.Conv(16, (3, 3))(x) + e[:, None, None, :]
        y = nn.MultiHeadDotProductAttention(num_heads=2)(y.reshape(b, h * w, 16))
        return nn.Conv(c, (3, 3))(nn.silu(y.reshape(b, h, w, 16)))


@pytest.fixture(scope="module")
def stranger():
    model = Stranger()
    x, one = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(1), x, one, one)["params"]
    return qjax.Pipeline.from_apply(
        model.apply, params, DDIM(), (16, 16, 3), null_label=3, num_labels=3
    )


def test_a_strangers_denoiser_is_quantized_sampled_and_compared(stranger, tmp_path):
    config = QuantConfig(weight=WeightSpec(bits=8))
    qparams = qjax.quantize(stranger.params, config)
    assert any(map(is_qtensor, leaves(qparams)))
    quantized = stranger.replace(params=qparams)
    out = tmp_path / "report.html"
    report = qjax.compare(
        stranger, quantized, num_images=4, steps=2, guidance_scale=1.5, repeats=1, out=out
    )
    (variant,) = report.variants
    assert report.labels == ("class 0", "class 1", "class 2", "class 0")
    assert variant.images.shape == (4, 16, 16, 3) and (variant.psnr > 30).all()
    assert variant.distances == () and variant.agreement is None
    assert "a denoiser of your own" in out.read_text()
    same = qjax.quantize(stranger, config)
    jax.tree.map(np.testing.assert_array_equal, same.params, qparams)


def test_a_stranger_cannot_be_saved_and_the_error_says_what_can(stranger, tmp_path):
    with pytest.raises(ValueError, match="which network it runs.*qjax.core.serialize.save"):
        stranger.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_candidates_are_timed_in_turn():
    order = []

    def call(name):
        order.append(name)
        return jnp.zeros(())

    calls = {name: (lambda name=name: call(name)) for name in "ab"}
    seconds = interleaved(calls, rounds=3, min_seconds=0, warm=True)
    assert order == list("ababab")
    assert set(seconds) == {"a", "b"}


def test_phases_add_up_by_name():
    phases = Phases()
    with phases.follow() as begin:
        begin("draw")
        begin("time")
        begin("draw")
    with phases.count("pages"):
        pass
    assert list(phases.seconds) == ["draw", "time", "pages"]
    assert sum(phases.seconds.values()) <= phases.total


@pytest.mark.parametrize(
    ("changes", "towers", "reason"),
    [
        ({"in_channels": 9}, 1, "takes 9 channels and answers 4"),
        ({"num_class_embeds": 3}, 1, "told classes beside the text"),
        ({}, 1, None),
    ],
)
def test_what_cannot_be_drawn_with_is_said_on_loading(changes, towers, reason):
    model = UNet2DConditionModel(dataclasses.replace(UNet2DConditionConfig.sd_v1_4(), **changes))
    fields = {"conditioner": TextConditioner(towers=(None,) * towers)}
    found = _why_not_drawn(model, fields)
    assert found == [] if reason is None else reason in found[0]
    xl = UNet2DConditionModel(UNet2DConditionConfig.sdxl())
    assert "needs two text towers" in _why_not_drawn(xl, fields)[0]
