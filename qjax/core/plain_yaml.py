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
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        references = any(isinstance(event, yaml.AliasEvent) for event in events)
        data = None if references else yaml.safe_load(text)
    # A tag such as `!!int ""` is an IndexError of the library.
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {said}.") from None
    if references:
        raise ValueError(f"{path} has references (*name), which are not read. Write them out.")
    return data
