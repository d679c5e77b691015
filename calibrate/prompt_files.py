"""Prompts out of the files that benchmarks publish them in.

| file | what is read |
|---|---|
| `.tsv`, `.csv` with a head | the column `prompt`, `caption` or `text`, in any case: PartiPrompts |
| `.json` of COCO's captions | one caption a picture, of the lowest id, in the order of the pictures' ids |
| `.json`, a list or a dict of texts or of objects | the texts; of objects the field as above |
| any other | a prompt a line; empty lines and those that begin with # are not |

References:
  Yu et al., Scaling Autoregressive Models for Content-Rich Text-to-Image Generation, 2022,
  https://arxiv.org/abs/2206.10789 (PartiPrompts). Lin et al., Microsoft COCO, 2014,
  https://arxiv.org/abs/1405.0312.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qjax.core.places import local_path

FIELDS = ("prompt", "caption", "text")
DELIMITERS = {".tsv": "\t", ".csv": ","}


def read_prompts(path: Path | str) -> tuple[str, ...]:
    """The prompts of a file, in its order; by its ending, as the module's table says.

    Raises:
      ValueError: If there is none, the file is not UTF-8, or not what its ending says.
    """
    path = local_path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be a text file in UTF-8, one prompt a line.") from None
    if path.suffix.lower() in DELIMITERS:
        found: Iterable[str] = _column(path, text, DELIMITERS[path.suffix.lower()])
    elif path.suffix.lower() == ".json":
        found = _from_json(path, text)
    else:
        found = [line for line in text.splitlines() if not line.startswith("#")]
    prompts = tuple(prompt.strip() for prompt in found if prompt.strip())
    if not prompts:
        raise ValueError(f"{path} must hold at least one prompt, one a line; it has none.")
    return prompts


def _column(path: Path, text: str, delimiter: str) -> list[str]:
    """The column of prompts of a table with a head; tabs leave quotes alone, commas do not."""
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    try:
        rows = list(
            csv.reader(text.splitlines(keepends=True), delimiter=delimiter, quoting=quoting)
        )
    except csv.Error as error:
        raise ValueError(f"{path} must be a table; got {error}.") from None
    head = [name.strip().lower() for name in rows[0]] if rows else []
    column = next((head.index(name) for name in FIELDS if name in head), None)
    if column is None:
        raise ValueError(
            f"{path} must have a head with a column {', '.join(FIELDS)}; its head is "
            f"{', '.join(head)[:200] or 'empty'}."
        )
    short = [i for i, row in enumerate(rows[1:], 2) if row and len(row) <= column]
    if short:
        raise ValueError(f"{path}, row {short[0]}, has no column {head[column]!r}.")
    return [row[column] for row in rows[1:] if row]


def _from_json(path: Path, text: str) -> list[str]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; got {error}.") from None
    if isinstance(data, Mapping) and isinstance(data.get("annotations"), list):
        return _captions(path, data["annotations"])
    entries = list(data.values()) if isinstance(data, Mapping) else data
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of prompts; it holds a {type(data).__name__}.")
    return [_prompt_of(path, i, entry) for i, entry in enumerate(entries)]


def _prompt_of(path: Path, i: int, entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping):
        fields = {str(key).lower(): value for key, value in entry.items()}
        found = [fields[name] for name in FIELDS if isinstance(fields.get(name), str)]
        if found:
            return found[0]
    raise ValueError(
        f"{path}, entry {i}, must be a text or have a field {', '.join(FIELDS)}; got "
        f"{repr(entry)[:80]}."
    )


def _captions(path: Path, annotations: Sequence[Any]) -> list[str]:
    """One caption a picture: of the lowest id, in the order of the pictures' ids."""
    first: dict[int, tuple[int, str]] = {}
    for entry in annotations:
        try:
            picture, own = int(entry["image_id"]), (int(entry["id"]), str(entry["caption"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: every annotation must have image_id, id and caption; got "
                f"{repr(entry)[:80]}."
            ) from None
        first[picture] = min(first.get(picture, own), own)
    return [first[picture][1].replace("\n", " ") for picture in sorted(first)]
