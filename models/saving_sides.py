"""Conditioner and decoder of a pipeline in the library's own format, and back.

Their params are leaves of the saved tree, below `sides` and the component's name; classes and
configs are in the record; the files of a tokenizer are copied, and their hashes kept.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qjax.models.components import Component, build_component
from qjax.models.conditioners import ClassConditioner, TextConditioner, TextTower
from qjax.models.decoders import LatentDecoder
from qjax.models.pipeline import Pipeline
from qjax.models.text_encoders.tokenizers import load_tokenizer

DECODER, CLASSES = "vae", "class_embedder"


class SavedSides(NamedTuple):
    """What goes into the record, into the tree of params, and beside both."""

    record: dict[str, Any]
    components: dict[str, Component]
    files: dict[str, Path]

    @property
    def params(self) -> dict[str, Any]:
        """Params by the component's name."""
        return {name: one.params for name, one in self.components.items()}


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
            components[_tower(i)] = tower.component
            paths = sorted(path for path in tower.files.iterdir() if path.is_file())
            files |= {f"{_words(i)}/{path.name}": path for path in paths}
    elif conditioner is not None:
        raise ValueError(
            f"a pipeline is saved with the conditioners of this library; got "
            f"{type(conditioner).__name__}. Save it with conditioner=None."
        )
    record["components"] = {
        name: {"class_name": one.class_name, "config": dict(one.config)}
        for name, one in components.items()
    }
    record["files"] = {name: _sha256(path) for name, path in files.items()}
    return SavedSides(record, components, files)


def read_sides(
    folder: Path, record: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of the pipeline that `sides_of` took apart.

    Raises:
      ValueError: If files or params are missing, or were changed.
    """
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
            params=params[name],
        )
        for name, one in described.items()
    }
    fields: dict[str, Any] = {}
    if DECODER in components:
        fields["decoder"] = LatentDecoder(component=components[DECODER], tiles=record["tiles"])
    if CLASSES in components:
        fields["conditioner"] = ClassConditioner(component=components[CLASSES])
    names = [name for name in components if name.startswith(_tower(0))]
    towers = tuple(
        TextTower(
            component=components[_tower(i)],
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


def _tower(i: int) -> str:
    return "text_encoder" + ("" if i == 0 else f"_{i + 1}")


def _words(i: int) -> str:
    return "tokenizer" + ("" if i == 0 else f"_{i + 1}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
