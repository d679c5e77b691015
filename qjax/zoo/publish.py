"""Write trained weights into the zoo, in the file layout of diffusers.

A diffusion model becomes a folder with `model_index.json`, the denoiser's `config.json` and
safetensors in float16, and the scheduler's config: diffusers' own classes read all three.
`zoo.json` adds what they have no place for, the labels and the null class. The classifier
becomes a config, its weights and the statistics of its features on real images.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from qjax.core.metrics import feature_statistics, frechet_distance
from qjax.core.safetensors_io import write_tensors
from qjax.core.typing import Array, Params
from qjax.models.convert import save_component
from qjax.models.dit import DiT
from qjax.models.dit_keys import diffusers_keys
from qjax.models.features import FeatureNet, penultimate
from qjax.models.unet2d import UNet2DModel
from qjax.models.unet2d_keys import checkpoint_keys
from qjax.zoo.data import CLASSES, DEFAULT_FOLDER, fashion_mnist, to_float
from qjax.zoo.models import NULL_LABEL, SAMPLER

REFERENCE_BATCH = 1000


def publish(
    name: str, model: nn.Module, params: Params, folder: Path, *, data: Path = DEFAULT_FOLDER
) -> None:
    """Write the model `name` into `folder`.

    Args:
      name: Its name in the zoo.
      model: A DiT, a UNet2DModel or a FeatureNet.
      params: Its trained weights.
      folder: Created if need be.
      data: Folder of the idx files, whose test set the classifier is judged on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, FeatureNet):
        _publish_features(model, params, folder, data)
        return
    if isinstance(model, DiT):
        component, table = "transformer", diffusers_keys(model.config)
    elif isinstance(model, UNet2DModel):
        component, table = "unet", checkpoint_keys(model.config)
    else:
        raise TypeError(f"The zoo holds DiT, UNet2DModel and FeatureNet; got {type(model)}.")
    config = model.config.to_diffusers()
    save_component(folder / component, config, params, table, dtype=np.float16)
    index = {
        "_class_name": "Pipeline",
        component: ["diffusers", config["_class_name"]],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    _write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", SAMPLER.to_diffusers())
    record = {"name": name, "labels": list(CLASSES), "null_label": NULL_LABEL}
    record["license"] = "Apache-2.0"
    record["data"] = "Fashion-MNIST (Zalando, MIT)"
    _write_json(folder / "zoo.json", record)


def _publish_features(model: FeatureNet, params: Params, folder: Path, data: Path) -> None:
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    tensors = {key: np.asarray(value, np.float16) for key, value in flat.items()}
    stored = jax.tree.map(lambda a: jnp.asarray(a, jnp.float16).astype(jnp.float32), params)
    _write_json(folder / "config.json", dataclasses.asdict(model.config))
    write_tensors(folder / "features.safetensors", tensors, {"format": "qjax"})

    images, labels = fashion_mnist("test", folder=data)
    predicted, features = features_of(model, stored, images)
    accuracy = float(np.mean(predicted == labels))
    order = np.random.default_rng(0).permutation(len(labels))
    half_a, half_b = np.array_split(features[order], 2)
    halves = frechet_distance(half_a, half_b)
    statistics = {"test": feature_statistics(features)}
    for label in range(len(CLASSES)):
        statistics[f"test_class_{label}"] = feature_statistics(features[labels == label])
    arrays = {}
    for key, value in statistics.items():
        arrays[f"{key}/mean"] = value.mean.astype(np.float32)
        arrays[f"{key}/cov"] = value.cov.astype(np.float32)
        arrays[f"{key}/n"] = np.asarray([value.n], np.int64)
    write_tensors(folder / "reference.safetensors", arrays, {"format": "qjax"})
    record = {
        "name": "fashion-features",
        "test_accuracy": round(accuracy, 4),
        "fd_between_real_halves": round(halves.value, 4),
        "fd_between_real_halves_n": len(half_a),
        "labels": list(CLASSES),
    }
    _write_json(folder / "zoo.json", record)


def features_of(
    model: FeatureNet, params: Params, images: Array | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes and float64 features of images given as bytes."""
    net = jax.jit(lambda x: penultimate(params, model.config, x))
    predicted, features = [], []
    for start in range(0, len(images), REFERENCE_BATCH):
        batch = jnp.asarray(images[start : start + REFERENCE_BATCH])
        classes, values = net(to_float(batch) / 2 + 0.5)
        predicted.append(np.asarray(classes))
        features.append(np.asarray(values, np.float64))
    return np.concatenate(predicted), np.concatenate(features)


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
