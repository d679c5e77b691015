import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qjax.core.steps import StepTable, TableKey
from qjax.models.pipeline import Pipeline, Source, guided_prediction, sample
from qjax.models.samplers import DDIM, DDPM
from qjax.models.sampling import draw_noise, image_keys, to_images
from qjax.models.schedules import Schedule

SHAPE = (4, 4, 2)
SAMPLER = DDIM(schedule=Schedule.linear(100, 1e-3, 0.1), clip_sample=False)
PARAMS = {"gain": jnp.asarray(0.7), "classes": jnp.array([0.0, 0.1, 0.2, -0.3])}


class Network:
    """A network without mixing: every pixel alone, so that batches cannot differ by rounding.

    It counts how often it is traced, and with which batch.
    """

    def __init__(self, variance=False):
        self.variance = variance
        self.batches = []

    def __call__(self, variables, x_t, t, labels):
        self.batches.append(x_t.shape[0])
        params = variables["params"]
        shift = t.astype(jnp.float32) / 100
        if labels is not None:
            shift = shift + params["classes"][labels]
        prediction = params["gain"] * x_t + shift[:, None, None, None]
        if "quant" in variables:
            prediction = prediction * variables["quant"]["dense"]["scale"]
        if "time" in variables:
            prediction = prediction + variables["time"]
        if self.variance:
            return jnp.concatenate([prediction, jnp.tanh(prediction)], axis=-1)
        return prediction


PLAIN, WITH_VARIANCE = Network(), Network(variance=True)  # shared, and with them their programs


def pipeline(network=None, sampler=SAMPLER, **fields):
    fields = {"null_label": 3, "num_labels": 3, **fields}
    return Pipeline.from_apply(network or PLAIN, PARAMS, sampler, SHAPE, **fields)


def table(name, value, **settings):
    steps = len(jax.tree.leaves(value)[0])
    settings.setdefault("timesteps", tuple(SAMPLER.timesteps(steps)))
    return StepTable().with_entry(name, value, key=TableKey(**settings))


def test_images_are_float32_between_zero_and_one(key):
    images = pipeline()(labels=[0, 1, 2], steps=4, key=key)
    assert images.shape == (3, *SHAPE) and images.dtype == jnp.float32
    assert 0 <= images.min() and images.max() <= 1


def test_images_are_the_latents_clipped_and_shifted(key):
    pipe = pipeline()
    latents = pipe(labels=[0, 1], steps=4, key=key, output="latent")
    assert jnp.max(jnp.abs(latents)) > 1
    np.testing.assert_array_equal(to_images(latents), pipe(labels=[0, 1], steps=4, key=key))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance_scale", [None, 2.5])
def test_sampling_is_the_plain_loop_over_the_steps(eta, guidance_scale, key):
    labels = jnp.array([0, 2])
    pipe = pipeline()
    found = pipe(
        labels=labels, steps=5, eta=eta, guidance_scale=guidance_scale, key=key, output="latent"
    )
    keys = image_keys(key, jnp.arange(2))
    x_t = draw_noise(keys, SHAPE)
    rows = SAMPLER.rows(5, eta=eta)
    for i in range(5):
        row = {name: value[i] for name, value in rows.items()}
        prediction = pipe.predict(x_t, row["t"], labels, guidance_scale)
        x_t, _ = SAMPLER.step(row, (), x_t, prediction, draw_noise(keys, SHAPE, draw=i + 1))
    np.testing.assert_allclose(found, x_t, rtol=1e-5, atol=1e-5)


@pytest.mark.quick_cases("sampler0")
@pytest.mark.parametrize("sampler", [SAMPLER, DDPM(schedule=SAMPLER.schedule)])
def test_an_image_does_not_depend_on_the_batch(sampler, key):
    pipe = pipeline(sampler=sampler)
    eta = 1.0
    common = {"steps": 4, "eta": eta, "key": key, "guidance_scale": 1.5}
    labels = [2, 0, 1, 1]
    together = pipe(labels=labels, **common)
    alone = [pipe(labels=[c], start_index=i, **common)[0] for i, c in enumerate(labels)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-6, atol=1e-6)
    parts = pipe(labels=labels, batch_size=3, **common)
    np.testing.assert_allclose(together, parts, rtol=1e-6, atol=1e-6)


def test_images_of_one_run_differ(key):
    latents = pipeline()(labels=1, num_images=3, steps=4, key=key, output="latent")
    assert jnp.min(jnp.std(latents, axis=0)) > 0


def test_noise_differs_between_images_steps_and_keys(key):
    keys = image_keys(key, jnp.arange(3))
    draws = [draw_noise(keys, SHAPE, draw=i) for i in range(3)]
    draws.append(draw_noise(image_keys(jax.random.key(1), jnp.arange(3)), SHAPE))
    flat = np.stack(draws).reshape(12, -1)
    assert len(np.unique(flat)) == flat.size


def test_another_call_does_not_trace_again(key):
    network = Network()
    pipe = pipeline(network)
    pipe(labels=[0, 1], steps=4, key=key, guidance_scale=2.0)
    traced = len(network.batches)
    pipe(labels=[1, 1], steps=4, key=jax.random.key(1), guidance_scale=2.0)
    pipe(labels=[1, 1], steps=4, key=key, guidance_scale=7.5)
    pipe(labels=[1, 1], steps=4, key=key, guidance_scale=3, eta=1.0)
    pipe(labels=[1, 1], steps=4, guidance_scale=3.0, latents=jnp.ones((2, *SHAPE)))
    other = pipe.replace(params=jax.tree.map(lambda x: x + 1, PARAMS))
    other(labels=[1, 1], steps=4, key=key, guidance_scale=2.0)
    assert len(network.batches) == traced
    pipe(labels=[1, 1], steps=5, key=key, guidance_scale=2.0)
    assert len(network.batches) > traced


def test_another_step_table_does_not_trace_again(key):
    network = Network()
    pipe = pipeline(network, step_table=table("quant", {"dense": {"scale": jnp.ones(4)}}))
    one = pipe(labels=[0], steps=4, key=key)
    traced = len(network.batches)
    refitted = table("quant", {"dense": {"scale": jnp.full(4, 0.9, jnp.float32)}}, eta=0.0)
    two = pipe.replace(step_table=refitted)(labels=[0], steps=4, key=key)
    assert len(network.batches) == traced
    assert jnp.max(jnp.abs(one - two)) > 1e-3


def test_a_large_run_uses_one_program_for_all_its_parts(key):
    network = Network()
    images = pipeline(network)(labels=[0] * 7, steps=4, key=key, batch_size=3)
    assert images.shape == (7, *SHAPE)
    assert set(network.batches) == {3}
    traced = len(network.batches)
    pipeline(network)(labels=[0] * 3, steps=4, key=key, batch_size=3)
    assert len(network.batches) == traced


@pytest.mark.parametrize("guidance_scale", [None, 1, 1.0])
def test_without_guidance_the_unconditional_half_is_not_computed(guidance_scale, key):
    network = Network()
    pipe = pipeline(network)
    pipe(labels=[0, 1], steps=4, key=key, guidance_scale=guidance_scale)
    assert set(network.batches) == {2}
    pipe(labels=[0, 1], steps=4, key=key, guidance_scale=1.1)
    assert set(network.batches) == {2, 4}


@pytest.mark.parametrize("guidance_channels", [None, 1])
def test_guidance_moves_away_from_the_null_class(guidance_channels, key):
    network = WITH_VARIANCE
    x_t = jax.random.normal(key, (2, *SHAPE))
    labels, t = jnp.array([1, 2]), jnp.array(50)
    variables = {"params": PARAMS}
    found = guided_prediction(
        network,
        variables,
        x_t,
        t,
        labels,
        jnp.array([3, 3]),
        guidance_scale=4.0,
        guidance_channels=guidance_channels,
    )
    t = jnp.full(2, 50)
    conditional = network(variables, x_t, t, labels)
    unconditional = network(variables, x_t, t, jnp.full(2, 3))
    guided = unconditional + 4.0 * (conditional - unconditional)
    c = guidance_channels or SHAPE[-1]
    np.testing.assert_allclose(found[..., :c], guided[..., :c], rtol=1e-6)
    np.testing.assert_array_equal(found[..., c:], conditional[..., c:])


def test_guidance_scale_zero_is_the_null_class(key):
    pipe = pipeline()
    common = {"steps": 4, "key": key}
    null = pipe(labels=[3, 3], **common)
    np.testing.assert_allclose(pipe(labels=[0, 1], guidance_scale=0.0, **common), null, atol=1e-6)


def test_without_labels_the_null_class_is_drawn(key):
    pipe = pipeline()
    np.testing.assert_array_equal(pipe(steps=4, key=key), pipe(labels=3, steps=4, key=key))


def test_a_network_without_classes_needs_no_labels(key):
    images = pipeline(null_label=None, num_labels=None)(num_images=2, steps=4, key=key)
    assert images.shape == (2, *SHAPE)


def test_learned_variance_reaches_the_sampler_and_not_the_prediction(key):
    sampler = DDPM(schedule=SAMPLER.schedule, variance_type="learned_range", clip_sample=False)
    learned = pipeline(WITH_VARIANCE, sampler)
    fixed = pipeline(PLAIN, DDPM(schedule=SAMPLER.schedule, clip_sample=False))
    x_t = jnp.ones((1, *SHAPE))
    np.testing.assert_array_equal(learned.predict(x_t, 5, 0), fixed.predict(x_t, 5, 0))
    one = learned(labels=0, steps=4, key=key, output="latent")
    assert jnp.max(jnp.abs(one - fixed(labels=0, steps=4, key=key, output="latent"))) > 1e-3
    ddim = pipeline(WITH_VARIANCE)(labels=0, steps=4, key=key)
    np.testing.assert_array_equal(ddim, pipeline()(labels=0, steps=4, key=key))


def test_latents_replace_the_noise(key):
    latents = draw_noise(image_keys(key, jnp.arange(2)), SHAPE)
    pipe = pipeline()
    drawn = pipe(labels=[0, 1], steps=4, key=key)
    np.testing.assert_array_equal(drawn, pipe(labels=[0, 1], steps=4, latents=latents))
    assert not np.allclose(drawn, pipe(labels=[0, 1], steps=4, latents=latents + 1))


@pytest.mark.parametrize("batch_size", [64, 2])
def test_trajectory_holds_every_step(batch_size, key):
    pipe = pipeline(WITH_VARIANCE)
    labels = jnp.array([0, 1, 2])
    x_0, trajectory = pipe(
        labels=labels,
        steps=4,
        guidance_scale=2.0,
        key=key,
        output="latent",
        return_trajectory=True,
        batch_size=batch_size,
    )
    assert trajectory.x_t.shape == trajectory.prediction.shape == (4, 3, *SHAPE)
    rows = SAMPLER.rows(4)
    x_T = draw_noise(image_keys(key, jnp.arange(3)), SHAPE)
    np.testing.assert_array_equal(trajectory.x_t[0], x_T)
    for i in range(4):
        predicted = pipe.predict(trajectory.x_t[i], rows["t"][i], labels, 2.0)
        np.testing.assert_allclose(trajectory.prediction[i], predicted, rtol=1e-5, atol=1e-5)
    row = {name: value[3] for name, value in rows.items()}
    last, _ = SAMPLER.step(row, (), trajectory.x_t[3], trajectory.prediction[3], 0 * x_T)
    np.testing.assert_allclose(x_0, last, rtol=1e-5, atol=1e-5)


def test_rows_of_the_step_table_reach_the_network_as_collections(key):
    scale, time = jnp.array([0.5, 1.0, 2.0, 0.1]), jnp.array([0.0, 0.3, 0.0, -1.0])
    quantized = table("quant", {"dense": {"scale": scale}}).with_entry("time", time, key=TableKey())
    pipe = pipeline(step_table=quantized)
    _, trajectory = pipe(labels=[1], steps=4, key=key, return_trajectory=True)
    for i, t in enumerate(SAMPLER.timesteps(4)):
        plain = pipeline().predict(trajectory.x_t[i], t, [1])
        expected = plain * scale[i] + time[i]
        np.testing.assert_allclose(trajectory.prediction[i], expected, rtol=1e-5, atol=1e-5)
        row = quantized.row(i)
        found = pipe.predict(trajectory.x_t[i], t, [1], row=row)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_correction_recovers_the_float_images(key):
    # A network whose answer is off by k times itself and a constant, and the table that says so.
    k, mu = jnp.array([0.3, 0.2, 0.1, 0.05]), jnp.tile(jnp.array([0.2, -0.1]), (4, 1))

    def noisy(variables, x_t, t, labels):
        prediction = PLAIN(variables, x_t, t, labels)
        k_t = jnp.interp(t.astype(jnp.float32), jnp.array([0.0, 25, 50, 75]), k[::-1])
        return (1 + k_t[:, None, None, None]) * prediction + mu[0]

    correction = {"k": k, "mu": mu, "variance": jnp.zeros(4)}
    common = {"labels": [0, 1], "steps": 4, "key": key, "eta": 1.0, "output": "latent"}
    float_images = pipeline()(**common)
    corrected = pipeline(noisy, step_table=table("noise_correction", correction))(**common)
    np.testing.assert_allclose(corrected, float_images, rtol=1e-4, atol=1e-4)
    assert jnp.max(jnp.abs(pipeline(noisy)(**common) - float_images)) > 0.1


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"steps": 5}, "timesteps were .75, 50, 25, 0., the run has .80, 60, 40, 20, 0."),
        ({"eta": 1.0}, "eta was 0.0, the run has 1.0"),
        ({"guidance_scale": 3.0}, "guidance_scale was 1.0, the run has 3.0"),
    ],
)
def test_a_step_table_of_other_settings_raises(run, message, key):
    pipe = pipeline(method="w4a8")
    fitted = StepTable().with_entry(
        "quant", {"dense": {"scale": jnp.ones(4)}}, key=pipe.table_key(steps=4)
    )
    pipe = pipe.replace(step_table=fitted)
    pipe(labels=[0], steps=4, key=key)
    with pytest.raises(ValueError, match=message):
        pipe(**{"labels": [0], "steps": 4, "key": key, **run})
    with pytest.raises(ValueError, match="method was 'w4a8', the run has 'w8a8'"):
        pipe.replace(method="w8a8")(labels=[0], steps=4, key=key)
    with pytest.raises(ValueError, match="sampler was 'ddim', the run has 'ddpm'"):
        pipe.replace(sampler=DDPM(schedule=SAMPLER.schedule))(labels=[0], steps=4, key=key)


def test_a_linen_model_is_a_denoiser(key):
    class Denoiser(nn.Module):
        @nn.compact
        def __call__(self, x_t, t, labels):
            return nn.Conv(2, (3, 3))(x_t) + nn.Embed(4, 2)(labels)[:, None, None]

    model = Denoiser()
    params = model.init(key, jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    pipe = Pipeline.from_apply(model.apply, params["params"], SAMPLER, SHAPE, num_labels=4)
    images = pipe(labels=[0, 3], steps=3, key=key)
    assert images.shape == (2, *SHAPE) and np.all(np.isfinite(images))
    alone = pipe(labels=[3], steps=3, key=key, start_index=1)
    np.testing.assert_allclose(images[1:], alone, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_network_is_sampled_in_float32(key):
    def half(variables, x_t, t, labels):
        return x_t.astype(jnp.bfloat16)

    latents = pipeline(half)(labels=0, steps=4, key=key, output="latent")
    assert latents.dtype == jnp.float32


def test_sample_is_differentiable_in_the_parameters(key):
    keys = image_keys(key, jnp.arange(2))
    x_T = draw_noise(keys, SHAPE)
    network = Network()

    def loss(gain):
        params = {**PARAMS, "gain": gain}
        x_0, _ = sample(network, params, SAMPLER, SAMPLER.rows(4), x_T, keys=keys)
        return jnp.mean(x_0**2)

    slope, width = jax.grad(loss)(0.7), 1e-2
    measured = (loss(0.7 + width) - loss(0.7 - width)) / (2 * width)
    np.testing.assert_allclose(slope, measured, rtol=1e-2)


def test_replace_leaves_the_original_as_it_was():
    pipe = pipeline(source=Source(model="DiT", config={"depth": 2}, name="tiny"))
    other = pipe.replace(method="w4a8", params={})
    assert other.source is pipe.source and other.params == {}
    assert pipe.method is None and pipe.params is PARAMS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"output": "pixels"}, ValueError, "'image', 'latent'.*'pixels'"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"start_index": -1}, ValueError, "start_index=-1"),
        ({"labels": None, "guidance_scale": 2.0}, ValueError, "guidance needs labels"),
        ({"labels": [0, 4, -1]}, ValueError, r"between 0 and 2; got \[-1, 4\]"),
        ({"labels": [0.5]}, TypeError, "integers.*float"),
        ({"labels": [[0]]}, TypeError, "integers, one or one per image"),
        ({"labels": []}, ValueError, "'labels': 0"),
        ({"labels": [0], "num_images": 2}, ValueError, "'num_images': 2, 'labels': 1"),
        ({"latents": np.zeros((1, 4, 4, 3))}, ValueError, r"\[b, 4, 4, 2\]; got \(1, 4, 4, 3\)"),
        ({"key": None}, ValueError, "noise needs a key"),
        ({"key": None, "latents": np.zeros((1, *SHAPE)), "eta": 0.5}, ValueError, "needs a key"),
        ({"key": 0}, TypeError, "got int. Use jax.random.key"),
        ({"steps": 101}, ValueError, "steps=101"),
    ],
)
def test_arguments_outside_the_rules_raise(arguments, error, message, key):
    with pytest.raises(error, match=message):
        pipeline()(**{"labels": [0], "steps": 4, "key": key, **arguments})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sampler": "ddim"}, TypeError, "got str. Use DDIM"),
        ({"guidance_channels": 3}, ValueError, r"guidance_channels=3, shape=\(4, 4, 2\)"),
        ({"shape": (4, 4)}, ValueError, r"got \(4, 4\)"),
    ],
)
def test_fields_outside_the_rules_raise(fields, error, message):
    with pytest.raises(error, match=message):
        pipeline().replace(**fields)


def test_a_model_of_classes_without_a_null_class_says_what_it_needs(key):
    pipe = pipeline(null_label=None, num_labels=3)
    with pytest.raises(ValueError, match="needs labels; got labels=None"):
        pipe(steps=4, key=key)
    with pytest.raises(ValueError, match="null_label=None"):
        pipe(labels=[0], steps=4, key=key, guidance_scale=2.0)


def test_a_network_of_another_shape_raises(key):
    wrong = lambda variables, x_t, t, labels: x_t[..., :1]
    with pytest.raises(ValueError, match=r"got \(1, 4, 4, 1\) for x_t of \(1, 4, 4, 2\)"):
        pipeline(wrong)(labels=0, steps=4, key=key)


def test_predict_with_a_step_table_needs_a_row():
    pipe = pipeline(step_table=table("quant", {"dense": {"scale": jnp.ones(4)}}))
    with pytest.raises(ValueError, match="row=None"):
        pipe.predict(jnp.ones((1, *SHAPE)), 5, 0)
