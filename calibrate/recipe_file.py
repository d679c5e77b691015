"""Recipe files: group sizes that were searched once, for other checkpoints of an architecture.

A file, YAML or JSON by its suffix, holds

    format         "qjax-granularity"
    version        1
    architecture   path and shape of every kernel of the model that can be quantized
    fingerprint    sha256 of these
    quant          the rules before the search (`QuantConfig.to_dict`)
    groups         the group size of every layer of the search, by the layer's path
    settings       how it was searched; for people, nothing reads it
    result         what came of it; likewise
    sha256         of all above, as canonical JSON

Nothing in it is code. Reading checks size, structure, version and hash, and applying it to a
model whose kernels have other paths or shapes is refused with what differs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.calibrate.fitted import KERNEL
from qjax.calibrate.genome_space import entries_of, grouped_config
from qjax.core.config import QuantConfig
from qjax.core.places import local_path
from qjax.core.plain_json import parse_json, read_limited
from qjax.core.plain_yaml import read_yaml
from qjax.core.plan import kernel_axes, name_some
from qjax.core.safetensors_io import atomic_write
from qjax.core.serialize import flatten
from qjax.core.typing import Params

__all__ = ["SearchRecipe", "fingerprint", "kernel_shapes", "load_search", "save_search"]

FORMAT = "qjax-granularity"
VERSION = 1

MAX_BYTES = 4_000_000
"""Of a file; that of DiT-XL/2, 142 kernels, has 20 kB."""

_FIELDS = (
    "format",
    "version",
    "architecture",
    "fingerprint",
    "quant",
    "groups",
    "settings",
    "result",
)


def kernel_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Shape of every kernel that could be quantized, by path, sorted; float or quantized."""
    found = {
        path: tuple(np.shape(leaf))
        for path, leaf in flatten(params)
        if path.rsplit("/", 1)[-1] == KERNEL and kernel_axes(path, len(np.shape(leaf))) is not None
    }
    return dict(sorted(found.items()))


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """sha256 of an architecture: of its kernels' paths and shapes."""
    return _digest([[path, list(shape)] for path, shape in sorted(shapes.items())])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """What a recipe file holds.

    Attributes:
      architecture: Shape of every kernel of the model, by path.
      quant: The rules before the search.
      groups: Group size of every layer of the search, by path without `/kernel`.
      settings: How it was searched: names with numbers and texts.
      result: What was found.
    """

    architecture: Mapping[str, tuple[int, ...]]
    quant: QuantConfig
    groups: Mapping[str, int]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config_for(self, params: Params) -> QuantConfig:
        """The rules that make of these float params what the search has made of its own.

        Args:
          params: Of another checkpoint of the same architecture, or of the same.

        Raises:
          ValueError: If its kernels have other paths or shapes; the error names what differs.
        """
        mine, theirs = dict(self.architecture), kernel_shapes(params)
        missing = [path for path in mine if path not in theirs]
        more = [path for path in theirs if path not in mine]
        other = [
            f"{path} {theirs[path]} instead of {mine[path]}"
            for path in mine
            if path in theirs and theirs[path] != mine[path]
        ]
        said = [
            f"{what} {name_some(paths)}"
            for what, paths in (("it lacks", missing), ("it also has", more), ("it has", other))
            if paths
        ]
        if said:
            raise ValueError(
                "the recipe file is for a model of another architecture (kernels "
                f"{fingerprint(mine)[:12]}, here {fingerprint(theirs)[:12]}): {'; '.join(said)}. "
                "Search anew for this model."
            )
        entries = entries_of(params, self.quant)
        quantized = {entry.path for entry in entries if entry.weight is not None}
        if idle := [p for p in self.groups if (f"{p}/{KERNEL}" if p else KERNEL) not in quantized]:
            raise ValueError(
                f"the recipe file gives groups to {name_some(idle)}, which its rules leave in "
                "float. It was edited by hand; write it anew with save_search."
            )
        return grouped_config(self.quant, entries, self.groups)


def save_search(path: Path | str, recipe: SearchRecipe) -> None:
    """Write a recipe file, YAML if it is named so (`.yaml`, `.yml`), else JSON; it appears whole.

    Raises:
      TypeError: If settings or result hold more than numbers, texts, lists and mappings.
    """
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": {p: list(shape) for p, shape in recipe.architecture.items()},
        "fingerprint": fingerprint(recipe.architecture),
        "quant": recipe.quant.to_dict(),
        "groups": dict(recipe.groups),
        "settings": dict(recipe.settings),
        "result": dict(recipe.result),
    }
    # Through JSON: no tuples, and no object twice, which YAML would write as a reference.
    data = json.loads(json.dumps(data, allow_nan=False))
    data["sha256"] = _digest(data)
    path = local_path(path)
    if path.suffix in (".yaml", ".yml"):
        import yaml

        text = yaml.safe_dump(data, sort_keys=False, width=100)
    else:
        text = json.dumps(data, indent=1) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def load_search(path: Path | str) -> SearchRecipe:
    """Read a recipe file; `config_for` of it gives the rules for a model.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is too large, not of this format or version, was changed after it was
        written, or holds what a recipe file cannot.
    """
    path = local_path(path)
    raw = read_limited(path, MAX_BYTES)
    data = _parsed(path, raw)
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a recipe file with format: {FORMAT}; got {data.get('format')!r}."
        )
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {data.get('version')!r}, and this library reads version "
            f"{VERSION}. Search anew, or install the version of qjax that wrote it."
        )
    stored = data.pop("sha256", None)
    if data.keys() != set(_FIELDS):
        wrong = sorted(map(str, data.keys() ^ set(_FIELDS)))
        raise ValueError(f"{path} must have the fields {', '.join(_FIELDS)}; {wrong} differ.")
    if stored != _digest(data):
        raise ValueError(
            f"{path} was changed after it was written: its sha256 is {_digest(data)[:12]}, and it "
            f"says {str(stored)[:12]}. Write it anew with save_search."
        )
    shapes, groups = data["architecture"], data["groups"]
    counts = lambda value: type(value) is int and value >= 1
    if not (
        isinstance(shapes, dict)
        and all(isinstance(s, list) and all(map(counts, s)) for s in shapes.values())
        and isinstance(groups, dict)
        and groups
        and all(map(counts, groups.values()))
        and all(isinstance(p, str) for p in (*shapes, *groups))
        and isinstance(data["settings"], dict)
        and isinstance(data["result"], dict)
    ):
        raise ValueError(
            f"{path}: architecture must map paths to shapes, groups paths to group sizes, and "
            "settings and result must be mappings."
        )
    recipe = SearchRecipe(
        architecture={p: tuple(shape) for p, shape in shapes.items()},
        quant=QuantConfig.from_dict(data["quant"]),
        groups=groups,
        settings=data["settings"],
        result=data["result"],
    )
    if data["fingerprint"] != fingerprint(recipe.architecture):
        raise ValueError(f"{path}: the fingerprint is not that of its architecture.")
    return recipe


def _parsed(path: Path, raw: bytes) -> dict[Any, Any]:
    parse = read_yaml if path.suffix in (".yaml", ".yml") else parse_json
    data = parse(path, raw)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping; got {type(data).__name__}.")
    return data


def _digest(data: Any) -> str:
    try:
        text = json.dumps(data, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"a recipe file holds numbers, texts, lists and mappings alone: {error}."
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()
