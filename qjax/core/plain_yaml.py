"""YAML without what a small file could blow up by."""

from pathlib import Path
from typing import Any


def read_yaml(path: Path | str, text: str | bytes) -> Any:
    """What a YAML text says, in plain lists, mappings, texts and numbers.

    Args:
      path: Where it is from, for messages.
      text: The text, or its UTF-8 bytes.

    Raises:
      ValueError: If it is no YAML, or has references (`*name`), by which a small file could
        stand for an enormous one.
    """
    import yaml

    try:
        text = text if isinstance(text, str) else text.decode()
        if any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError(f"{path} has references (*name), which are not read. Write them out.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {said}.") from None
