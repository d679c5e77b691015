"""Train the zoo: `python -m qjax.zoo.train fashion-dit --out runs/fashion-dit`.

Diffusion models minimise the mean squared error of the predicted noise,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise,

with t stratified over the batch and the label replaced by the null class in one case of
ten, so that one net gives the conditional and the unconditional prediction that guidance
needs. The weights that ship are an exponential moving average. The batch and the noise of
a step depend on the seed and the step's number alone, so a run that was interrupted goes on
where it stopped, from the last checkpoint under `--out`.

References:
  Ho et al., Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239,
  algorithm 1; Ho and Salimans, Classifier-Free Diffusion Guidance, 2022,
  https://arxiv.org/abs/2207.12598, algorithm 1.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from rich.progress import Progress

from qjax.core.typing import Array, Params, PRNGKeyArray
from qjax.models.features import FeatureNet, FeatureNetConfig
from qjax.zoo.data import DEFAULT_FOLDER, fashion_mnist, to_float
from qjax.zoo.models import NULL_LABEL, SCHEDULE, build


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
      steps: Optimizer steps.
      batch: Images a step.
      learning_rate: Peak, after a linear warm-up of `warmup` steps; cosine decay to zero.
      warmup: Steps of warm-up, but no more than half of all.
      ema: Decay of the moving average of the weights, once past its own warm-up.
      label_dropout: Share of labels replaced by the null class.
      seed: Of the initial weights, the batches and the noise.
      checkpoint_every: Steps from one checkpoint to the next; changes nothing of the result.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: int = 300
    ema: float = 0.999
    label_dropout: float = 0.1
    seed: int = 0
    checkpoint_every: int = 500


RUNS = {
    "fashion-dit": TrainConfig(steps=4500, learning_rate=1.5e-3),
    "fashion-unet": TrainConfig(steps=10000, batch=64, learning_rate=2e-3),
    "fashion-features": TrainConfig(steps=3000, learning_rate=2e-3, ema=0.998),
}


class State(NamedTuple):
    """What training carries from one step to the next."""

    step: Array
    params: Params
    ema: Params
    optimizer: Any


Loss = Callable[[Params, PRNGKeyArray, Array, Array], Array]


def diffusion_loss(model: nn.Module, alpha_bar: Array, config: TrainConfig) -> Loss:
    """Mean squared error of the predicted noise on a batch of bytes and labels."""

    def loss(params: Params, key: PRNGKeyArray, images: Array, labels: Array) -> Array:
        t_key, noise_key, drop_key = jax.random.split(key, 3)
        b = images.shape[0]
        strata = (jnp.arange(b, dtype=jnp.float32) + jax.random.uniform(t_key, (b,))) / b
        t = jnp.floor(strata * alpha_bar.size).astype(jnp.int32)
        a = alpha_bar[t][:, None, None, None]
        noise = jax.random.normal(noise_key, images.shape)
        x_t = jnp.sqrt(a) * to_float(images) + jnp.sqrt(1 - a) * noise
        dropped = jax.random.bernoulli(drop_key, config.label_dropout, (b,))
        labels = jnp.where(dropped, NULL_LABEL, labels)
        prediction = jnp.asarray(model.apply({"params": params}, x_t, t, labels))
        return jnp.mean(jnp.square(prediction - noise))

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


def make_step(loss: Loss, optimizer: optax.GradientTransformation, config: TrainConfig):
    """The jitted function `(state, images, labels, key) -> (state, loss)`.

    The whole data set is an argument; the batch is drawn inside, from the step's number.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, images: Array, labels: Array, key: PRNGKeyArray):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        index = jax.random.randint(batch_key, (config.batch,), 0, images.shape[0])
        value, gradient = jax.value_and_grad(loss)(
            state.params, loss_key, images[index], labels[index]
        )
        update, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, update)
        number = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema, (1 + number) / (10 + number))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        return State(state.step + 1, params, ema, optimizer_state), value

    return step


def train(
    name: str, *, out: Path, config: TrainConfig, folder: Path = DEFAULT_FOLDER
) -> tuple[nn.Module, Params]:
    """Train the zoo model `name` and return its module and averaged weights.

    Writes a checkpoint under `out` every `checkpoint_every` steps and one JSON line to
    `out/log.jsonl` every 100; starts from the newest checkpoint found there.
    """
    images, labels = (jnp.asarray(a) for a in fashion_mnist("train", folder=folder))
    key = jax.random.key(config.seed)
    if name == "fashion-features":
        classifier = FeatureNet(FeatureNetConfig())
        model: nn.Module = classifier
        loss = classifier_loss(classifier)
        params = model.init(key, to_float(images[:1]))["params"]
    else:
        model = build(name)
        loss = diffusion_loss(model, jnp.asarray(SCHEDULE.alpha_bar, jnp.float32), config)
        params = model.init(
            key, to_float(images[:1]), jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32)
        )["params"]

    warmup = min(config.warmup, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01)
    )
    state = State(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    step = make_step(loss, optimizer, config)

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
        with Progress() as progress, open(out / "log.jsonl", "a") as log:
            bar = progress.add_task(name, total=config.steps, completed=int(state.step))
            start, recent = time.monotonic(), []
            while (number := int(state.step)) < config.steps:
                state, value = step(state, images, labels, key)
                recent.append(value)
                progress.advance(bar)
                if (number + 1) % 100 == 0:
                    record = {
                        "step": number + 1,
                        "loss": round(float(np.mean(recent)), 5),
                        "seconds": round(time.monotonic() - start, 1),
                    }
                    print(json.dumps(record), file=log, flush=True)
                    progress.update(bar, description=f"{name} loss {record['loss']:.4f}")
                    recent = []
                if (number + 1) % config.checkpoint_every == 0:
                    manager.save(number + 1, args=ocp.args.StandardSave(state))
    return model, state.ema


def main() -> None:
    """The command line: train one model and write it into the zoo's folder."""
    parser = argparse.ArgumentParser(description="Train one model of the zoo.")
    parser.add_argument("name", choices=sorted(RUNS))
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of idx files")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as shipped)")
    parser.add_argument("--batch", type=int, help="images a step (default: as shipped)")
    parser.add_argument("--publish", type=Path, help="folder to write the model into")
    args = parser.parse_args()
    changes = {key: getattr(args, key) for key in ("steps", "batch") if getattr(args, key)}
    config = dataclasses.replace(RUNS[args.name], **changes)
    args.out.mkdir(parents=True, exist_ok=True)
    model, params = train(args.name, out=args.out, config=config, folder=args.data)
    from qjax.zoo.publish import publish

    folder = args.publish or Path(__file__).parent / args.name
    publish(args.name, model, params, folder, data=args.data)


if __name__ == "__main__":
    main()
