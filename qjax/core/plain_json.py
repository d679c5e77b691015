"""JSON from files that may come from anybody."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from qjax.core.places import local_path

MAX_BYTES = 64_000_000
"""Of a file. The longest there are, tokenizers of large vocabularies, have some 20 MB."""


def read_json(path: Path | str) -> dict[str, Any]:
    """The mapping in a JSON file, in UTF-8 wherever it is read.

    `NaN` and `Infinity` are read, as Python writes them: configs of schedulers hold them.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is not a plain file, is larger than `MAX_BYTES`, is no JSON, has a key
        twice, or holds something else than a mapping.
    """
    value = parse_json(path, read_limited(path, MAX_BYTES))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {value!r:.80}.")
    return value


def read_limited(path: Path | str, limit: int) -> bytes:
    """The bytes of a plain file that has at most `limit` of them.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is larger, or is a pipe, a device or a folder.
    """
    path = local_path(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise ValueError(f"{path} must be a plain file.")
    with open(path, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{path} is larger than such a file may be, {limit:,} bytes.")
    return raw


def parse_json(path: Path | str, text: bytes | str) -> Any:
    """What a JSON text says.

    Args:
      path: Where it is from, for messages.
      text: The text, or its UTF-8 bytes.

    Raises:
      ValueError: If it is no JSON, or has a key twice.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different, and text that can be written again.

    Raises:
      ValueError: If one comes twice, or holds half of a surrogate pair.
    """
    result = dict(pairs)
    for key in result:
        key.encode("utf-8")
    if len(result) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r:.200} twice")
    return result
