"""A model component's folder in the diffusers layout: config, weight files, variants, shards.

Nothing here knows a model. The files of a checkpoint may come from anybody, so an index can
name files of its own folder only, pickles are refused, and every file is checked by
`qjax.core.safetensors_io` before a byte of data is read.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qjax.core.places import local_path
from qjax.core.plain_json import read_json
from qjax.core.safetensors_io import LazyTensor, open_tensors

STEM = "diffusion_pytorch_model"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_LISTED = 40  # names shown of each kind of problem


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint(Mapping[str, LazyTensor]):
    """What a component's folder holds: a mapping from key to tensor, none of them read yet.

    Attributes:
      config: The contents of `config.json`.
      tensors: The tensors of all files, by key.
      files: The weight files, shards included.
      variant: The variant that was read, such as "fp16"; None for the plain files.
      notes: What was decided without being asked for, in sentences; empty for nothing.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    files: tuple[Path, ...]
    variant: str | None
    notes: tuple[str, ...]

    def __getitem__(self, key: str) -> LazyTensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def load_checkpoint(
    folder: str | os.PathLike[str],
    subfolder: str | None = None,
    *,
    variant: str | None = None,
    stem: str = STEM,
) -> Checkpoint:
    """The config and the unread tensors of a component in the diffusers layout.

    That is `config.json` beside `diffusion_pytorch_model[.variant].safetensors`, or beside an
    index (`*.safetensors.index[.variant].json`) and the shards that it names.

    Args:
      folder: A local folder: the component's own, or the whole model's.
      subfolder: The component's name inside `folder`, such as "unet".
      variant: Which weights to read. None reads the plain ones and, where there are only
        fp16 ones, those, with a note in the result.
      stem: Name of the weight files without variant and ending; "model" for text encoders.

    Raises:
      FileNotFoundError: If the folder, its config, its weights or some shards are missing; all
        missing shards are named.
      ValueError: If a file is not what it should be, the weights are pickles only, the variant
        does not exist, or an index names files outside the folder or keys it does not hold.
    """
    folder = local_path(folder)
    if subfolder is not None:
        if not is_plain_name(subfolder):
            raise ValueError(f"subfolder must be one plain name; got {subfolder!r}.")
        folder = folder / subfolder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} must hold config.json beside its weights. Pass the component's own folder, "
            "or its name as subfolder."
        )
    config = read_json(folder / "config.json")
    found = _weight_files(folder, stem)
    notes: tuple[str, ...] = ()
    if variant is None and found.keys() == {"fp16"}:
        variant = "fp16"
        notes = (f"{folder} has weights in the fp16 variant only; those were read.",)
    if variant not in found:
        raise ValueError(
            f"{folder} has no weights in variant {variant!r}; it has "
            f"{', '.join(repr(name) for name in found)}. Pass one of these as variant."
        )
    path = found[variant]
    if path.suffix == ".json":
        tensors, files = _open_shards(path)
    else:
        tensors, files = open_tensors(path), (path,)
    return Checkpoint(config=config, tensors=tensors, files=files, variant=variant, notes=notes)


def _weight_files(folder: Path, stem: str) -> dict[str | None, Path]:
    """The weight file or the index of each variant in the folder; never empty."""
    variant = r"(?:\.(?!.*-\d+-of-\d+)(?P<variant>[\w-]+))?"
    single = re.compile(re.escape(stem) + variant + r"\.safetensors")
    index = re.compile(re.escape(stem) + r"\.safetensors\.index" + variant + r"\.json")
    found: dict[str | None, Path] = {}
    paths = sorted(folder.iterdir())
    for path in paths:
        match = single.fullmatch(path.name) or index.fullmatch(path.name)
        if match is None:
            continue
        other = found.setdefault(match["variant"], path)
        if other != path:
            raise ValueError(
                f"{folder} must hold weights in one form; got {other.name} and {path.name}. "
                "Remove the one that is out of date."
            )
    if found:
        return found
    pickles = [path.name for path in paths if path.suffix in _PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds pickles, which can run code when they are read; got "
            f"{listed(pickles)}. Re-save as safetensors: in PyTorch, "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    raise FileNotFoundError(f"{folder} must hold {stem}.safetensors, or an index of shards.")


def _open_shards(index: Path) -> tuple[Mapping[str, LazyTensor], tuple[Path, ...]]:
    """The tensors of the shards that an index names, once both agree, and the shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} must have a weight_map from keys to file names.")
    names = sorted(set(weight_map.values()))
    outside = [repr(n) for n in names if not is_plain_name(n) or not n.endswith(".safetensors")]
    if outside:
        raise ValueError(
            f"{index} must name safetensors files in its own folder, without any path; got "
            f"{listed(outside)}. Do not use this checkpoint."
        )
    files = tuple(index.parent / name for name in names)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(files)} shards and {len(missing)} are missing: "
            f"{listed(missing)}. Get them too."
        )
    tensors: dict[str, LazyTensor] = {}
    problems: dict[str, list[str]] = {"not in the shard that the index names": []}
    stray = problems["in a shard that the index does not name"] = []
    for path in files:
        shard = open_tensors(path)
        stray += [f"{key} in {path.name}" for key in shard if weight_map.get(key) != path.name]
        tensors |= {key: shard[key] for key in shard if weight_map.get(key) == path.name}
    problems["not in the shard that the index names"] = [
        f"{key} in {name}" for key, name in weight_map.items() if key not in tensors
    ]
    raise_if_any(problems, f"{index} and its shards disagree", "Get index and shards again.")
    return tensors, files


def is_plain_name(name: str) -> bool:
    """Whether `name` stays in its folder on every system."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0")


def is_plain_path(name: str) -> bool:
    """Whether `name`, of parts with `/` between them, stays below its folder on every system."""
    return all(is_plain_name(part) for part in name.split("/"))


def raise_if_any(problems: Mapping[str, Sequence[str]], claim: str, way_out: str) -> None:
    """One error for all problems, each kind with its count."""
    found = [f"{len(v)} {kind}: {listed(v)}" for kind, v in problems.items() if v]
    if found:
        raise ValueError(f"{claim}; got {'; '.join(found)}. {way_out}")


def listed(names: Sequence[str]) -> str:
    """The names in one line; the count of those beyond the first 40."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {rest} more" if rest > 0 else "")
