"""Sampling as pure functions: from noise to clean samples in one scan.

The scan's inputs are the rows of the sampler and of the step table, so that whatever varies
with the step is data. What is fixed, the network and the sampler's settings, is static.

Classifier-free guidance (Ho and Salimans, https://arxiv.org/abs/2207.12598) evaluates both
halves in one batch, `[labels; null_labels]`, and takes

    prediction = unconditional + guidance_scale (conditional - unconditional)

on the first `guidance_channels` channels of the sample (all of them if None; the reference
code of DiT guides 3 of 4). Other channels, and those of a learned variance, are the
conditional half's. A large scale widens the prediction; `guidance_rescale` takes it part of
the way back to the standard deviation of the conditional half, image by image (Lin et al.,
https://arxiv.org/abs/2305.08891, equations 14 to 16).

Labels are classes `[b]`, or whatever else the network is told: any tree of arrays with the
batch first, the embeddings of texts for example.

Image i of a run has the key `fold_in(key, i)` to itself, so it does not depend on how many
are drawn with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qjax.core.typing import Apply, Array, Float, Int, Params, PRNGKeyArray
from qjax.models.mesh import on_each_device
from qjax.models.samplers import Row, Sampler, correct_prediction

__all__ = [
    "Trajectory",
    "draw_noise",
    "guided_prediction",
    "image_keys",
    "noise_jit",
    "sample",
    "sample_jit",
    "to_images",
]


class Trajectory(NamedTuple):
    """What a sampler went through, the steps in the sampler's order."""

    x_t: Float[Array, "s b h w c"]
    """The noisy sample that went into every step."""
    prediction: Float[Array, "s b h w c"]
    """The prediction that left it: guided, and corrected if the table has a correction."""


def image_keys(key: PRNGKeyArray, images: Int[Array, " b"]) -> PRNGKeyArray:
    """The key of every image, `[b]`, from the key of the run and the images' indices."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, images)


def draw_noise(
    keys: PRNGKeyArray, shape: tuple[int, ...], *, draw: int | Array = 0
) -> Float[Array, "b h w c"]:
    """Standard normal noise, each image's from its own key.

    Args:
      keys: Keys of the images, `[b]`, from `image_keys`.
      shape: Shape of one image.
      draw: 0 for `x_T`, `i + 1` for the noise of step i; may be traced.
    """

    def one(key):
        return jax.random.normal(jax.random.fold_in(key, draw), shape, jnp.float32)

    return jax.vmap(one)(keys)


def _noise_on(
    keys: PRNGKeyArray, shape: tuple[int, ...], *, mesh: Mesh | None = None
) -> Float[Array, "b h w c"]:
    return on_each_device(mesh, lambda _, keys: draw_noise(keys, shape), (), keys)


noise_jit = jax.jit(_noise_on, static_argnames=("shape", "mesh"))
"""`draw_noise` as one program, on a mesh with the images cut over it."""


def guided_prediction(
    apply: Apply,
    variables: Mapping[str, Any],
    x_t: Float[Array, "b h w c"],
    t: Array,
    labels: Any = None,
    null_labels: Any = None,
    *,
    guidance_scale: float | Array | None = None,
    guidance_rescale: float | Array | None = None,
    guidance_channels: int | None = None,
) -> Float[Array, "b h w c2"]:
    """The network's answer with classifier-free guidance, in float32.

    Args:
      apply: `apply(variables, x_t, t, labels)`, c channels or 2c with a learned variance.
      variables: Collections, `"params"` and what the step table adds.
      x_t: Noisy sample.
      t: Timestep, one for all or `[b]`.
      labels: What the network is told, the batch first; None for a network without.
      null_labels: The same for the unconditional half; needed with a guidance scale.
      guidance_scale: Weight of the guidance, may be traced; None evaluates the conditional
        half only.
      guidance_rescale: 0 for none to 1 for the conditional half's standard deviation, may be
        traced; None is 0 and costs nothing.
      guidance_channels: How many of the sample's channels are guided; None for all.

    Raises:
      ValueError: If `apply` returns another shape, or guidance lacks one of the labels.
    """
    b, *_, c = x_t.shape
    t = jnp.broadcast_to(t, (b,))
    if guidance_scale is None:
        return _answer(apply, variables, x_t, t, labels)
    if labels is None or null_labels is None:
        raise ValueError(
            f"guidance needs labels and null_labels; got labels={_brief(labels)}, "
            f"null_labels={_brief(null_labels)}. Leave guidance_scale at None."
        )
    twice = lambda first, second: jnp.concatenate([first, second])
    both = jax.tree.map(twice, labels, null_labels)
    answer = _answer(apply, variables, twice(x_t, x_t), twice(t, t), both)
    conditional, unconditional = jnp.split(answer, 2)
    channels = c if guidance_channels is None else guidance_channels
    difference = (conditional - unconditional)[..., :channels]
    guided = unconditional[..., :channels] + guidance_scale * difference
    if guidance_rescale is not None:
        wanted = jnp.std(conditional[..., :channels], axis=(1, 2, 3), keepdims=True)
        ratio = wanted / jnp.std(guided, axis=(1, 2, 3), keepdims=True)
        guided = guided * (guidance_rescale * ratio + 1 - guidance_rescale)
    return jnp.concatenate([guided, conditional[..., channels:]], axis=-1)


def _answer(apply: Apply, variables, x_t, t, labels) -> Array:
    answer = apply(variables, x_t, t, labels)
    c = x_t.shape[-1]
    if answer.shape[:-1] != x_t.shape[:-1] or answer.shape[-1] not in (c, 2 * c):
        raise ValueError(
            f"apply must return the shape of x_t, or twice its channels with a learned "
            f"variance; got {answer.shape} for x_t of {x_t.shape}."
        )
    return answer.astype(jnp.float32)


def sample(
    apply: Apply,
    params: Params,
    sampler: Sampler,
    rows: Row,
    x_T: Float[Array, "b h w c"],
    labels: Any = None,
    null_labels: Any = None,
    *,
    keys: PRNGKeyArray,
    entries: Mapping[str, Any] | None = None,
    guidance_scale: float | Array | None = None,
    guidance_rescale: float | Array | None = None,
    guidance_channels: int | None = None,
    return_trajectory: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "b h w c"], Trajectory | None]:
    """The clean samples that `sampler` makes of `x_T`; pure, one scan over the rows.

    Args:
      apply: The denoiser, as `guided_prediction` calls it.
      params: Its parameters.
      sampler: Whose `rows` and `step` are used.
      rows: `sampler.rows(steps, eta=eta)`.
      x_T: Standard normal noise to begin with; multiplied by the rows' `init_scale`, if the
        sampler has one.
      labels: What the network is told, as for `guided_prediction`.
      null_labels: As there, like all that is about guidance.
      keys: The images' keys, `[b]`, for the noise of the steps.
      entries: Entries of a step table with as many rows. `"noise_correction"` goes to
        `correct_prediction`; every other one is a variable collection of its own name.
      guidance_scale: As there.
      guidance_rescale: As there.
      guidance_channels: As there.
      return_trajectory: Whether all samples and predictions are kept.
      mesh: Each of its devices draws its part of the batch, which is a multiple of their number;
        within a `jax.jit`, and what is given lies there already.

    Returns:
      The samples, and the trajectory or None.
    """

    def draw(whole: Any, split: Any) -> tuple[Array, Trajectory | None]:
        params, rows, entries, scale, rescale = whole
        x_T, labels, null_labels, keys = split
        shape = x_T.shape[1:]
        if "init_scale" in rows:
            x_T = x_T * rows["init_scale"][0]

        def body(carry, inputs):
            x_t, state = carry
            i, row, table = inputs
            collections = {k: v for k, v in table.items() if k != "noise_correction"}
            prediction = guided_prediction(
                apply,
                {"params": params, **collections},
                x_t,
                row["t"],
                labels,
                null_labels,
                guidance_scale=scale,
                guidance_rescale=rescale,
                guidance_channels=guidance_channels,
            )
            if "noise_correction" in table:
                row, prediction = correct_prediction(table["noise_correction"], row, prediction)
            noise = draw_noise(keys, shape, draw=i + 1)
            x_prev, state = sampler.step(row, state, x_t, prediction, noise)
            kept = Trajectory(x_t, prediction[..., : shape[-1]]) if return_trajectory else None
            return (x_prev, state), kept

        inputs = (jnp.arange(len(rows["t"])), rows, entries)
        (x_0, _), trajectory = jax.lax.scan(body, (x_T, sampler.init(x_T)), inputs)
        return x_0, trajectory

    whole = (params, dict(rows), dict(entries or {}), guidance_scale, guidance_rescale)
    return on_each_device(mesh, draw, whole, (x_T, labels, null_labels, keys), axes=(0, 1))


sample_jit = jax.jit(
    sample,
    static_argnames=("apply", "sampler", "guidance_channels", "return_trajectory", "mesh"),
)
"""`sample` as one program, compiled for every static argument and shape."""


def to_images(x_0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Images in [0, 1] from samples in [-1, 1]; what lies outside is clipped."""
    return (jnp.clip(x_0, -1, 1) + 1) / 2


def _brief(value: Any) -> str:
    leaves = jax.tree.leaves(value)
    return f"arrays of {', '.join(str(np.shape(leaf)) for leaf in leaves)}" if leaves else "None"
