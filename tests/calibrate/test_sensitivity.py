"""Sensitivity of single layers: what is measured, with one program, and the scores of pictures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.collect import Pairs, samples_at
from qjax.calibrate.data import CalibrationSet
from qjax.calibrate.layer_widths import quantized_layers
from qjax.calibrate.rollout import Buffer
from qjax.calibrate.sensitivity import (
    Probe,
    most_sensitive,
    noise_to_signal,
    picture_distances,
    sqnr_of_layers,
)
from qjax.calibrate.similarity import (
    feature_distance,
    load_feature_net,
    squared_error,
    ssim_distance,
)
from qjax.core import metrics
from qjax.core.config import QuantConfig, Rule, WeightSpec
from qjax.core.safetensors_io import write_tensors
from qjax.core.serialize import flatten
from qjax.models.features import FeatureNet, FeatureNetConfig

BITS = (3, 4, 8)
NET = FeatureNetConfig(channels=(4, 6, 8), num_features=3, num_classes=2)


def samples_of(pipe, count: int = 4, batches: int = 2):
    """Batches of noise at steps of DDIM, told every label in turn, both halves of guidance."""
    items = CalibrationSet(items=count).draw(pipe, jax.random.key(5), guidance_scale=2.0)
    t, group = np.array([66, 33, 0], np.int32), np.arange(3, dtype=np.int32)
    x_t = np.stack([np.asarray(items.x_T)] * 3)
    buffer = Buffer(x_t, x_t[0], [], 0)
    step, item = np.arange(count) % 3, np.arange(count)
    size = count // batches
    return [
        samples_at(buffer, items, t, group, Pairs(step[a : a + size], item[a : a + size]))
        for a in range(0, count, size)
    ]


@pytest.fixture(scope="module")
def layers(dit, quantize):
    return quantized_layers(quantize(dit))


@pytest.fixture(scope="module")
def samples(dit):
    return samples_of(dit)


@pytest.fixture(scope="module")
def table(dit, layers, samples):
    return sqnr_of_layers(dit.apply, dit.params, layers, BITS, samples)


def test_every_layer_at_every_width_runs_one_program(dit, layers, samples):
    traces = []

    def apply(variables, x_t, t, told):
        traces.append(x_t.shape)
        return dit.apply(variables, x_t, t, told)

    seen = []
    found = sqnr_of_layers(
        apply, dit.params, layers, BITS, samples, on_layer=lambda path, _: seen.append(path)
    )
    assert len(traces) == 1
    assert seen == list(layers) == list(found) and len(seen) > 4
    assert {one.shape for one in found.values()} == {(len(BITS),)}


def test_sqnr_is_that_of_the_answers_with_the_integers_of_that_layer(dit, layers, samples, table):
    path = "blocks_1/mlp/fc1"
    w = dit.params["blocks_1"]["mlp"]["fc1"]["kernel"]
    q = layers[path].quantized(w, 3)
    params = jax.tree.map(lambda leaf: q.dequantize() if leaf is w else leaf, dit.params)
    ask = lambda p, s: np.asarray(dit.apply({"params": p}, s.x_t, s.t, s.told))
    float_answers = np.concatenate([ask(dit.params, s) for s in samples])
    answers = np.concatenate([ask(params, s) for s in samples])
    assert table[path][0] == pytest.approx(metrics.sqnr(answers, float_answers), abs=0.01)


def test_more_bits_are_less_noise_by_about_six_decibels_each(table):
    found = np.stack(list(table.values()))
    assert np.all(np.diff(found, axis=1) > 0)
    per_bit = np.diff(found, axis=1) / np.diff(BITS)
    assert 5 < np.median(per_bit) < 8


def test_noises_of_layers_add_up(dit, layers, samples, table):
    probe = Probe.of(dit.apply, dit.params, samples)
    kernels = {path: one.quantized(probe.kernel(path), 8) for path, one in layers.items()}
    together = noise_to_signal(probe.sqnr(kernels))
    added = sum(noise_to_signal(found[-1]) for found in table.values())
    assert together == pytest.approx(added, rel=0.5)


def test_a_kernel_on_its_grid_costs_nothing(dit, layers, samples):
    path, (layer,) = "blocks_0/attn/qkv", [layers["blocks_0/attn/qkv"]]
    w = dit.params["blocks_0"]["attn"]["qkv"]["kernel"]
    on_grid = layer.quantized(w, 4).dequantize()
    params = jax.tree.map(lambda leaf: on_grid if leaf is w else leaf, dit.params)
    probe = Probe.of(dit.apply, params, samples)
    assert probe.sqnr({path: layer.quantized(on_grid, 4)}) == np.inf
    assert noise_to_signal(np.array([np.inf, 10.0, 20.0])).tolist() == [0, 0.1, 0.01]


def test_channels_of_a_learned_variance_do_not_count(dit, layers, samples, table):
    def with_variance(variables, x_t, t, told):
        answer = dit.apply(variables, x_t, t, told)
        return jnp.concatenate([answer, 1e3 * jnp.ones_like(answer)], axis=-1)

    path = "blocks_0/attn/proj"
    found = sqnr_of_layers(with_variance, dit.params, {path: layers[path]}, BITS, samples)
    np.testing.assert_allclose(found[path], table[path], atol=0.01)


@pytest.mark.slow
def test_convolutions_are_measured_too(unet, quantize):
    layers = quantized_layers(quantize(unet))
    convs = {path: one for path, one in layers.items() if path.endswith("conv1")}
    found = sqnr_of_layers(unet.apply, unet.params, convs, (3, 8), samples_of(unet))
    assert convs and all(low < high for low, high in found.values())


def test_a_network_that_answers_zeros_cannot_be_measured(dit, samples):
    zeros = jax.tree.map(jnp.zeros_like, dit.params)
    with pytest.raises(ValueError, match="not zeros alone; the sum of their squares is 0"):
        Probe.of(dit.apply, zeros, samples)


def test_the_most_sensitive_layers_come_first():
    sqnr = np.array([[30.0, 50], [10, 60], [20, 40], [40, 80]])
    assert most_sensitive(sqnr, 0.5) == [1, 2]
    assert most_sensitive(sqnr, 0.3) == [1, 2] and most_sensitive(sqnr, 0.0) == []
    assert most_sensitive(sqnr, 1.0) == [1, 2, 0, 3]


# How layers are quantized, at other widths.


def test_another_width_leaves_all_else_as_it_is(dit):
    from qjax.calibrate.recipe import quantize_pipeline

    spec = WeightSpec(bits=4, symmetric=False, granularity="per_group", group_size=(12, 8))
    rules = (Rule(pattern=r"blocks_\d/attn/qkv/kernel", weight=spec),)
    pipe = quantize_pipeline(dit, QuantConfig(rules=rules, scale_dtype="float16"))
    layer = quantized_layers(pipe)["blocks_0/attn/qkv"]
    old = pipe.params["blocks_0"]["attn"]["qkv"]["kernel"]
    w = dit.params["blocks_0"]["attn"]["qkv"]["kernel"]
    same, other = layer.quantized(w, 4), layer.quantized(w, 6)
    np.testing.assert_array_equal(same.qvalue, old.qvalue)
    np.testing.assert_array_equal(same.scale, old.scale)
    assert other.bits == 6 and other.group_size == old.group_size == 8
    assert other.scale.dtype == jnp.float16 and other.zero_point is not None
    assert other.layout == "packed" and layer.quantized(w, 8).layout == "native"


def test_stored_bytes_are_those_of_the_kernel_once_it_is_made(dit, layers):
    w = dit.params["blocks_0"]["attn"]["qkv"]["kernel"]
    layer = layers["blocks_0/attn/qkv"]
    for bits in (2, 3, 4, 5, 6, 8):
        assert layer.stored_bytes(w, bits) == layer.quantized(w, bits).nbytes_packed
        assert layer.stored_bytes(w, bits) == w.size * bits // 8 + 2 * w.shape[-1]


def test_rules_that_are_forgotten_cannot_be_changed(dit, quantize):
    with pytest.raises(ValueError, match="got 0 quantized layers"):
        quantized_layers(dit)
    with pytest.raises(ValueError, match="quant=None"):
        quantized_layers(quantize(dit).replace(quant=None))


# Scores of pictures.


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1, (3, 16, 16, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    model = FeatureNet(NET)
    return model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]


def scores(net):
    return ssim_distance, squared_error, feature_distance(net, NET, batch=2)


def test_equal_pictures_are_at_no_distance_and_noise_adds_to_it(pictures, net):
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, pictures.shape).astype(np.float32)
    for score in scores(net):
        assert score(pictures, pictures) == pytest.approx(0, abs=1e-9)
        near, far = (score(np.clip(pictures + s * noise, 0, 1), pictures) for s in (0.02, 0.2))
        assert 0 < near < far


def test_feature_distances_do_not_depend_on_the_batch(pictures, net):
    one, all_ = (feature_distance(net, NET, batch=n)(pictures, 1 - pictures) for n in (1, 3))
    assert one == pytest.approx(all_, rel=1e-5)


def test_a_feature_net_is_read_from_its_folder(pictures, net, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(NET)))
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(net)}
    write_tensors(tmp_path / "features.safetensors", arrays, {})
    params, config = load_feature_net(tmp_path)
    assert config == NET
    again = feature_distance(params, config)(pictures, 1 - pictures)
    assert again == pytest.approx(feature_distance(net, NET)(pictures, 1 - pictures), rel=1e-6)


def test_pictures_that_a_score_is_not_for_are_refused(pictures, net):
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim_distance(pictures[:, :8, :8], pictures[:, :8, :8])
    score = feature_distance(net, NET)
    for wrong in (np.zeros((1, 16, 16, 3)), np.zeros((1, 32, 32, 1))):
        with pytest.raises(ValueError, match="sees pictures of 1 channels whose last map has 32"):
            score(wrong, wrong)


def test_every_score_is_asked_for_every_width(dit, layers, samples):
    probe = Probe.of(dit.apply, dit.params, samples)
    drawn = lambda params: np.asarray(params["blocks_0"]["mlp"]["fc1"]["kernel"])
    found = picture_distances(
        probe,
        layers["blocks_0/mlp/fc1"],
        BITS,
        drawn,
        drawn(dit.params),
        (squared_error, lambda a, b: 2 * squared_error(a, b)),
    )
    assert found.shape == (2, len(BITS)) and np.all(np.diff(found, axis=1) < 0)
    np.testing.assert_allclose(found[1], 2 * found[0])
