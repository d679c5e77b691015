"""What the zoo's models minimise: functions `(params, key, batch, labels) -> loss`.

The denoisers are given noisy samples `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise`
with t stratified over the batch, and labels of which one in ten is replaced by the null
class, so that one net learns both predictions that guidance needs; the loss is the mean
squared error of the prediction. The autoencoder's is

    mean |x - decoder(z)| + mean (x - decoder(z))^2 + beta mean KL(q(z | x) || N(0, 1))

References:
  Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239,
  algorithm 1; Ho and Salimans, Classifier-Free Diffusion Guidance, 2022,
  https://arxiv.org/abs/2207.12598, algorithm 1; Kingma and Welling, 2014,
  https://arxiv.org/abs/1312.6114, appendix B; Salimans and Ho, 2022,
  https://arxiv.org/abs/2202.00512 (v-prediction).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from qjax.core.typing import Array, Params, PRNGKeyArray
from qjax.models.autoencoder_kl import AutoencoderKL
from qjax.models.features import FeatureNet
from qjax.models.schedules import Schedule
from qjax.zoo.data import to_float
from qjax.zoo.models import NULL_LABEL

Loss = Callable[[Params, PRNGKeyArray, Array, Array], Array]

KL_WEIGHT = 1e-3


def diffusion_loss(
    model: nn.Module,
    schedule: Schedule,
    *,
    draw: Callable[[PRNGKeyArray, Array], Array],
    label_dropout: float,
    prediction_type: str = "epsilon",
) -> Loss:
    """Mean squared error of a denoiser's prediction.

    Args:
      model: Called with `x_t`, `t` and labels.
      schedule: Noise schedule.
      draw: `draw(key, batch)`: the clean samples of a batch of stored ones.
      label_dropout: Share of labels replaced by the null class, 0 to 1.
      prediction_type: What the model answers.
    """

    def loss(params: Params, key: PRNGKeyArray, batch: Array, labels: Array) -> Array:
        t_key, noise_key, drop_key, draw_key = jax.random.split(key, 4)
        b = batch.shape[0]
        strata = (jnp.arange(b, dtype=jnp.float32) + jax.random.uniform(t_key, (b,))) / b
        t = jnp.floor(strata * schedule.num_train_timesteps).astype(jnp.int32)
        x_0 = draw(draw_key, batch)
        noise = jax.random.normal(noise_key, x_0.shape)
        dropped = jax.random.bernoulli(drop_key, label_dropout, (b,))
        labels = jnp.where(dropped, NULL_LABEL, labels)
        prediction = jnp.asarray(
            model.apply({"params": params}, schedule.add_noise(x_0, noise, t), t, labels)
        )
        target = schedule.target(x_0, noise, t, prediction_type=prediction_type)
        return jnp.mean(jnp.square(prediction - target))

    return loss


def autoencoder_loss(model: AutoencoderKL) -> Loss:
    """Absolute and squared error of the decoded image, and the divergence of the latents."""

    def loss(params: Params, key: PRNGKeyArray, images: Array, labels: Array) -> Array:
        flip_key, sample_key = jax.random.split(key)
        flipped = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
        x = to_float(jnp.where(flipped, images[:, :, ::-1], images))
        posterior: Any = model.apply({"params": params}, x, method="encode")
        z = posterior.sample(key=sample_key)
        error = jnp.asarray(model.apply({"params": params}, z, method="decode")) - x
        mean, log_variance = posterior.mean, posterior.log_variance
        divergence = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
        fit = jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(error))
        return fit + KL_WEIGHT * 0.5 * jnp.mean(divergence)

    return loss


def classifier_loss(model: FeatureNet) -> Loss:
    """Cross-entropy on images that are mirrored, shifted by up to two pixels, a little noisy."""

    def loss(params: Params, key: PRNGKeyArray, images: Array, labels: Array) -> Array:
        flip_key, shift_key, noise_key = jax.random.split(key, 3)
        flipped = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
        shift = jax.random.randint(shift_key, (2,), -2, 3)
        x = jnp.where(flipped, images[:, :, ::-1], images)
        x = jnp.roll(to_float(x), shift, axis=(1, 2)) / 2 + 0.5
        x = x + 0.02 * jax.random.normal(noise_key, x.shape)
        logits, _ = model.apply({"params": params}, x)
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
        return jnp.mean(optax.softmax_cross_entropy(logits, smooth))

    return loss
