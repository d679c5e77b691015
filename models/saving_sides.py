"""Conditioner and decoder of a pipeline in the library's own format, and back.

Their params are leaves of the saved tree, below `sides` and the component's name, in float16 where
that loses nothing, as after loading float16 files; classes and configs are in the record; the
files of a tokenizer are copied, and their hashes kept. The record also says which LoRAs are beside
the weights; their factors are leaves of the params.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.checkpoints import is_plain_path, listed
from qjax.models.components import Component, build_component
from qjax.models.conditioners import (
    ClassConditioner,
    TextConditioner,
    TextTower,
    tower_name,
)
from qjax.models.decoders import LatentDecoder
from qjax.models.lora import AttachedLoRA
from qjax.models.pipeline import Pipeline
from qjax.models.text_encoders.tokenizers import FILES, load_tokenizer

DECODER, CLASSES = "vae", "class_embedder"


class SavedSides(NamedTuple):
    """What goes into the record, into the tree of params, and beside both."""

    record: dict[str, Any]
    components: dict[str, Component]
    files: dict[str, Path]

    @property
    def params(self) -> dict[str, Any]:
        """Params by the component's name, as they are stored."""
        return {
            name: jax.tree.map(lambda leaf: leaf.astype(np.float16), one.params)
            if "dtype" in self.record["components"][name]
            else one.params
            for name, one in self.components.items()
        }


def sides_of(pipe: Pipeline) -> SavedSides:
    """Conditioner and decoder of a pipeline, to be saved.

    Raises:
      ValueError: If the conditioner is not one of this library.
    """
    components: dict[str, Component] = {}
    record: dict[str, Any] = {}
    files: dict[str, Path] = {}
    conditioner = pipe.conditioner
    if pipe.decoder is not None:
        components[DECODER] = pipe.decoder.component
        record["tiles"] = pipe.decoder.tiles
    if isinstance(conditioner, ClassConditioner):
        components[CLASSES] = conditioner.component
    elif isinstance(conditioner, TextConditioner):
        record["zero_without_negative"] = conditioner.zero_without_negative
        for i, tower in enumerate(conditioner.towers):
            components[tower_name(i)] = tower.component
            paths = [tower.files / name for name in FILES if (tower.files / name).is_file()]
            files |= {f"{_words(i)}/{path.name}": path for path in paths}
    elif conditioner is not None:
        raise ValueError(
            f"a pipeline is saved with the conditioners of this library; got "
            f"{type(conditioner).__name__}. Save it with conditioner=None."
        )
    record["components"] = {
        name: {"class_name": one.class_name, "config": dict(one.config)}
        | ({"dtype": "float32"} if _is_widened(one.params) else {})
        for name, one in components.items()
    }
    record["files"] = {name: _sha256(path) for name, path in files.items()}
    record["loras"] = [dataclasses.asdict(lora) for lora in pipe.loras]
    return SavedSides(record, components, files)


def read_sides(
    folder: Path, record: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of the pipeline that `sides_of` took apart.

    Raises:
      ValueError: If files or params are missing, or were changed.
    """
    for one in record.get("loras", []):
        if not (
            type(one["name"]) is str
            and type(one["scale"]) in (int, float)
            and all(
                type(rank) is int and rank > 0
                for ranks in one["ranks"].values()
                for rank in ranks.values()
            )
        ):
            raise ValueError(f"{folder} describes a LoRA with impossible values: {one!r:.200}.")
    if outside := [name for name in record["files"] if not is_plain_path(name)]:
        raise ValueError(
            f"{folder} names files outside of it: {listed(outside)}. Do not use this save."
        )
    changed = [
        name
        for name, digest in record["files"].items()
        if not (folder / name).is_file() or _sha256(folder / name) != digest
    ]
    described = record["components"]
    if changed or described.keys() != params.keys():
        raise ValueError(
            f"{folder} is not as it was saved: files missing or changed: "
            f"{', '.join(changed) or 'none'}; components {sorted(described)} with params of "
            f"{sorted(params)}. Copy the folder again."
        )
    components = {
        name: Component(
            class_name=one["class_name"],
            config=one["config"],
            model=build_component(one["class_name"], one["config"]).model,
            params=_widened(params[name], one.get("dtype")),
        )
        for name, one in described.items()
    }
    # Saves from before there were LoRAs on pipelines name none.
    fields: dict[str, Any] = {
        "loras": tuple(AttachedLoRA(**one) for one in record.get("loras", []))
    }
    if DECODER in components:
        fields["decoder"] = LatentDecoder(component=components[DECODER], tiles=record["tiles"])
    if CLASSES in components:
        fields["conditioner"] = ClassConditioner(component=components[CLASSES])
    names = [name for name in components if name.startswith(tower_name(0))]
    towers = tuple(
        TextTower(
            component=components[tower_name(i)],
            tokenizer=load_tokenizer(folder / _words(i)),
            files=folder / _words(i),
        )
        for i in range(len(names))
    )
    if towers:
        fields["conditioner"] = TextConditioner(
            towers=towers, zero_without_negative=record["zero_without_negative"]
        )
    return fields


def _words(i: int) -> str:
    return "tokenizer" + ("" if i == 0 else f"_{i + 1}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_widened(params: Any) -> bool:
    """Whether all values are float32 and are float16's, too."""
    leaves = jax.tree.leaves(params)
    return all(
        leaf.dtype == jnp.float32
        and bool(jnp.all(leaf == leaf.astype(jnp.float16).astype(jnp.float32)))
        for leaf in leaves
    )


def _widened(params: Any, dtype: str | None) -> Any:
    if dtype is None:
        return params
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
