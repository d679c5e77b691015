"""Train the zoo: `python -m qjax.zoo.train fashion-dit --out runs/fashion-dit`.

What each model minimises is in `losses.py`. The weights that ship are an exponential moving
average. The batch and the noise of a step depend on the seed and the step's number alone, so
a run that was interrupted goes on where it stopped, from the last checkpoint under `--out`.
The latent models need the autoencoder: `fashion-vae` comes before `fashion-ldm`.
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
from qjax.models.autoencoder_kl import AutoencoderKL
from qjax.models.features import FeatureNet
from qjax.zoo.data import DEFAULT_FOLDER, fashion_mnist, to_float
from qjax.zoo.latents import draw_latents, encode_images, load_autoencoder
from qjax.zoo.losses import Loss, autoencoder_loss, classifier_loss, diffusion_loss
from qjax.zoo.models import PREDICTION_TYPES, SCHEDULE, build


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
    "fashion-vae": TrainConfig(steps=2500, batch=64, learning_rate=2e-3, ema=0.998),
    "fashion-ldm": TrainConfig(steps=4000, learning_rate=1.5e-3),
    "fashion-ldm-v": TrainConfig(steps=2500, learning_rate=1.5e-3),
    "fashion-features": TrainConfig(steps=3000, learning_rate=2e-3, ema=0.998),
}


ZOO = Path(__file__).parent
AUTOENCODER = ZOO / "fashion-ldm" / "vae"


class State(NamedTuple):
    """What training carries from one step to the next."""

    step: Array
    params: Params
    ema: Params
    optimizer: Any


class Task(NamedTuple):
    """A model, its first weights, what it minimises and what it learns from."""

    model: nn.Module
    params: Params
    loss: Loss
    data: Array


def make_task(
    name: str, config: TrainConfig, images: np.ndarray, *, autoencoder: Path | None = None
) -> Task:
    """The task `name` on images given as bytes.

    Args:
      name: A model of the zoo.
      config: Settings.
      images: The training images.
      autoencoder: Folder of the trained autoencoder, for the latent models.
    """
    model, key = build(name), jax.random.key(config.seed)
    first = to_float(jnp.asarray(images[:1]))
    nothing = jnp.zeros((1,), jnp.int32)
    if isinstance(model, FeatureNet):
        params = model.init(key, first)["params"]
        return Task(model, params, classifier_loss(model), jnp.asarray(images))
    if isinstance(model, AutoencoderKL):
        params = model.init(key, first)["params"]
        return Task(model, params, autoencoder_loss(model), jnp.asarray(images))
    draw: Callable[[PRNGKeyArray, Array], Array] = lambda key, batch: to_float(batch)
    data = images
    if name in PREDICTION_TYPES:
        assert autoencoder is not None
        data, draw = encode_images(*load_autoencoder(autoencoder), images), draw_latents
        first = draw_latents(key, jnp.asarray(data[:1]))
    loss = diffusion_loss(
        model,
        SCHEDULE,
        draw=draw,
        label_dropout=config.label_dropout,
        prediction_type=PREDICTION_TYPES.get(name, "epsilon"),
    )
    params = model.init(key, first, nothing, nothing)["params"]
    return Task(model, params, loss, jnp.asarray(data))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, config: TrainConfig):
    """The jitted function `(state, images, labels, key) -> (state, loss)`.

    The whole data set is an argument; the batch is drawn inside, from the step's number.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, data: Array, labels: Array, key: PRNGKeyArray):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        index = jax.random.randint(batch_key, (config.batch,), 0, data.shape[0])
        value, gradient = jax.value_and_grad(loss)(
            state.params, loss_key, data[index], labels[index]
        )
        update, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, update)
        number = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema, (1 + number) / (10 + number))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        return State(state.step + 1, params, ema, optimizer_state), value

    return step


def train(
    name: str,
    *,
    out: Path,
    config: TrainConfig,
    folder: Path = DEFAULT_FOLDER,
    autoencoder: Path = AUTOENCODER,
) -> tuple[nn.Module, Params]:
    """Train the zoo model `name` and return its module and averaged weights.

    Writes a checkpoint under `out` every `checkpoint_every` steps and one JSON line to
    `out/log.jsonl` every 100; starts from the newest checkpoint found there.
    """
    images, classes = fashion_mnist("train", folder=folder)
    key, labels = jax.random.key(config.seed), jnp.asarray(classes)
    model, params, loss, data = make_task(name, config, images, autoencoder=autoencoder)

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
                state, value = step(state, data, labels, key)
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
    parser.add_argument(
        "--autoencoder", type=Path, default=AUTOENCODER, help="its folder, for the latent models"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps (default: as shipped)")
    parser.add_argument("--batch", type=int, help="images a step (default: as shipped)")
    parser.add_argument("--publish", type=Path, help="folder to write the model into")
    args = parser.parse_args()
    changes = {key: getattr(args, key) for key in ("steps", "batch") if getattr(args, key)}
    config = dataclasses.replace(RUNS[args.name], **changes)
    args.out.mkdir(parents=True, exist_ok=True)
    model, params = train(
        args.name, out=args.out, config=config, folder=args.data, autoencoder=args.autoencoder
    )
    from qjax.zoo.publish import publish

    default = AUTOENCODER if args.name == "fashion-vae" else ZOO / args.name
    folder = args.publish or default
    publish(args.name, model, params, folder, data=args.data, autoencoder=args.autoencoder)


if __name__ == "__main__":
    main()
