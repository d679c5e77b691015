"""Write trained weights into the zoo, in the file layout of diffusers.

A diffusion model becomes a folder with `model_index.json`, the denoiser's `config.json` and
safetensors in float16, and the scheduler's config: diffusers' own classes read all three.
`zoo.json` adds what they have no place for, the labels and the null class. The classifier
becomes a config, its weights and the statistics of its features on real images. The
autoencoder is one component, and every latent model has its own copy.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from qjax.core.metrics import feature_statistics, frechet_distance
from qjax.core.safetensors_io import write_tensors
from qjax.core.typing import Array, Params
from qjax.models import autoencoder_kl, class_embedder, unet2d_condition_keys, unet2d_keys
from qjax.models.autoencoder_kl import AutoencoderKL
from qjax.models.convert import Target, save_component
from qjax.models.dit import DiT
from qjax.models.dit_keys import diffusers_keys
from qjax.models.features import FeatureNet, penultimate
from qjax.models.unet2d import UNet2DModel
from qjax.zoo.data import CLASSES, DEFAULT_FOLDER, fashion_mnist, to_float
from qjax.zoo.latents import scaling_factor
from qjax.zoo.models import (
    FASHION_CLASSES,
    FASHION_LDM,
    MODELS,
    NULL_LABEL,
    PREDICTION_TYPES,
    SAMPLER,
    LatentDenoiser,
)

REFERENCE_BATCH = 1000


def publish(
    name: str,
    model: nn.Module,
    params: Params,
    folder: Path,
    *,
    data: Path = DEFAULT_FOLDER,
    autoencoder: Path | None = None,
) -> None:
    """Write the model `name` into `folder`.

    Args:
      name: Its name in the zoo.
      model: Its module.
      params: Its trained weights.
      folder: Created if need be.
      data: Folder of the idx files: the classifier is judged on their test set, and the
        autoencoder's latents of their training set are measured.
      autoencoder: Folder of the trained autoencoder, for the latent models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[Any, Params, Mapping[str, Target]]]
    if isinstance(model, FeatureNet):
        _publish_features(model, params, folder, data)
    elif isinstance(model, AutoencoderKL):
        _publish_autoencoder(model, params, folder, data)
    elif isinstance(model, DiT):
        parts = {"transformer": (model.config, params, diffusers_keys(model.config))}
        _publish_pipeline(name, folder, parts)
    elif isinstance(model, UNet2DModel):
        parts = {"unet": (model.config, params, unet2d_keys.checkpoint_keys(model.config))}
        _publish_pipeline(name, folder, parts)
    elif isinstance(model, LatentDenoiser):
        assert autoencoder is not None
        unet = unet2d_condition_keys.checkpoint_keys(FASHION_LDM)
        classes = class_embedder.checkpoint_keys(FASHION_CLASSES)
        parts = {
            "unet": (FASHION_LDM, params["unet"], unet),
            "class_embedder": (FASHION_CLASSES, params["class_embedder"], classes),
        }
        if autoencoder.resolve() != (folder / "vae").resolve():
            shutil.copytree(autoencoder, folder / "vae", dirs_exist_ok=True)
        _publish_pipeline(name, folder, parts, {"vae": ["diffusers", "AutoencoderKL"]})
    else:
        raise TypeError(f"The zoo holds {', '.join(MODELS)}; got {type(model)}.")


def _publish_pipeline(
    name: str,
    folder: Path,
    parts: Mapping[str, tuple[Any, Params, Mapping[str, Target]]],
    others: Mapping[str, list[str]] | None = None,
) -> None:
    """Each part's folder, the scheduler, the index and the zoo's own record."""
    index: dict[str, Any] = {"_class_name": "Pipeline"} | dict(others or {})
    for component, (settings, params, table) in parts.items():
        config = settings.to_diffusers()
        save_component(folder / component, config, params, table, dtype=np.float16)
        library = "qjax" if config["_class_name"] == class_embedder.CLASS_NAME else "diffusers"
        index[component] = [library, config["_class_name"]]
    prediction_type = PREDICTION_TYPES.get(name, "epsilon")
    sampler = dataclasses.replace(SAMPLER, prediction_type=prediction_type)
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    _write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", sampler.to_diffusers())
    record = {"name": name, "labels": list(CLASSES), "null_label": NULL_LABEL}
    record["license"] = "Apache-2.0"
    record["data"] = "Fashion-MNIST (Zalando, MIT)"
    _write_json(folder / "zoo.json", record)


def _publish_autoencoder(model: AutoencoderKL, params: Params, folder: Path, data: Path) -> None:
    """The component's folder, with the scaling factor that makes the latents' variance 1."""
    plain = AutoencoderKL(dataclasses.replace(model.config, scaling_factor=1.0))
    images, _ = fashion_mnist("train", folder=data)
    factor = scaling_factor(plain, params, images)
    config = dataclasses.replace(model.config, scaling_factor=round(factor, 4))
    table = autoencoder_kl.checkpoint_keys(config)
    save_component(folder, config.to_diffusers(), params, table, dtype=np.float16)


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
